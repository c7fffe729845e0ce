"""Shapes, rates and FLOPs of a run: pixels and frames -> latents -> patches -> tokens. Does not import torch.

A VAE with temporal stride s encodes s * n + 1 frames to n + 1 latent frames. The transformer divides latents
[C, F, H, W] into patches; each patch is one token. FLOPs are those of matrix products and attention, two for
a multiplication with its addition, as `torch.utils.flop_counter` counts them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Rational
from typing import Any

from ascendit.errors import UsageError
from ascendit.family import WanConfig

Grid = tuple[int, int, int]
"""(frames, height, width), in latents or in patches."""

FrameRate = int | Fraction
"""Frames per second; a Fraction if the number is not whole."""
RATE_RULE = "frames per second from 1 to 240: a number as 24 or 23.976, or a fraction as 24000/1001"
_NTSC = (12, 15, 24, 30, 48, 60, 120, 240)
"""Rates that video players also have slowed down by 1000/1001."""


def frame_rate(value: Any) -> FrameRate:
    """Convert a number or text to a rate: 24, 23.976, "24000/1001". Rounded NTSC rates become exact.

    23.976, 23.98 and 29.97 mean 24000/1001 and 30000/1001. Raises ValueError for anything outside
    `RATE_RULE`, and for a number that needs a denominator above 1001.
    """
    text = str(value).strip()
    if isinstance(value, Rational) and not isinstance(value, bool):
        rate = Fraction(value)
    elif isinstance(value, bool) or not re.fullmatch(r"\d{1,3}(\.\d{1,20})?|\d{1,6}/\d{1,4}", text):
        raise ValueError(text)
    elif "." in text:
        decimals = len(text.partition(".")[2])
        slowed = (Fraction(whole * 1000, 1001) for whole in _NTSC)
        same = (x for x in slowed if decimals > 1 and round(float(x), decimals) == float(text))
        exact = Fraction(text)
        rate = next(same, exact.limit_denominator(1001))
        if decimals > 3 and abs(rate - exact) > 1e-9:
            raise ValueError(text)
    else:
        numerator, _, denominator = text.partition("/")
        if denominator and not int(denominator):
            raise ValueError(text)
        rate = Fraction(int(numerator), int(denominator or 1))
    if not 1 <= rate <= 240 or rate.denominator > 1001:
        raise ValueError(text)
    return rate.numerator if rate.denominator == 1 else rate


def rate_text(fps: FrameRate) -> str:
    """A rate in decimals: `8`, `23.976`."""
    return f"{float(fps):.5g}"


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


def frames_for(seconds: float, fps: FrameRate, frame_stride: int = 4) -> int:
    """The valid number of frames nearest to `seconds` of video.

    Raises UsageError (E-USE-01) unless `seconds` is above 0 and below 3600.
    """
    if not 0 < seconds < 3600:
        raise UsageError(
            f"--seconds {seconds:g}",
            needs="a length above 0 and below 3600 seconds",
            fix="--seconds 5",
        )
    return frame_stride * round(seconds * float(fps) / frame_stride) + 1


def size_of_area(area: int, picture: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(width, height) of at most `area` pixels in the ratio of `picture`, each rounded down to `multiple`.

    The rule of `image2video.py` of Wan2.1 and Wan2.2, in integers: their floats make 832x464 of 832x480. A
    side is 0 if the picture is too narrow.
    """
    w, h = picture
    width, height = (math.isqrt(area * a // b) // multiple * multiple for a, b in ((w, h), (h, w)))
    return width, height


def best_size(area: int, picture: tuple[int, int], multiple: int) -> tuple[int, int]:
    """(width, height) of at most `area` pixels: one side as in `size_of_area`, the other as long as fits.

    Of the two such sizes, the one nearer to the ratio of `picture`: `best_output_size` of Wan2.2 (TI2V-5B). A
    side is 0 if the picture is too narrow.
    """
    ratio = picture[0] / picture[1]
    width, height = size_of_area(area, picture, multiple)
    sizes = []
    if width:
        sizes.append((width, area // width // multiple * multiple))
    if height:
        sizes.append((area // height // multiple * multiple, height))

    def distance(size: tuple[int, int]) -> float:
        own = size[0] / size[1]
        return max(ratio / own, own / ratio)

    sizes = [size for size in reversed(sizes) if 0 not in size]  # of equal ones the authors take the second
    return min(sizes, key=distance, default=(0, 0))


# ---- FLOPs --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TransformerFlops:
    """FLOPs of one transformer for one video."""

    forward: int
    """One forward pass, attention included, without the time embedding."""
    attention: int
    """The products of queries, keys and values in `forward`."""
    modulation: int
    """The time embedding of one timestep, once per step."""
    context: int
    """Embedding, keys and values of text and image, once per prompt."""


def transformer_flops(
    config: WanConfig, tokens: int, text_tokens: int, image_tokens: int = 0
) -> TransformerFlops:
    """FLOPs of a transformer with these numbers of tokens."""
    dim, layers, patch = config.dim, config.num_layers, math.prod(config.patch_size)
    context = text_tokens + image_tokens
    attention = layers * 4 * tokens * (tokens + context) * dim
    linears = layers * 2 * tokens * (6 * dim * dim + 2 * dim * config.ffn_dim)
    ends = 2 * tokens * dim * patch * (config.in_channels + config.out_channels)
    text = 2 * text_tokens * (config.text_dim * dim + dim * dim + layers * 2 * dim * dim)
    image, added = config.image_dim or 0, config.added_kv_proj_dim or 0
    pictures = 2 * image_tokens * (image * image + image * dim + layers * 2 * added * dim)
    return TransformerFlops(
        forward=attention + linears + ends,
        attention=attention,
        modulation=2 * dim * (config.freq_dim + 7 * dim),
        context=text + pictures,
    )
