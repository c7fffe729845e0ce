"""`encode_tiles` of native/encode.cpp against the rule in NumPy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from mx import encoders
from torch import Tensor

from ascendit.mx import native_encoder

TILE = 128
KINDS: dict[int, tuple[Any, float]] = {0: (np.int8, 127.0), 1: (ml_dtypes.float8_e4m3fn, 448.0)}
"""kind -> dtype and its largest value."""
SHAPES = [(1, 1), (1, 1536), (128, 512), (130, 513), (257, 129)]


@pytest.fixture(params=["native", "aarch64"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    encoders.use(request.param, monkeypatch)
    return native_encoder.library().library


def encode_tiles(library: Any, x: Tensor, kind: int, threads: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """qdata [rows, K] and scale [ceil(rows / 128), ceil(K / 128)] of a matrix [rows, K]."""
    rows, length = x.shape
    qdata = torch.full((rows, length), 77, dtype=torch.uint8)
    scale = torch.full((-(-rows // TILE), -(-length // TILE)), -1.0)
    dtype = native_encoder.DTYPE_NUMBERS[x.dtype]
    pointers = qdata.data_ptr(), scale.data_ptr()
    assert library.encode_tiles(x.data_ptr(), dtype, rows, length, threads, kind, *pointers) == 0
    return qdata.numpy().view(KINDS[kind][0]), scale.numpy()


def check(library: Any, x: Tensor, kind: int) -> None:
    qdata, scale = encode_tiles(library, x, kind)
    dtype, largest = KINDS[kind]
    values = x.float().numpy()
    for i in range(0, x.shape[0], TILE):
        for j in range(0, x.shape[1], TILE):
            tile, at = values[i : i + TILE, j : j + TILE], (slice(i, i + TILE), slice(j, j + TILE))
            if not np.isfinite(tile).all():
                assert np.isnan(scale[i // TILE, j // TILE])
                assert (np.isnan(qdata[at]) if kind else qdata[at] == 0).all()
                continue
            wanted = np.abs(tile).max() / np.float32(largest)
            assert scale[i // TILE, j // TILE] == wanted
            steps = tile / (wanted or np.float32(np.inf))
            steps = np.rint(steps).clip(-128, 127) if kind == 0 else steps.clip(-largest, largest)
            np.testing.assert_array_equal(qdata[at].view(np.uint8), steps.astype(dtype).view(np.uint8))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_qdata_and_scales_are_the_rule(library: Any, kind: int, dtype: torch.dtype) -> None:
    for rows, length in SHAPES:
        x = (torch.randn(rows, length) * torch.randn(rows, 1).exp()).to(dtype)
        check(library, x, kind)


@pytest.mark.parametrize("kind", list(KINDS))
def test_zeros_ties_and_values_that_are_not_finite(library: Any, kind: int) -> None:
    x = torch.randn(260, 400)
    x[:128, :128] = 0
    x[128:256, :128] = torch.randint(-254, 255, (128, 128)) / 2  # with scale 1: half of all values are ties
    x[128, 0] = KINDS[kind][1]
    x[0, 130], x[200, 399] = torch.inf, torch.nan
    check(library, x, kind)
    check(library, x.to(torch.bfloat16), kind)


def test_subnormal_scales(library: Any) -> None:
    """amax / 127 of a few units of 2^-149 has no precision left: qdata saturates."""
    for amax in (1, 60, 63, 64, 100, 180, 300):
        check(library, torch.linspace(-1, 1, 999).view(3, 333) * amax * 2.0**-149, 0)


def test_the_number_of_threads_changes_nothing(library: Any) -> None:
    x = torch.randn(700, 1100).to(torch.bfloat16)
    one, two = encode_tiles(library, x, 0, threads=1), encode_tiles(library, x, 0, threads=2)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
