"""Convert decoded values to pixels, and fail the run if values are NaN or infinite, or the video is black."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendit.errors import QualityError

log = logging.getLogger("ascendit")

Frames = NDArray[np.uint8]
"""[F, H, W, 3], RGB."""

BLACK_LEVEL = 20
"""Black: at most `FLAT_SHARE` of all pixels have a channel above this level of 255."""
FLAT_LEVELS, FLAT_STD = 20, 1.5
"""Flat: each channel's standard deviation over the whole video is under `FLAT_STD` levels, and at most
`FLAT_SHARE` of all pixels are more than `FLAT_LEVELS` away from the mean colour."""
FLAT_SHARE = 1e-5
"""4 pixels of an 832x480 frame, so that a small object on a plain background passes."""


def to_uint8(x: Any) -> Frames:
    """Convert decoded values to pixels, rounded as Diffusers' VideoProcessor and numpy_to_pil do it.

    `x`: tensor (any device and float dtype) or array, [3, F, H, W], clipped to [-1, 1]. Returns uint8
    [F, H, W, 3]. Raises QualityError (E-OUT-01) if any value is NaN or infinite.
    """
    assert x.ndim == 4 and x.shape[0] == 3, f"[3, F, H, W] expected, got {tuple(x.shape)}"
    frames = np.empty((*x.shape[1:], 3), np.uint8)
    bad: dict[int, int] = {}
    for i in range(len(frames)):  # one frame at a time: a 720p video takes 1 GB in float32
        values = x[:, i] * 0.5 + 0.5  # in the dtype of x, as Diffusers does
        if hasattr(values, "detach"):
            values = values.detach().float().cpu().numpy()
        values = np.asarray(values, np.float32)
        if count := int(values.size - np.isfinite(values).sum()):
            bad[i] = count
        else:
            frames[i] = (values.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    if bad:
        numbers = ", ".join(map(str, list(bad)[:8])) + (", ..." if len(bad) > 8 else "")
        raise QualityError(
            f"{sum(bad.values())} of {frames.size} values are nan or infinite, "
            f"in {len(bad)} of {len(frames)} frames ({numbers})",
            needs="finite values in every frame",
            fix="check the weights with: ascendit inspect MODEL; or load with dtype float32",
            code="E-OUT-01",
        )
    return frames


def check_not_flat(frames: Frames) -> None:
    """Raise QualityError (E-OUT-02) if the video is black (`BLACK_LEVEL`); warn if it is a single colour.

    `frames`: uint8 [F, H, W, 3]. A single colour is not an error: models with random weights produce it.
    """
    counts = np.zeros((3, 256), np.int64)
    for frame in frames:
        counts += [np.bincount(frame[..., c].ravel(), minlength=256) for c in range(3)]
    levels, total = np.arange(256), counts[0].sum()
    mean = counts @ levels / total
    if (counts[:, BLACK_LEVEL + 1 :].sum(1) <= FLAT_SHARE * total).all():
        raise QualityError(
            f"the video is black: its mean level is {mean.mean():.1f} of 255, in all {len(frames)} frames",
            needs="visible content in at least one frame",
            fix="try another --seed or more --steps; if that does not help: ascendit inspect MODEL",
            code="E-OUT-02",
        )
    away = np.abs(levels - mean[:, None])
    std = np.sqrt((counts * away**2).sum(1) / total)
    outside = (counts * (away > FLAT_LEVELS)).sum(1) / total
    if (std < FLAT_STD).all() and (outside <= FLAT_SHARE).all():
        r, g, b = mean.round().astype(int)
        log.warning("the video is a single colour, rgb(%d, %d, %d), in all %d frames", r, g, b, len(frames))
