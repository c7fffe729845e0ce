"""Verdicts of the self-check: exact, close and wrong, for quantized values and floats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ascendit.doctor.operator_cases import Result, compare_results, describe, worst

BASE = Result(part="operator", name="a case", operator="npu_some")


def ramp(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.linspace(1, 2, torch.Size(shape).numel()).view(shape).to(dtype)


def test_equal_bit_for_bit() -> None:
    result = compare_results(BASE, ramp(3, 4), ramp(3, 4))
    assert (result.verdict, result.max_abs, result.db, result.failed) == ("exact", 0.0, None, False)
    odd = torch.tensor([float("nan"), float("inf"), 1.0])
    assert compare_results(BASE, odd, odd.clone()).verdict == "exact"


@pytest.mark.parametrize(
    ("dtype", "step", "verdict"),
    [
        (torch.bfloat16, 2**-7, "close"),
        (torch.bfloat16, 2**-5, "wrong"),
        (torch.float32, 2**-15, "close"),
        (torch.float32, 2**-8, "wrong"),
    ],
)
def test_floats_by_decibels(dtype: torch.dtype, step: float, verdict: str) -> None:
    expected = ramp(16, 16, dtype=dtype)
    actual = expected.clone()
    actual[0] += step
    result = compare_results(BASE, actual, expected)
    assert (
        result.verdict == verdict and result.db is not None and result.max_abs == pytest.approx(step, rel=0.1)
    )
    assert ("at least" in result.error) == (verdict == "wrong") == result.failed


def test_a_case_with_its_own_limit() -> None:
    expected = ramp(16, 16)
    actual = expected * 1.0065  # some 44 dB
    assert compare_results(BASE, actual, expected).verdict == "wrong"
    assert compare_results(BASE, actual, expected, db=40.0).verdict == "close"


def test_an_unexpected_infinity_is_reported() -> None:
    actual = ramp(4)
    actual[2] = float("inf")
    assert "NaN or infinity" in compare_results(BASE, actual, ramp(4)).error


@pytest.mark.parametrize(
    ("dtype", "count", "verdict"),
    [
        (torch.int8, 5, "close"),
        (torch.int8, 20, "wrong"),
        (torch.uint8, 1, "close"),
        (torch.uint8, 5, "wrong"),
        (torch.float8_e4m3fn, 5, "wrong"),
        (torch.int32, 1, "wrong"),
    ],
)
def test_quantized_values_by_the_share_that_differs(dtype: torch.dtype, count: int, verdict: str) -> None:
    expected = torch.arange(1000).remainder(100).to(dtype)
    actual = expected.clone()
    bytes_ = actual.view(torch.uint8) if dtype.is_floating_point else actual
    bytes_[:count] += 1
    result = compare_results(BASE, actual, expected)
    assert result.verdict == verdict and result.different == count / 1000
    assert ("the first at [0]" in result.error) == (verdict == "wrong")


def test_int8_values_that_are_two_steps_off() -> None:
    expected = torch.zeros(10_000, dtype=torch.int8)
    actual = expected.clone()
    actual[:50] = 2
    assert compare_results(BASE, actual, expected).verdict == "wrong"


def test_shape_dtype_and_several_results() -> None:
    result = compare_results(BASE, ramp(3, 4), ramp(4, 3))
    assert result.error == "got bfloat16 [3, 4], not bfloat16 [4, 3]"
    empty, seed = torch.empty(0), 7
    result = compare_results(BASE, (ramp(2), ramp(3) + 1, empty, seed), (ramp(2), ramp(3), empty, 9))
    assert result.verdict == "wrong" and result.db is not None
    assert compare_results(BASE, 29, 29).verdict == "exact"
    assert compare_results(BASE, 2, 29).error == "2, not 29"


def test_an_operator_that_is_not_called_cannot_fail() -> None:
    unused = Result(part="operator", name="x", operator="npu_other", used=False, verdict="wrong")
    assert not unused.failed
    several = [replace(unused, verdict=verdict) for verdict in ("exact", "close", "error", "wrong", "error")]
    assert worst(several) is several[2]


def test_arguments_as_text() -> None:
    assert describe(ramp(2, 3).t()) == "bfloat16 [3, 2] strides [1, 3]"
    assert describe([1, 1, 32]) == "[1, 1, 32]" and describe("BSND") == "'BSND'"
