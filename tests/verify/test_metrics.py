"""Metrics compared with their definitions and with a value from scikit-image."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ascendit.verify.metrics import EQUAL_DB, cosine, output_sqnr, psnr, relative_l2, ssim, strip

SKIMAGE = 0.4645397297984152
"""scikit-image 0.26: structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)."""


def videos(seed: int = 0, shape: tuple[int, ...] = (2, 20, 24, 3)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[1], : shape[2]]
    a = np.broadcast_to((x * 7 + y * 3)[None, :, :, None] % 256, shape).astype(np.uint8)
    return a, np.clip(a + rng.normal(0, 20, shape), 0, 255).astype(np.uint8)


def ssim_by_definition(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, with explicit sums over each window."""
    at = np.arange(-5, 6)
    w = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(a.astype(float), b.astype(float), strict=True):
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                for c in range(3):
                    p, q = x[i : i + 11, j : j + 11, c], y[i : i + 11, j : j + 11, c]
                    mp, mq = (w * p).sum(), (w * q).sum()
                    vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
                    covariance = (w * (p - mp) * (q - mq)).sum()
                    values.append(
                        (2 * mp * mq + c1) * (2 * covariance + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
                    )
    return float(np.mean(values))


def test_ssim_follows_the_paper() -> None:
    a, b = videos()
    assert ssim(a, b) == pytest.approx(ssim_by_definition(a, b), abs=1e-9)
    assert ssim(a, b) == pytest.approx(SKIMAGE, abs=1e-6)
    assert ssim(a, a) == 1 and ssim(a, 255 - a) < 0


def test_ssim_of_frames_smaller_than_a_window() -> None:
    a, b = videos(shape=(1, 8, 6, 3))
    assert 0 < ssim(a, b) < 1 and ssim(a, a) == 1


def test_psnr() -> None:
    a, b = videos()
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)
    assert psnr(a, a) == EQUAL_DB
    assert psnr(np.zeros_like(a), np.full_like(a, 255)) == 0  # no wrap-around of bytes


def test_tensors() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert cosine(a, b) == pytest.approx(24 / 25)
    assert relative_l2(a, b) == pytest.approx(math.sqrt(2) / 5)
    assert output_sqnr(a, b) == pytest.approx(10 * math.log10(25 / 2))
    assert output_sqnr(a, a) == EQUAL_DB and relative_l2(a, a) == 0 and cosine(a, a) == pytest.approx(1)


def test_zeros_do_not_divide_by_zero() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert cosine(zero, zero) == 1 and cosine(zero, one) == 0
    assert relative_l2(zero, zero) == 0 and relative_l2(one, zero) == math.inf
    assert output_sqnr(one, zero) == -EQUAL_DB


def test_a_strip_has_evenly_spaced_frames_of_both_videos() -> None:
    a = np.random.default_rng(0).integers(0, 256, (17, 16, 24, 3), np.uint8)
    b = a[:, ::-1]
    pixels = np.asarray(Image.open(io.BytesIO(strip([a, b]))))
    assert pixels.shape == (2 * 16, 8 * 24, 3)
    for column, frame in enumerate((0, 2, 5, 7, 9, 11, 14, 16)):
        shown = pixels[:, column * 24 : (column + 1) * 24]
        assert (shown[:16] == a[frame]).all() and (shown[16:] == b[frame]).all()
    large = np.zeros((3, 480, 832, 3), np.uint8)
    assert Image.open(io.BytesIO(strip([large]))).size == (3 * 111, 64)
