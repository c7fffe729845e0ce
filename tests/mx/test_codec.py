"""Encoding of tensors: properties of every format, corner cases and checks."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mx.blocks import MX_FORMATS, bf16_from_bits, random_blocks, raw
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.mx.codec import Encoded, decibels, decode, encode, sqnr
from ascendit.mx.formats import E5M2, FORMATS, Format

ROW_FORMATS = [name for name, f in FORMATS.items() if not f.tile]
"""Formats in which no two rows share a scale; `test_tiles` has the others."""
RULES = [
    (name, rule + ("7.25" if rule.endswith(":") else ""))
    for name in ROW_FORMATS
    for rule in FORMATS[name].rules
    if rule != "max:"
]
NUMPY: dict[str, Any] = {
    "mxfp8": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp4": ml_dtypes.float4_e2m1fn,
}
shapes = st.tuples(st.integers(1, 3), st.integers(1, 80), st.integers(1, 3))


def same(a: Encoded, b: Encoded) -> bool:
    pairs = [(a.qdata, b.qdata), (a.scale, b.scale)]
    if a.dual_scale is not None and b.dual_scale is not None:
        pairs.append((a.dual_scale, b.dual_scale))
    return all(torch.equal(raw(x), raw(y)) for x, y in pairs) and a.shape == b.shape


def finite_bf16(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random bits, hence all exponents; those of infinities and NaN are lowered."""
    bits = torch.randint(0, 0x10000, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return bf16_from_bits(torch.where(bits & 0x7F80 == 0x7F80, bits & ~0x4000, bits))


# ---- every format -------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "rule"), RULES)
@settings(max_examples=10)
@given(shapes, st.integers(0, 2), st.integers(0, 9))
def test_an_axis_equals_the_last_axis_after_movedim(
    fmt: str, rule: str, shape: tuple[int, int, int], axis: int, seed: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    direct, moved = (
        encode(x, fmt, axis=axis, scale_rule=rule),
        encode(x.movedim(axis, -1), fmt, scale_rule=rule),
    )
    assert torch.equal(raw(direct.qdata).movedim(axis, -1), raw(moved.qdata))
    assert torch.equal(direct.scale.movedim(axis, -1), moved.scale)
    assert torch.equal(decode(direct).movedim(axis, -1), decode(moved))
    assert same(direct, encode(x, fmt, axis=axis - 3, scale_rule=rule))


@pytest.mark.parametrize("fmt", MX_FORMATS)
@pytest.mark.parametrize("rule", ["floor", "ceil", "pow2", "even"])
@settings(max_examples=15)
@given(shapes, st.integers(0, 9))
def test_decoded_values_encode_to_themselves(fmt: str, rule: str, shape: tuple[int, ...], seed: int) -> None:
    once = decode(encode(finite_bf16(shape, seed), fmt, scale_rule=rule))
    once = once.where(once.isfinite(), 0)
    again = decode(encode(once, fmt, scale_rule=rule))
    assert torch.equal(once, again)


@pytest.mark.parametrize(("fmt", "rule"), RULES)
def test_rows_are_independent(fmt: str, rule: str) -> None:
    """A weight may be encoded in blocks of rows. (Except for the search, with one c per tensor.)"""
    x = torch.randn(6, 530).to(torch.bfloat16)
    complete = decode(encode(x, fmt, scale_rule=rule))
    pieces = [decode(encode(piece, fmt, scale_rule=rule)) for piece in x.split(2)]
    assert torch.equal(complete, torch.cat(pieces))


@pytest.mark.parametrize("fmt", ROW_FORMATS)
def test_a_partial_last_block_equals_one_padded_with_zeros(fmt: str) -> None:
    x = torch.randn(3, 541).to(torch.bfloat16)
    partial, padded = encode(x, fmt), encode(torch.nn.functional.pad(x, (0, 1024 - 541)), fmt)
    assert torch.equal(decode(partial), decode(padded)[:, :541])
    assert torch.equal(partial.scale, padded.scale[:, : partial.scale.shape[1]])


@pytest.mark.parametrize(("fmt", "rule"), RULES)
def test_zeros_stay_zeros(fmt: str, rule: str) -> None:
    encoded = encode(torch.zeros(2, 544, dtype=torch.bfloat16), fmt, scale_rule=rule)
    assert torch.equal(decode(encoded), torch.zeros(2, 544))
    assert not raw(encoded.qdata).any()


@pytest.mark.parametrize(("fmt", "rule"), RULES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_only_a_block_with_non_finite_values_decodes_to_nan(fmt: str, rule: str, bad: float) -> None:
    x = torch.randn(2, 96).to(torch.bfloat16)
    expected = decode(encode(x, fmt, scale_rule=rule))
    x[1, 40] = bad
    encoded = encode(x, fmt, scale_rule=rule)
    decoded = decode(encoded)
    if FORMATS[fmt].kind in ("block", "dual"):
        assert encoded.scale[1].tolist()[1] == 255
        assert decoded[1, 32:64].isnan().all()
        if FORMATS[fmt].kind == "block":
            assert torch.equal(decoded[1, :32], expected[1, :32]) and torch.equal(
                decoded[1, 64:], expected[1, 64:]
            )
        assert decoded[1, :32].isfinite().all() and decoded[1, 64:].isfinite().all()
    else:
        assert decoded[1].isnan().all()
    assert torch.equal(decoded[0], expected[0])


@pytest.mark.parametrize(("fmt", "rule"), RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shapes_and_dtypes_match_a_checkpoint(fmt: str, rule: str, dtype: torch.dtype) -> None:
    encoded = encode(torch.randn(5, 600).to(dtype), fmt, scale_rule=rule)
    expected = {
        "mxfp8": ((5, 600), torch.float8_e4m3fn, (5, 19), torch.uint8, None),
        "mxfp8_e5m2": ((5, 600), torch.float8_e5m2, (5, 19), torch.uint8, None),
        "mxfp4": ((5, 300), torch.uint8, (5, 19), torch.uint8, None),
        "mxfp4_dualscale": ((5, 300), torch.uint8, (5, 19), torch.uint8, (5, 2, 1)),
        "int8": ((5, 600), torch.int8, (5, 1), torch.float32, None),
        "fp8": ((5, 600), torch.float8_e4m3fn, (5, 1), torch.float32, None),
    }[fmt]
    dual = encoded.dual_scale
    assert (encoded.qdata.shape, encoded.qdata.dtype, encoded.scale.shape, encoded.scale.dtype) == expected[
        :4
    ]
    assert (None if dual is None else tuple(dual.shape)) == expected[4]
    assert (encoded.format, encoded.axis, encoded.shape) == (fmt, -1, (5, 600))
    assert decode(encoded, torch.bfloat16).dtype == torch.bfloat16


GAUSSIAN_SQNR = {
    ("mxfp8", "floor"): 30.68,
    ("mxfp8", "even"): 31.12,
    ("mxfp8", "pow2"): 31.52,
    ("mxfp8", "ceil"): 31.52,
    ("mxfp4", "floor"): 18.86,
    ("mxfp4", "even"): 19.00,
    ("mxfp4", "ceil"): 18.54,
    ("mxfp4", "pow2"): 17.29,
    ("mxfp4", "msms:minmax"): 18.98,
}


@pytest.mark.parametrize(
    ("case", "expected"), GAUSSIAN_SQNR.items(), ids=lambda v: "-".join(v) if isinstance(v, tuple) else v
)
def test_gaussian_sqnr_equals_torchao_and_msmodelslim(case: tuple[str, str], expected: float) -> None:
    """The values were measured with their code on Gaussian BF16 weights."""
    x = (torch.randn(256, 2048) * 0.02).to(torch.bfloat16)
    assert sqnr(x, decode(encode(x, case[0], scale_rule=case[1]))) == pytest.approx(expected, abs=0.05)


# ---- formats one by one -------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", MX_FORMATS)
@pytest.mark.parametrize("rule", ["floor", "ceil", "pow2", "even"])
def test_qdata_equals_the_casts_of_ml_dtypes(fmt: str, rule: str) -> None:
    check_against_ml_dtypes(random_blocks(4000, seed=1), fmt, rule)


MILLION = [(fmt, rule) for fmt in MX_FORMATS for rule in ("floor", "ceil", "pow2", "even")]
MILLION += [("mxfp4", rule) for rule in ("max:6", "max:7", "max:7.25")]


@pytest.mark.slow
@pytest.mark.parametrize(("fmt", "rule"), MILLION)
def test_a_million_blocks_equal_the_casts_of_ml_dtypes(fmt: str, rule: str) -> None:
    for seed in range(20):
        check_against_ml_dtypes(random_blocks(50_000, seed), fmt, rule)


def check_against_ml_dtypes(x: Tensor, fmt: str, rule: str) -> None:
    """Scale bytes from frexp, qdata from the cast of ml_dtypes, values in float64: all bits equal."""
    encoded = encode(x, fmt, scale_rule=rule)
    element = FORMATS[fmt].element
    assert element is not None
    values64 = x.double().numpy()
    amax = np.abs(values64).max(-1)
    bound = (
        element.max if rule == "ceil" else float(rule[4:]) if rule.startswith("max:") else 2.0**element.emax
    )
    if rule == "even":
        unit = np.ldexp(1.0, np.frexp(amax)[1] - 1 - element.mbits)
        amax = np.floor(amax / unit + 0.5) * unit
    fraction, exponent = np.frexp(amax)
    fraction_of_bound, exponent_of_bound = np.frexp(bound)
    up = (
        fraction > fraction_of_bound if rule not in ("floor", "even") else np.zeros_like(fraction, dtype=bool)
    )
    exponents = np.where(amax == 0, -127, exponent - exponent_of_bound + up).clip(-127, 127)
    np.testing.assert_array_equal(encoded.scale[:, 0].numpy(), exponents + 127)
    scaled = np.ldexp(values64, -exponents[:, None]).clip(-element.max, element.max).astype(np.float32)
    qdata = scaled.astype(NUMPY[fmt])
    unpacked = qdata.view(np.uint8)
    if fmt == "mxfp4":
        unpacked = unpacked[:, 0::2] | unpacked[:, 1::2] << 4
    np.testing.assert_array_equal(raw(encoded.qdata).numpy(), unpacked)
    with np.errstate(over="ignore"):
        values = np.ldexp(qdata.astype(np.float64), exponents[:, None]).astype(np.float32)
    np.testing.assert_array_equal(decode(encoded).numpy(), values)


def test_tiny_blocks_are_divided_by_exactly_2_to_minus_127() -> None:
    x = torch.tensor([[2.0**-127, -(2.0**-126), 2.0**-130]])
    encoded = encode(x, "mxfp8", scale_rule="floor")
    assert encoded.scale.tolist() == [[0]]
    assert torch.equal(decode(encoded), x)


def test_dual_scale_equals_the_npu_operator() -> None:
    """The vector of op-plugin's test, with all x = 8."""
    encoded = encode(torch.full((1, 512), 8.0, dtype=torch.bfloat16), "mxfp4_dualscale")
    assert encoded.qdata.eq(0x77).all() and encoded.scale.eq(127).all()
    assert encoded.dual_scale is not None
    assert encoded.dual_scale.tolist() == [[[pytest.approx(1.333333, abs=1e-6)]]]


def test_dual_scale_by_hand() -> None:
    """Reimplemented in NumPy from the operator's description."""
    x = (torch.randn(4, 1100) * torch.exp2(torch.randint(-8, 8, (4, 1100)).float())).to(torch.bfloat16)
    x[0, :512] = 0
    encoded = encode(x, "mxfp4_dualscale")
    padded = np.zeros((4, 1536), np.float32)
    padded[:, :1100] = x.float().numpy()
    sixth = np.uint32(0x3E2AAAAB).view(np.float32)
    coarse = np.abs(padded.reshape(4, 3, 512)).max(-1) * sixth
    with np.errstate(invalid="ignore"):
        divided = np.nan_to_num(padded.reshape(4, 3, 512) / coarse[..., None])
    rounded = divided.reshape(4, 48, 32).astype(ml_dtypes.bfloat16).astype(np.float32)
    fine = np.where(rounded.any(-1), np.frexp(np.abs(rounded).max(-1))[1] - 3, -127)
    qdata = np.ldexp(rounded, -fine[..., None]).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    assert encoded.dual_scale is not None
    np.testing.assert_array_equal(encoded.dual_scale.squeeze(-1).numpy(), coarse)
    np.testing.assert_array_equal(encoded.scale.numpy(), (fine + 127)[:, :35])
    values = np.ldexp(qdata.astype(np.float32), fine[..., None]).reshape(4, 3, 512) * coarse[..., None]
    np.testing.assert_array_equal(decode(encoded).numpy(), values.reshape(4, 1536)[:, :1100])


def test_int8_equals_npu_dynamic_quant() -> None:
    x = torch.randn(7, 300).to(torch.bfloat16)
    encoded = encode(x, "int8")
    scale = x.float().abs().amax(1, keepdim=True).numpy() * np.float32(1 / 127)
    np.testing.assert_array_equal(encoded.scale.numpy(), scale)
    np.testing.assert_array_equal(encoded.qdata.numpy(), np.rint(x.float().numpy() / scale))
    assert encoded.qdata.abs().max() == 127


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [("rint", [2, -2, 4, -4]), ("half_away", [3, -3, 4, -4]), ("floor", [2, -3, 3, -4])],
)
def test_int8_roundings(rounding: str, expected: list[int]) -> None:
    x = torch.tensor([[127.0, 2.5, -2.5, 3.5, -3.5]])
    assert encode(x, "int8", rounding=rounding).qdata.tolist() == [[127, *expected]]


def test_fp8_rows() -> None:
    x = torch.randn(7, 300).to(torch.bfloat16)
    encoded = encode(x, "fp8")
    scale = x.float().abs().amax(1, keepdim=True).numpy() * np.float32(1 / 448)
    qdata = (x.float().numpy() / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(encoded.scale.numpy(), scale)
    np.testing.assert_array_equal(raw(encoded.qdata).numpy(), qdata.view(np.uint8))


def test_float16_and_non_contiguous_input() -> None:
    x = torch.randn(64, 48)
    assert torch.equal(decode(encode(x.t(), "mxfp8")), decode(encode(x.t().contiguous(), "mxfp8")))
    half = x.to(torch.float16)
    assert same(encode(half, "mxfp8"), encode(half.float(), "mxfp8"))


# ---- sqnr and errors ----------------------------------------------------------------------------


def test_sqnr() -> None:
    a = torch.tensor([3.0, 4.0])
    assert sqnr(a, a) == math.inf
    assert sqnr(a, a + torch.tensor([0.0, 0.5])) == pytest.approx(20)
    assert sqnr(a * 1e-30, a * 1.1e-30) == pytest.approx(20, abs=1e-3)
    assert sqnr(torch.zeros(2), a) == -math.inf
    assert math.isnan(sqnr(a, torch.tensor([3.0, math.nan])))
    with pytest.raises(UsageError, match=r"tensors of shape \(2,\) and \(3,\)"):
        sqnr(a, torch.zeros(3))


@pytest.mark.parametrize(
    ("x", "fmt", "kwargs", "text"),
    [
        (torch.zeros(2, 32), "nf4", {}, "number format 'nf4'"),
        (torch.zeros(2, 32), "mxfp8", {"scale_rule": "best"}, "scale rule 'best' for mxfp8"),
        (torch.zeros(2, 32), "mxfp8", {"rounding": "up"}, "rounding 'up'"),
        (torch.zeros(2, 32, dtype=torch.float64), "mxfp8", {}, "a tensor of torch.float64"),
        (
            torch.zeros(2, 32, dtype=torch.float16),
            "mxfp8",
            {"scale_rule": "msms:minmax"},
            "a tensor of torch.float16",
        ),
        (torch.zeros(2, 32), "mxfp8", {"axis": 2}, "axis 2 of a tensor with 2 axes"),
        (torch.zeros(()), "mxfp8", {}, "axis -1 of a tensor with 0 axes"),
        (torch.zeros(2, 0), "int8", {}, r"axis -1 of a tensor \(2, 0\) is empty"),
        (torch.zeros(2, 2, 32), "fp8_128x128", {}, r"a tensor \(2, 2, 32\) for fp8_128x128"),
    ],
)
def test_errors_of_encode(x: Tensor, fmt: str, kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        encode(x, fmt, **kwargs)
    assert caught.value.code == "E-USE-01"


def test_encoded_checks_shapes_and_dtypes() -> None:
    encoded = encode(torch.randn(4, 1024).to(torch.bfloat16), "mxfp4_dualscale")
    fields: dict[str, Any] = {
        "qdata": encoded.qdata,
        "scale": encoded.scale,
        "dual_scale": encoded.dual_scale,
    }
    for name, tensor, text in (
        ("qdata", encoded.qdata[:, :-1], r"qdata \(4, 511\) torch.uint8"),
        ("qdata", encoded.qdata.to(torch.int8), r"needs  qdata \(4, 512\) of torch.uint8"),
        ("scale", encoded.scale.float(), r"needs  scale \(4, 32\) of torch.uint8"),
        ("dual_scale", None, r"dual_scale None .*mxfp4_dualscale"),
        ("dual_scale", torch.ones(4, 2), r"needs  dual_scale \(4, 2, 1\) of torch.float32"),
    ):
        with pytest.raises(UsageError, match=text):
            Encoded(**{**fields, name: tensor}, format="mxfp4_dualscale", axis=-1, shape=(4, 1024))
    with pytest.raises(UsageError, match=r"dual_scale \(4, 2, 1\) torch.float32 for mxfp4"):
        Encoded(**fields, format="mxfp4", axis=-1, shape=(4, 1024))


def test_float8_qdata_may_be_bytes() -> None:
    encoded = encode(torch.randn(4, 64).to(torch.bfloat16), "mxfp8")
    bytes_ = Encoded(encoded.qdata.view(torch.uint8), encoded.scale, None, "mxfp8", -1, (4, 64))
    assert torch.equal(decode(bytes_), decode(encoded))


# ---- decibels ------------------------------------------------------------------------------------


def test_decibels_are_ten_times_the_logarithm() -> None:
    assert decibels(100.0, 1.0) == 20 and decibels(1.0, 1000.0) == pytest.approx(-30)
    assert decibels(1e-100, 1e100) == pytest.approx(-2000)
    assert decibels(1e-300, 1e300) == -math.inf and decibels(1e300, 1e-300) == math.inf


def test_decibels_without_noise_and_without_signal() -> None:
    assert decibels(1.0, 0.0) == decibels(0.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) == -math.inf


def test_the_cap_replaces_infinity() -> None:
    assert decibels(1.0, 0.0, cap=99.0) == decibels(0.0, 0.0, cap=99.0) == decibels(1e20, 1.0, cap=99.0) == 99
    assert decibels(0.0, 1.0, cap=99.0) == decibels(1e-20, 1.0, cap=99.0) == -99
    assert decibels(100.0, 1.0, cap=99.0) == 20


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_decibels_of_non_finite_values_are_nan(bad: float) -> None:
    assert math.isnan(decibels(bad, 1.0)) and math.isnan(decibels(1.0, bad, cap=99.0))


@pytest.mark.parametrize(
    "fmt",
    [
        Format(name="new", kind="row", element=E5M2, qdata_dtype="float8_e5m2", rules=("amax",)),
        Format(name="new", kind="tile", element=None, qdata_dtype="int8", block=64, rules=("amax",)),
    ],
)
def test_a_new_format_is_not_encoded_as_another(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "new", fmt)
    x = torch.randn(70, 130).bfloat16()
    back = decode(encode(x, "new"))
    assert sqnr(x, back) > 20
