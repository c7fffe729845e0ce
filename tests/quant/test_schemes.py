"""The scheme table against literals; its rows are complete, and there is no second table."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from ascendit.checkpoint.layer_format import Packing
from ascendit.mx.formats import FORMATS, resolve_rule
from ascendit.names import QUANTIZED_ROLES
from ascendit.quant.schemes import (
    FP4,
    FP8_TILES,
    LINEAR_SCHEMES,
    MANIFEST_SCHEMES,
    QUANTIZED,
    SCHEMES,
    STORED_SCHEMES,
    scheme_after_reading,
)

SRC = Path(__file__).resolve().parents[2] / "src" / "ascendit"

# name: weight, activation, its rule, msModelSlim's type, vLLM-Omni's key, its smoothing
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "bf16": ("", "", "", "FLOAT", "", False),
    "int8": ("int8", "int8", "amax", "W8A8_DYNAMIC", "is_checkpoint_int8_serialized", False),
    "int8_block": ("int8_block", "int8_block", "amax", "W8A8_BLOCK128", "", False),
    "fp8": ("fp8", "fp8", "amax", "WFP8AFP8_DYNAMIC", "", False),
    "mxfp8": ("mxfp8", "mxfp8", "ceil", "W8A8_MXFP8", "is_checkpoint_mxfp8_serialized", False),
    "mxfp4": ("mxfp4", "mxfp4", "floor", "W4A4_MXFP4", "is_checkpoint_mxfp4_serialized", True),
    "mxfp4_dualscale": (
        *("mxfp4_dualscale", "mxfp4_dualscale", "floor", "W4A4_MXFP4_DUALSCALE", "is_checkpoint_serialized"),
        True,
    ),
    "w4a8": ("mxfp4", "mxfp8", "ceil", "", "", False),
    "fp8_128x128": ("fp8_128x128", "", "", "", "", False),
}


def test_rows() -> None:
    table = {**STORED_SCHEMES, **LINEAR_SCHEMES}
    assert table.keys() == PUBLISHED.keys()
    for name, s in table.items():
        row = (s.weight, s.activation, s.rule, s.manifest, s.vllm_omni_key, s.vllm_omni_smooth)
        assert (s.name, row) == (name, PUBLISHED[name])


def test_views() -> None:
    assert list(SCHEMES) == ["bf16", "int8", "int8_block", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale"]
    assert ("bf16", *QUANTIZED) == tuple(SCHEMES)
    assert list(LINEAR_SCHEMES) == [*QUANTIZED, "w4a8"]
    assert list(STORED_SCHEMES) == [*SCHEMES, FP8_TILES]
    assert FP4 == ("mxfp4", "mxfp4_dualscale")
    assert [scheme_after_reading(s) for s in ("mxfp8", FP8_TILES)] == ["mxfp8", "bf16"]
    assert MANIFEST_SCHEMES["W4A4_MXFP4_DYNAMIC"] == "mxfp4" and set(MANIFEST_SCHEMES.values()) == set(
        SCHEMES
    )


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_row_is_complete(name: str) -> None:
    s = SCHEMES[name]
    assert s.weight in FORMATS and s.activation in FORMATS and s.manifest and s.text
    assert resolve_rule(FORMATS[s.activation], s.rule) == s.rule
    assert s.roles[:2] == ("weight", "weight_scale")
    assert list(s.roles) == [role for role in QUANTIZED_ROLES if role in s.roles], (
        "the order of the tensors in a file"
    )
    assert FORMATS[s.activation].packed == (name in FP4)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("bf16", {}),
        (
            "int8",
            {"weight": ("I8", (3, 1041)), "weight_scale": ("F32", (3, 1)), "weight_offset": ("F32", (3, 1))},
        ),
        ("int8_block", {"weight": ("I8", (3, 1041)), "weight_scale": ("F32", (1, 9))}),
        ("fp8", {"weight": ("F8_E4M3", (3, 1041)), "weight_scale": ("F32", (3, 1))}),
        ("mxfp8", {"weight": ("F8_E4M3", (3, 1041)), "weight_scale": ("U8", (3, 33))}),
        ("mxfp4", {"weight": ("U8", (3, 521)), "weight_scale": ("U8", (3, 33))}),
        (
            "mxfp4_dualscale",
            {
                "weight": ("U8", (3, 521)),
                "weight_scale": ("U8", (3, 33)),
                "weight_dual_scale": ("F32", (3, 3, 1)),
            },
        ),
        ("fp8_128x128", {"weight": ("F8_E4M3", (3, 1041)), "weight_scale_inv": ("F32", (1, 9))}),
    ],
)
def test_tensors(name: str, tensors: dict[str, Any]) -> None:
    assert STORED_SCHEMES[name].tensors(3, 1041) == tensors


def test_block_and_group() -> None:
    assert {name: (s.block, s.group) for name, s in STORED_SCHEMES.items()} == {
        **dict.fromkeys(("bf16", "int8", "int8_block", "fp8", FP8_TILES), (0, 0)),
        **dict.fromkeys(("mxfp8", "mxfp4"), (32, 0)),
        "mxfp4_dualscale": (32, 512),
    }


def test_the_table_needs_no_torch() -> None:
    code = (
        "import sys, ascendit.quant.schemes, ascendit.quant.engines, ascendit.quant.fusion;"
        "assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- no second table ----------------------------------------------------------------------------

NAMES = {*STORED_SCHEMES, *LINEAR_SCHEMES}
KERNELS = ("ops", "kernels", "twin")
"""They name the function that computes a scheme."""
LITERALS = {"integrations/diffusers/__init__.py", "quant/attention_schemes.py"}
"""A type for a type checker, which a test below compares with the table; the table of attention."""


def groups_of_names(tree: ast.AST) -> list[tuple[int, list[str]]]:
    """(line, names) of dicts, tuples, lists and `Literal`s with three schemes or more."""
    groups = []
    for node in ast.walk(tree):
        members: list[Any] = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
        names = [m.value for m in members if isinstance(m, ast.Constant) and m.value in NAMES]
        if len(set(names)) >= 3:
            groups.append((members[0].lineno, names))
    return groups


def test_no_other_file_lists_the_schemes() -> None:
    lists = []
    for path in sorted(SRC.rglob("*.py")):
        name = path.relative_to(SRC).as_posix()
        if name.startswith(KERNELS) or name in LITERALS or name == "mx/formats.py":
            continue
        lists += [(name, *group) for group in groups_of_names(ast.parse(path.read_text(encoding="utf-8")))]
    assert lists == [], "a decision that depends on the scheme is a column of quant/schemes.py"


def test_the_tiles_have_one_name() -> None:
    files = [
        path.relative_to(SRC).as_posix()
        for path in sorted(SRC.rglob("*.py"))
        if any(
            isinstance(node, ast.Constant) and node.value == FP8_TILES
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]
    assert files == ["mx/formats.py", "quant/schemes.py"]


def test_literal_types_agree_with_the_table() -> None:
    from ascendit.integrations.diffusers import AscenditMethod
    from ascendit.pipeline.options import LoadOptions

    literal, _ = get_args(LoadOptions.model_fields["scheme"].annotation)
    assert get_args(literal) == tuple(SCHEMES)
    methods = {name for name, s in SCHEMES.items() if s.vllm_omni_key}
    assert {m.value for m in AscenditMethod} == {"ascendit", *methods}
    assert set(get_args(Packing)) == {"plain", "packed", "e4m3", "bf16"}
