"""Convert decoded values to pixels, and fail the run if they are not finite, or show nothing or noise."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendit.errors import QualityError

log = logging.getLogger("ascendit")

Frames = NDArray[np.uint8]
"""[F, H, W, 3], RGB."""
Array = NDArray[Any]

BLACK_LEVEL = 20
"""Black: at most `FLAT_SHARE` of all pixels have a channel above this level of 255."""
FLAT_LEVELS, FLAT_STD = 20, 1.5
"""Flat: each channel's standard deviation over the whole video is under `FLAT_STD` levels, and at most
`FLAT_SHARE` of all pixels are more than `FLAT_LEVELS` away from the mean colour."""
FLAT_SHARE = 1e-5
"""4 pixels of an 832x480 frame, so that a small object on a plain background passes."""
NOISE = {"pixels": [(0.3, 0.3)], "latents": [(0.2, 0.25), (0.1, 0.7)]}
"""Noise: neighbours are less correlated than one of these (space, time) pairs; one frame has no time.
Fast motion has little correlation in time, fine texture little in space; only noise has neither. Measured on
the demo model: at least 0.29 and 0.27 in latents of good videos, at most 0.08 and 0.20 without scales."""
NOISE_MINIMUM = {"pixels": 256, "latents": 192}
"""Values of a channel, over all frames, below which noise is not judged."""
MEASURED_FRAMES = 8
"""Evenly spaced frames whose pixels are compared, each with the next one."""


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


def check_visible(frames: Frames, latents: Array | None = None, *, allow: bool = False) -> tuple[str, ...]:
    """Refuse a video that is black, a single colour or noise.

    `frames`: uint8 [F, H, W, 3]. `latents`: float32 [1, z, F, h, w], if known. Raises QualityError: E-OUT-02
    for black or a single colour, E-OUT-04 for noise; with `allow` it logs and returns a warning instead.
    """
    error = _flat(frames) or _noise(frames, latents)
    if error is None:
        return ()
    if not allow:
        raise error
    log.warning(error.got)
    return (error.got,)


def _flat(frames: Frames) -> QualityError | None:
    """E-OUT-02 if the video is black (`BLACK_LEVEL`) or a single colour (`FLAT_STD`)."""
    counts = np.zeros((3, 256), np.int64)
    for frame in frames:
        counts += [np.bincount(frame[..., c].ravel(), minlength=256) for c in range(3)]
    levels, total = np.arange(256), counts[0].sum()
    mean = counts @ levels / total
    away = np.abs(levels - mean[:, None])
    std = np.sqrt((counts * away**2).sum(1) / total)
    outside = (counts * (away > FLAT_LEVELS)).sum(1) / total
    if (counts[:, BLACK_LEVEL + 1 :].sum(1) <= FLAT_SHARE * total).all():
        got = f"the video is black: its mean level is {mean.mean():.1f} of 255, in all {len(frames)} frames"
    elif (std < FLAT_STD).all() and (outside <= FLAT_SHARE).all():
        r, g, b = mean.round().astype(int)
        got = f"the video is a single colour, rgb({r}, {g}, {b}), in all {len(frames)} frames"
    else:
        return None
    fix = "try another seed or more steps, or accept it with --allow-flat"
    return QualityError(got, needs="visible content in at least one frame", fix=fix, code="E-OUT-02")


def _noise(frames: Frames, latents: Array | None) -> QualityError | None:
    """E-OUT-04 if neighbours are unrelated in space and in time, in the pixels or in the latents."""
    evenly = np.unique(np.linspace(0, len(frames) - 1, MEASURED_FRAMES).astype(int))
    chosen = np.union1d(evenly, np.minimum(evenly + 1, len(frames) - 1))
    measured = {"pixels": frames[chosen].mean(-1, dtype=np.float32)[None]}
    if latents is not None:
        measured["latents"] = latents[0]
    for name, values in measured.items():
        space, time = neighbour_correlation(values)
        below = any(abs(space) < low and not abs(time) >= late for low, late in NOISE[name])
        if below and values[0].size >= NOISE_MINIMUM[name]:
            return QualityError(
                f"the video is noise: the correlation of neighbouring {name} is {space:.2f} in space and "
                f"{time:.2f} in time",
                needs="a picture; noise usually means damaged weights, or a scale that was not applied",
                fix="check the weights with: ascendit inspect MODEL; or accept the video with --allow-flat",
                code="E-OUT-04",
            )
    return None


def neighbour_correlation(values: Array) -> tuple[float, float]:
    """Correlation of neighbours in space (rows and columns), and in time (NaN for one frame).

    `values`: float [C, F, h, w]. Each channel of each frame is centred first: equal averages are no content.
    Constant values count as fully correlated.
    """
    x = values - values.mean(axis=(2, 3), keepdims=True, dtype=np.float64)

    def correlation(a: Array, b: Array) -> float:
        if not a.size:
            return float("nan")
        scale = float(np.sqrt(np.vdot(a, a) * np.vdot(b, b)))
        return float(np.vdot(a, b)) / scale if scale > 0 else 1.0

    rows = correlation(x[:, :, 1:], x[:, :, :-1])
    columns = correlation(x[..., 1:], x[..., :-1])
    return (rows + columns) / 2, correlation(x[:, 1:], x[:, :-1])
