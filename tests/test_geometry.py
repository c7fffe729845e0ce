"""Frames, latents, patches and tokens: valid numbers, and the nearest valid ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendit.errors import UsageError
from ascendit.geometry import (
    frames_for,
    latent_grid,
    nearest_frames,
    nearest_sizes,
    num_tokens,
    patch_grid,
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
    with pytest.raises(UsageError, match="--seconds 0"):
        frames_for(0, 16)


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
