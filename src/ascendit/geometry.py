"""Shapes of a run: pixels and frames -> latents -> patches -> tokens. Does not import torch.

A VAE with temporal stride s encodes s * n + 1 frames to n + 1 latent frames. The transformer divides latents
[C, F, H, W] into patches; each patch is one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ascendit.errors import UsageError

Grid = tuple[int, int, int]
"""(frames, height, width), in latents or in patches."""


def latent_grid(num_frames: int, height: int, width: int, *, frame_stride: int, stride: int) -> Grid:
    """Latent frames, rows and columns of a video. `stride`: pixels per latent in height and width."""
    return (num_frames - 1) // frame_stride + 1, height // stride, width // stride


def patch_grid(latents: Sequence[int], patch_size: Sequence[int]) -> Grid:
    """Patches along frames, height and width of `latents` (frames, height, width)."""
    f, h, w = (n // p for n, p in zip(latents, patch_size, strict=True))
    return f, h, w


def num_tokens(grid: Grid) -> int:
    """Length S of the video sequence: one token per patch."""
    return math.prod(grid)


def size_multiple(stride: int, patch_size: Sequence[int]) -> int:
    """Required multiple of width and height: VAE stride x patch, and 16 as in Diffusers' pipelines."""
    return math.lcm(16, *(stride * int(p) for p in patch_size[1:]))


def nearest_frames(num_frames: int, frame_stride: int = 4) -> tuple[int, int]:
    """The two valid frame counts (frame_stride x n + 1, at least 1) closest to an invalid one."""
    low = max(1, (num_frames - 1) // frame_stride * frame_stride + 1)
    return low, low + frame_stride


def nearest_sizes(pixels: int, multiple: int) -> tuple[int, int]:
    """The two valid widths or heights (at least `multiple`) closest to an invalid one."""
    low = max(multiple, pixels // multiple * multiple)
    return low, low + multiple


def frames_for(seconds: float, fps: int, frame_stride: int = 4) -> int:
    """The valid number of frames nearest to `seconds` of video.

    Raises UsageError (E-USE-01) unless `seconds` is above 0 and below 3600.
    """
    if not 0 < seconds < 3600:
        raise UsageError(
            f"--seconds {seconds:g}",
            needs="a length above 0 and below 3600 seconds",
            fix="--seconds 5",
        )
    return frame_stride * round(seconds * fps / frame_stride) + 1
