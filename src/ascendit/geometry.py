"""Shapes of a run: pixels and frames -> latents -> patches -> tokens. Pure arithmetic, no torch.

A VAE with temporal stride s turns s * n + 1 frames into n + 1 latent frames; the transformer then cuts
latents [C, F, H, W] into patches, and every patch is one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ascendit.errors import UsageError

Grid = tuple[int, int, int]
"""(frames, height, width) of latents, or of a sequence of tokens in patches."""


def latent_grid(num_frames: int, height: int, width: int, *, frame_stride: int, stride: int) -> Grid:
    """Latent frames, rows and columns of a video. `stride`: pixels per latent, in both directions."""
    return (num_frames - 1) // frame_stride + 1, height // stride, width // stride


def patch_grid(latents: Sequence[int], patch_size: Sequence[int]) -> Grid:
    """Patches along frames, height and width of latents with these three lengths."""
    f, h, w = (n // p for n, p in zip(latents, patch_size, strict=True))
    return f, h, w


def num_tokens(grid: Grid) -> int:
    """Length S of the video sequence: one token per patch."""
    return math.prod(grid)


def size_multiple(stride: int, patch_size: Sequence[int]) -> int:
    """Width and height must be multiples of this: VAE stride x patch, and 16 as in Diffusers' pipelines."""
    return math.lcm(16, *(stride * int(p) for p in patch_size[1:]))


def nearest_frames(num_frames: int, frame_stride: int = 4) -> tuple[int, int]:
    """The two legal frame counts (frame_stride x n + 1) around an illegal one, smallest 1."""
    low = max(1, (num_frames - 1) // frame_stride * frame_stride + 1)
    return low, low + frame_stride


def nearest_sizes(pixels: int, multiple: int) -> tuple[int, int]:
    """The two legal widths or heights around an illegal one, smallest `multiple`."""
    low = max(multiple, pixels // multiple * multiple)
    return low, low + multiple


def frames_for(seconds: float, fps: int, frame_stride: int = 4) -> int:
    """The legal number of frames nearest to `seconds` of video. UsageError E-USE-01 outside 0 to 3600 s."""
    if not 0 < seconds < 3600:
        raise UsageError(
            f"--seconds {seconds:g}",
            needs="a length above 0 and below 3600 seconds",
            fix="--seconds 5",
        )
    return frame_stride * round(seconds * fps / frame_stride) + 1
