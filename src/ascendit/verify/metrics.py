"""Similarity of two videos (PSNR, SSIM) and of two tensors (cosine, relative L2, SQNR); pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ascendit.mx.codec import decibels
from ascendit.pipeline.frame_checks import Frames

EQUAL_DB = 99.0
"""The value for equal inputs, instead of infinity."""
STRIP_FRAMES, STRIP_HEIGHT = 8, 64
"""Pictures of a video in a report."""
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
"""SSIM (Wang et al. 2004): size and standard deviation of the Gaussian window, and two constants."""


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal-to-noise ratio in dB over all frames, uint8 [F, H, W, 3]; at most `EQUAL_DB`."""
    error = np.subtract(a, b, dtype=np.float32)
    return decibels(255.0**2, float(np.mean(np.square(error), dtype=np.float64)), cap=EQUAL_DB)


def ssim(a: Frames, b: Frames) -> float:
    """Structural similarity, -1 to 1, of uint8 [F, H, W, 3]: mean over frames, channels and complete windows.

    An axis shorter than a window is one window with equal weights.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def _blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted means over complete windows of [F, H, W, C], along rows and then columns."""
    for axis in (1, 2):
        size = x.shape[axis]
        offsets = np.arange(WINDOW) - WINDOW // 2
        weights = np.exp(-0.5 * (offsets / SIGMA) ** 2) if size >= WINDOW else np.ones(size)
        weights /= weights.sum()
        last = size - len(weights) + 1
        parts = (w * np.take(x, range(i, i + last), axis) for i, w in enumerate(weights))
        x = sum(parts, start=np.zeros(()))
    return x


def strip(videos: Sequence[Frames]) -> bytes:
    """A PNG with a row of frames, evenly spaced, for each video, uint8 [F, H, W, 3]."""
    rows = []
    for frames in videos:
        times = np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)
        images = [Image.fromarray(frames[i]) for i in times]
        for image in images:
            image.thumbnail((4 * STRIP_HEIGHT, STRIP_HEIGHT))
        rows.append(np.concatenate([np.asarray(image) for image in images], axis=1))
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine similarity of two tensors [..] of one shape and any dtype; 1 if both are zero, 0 if one is."""
    a, b = a.double().flatten(), b.double().flatten()
    norms = float(a.norm()) * float(b.norm())
    return float(a @ b) / norms if norms else float(torch.equal(a, b))


def relative_l2(a: Tensor, reference: Tensor) -> float:
    """|a - reference| / |reference| of two tensors [..] of one shape and any dtype."""
    reference = reference.double()
    norm = float(reference.norm())
    distance = float((a.double() - reference).norm())
    return distance / norm if norm else math.inf if distance else 0.0


def output_sqnr(a: Tensor, reference: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, |reference|^2 / |a - reference|^2, of [..] in any dtype."""
    reference = reference.double()
    noise = float((a.double() - reference).square().sum())
    return decibels(float(reference.square().sum()), noise, cap=EQUAL_DB)
