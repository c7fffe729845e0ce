from __future__ import annotations

import subprocess
import sys

import pytest

from ascendit.errors import UsageError
from ascendit.mx.formats import E2M1, E4M3, E5M2, FORMATS, lookup, resolve_rounding, resolve_rule


def test_the_table_has_these_formats() -> None:
    assert {name: (f.kind, f.block, f.coarse, f.default_rule) for name, f in FORMATS.items()} == {
        "mxfp8": ("block", 32, 0, "ceil"),
        "mxfp8_e5m2": ("block", 32, 0, "ceil"),
        "mxfp4": ("block", 32, 0, "max:7"),
        "mxfp4_dualscale": ("dual", 32, 512, "floor"),
        "int8": ("row", 0, 0, "amax"),
        "int8_block": ("tile", 128, 0, "amax"),
        "fp8": ("row", 0, 0, "amax"),
        "fp8_128x128": ("tile", 128, 0, "amax"),
    }


@pytest.mark.parametrize(("element", "emin"), [(E4M3, -6), (E5M2, -14), (E2M1, 0)])
def test_smallest_exponents_match_ocp(element, emin) -> None:
    assert element.emin == emin


def test_the_table_does_not_import_torch() -> None:
    code = "import sys, ascendit.mx.formats, ascendit.mx; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_the_error_for_an_unknown_format_lists_the_formats() -> None:
    with pytest.raises(
        UsageError, match=r"E-USE-01\] number format 'mxfp6'\n  needs  one of mxfp8, mxfp8_e5m2"
    ):
        lookup("mxfp6")


@pytest.mark.parametrize(
    ("fmt", "rule"),
    [
        ("mxfp8", "floor"),
        ("mxfp8", "msms:mse_round"),
        ("mxfp4", "max:6"),
        ("mxfp4", "max:7.25"),
        ("mxfp4", "msms:ceil_x:7.25"),
        ("mxfp4", "msms:ceil_x:search"),
        ("mxfp4_dualscale", "msms:dualscale"),
        ("int8", "msms:int8_legacy"),
    ],
)
def test_rules_of_a_format(fmt: str, rule: str) -> None:
    assert resolve_rule(FORMATS[fmt], rule) == rule


@pytest.mark.parametrize(
    ("fmt", "rule"),
    [
        ("mxfp8", "max:7"),
        ("mxfp8", "rceil"),
        ("mxfp8_e5m2", "msms:minmax"),
        ("mxfp4", "max:"),
        ("mxfp4", "max:13"),
        ("mxfp4", "max:nan"),
        ("mxfp4", "max:seven"),
        ("mxfp4", "max:search"),
        ("mxfp4", "msms:ceil_x"),
        ("mxfp4", "msms:dualscale"),
        ("mxfp4_dualscale", "max:7"),
        ("int8", "ceil"),
        ("int8_block", "msms:int8"),
    ],
)
def test_rules_that_a_format_lacks(fmt: str, rule: str) -> None:
    with pytest.raises(UsageError, match="scale rule") as caught:
        resolve_rule(FORMATS[fmt], rule)
    assert caught.value.code == "E-USE-01"
    assert caught.value.needs.startswith("one of ")
    assert ("number" in caught.value.fix) == (fmt == "mxfp4")


def test_msmodelslim_rules_have_their_own_rounding() -> None:
    assert resolve_rounding(FORMATS["mxfp8"], "ceil", None) == "rint"
    assert resolve_rounding(FORMATS["mxfp4"], "max:7", "floor") == "floor"
    assert resolve_rounding(FORMATS["mxfp8"], "msms:minmax", None) == "half_away"
    assert resolve_rounding(FORMATS["int8"], "msms:int8", None) == "rint"
    with pytest.raises(UsageError, match=r"rounding 'rint' for mxfp8 with scale rule 'msms:minmax'"):
        resolve_rounding(FORMATS["mxfp8"], "msms:minmax", "rint")
    with pytest.raises(UsageError, match=r"needs  one of rint, half_away, floor"):
        resolve_rounding(FORMATS["mxfp8"], "ceil", "stochastic")
