"""Decoded values become the same pixels as in Diffusers; black, flat and noise videos are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from demo_data import Motion, render
from pipeline.refusals import refused

from ascendit.demo import world
from ascendit.errors import QualityError
from ascendit.pipeline.frame_checks import Frames, check_visible, neighbour_correlation, to_uint8


def scene() -> Frames:
    motion = Motion(radius=10, travel=20, centre=(32, 32))
    return render(world.Scene("purple", "square", "right", "white"), motion, 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_to_uint8_rounds_as_diffusers(dtype: str) -> None:
    import torch
    from diffusers.video_processor import VideoProcessor

    x = (torch.randn(3, 5, 16, 24, generator=torch.Generator().manual_seed(0)) * 0.7).to(
        getattr(torch, dtype)
    )
    processor = VideoProcessor()
    oracle = processor.numpy_to_pil(processor.postprocess_video(x[None], output_type="np")[0])
    assert np.array_equal(to_uint8(x), np.stack([np.array(image) for image in oracle]))
    assert np.array_equal(to_uint8(x.requires_grad_()), np.stack([np.array(image) for image in oracle]))


def test_to_uint8_of_an_array() -> None:
    x = np.array([-9, -1, 0, 1, 9], np.float32).reshape(1, 5, 1, 1).repeat(3, 0)
    assert to_uint8(x)[:, 0, 0].tolist() == [[v] * 3 for v in (0, 0, 128, 255, 255)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = np.zeros((3, 5, 8, 8), np.float32)
    x[0, 1, 0, 0] = x[1, 4, 2, 2] = x[2, 4, 2, 2] = bad
    with refused(QualityError, "E-OUT-01", "3 of 960 values", "in 2 of 5 frames (1, 4)", "ascendit inspect"):
        to_uint8(x)


def dot(shape: tuple[int, int, int], size: int, background: int, colour: int) -> Frames:
    """A small square that moves on a plain background."""
    x = np.full((*shape, 3), background, np.uint8)
    for i in range(shape[0]):
        x[i, 8 : 8 + size, 2 * i : 2 * i + size] = colour
    return x


def noise(level: int, spread: float) -> Frames:
    x = np.random.default_rng(0).normal(level, spread, (5, 64, 64, 3))
    return x.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        (np.zeros((5, 64, 64, 3), np.uint8), "is black"),
        (noise(4, 3), "is black"),
        (np.full((5, 64, 64, 3), (127, 3, 200), np.uint8), "a single colour, rgb(127, 3, 200)"),
        (noise(128, 1), "a single colour, rgb(128, 128, 128)"),
        (np.full((1, 8, 8, 3), 255, np.uint8), "a single colour"),
    ],
)
def test_black_and_single_colours_are_refused(
    frames: Frames, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    with refused(
        QualityError, "E-OUT-02", text, f"all {len(frames)} frames", "another seed", "allow_flat=True"
    ):
        check_visible(frames)
    assert not caplog.records
    (warning,) = check_visible(frames, allow=True)
    assert text in warning and caplog.messages == [warning]


def texture(shape: tuple[int, int, int], grain: float = 0.0, still: bool = False) -> Frames:
    """Leaves: noise blurred over three pixels, that drift or not, with film grain in each frame."""
    rng = np.random.default_rng(1)
    base = rng.normal(0, 90, shape[1:])
    base = (base + np.roll(base, 1, 0) + np.roll(base, 1, 1) + np.roll(base, (1, 1), (0, 1))) / 4
    moved = [np.roll(base, 0 if still else 2 * i, 1) for i in range(shape[0])]
    x = 128 + np.stack(moved)[..., None] + rng.normal(0, grain, (*shape, 3))
    return x.round().clip(0, 255).astype(np.uint8)


def checkerboard(square: int, moving: int = 0) -> Frames:
    y, x = np.mgrid[:64, :64]
    frames = [((x + moving * i) // square + y // square) % 2 * 200 + 20 for i in range(5)]
    return np.stack(frames)[..., None].repeat(3, -1).astype(np.uint8)


@pytest.mark.parametrize(
    "frames",
    [
        scene(),
        dot((5, 64, 64), 2, 0, 255),
        dot((5, 64, 64), 2, 128, 170),
        dot((3, 480, 832), 3, 0, 60),
        np.stack([np.full((64, 64, 3), v, np.uint8) for v in (0, 40, 0)]),  # a flash
        texture((5, 64, 64), still=True),
        texture((5, 64, 64)),
        texture((1, 64, 64)),
        texture((5, 64, 64), grain=25, still=True),
        np.broadcast_to(noise(128, 40)[:1], (5, 64, 64, 3)),  # a still picture of gravel
        checkerboard(1),
        checkerboard(1, moving=1),
        checkerboard(4, moving=3),
        noise(128, 60)[:1, :8, :8],  # too small to judge
    ],
)
def test_small_objects_textures_and_grain_pass(frames: Frames, caplog: pytest.LogCaptureFixture) -> None:
    assert check_visible(frames) == ()
    assert not caplog.records


@pytest.mark.parametrize(
    "frames",
    [
        noise(128, 4),
        noise(128, 60),
        noise(128, 60)[:1],
        np.random.default_rng(2).integers(0, 256, (9, 32, 48, 3), np.uint8),
        np.random.default_rng(2).integers(0, 2, (5, 64, 64, 3), np.uint8) * 255,
        np.random.default_rng(2).integers(0, 256, (5, 64, 64, 1), np.uint8).repeat(3, -1),
    ],
)
def test_noise_is_refused(frames: Frames) -> None:
    with refused(QualityError, "E-OUT-04", "is noise", "pixels", "ascendit inspect", "allow_flat=True"):
        check_visible(frames)
    assert "is noise" in check_visible(frames, allow=True)[0]


def latents(space: float, time: float, size: tuple[int, int, int] = (5, 8, 8)) -> Any:
    """[1, 16, F, h, w] with about these correlations of neighbours."""
    rng = np.random.default_rng(0)

    def step(x: Any, axis: int, correlation: float) -> Any:
        for i in range(1, x.shape[axis]):
            before, after = (np.take(x, [j], axis) for j in (i - 1, i))
            index = [slice(None)] * x.ndim
            index[axis] = slice(i, i + 1)
            x[tuple(index)] = correlation * before + np.sqrt(1 - correlation**2) * after
        return x

    x = rng.normal(0, 1, (1, 16, *size))
    return step(step(step(x, 3, space), 4, space), 2, time).astype(np.float32)


@pytest.mark.parametrize(
    ("values", "is_noise"),
    [
        (latents(0, 0), True),
        (3 * latents(0, 0) + 1, True),
        (latents(0, 0.4), True),  # a static pattern, as of weights in the wrong order
        (latents(0.5, 0.4), False),
        (latents(0.5, 0), False),  # fast motion
        (latents(0, 0.95), False),  # a fine texture that does not move
        (latents(0, 0, (1, 16, 16)), True),
        (latents(0.5, 0, (1, 16, 16)), False),
        (latents(0, 0, (2, 4, 4)), False),  # too small to judge
    ],
)
def test_latents_show_noise_that_the_vae_has_smoothed(values: Any, is_noise: bool) -> None:
    if is_noise:
        with refused(QualityError, "E-OUT-04", "is noise", "latents"):
            check_visible(scene(), values)
    else:
        assert check_visible(scene(), values) == ()


def test_correlation_of_neighbours() -> None:
    y, x = np.mgrid[:6, :8].astype(np.float32)
    space, time = neighbour_correlation(np.stack([x + y, x + y])[None])
    rows = np.corrcoef((x + y)[1:].ravel(), (x + y)[:-1].ravel())[0, 1]
    assert time == pytest.approx(1) and abs(space - rows) < 0.1
    assert np.isnan(neighbour_correlation(np.ones((1, 1, 4, 4)))[1])


def test_every_plain_scene_of_the_world_passes(caplog: pytest.LogCaptureFixture) -> None:
    motion = Motion(radius=9, travel=18, centre=(32, 32))
    for item in world.scenes():
        check_visible(render(item, motion, 17, only=range(0, 17, 8)))
    assert not caplog.records
