"""Signal to noise: the formula, and its ends."""

from __future__ import annotations

import math

import pytest

from ascendit.mx.codec import decibels


def test_ten_times_the_logarithm() -> None:
    assert decibels(100.0, 1.0) == 20 and decibels(1.0, 1000.0) == pytest.approx(-30)
    assert decibels(1e-100, 1e100) == pytest.approx(-2000)
    assert decibels(1e-300, 1e300) == -math.inf and decibels(1e300, 1e-300) == math.inf


def test_without_noise_and_without_signal() -> None:
    assert decibels(1.0, 0.0) == decibels(0.0, 0.0) == math.inf
    assert decibels(0.0, 1.0) == -math.inf


def test_the_cap_stands_for_infinity() -> None:
    assert decibels(1.0, 0.0, cap=99.0) == decibels(0.0, 0.0, cap=99.0) == decibels(1e20, 1.0, cap=99.0) == 99
    assert decibels(0.0, 1.0, cap=99.0) == decibels(1e-20, 1.0, cap=99.0) == -99
    assert decibels(100.0, 1.0, cap=99.0) == 20


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_no_ratio(bad: float) -> None:
    assert math.isnan(decibels(bad, 1.0)) and math.isnan(decibels(1.0, bad, cap=99.0))
