"""Decoded values become the same pixels as in Diffusers; black and broken videos are refused."""

from __future__ import annotations

import numpy as np
import pytest
from demo_data import Motion, render
from pipeline.refusals import refused

from ascendit.demo import world
from ascendit.errors import QualityError
from ascendit.pipeline.frame_checks import Frames, check_not_flat, to_uint8


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
    ],
)
def test_black_videos_are_refused(frames: Frames, text: str) -> None:
    with refused(QualityError, "E-OUT-02", text, f"all {len(frames)} frames", "--seed"):
        check_not_flat(frames)


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        (np.full((5, 64, 64, 3), (127, 3, 200), np.uint8), "a single colour, rgb(127, 3, 200)"),
        (noise(128, 1), "a single colour, rgb(128, 128, 128)"),
        (np.full((1, 8, 8, 3), 255, np.uint8), "a single colour"),
    ],
)
def test_one_colour_is_a_warning(frames: Frames, text: str, caplog: pytest.LogCaptureFixture) -> None:
    check_not_flat(frames)
    assert text in caplog.text


@pytest.mark.parametrize(
    "frames",
    [
        scene(),
        dot((5, 64, 64), 2, 0, 255),
        dot((5, 64, 64), 2, 128, 170),
        dot((3, 480, 832), 3, 0, 60),
        noise(128, 4),  # fog: little contrast, but a picture
        np.stack([np.full((64, 64, 3), v, np.uint8) for v in (0, 40, 0)]),  # a flash
    ],
)
def test_small_objects_on_plain_backgrounds_pass(frames: Frames, caplog: pytest.LogCaptureFixture) -> None:
    check_not_flat(frames)
    assert not caplog.records


def test_every_plain_scene_of_the_world_passes(caplog: pytest.LogCaptureFixture) -> None:
    motion = Motion(radius=9, travel=18, centre=(32, 32))
    for item in world.scenes():
        check_not_flat(render(item, motion, 17, only=range(0, 17, 8)))
    assert not caplog.records
