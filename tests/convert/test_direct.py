"""The way without torch gives the bits of `mx`, and is the one that is taken."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert.models import write_transformer
from torch import Tensor

from ascendit import mx
from ascendit.convert import direct
from ascendit.convert.direct import Coded, DirectEncoder, direct_encoder
from ascendit.mx.formats import E2M1, E4M3, E5M2, FORMATS
from ascendit.mx.scales import shared_exponents, to_bytes
from ascendit.native.build import native

needs_compiler = pytest.mark.skipif(native("encode").library is None, reason=native("encode").reason)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
RULES = [
    (form.name, rule + ("7.25" if rule.endswith(":") else ""))
    for form in FORMATS.values()
    for rule in form.rules
    if form.kind != "tile" and not rule.startswith("msms:")
]


def encoder(format: str, rule: str, length: int, dtype: str, rows: int = 64) -> DirectEncoder:
    found = direct_encoder(format, rule, length, dtype, rows, measure=True)
    assert found is not None
    return found


def memory(rows: Tensor) -> memoryview:
    view = memoryview(mmap.mmap(-1, rows.nbytes))
    view[:] = raw(rows)
    return view


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def weight(rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different size, a row and a block of zeros, subnormals."""
    drawn = torch.randn(rows, length) * torch.exp2(torch.linspace(-20, 10, rows)).unsqueeze(1)
    drawn[3] = 0
    drawn[4, :32] = 0
    drawn[5] *= 1e-30
    return drawn.to(dtype)


def check(coded: Coded, rows: Tensor, format: str, rule: str) -> None:
    encoded = mx.encode(rows, format, scale_rule=rule)
    assert bytes(coded.codes) == raw(encoded.codes)
    assert bytes(coded.scale) == raw(encoded.scale)
    assert bytes(coded.dual or b"") == (b"" if encoded.dual_scale is None else raw(encoded.dual_scale))


@needs_compiler
@pytest.mark.parametrize("length", [32, 100, 33, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "rule"), RULES)
def test_the_bits_are_those_of_mx(format, rule, dtype, length):
    if (format, dtype) == ("mxfp4_dualscale", "F16"):
        assert direct_encoder(format, rule, length, dtype, 64) is None
        return
    encode = encoder(format, rule, length, dtype)
    rows = weight(50, length, DTYPES[dtype])
    for count in (50, 7):  # the buffers are used again
        coded = encode(memory(rows[:count]))
        assert coded.rows == count and coded.bad_row is None
        check(coded, rows[:count], format, rule)
    encode.restart()
    encode(memory(rows))
    decoded = mx.decode(mx.encode(rows, format, scale_rule=rule))
    assert encode.sqnr == pytest.approx(mx.sqnr(rows, decoded), abs=1e-3)


@needs_compiler
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("format", ["mxfp8", "mxfp4", "mxfp4_dualscale", "int8", "fp8"])
def test_a_row_that_is_not_finite_is_found(format, value):
    rows = weight(50, 100, torch.bfloat16)
    rows[17, 99] = rows[30, 0] = value
    rule = FORMATS[format].default_rule
    assert encoder(format, rule, 100, "BF16")(memory(rows)).bad_row == 17


@needs_compiler
def test_measuring_starts_anew_and_knows_the_ends():
    encode = encoder("mxfp8", "ceil", 32, "BF16")
    encode(memory(weight(8, 32, torch.bfloat16)))
    encode.restart()
    encode(memory(torch.ones(8, 32, dtype=torch.bfloat16)))
    assert encode.sqnr == torch.inf


@pytest.mark.parametrize("element", [E4M3, E5M2, E2M1])
@pytest.mark.parametrize("rule", ["floor", "ceil", "pow2", "even", "max:6", "max:7", "max:7.25", "max:12"])
def test_tables_are_the_rule(element, rule):
    """Every bfloat16 magnitude there is."""
    amax = torch.arange(0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(torch.float32)
    bytes_ = to_bytes(shared_exponents(amax, element, rule), amax.isfinite())
    assert direct.rule_table(element, rule) == bytes_.numpy().tobytes()


def test_what_torch_must_do(monkeypatch):
    assert direct_encoder("mxfp8", "msms:minmax", 64, "BF16", 8) is None
    assert direct_encoder("mxfp8", "ceil", 64, "F64", 8) is None
    monkeypatch.setattr(direct, "_library", lambda: None)
    assert direct_encoder("mxfp8", "ceil", 64, "BF16", 8) is None


@needs_compiler
@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4_dualscale", "int8"])
def test_quantize_imports_no_torch(tmp_path, scheme):
    folder = write_transformer(tmp_path / "model", ffn_dim=1024)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from ascendit.convert.quantize import quantize\n"
        "quantize(sys.argv[2], sys.argv[3], scheme=sys.argv[4], report=True)\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    src = Path(__file__).parents[2] / "src"
    arguments = [str(src), str(folder), str(tmp_path / "out"), scheme]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_without_a_compiler_the_folder_is_the_same(tmp_path, monkeypatch):
    from convert.models import read, same

    from ascendit.convert.quantize import quantize

    folder = write_transformer(tmp_path / "model")
    quantize(folder, tmp_path / "a", scheme="mxfp4")
    monkeypatch.setattr(direct, "_library", lambda: None)
    quantize(folder, tmp_path / "b", scheme="mxfp4")
    ours, theirs = read(tmp_path / "a" / "transformer"), read(tmp_path / "b" / "transformer")
    assert ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
