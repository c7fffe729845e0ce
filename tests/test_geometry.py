"""Frames, latents, patches and tokens: valid numbers, and the nearest valid ones."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendit.errors import UsageError
from ascendit.geometry import (
    frame_rate,
    frames_for,
    latent_grid,
    nearest_frames,
    nearest_sizes,
    num_tokens,
    patch_grid,
    rate_text,
    size_multiple,
)


@given(st.integers(1, 5000), st.integers(1, 8))
def test_nearest_frames_enclose_the_request(frames: int, stride: int) -> None:
    low, high = nearest_frames(frames, stride)
    assert low <= frames < high == low + stride
    assert low % stride == high % stride == 1 % stride


@given(st.integers(-50, 0))
def test_nearest_frames_are_never_below_one(frames: int) -> None:
    assert nearest_frames(frames) == (1, 5)


@given(st.integers(1, 5000), st.sampled_from([8, 16, 32]))
def test_nearest_sizes_enclose_the_request(pixels: int, multiple: int) -> None:
    low, high = nearest_sizes(pixels, multiple)
    assert high == low + multiple and low % multiple == 0 and low >= multiple
    assert low <= pixels < high or (pixels < multiple == low)


def test_typical_requests() -> None:
    assert nearest_frames(80) == (77, 81)
    assert nearest_frames(120) == (117, 121)
    assert nearest_sizes(720, 32) == (704, 736)
    assert nearest_sizes(850, 16) == (848, 864)


@given(st.floats(0.01, 60), st.integers(1, 60))
def test_frames_for_returns_the_nearest_valid_length(seconds: float, fps: int) -> None:
    frames = frames_for(seconds, fps)
    assert frames % 4 == 1 and frames >= 1
    assert abs((frames - 1) - seconds * fps) <= 2


def test_frames_for() -> None:
    assert frames_for(5, 16) == 81 and frames_for(5, 24) == 121
    assert frames_for(5, Fraction(24000, 1001)) == 121
    with pytest.raises(UsageError, match="--seconds 0"):
        frames_for(0, 16)


@pytest.mark.parametrize(
    ("value", "numerator", "denominator"),
    [
        (24, 24, 1),
        (24.0, 24, 1),
        ("24", 24, 1),
        (np.float64(12.5), 25, 2),
        (23.976, 24000, 1001),
        ("23.98", 24000, 1001),
        (23.976023976, 24000, 1001),
        ("29.97", 30000, 1001),
        ("59.94", 60000, 1001),
        (119.88, 120000, 1001),
        ("24000/1001", 24000, 1001),
        ("48/2", 24, 1),
        (Fraction(30000, 1001), 30000, 1001),
        (23.9, 239, 10),
        (37 / 3, 37, 3),
        ("25.001", 25001, 1000),
    ],
)
def test_frame_rates(value: Any, numerator: int, denominator: int) -> None:
    rate = frame_rate(value)
    assert rate == Fraction(numerator, denominator) and isinstance(rate, int) == (denominator == 1)
    assert frame_rate(str(rate)) == frame_rate(float(rate)) == frame_rate(rate) == rate
    assert float(rate_text(rate)) == pytest.approx(float(rate), abs=1e-3)


@pytest.mark.parametrize(
    "value",
    [0, 0.5, 241, 240.5, -24, True, None, "", "x", "1e2", "1/0", "24/", 24.00001, "1/1002", float("nan")],
)
def test_frame_rates_that_are_refused(value: Any) -> None:
    with pytest.raises(ValueError):
        frame_rate(value)


def test_tokens_of_published_sizes() -> None:
    """Wan2.1 at 832x480 and 1280x720 has 32,760 and 75,600 tokens; Wan2.2-TI2V at 1280x704 has 27,280."""
    wan21 = {"frame_stride": 4, "stride": 8}
    assert latent_grid(81, 480, 832, **wan21) == (21, 60, 104)
    assert num_tokens(patch_grid((21, 60, 104), (1, 2, 2))) == 32_760
    assert num_tokens(patch_grid(latent_grid(81, 720, 1280, **wan21), (1, 2, 2))) == 75_600
    assert num_tokens(patch_grid(latent_grid(121, 704, 1280, frame_stride=4, stride=16), (1, 2, 2))) == 27_280


def test_size_multiples_of_the_family() -> None:
    assert size_multiple(8, (1, 2, 2)) == 16
    assert size_multiple(16, (1, 2, 2)) == 32
    assert size_multiple(4, (1, 2, 2)) == 16
