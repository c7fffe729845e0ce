"""Scale rules against exact arithmetic on every bfloat16 number, and E8M0 against ml_dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mx.blocks import every_finite_amax

from ascendit.mx import scales
from ascendit.mx.codec import encode
from ascendit.mx.formats import E2M1, E4M3, E5M2, Element

ELEMENTS = (E4M3, E5M2, E2M1)


def exact_ceil(quotient: float) -> int:
    """Exact ceil(log2) of a float64."""
    fraction, exponent = math.frexp(quotient)
    return exponent - 1 if fraction == 0.5 else exponent


def exact_floor(quotient: float) -> int:
    return math.frexp(quotient)[1] - 1


def ceil_over(bound: float) -> Callable[[float], int]:
    """ceil(log2(amax / bound)) corrected by products: the smallest e with bound x 2^e >= amax."""

    def rule(amax: float) -> int:
        exponent = exact_ceil(amax / bound)
        while math.ldexp(bound, exponent - 1) >= amax:
            exponent -= 1
        while math.ldexp(bound, exponent) < amax:
            exponent += 1
        return exponent

    return rule


def round_then_floor(element: Element) -> Callable[[float], int]:
    """The `even` rule: round amax to the element's mantissa, halves up, then take the exponent."""

    def rule(amax: float) -> int:
        unit = math.ldexp(1.0, exact_floor(amax) - element.mbits)
        return exact_floor(math.floor(amax / unit + 0.5) * unit) - element.emax

    return rule


def oracle(rule: str, element: Element) -> Callable[[float], int]:
    if rule == "floor":
        return lambda a: exact_floor(a) - element.emax
    if rule == "pow2":
        return lambda a: exact_ceil(a) - element.emax
    if rule == "even":
        return round_then_floor(element)
    return ceil_over(element.max if rule == "ceil" else float(rule[4:]))


CASES = [(e, r) for e in ELEMENTS for r in ("floor", "ceil", "pow2", "even")]
CASES += [(E2M1, r) for r in ("max:6", "max:6.5", "max:7", "max:7.25", "max:8", "max:12")]


@pytest.mark.parametrize(("element", "rule"), CASES, ids=lambda v: getattr(v, "name", v))
def test_every_bf16_amax(element: Element, rule: str) -> None:
    amax = every_finite_amax()
    exact = oracle(rule, element)
    expected = [max(-127, min(127, exact(a))) if a else -127 for a in amax.double().tolist()]
    assert scales.shared_exponents(amax.float(), element, rule).tolist() == expected


@given(st.integers(1, 0x7F7FFFFF))
def test_any_float32_amax(bits: int) -> None:
    amax = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for element in ELEMENTS:
        for rule in ("floor", "ceil", "pow2", "even"):
            expected = max(-127, min(127, oracle(rule, element)(amax.double().item())))
            assert scales.shared_exponents(amax, element, rule).item() == expected, rule


def test_max_6_is_ceil_and_7_is_not_even() -> None:
    amax = every_finite_amax().float()
    assert torch.equal(
        scales.shared_exponents(amax, E2M1, "max:6"), scales.shared_exponents(amax, E2M1, "ceil")
    )
    seven, even = (scales.shared_exponents(amax, E2M1, r) for r in ("max:7", "even"))
    ties = (seven != even).nonzero().flatten()
    mantissas = {math.frexp(a)[0] * 2 for a in amax[ties].tolist()}
    assert mantissas == {1.75}  # amax exactly 7 x 2^e: `even` rounds up, the NPU does not


def test_max_7_uses_bf16_bits_like_the_npu() -> None:
    amax = torch.tensor([1.75, 1.7500001, 1.7578124, 1.7578125])
    assert scales.shared_exponents(amax, E2M1, "max:7").tolist() == [-2, -2, -2, -1]
    assert scales.shared_exponents(amax, E2M1, "max:7.25").tolist() == [-2, -2, -2, -2]


def test_every_scale_byte_decodes_as_in_ml_dtypes() -> None:
    raw = torch.arange(256, dtype=torch.uint8)
    expected = raw.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(scales.from_bytes(raw).numpy(), expected)
    assert math.isnan(expected[255]) and expected[0] == 2.0**-127


def test_the_example_of_the_npu_documentation() -> None:
    """aclnnDynamicMxQuantV3: algorithm 1 on 0, 8, 64, 512."""
    encoded = encode(torch.tensor([[0.0, 8, 64, 512]], dtype=torch.bfloat16), "mxfp8", scale_rule="ceil")
    assert encoded.scale.tolist() == [[128]]
    assert encoded.qdata.view(torch.uint8).tolist() == [[0, 72, 96, 120]]
