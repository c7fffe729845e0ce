"""How close two videos are, and two tensors: PSNR, SSIM, cosine, relative L2, signal to noise."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ascendit.mx.codec import decibels
from ascendit.pipeline.frame_checks import Frames

EQUAL_DB = 99.0
"""What stands for infinity: no difference at all."""
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
"""Of SSIM (Wang et al. 2004): side and standard deviation of the Gaussian window, and two constants."""


def psnr(a: Frames, b: Frames) -> float:
    """Peak signal to noise in dB, over all frames of a video."""
    error = np.subtract(a, b, dtype=np.float32)
    return decibels(255.0**2, float(np.mean(np.square(error), dtype=np.float64)), cap=EQUAL_DB)


def ssim(a: Frames, b: Frames) -> float:
    """Structural similarity, -1 to 1: the mean over frames, channels and all whole windows.

    Frames smaller than a window are compared as one window of equal weights.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x**2
    var_y = _blur(y * y) - mean_y**2
    both = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float(np.mean(top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def _blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted means over whole windows of [F, H, W, C], rows and then columns."""
    for axis in (1, 2):
        size = x.shape[axis]
        at = np.arange(WINDOW) - WINDOW // 2
        weights = np.exp(-0.5 * (at / SIGMA) ** 2) if size >= WINDOW else np.ones(size)
        weights /= weights.sum()
        last = size - len(weights) + 1
        parts = (w * np.take(x, range(i, i + last), axis) for i, w in enumerate(weights))
        x = sum(parts, start=np.zeros(()))
    return x


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two tensors of one shape; 1 for two zeros, 0 for one."""
    a, b = a.double().flatten(), b.double().flatten()
    length = float(a.norm()) * float(b.norm())
    return float(a @ b) / length if length else float(torch.equal(a, b))


def relative_l2(a: Tensor, reference: Tensor) -> float:
    """|a - reference| / |reference|."""
    reference = reference.double()
    size = float(reference.norm())
    away = float((a.double() - reference).norm())
    return away / size if size else math.inf if away else 0.0


def output_sqnr(a: Tensor, reference: Tensor) -> float:
    """Signal to quantization noise in dB: |reference|^2 / |a - reference|^2."""
    reference = reference.double()
    noise = float((a.double() - reference).square().sum())
    return decibels(float(reference.square().sum()), noise, cap=EQUAL_DB)
