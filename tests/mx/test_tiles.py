"""Formats with one float32 scale per 128 x 128 values, against NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mx.blocks import raw

from ascendit.mx.codec import Encoded, decode, encode, sqnr
from ascendit.mx.formats import FORMATS
from ascendit.mx.row_encoder import RowEncoder

TILES = [name for name, f in FORMATS.items() if f.tile]
ELEMENTS: dict[str, tuple[Any, int]] = {
    "fp8_128x128": (ml_dtypes.float8_e4m3fn, 448),
    "int8_block": (np.int8, 127),
}
"""Format -> dtype in NumPy and its largest number."""
SHAPES = [(256, 128), (200, 301), (1, 129), (130, 1), (1, 1)]
edges = st.integers(1, 300)


def tiles(shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    """Index of each tile, and its rows and columns."""
    for i in range(0, shape[0], 128):
        for j in range(0, shape[1], 128):
            yield (i // 128, j // 128), (slice(i, i + 128), slice(j, j + 128))


def rounded(x: np.ndarray, name: str) -> np.ndarray:
    """float32 to elements: to nearest, ties to even, saturated."""
    dtype, _ = ELEMENTS[name]
    return np.rint(x).clip(-128, 127).astype(np.int8) if dtype is np.int8 else x.astype(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TILES)
def test_encode_is_numpy(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    x[130:, 130:] = 0
    encoded, values = encode(x, name), x.float().numpy()
    for at, where in tiles(shape):
        scale = np.abs(values[where]).max() / np.float32(ELEMENTS[name][1])
        assert encoded.scale[at] == scale
        qdata = rounded(values[where] / (scale or np.float32(np.inf)), name)
        np.testing.assert_array_equal(raw(encoded.qdata).numpy()[where], qdata.view(np.uint8))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TILES)
def test_decode_is_value_times_scale(name: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    qdata = torch.randint(0, 127, shape, generator=generator, dtype=torch.uint8)
    qdata |= torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) << 7
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), generator=generator) + 0.5
    qdata = qdata.view(getattr(torch, FORMATS[name].qdata_dtype))
    decoded, values = decode(Encoded(qdata, scale, None, name, -1, shape)).numpy(), qdata.float().numpy()
    for at, where in tiles(shape):
        np.testing.assert_array_equal(decoded[where], values[where] * scale[at].numpy())


@pytest.mark.parametrize("name", TILES)
@settings(max_examples=20, deadline=None)
@given(edges, edges, st.integers(0, 9))
def test_round_trip(name: str, n: int, k: int, seed: int) -> None:
    """No value is off by more than half a step of its tile, and decoded values encode to themselves."""
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    encoded = encode(x, name)
    decoded = decode(encoded)
    assert torch.equal(decode(encode(decoded, name)), decoded)
    assert (decoded == 0).all() if not bool(x.any()) else sqnr(x, decoded) > 20
    for at, where in tiles((n, k)):
        step = float(encoded.scale[at]) * (1 if FORMATS[name].element is None else 32)
        assert float((decoded - x)[where].abs().max()) <= step / 2 * (1 + 1e-6)


@pytest.mark.parametrize("name", TILES)
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 400), st.integers(1, 300), st.integers(0, 3), st.integers(0, 3))
def test_tiles_do_not_see_each_other(name: str, n: int, k: int, row: int, column: int) -> None:
    """Rows and columns cut at multiples of 128 have the same bits as the whole."""
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)).to(torch.bfloat16)
    row, column = min(row, (n - 1) // 128), min(column, (k - 1) // 128)
    part, whole = encode(x[row * 128 :, column * 128 :], name), encode(x, name)
    assert torch.equal(raw(part.qdata), raw(whole.qdata[row * 128 :, column * 128 :]))
    assert torch.equal(part.scale, whole.scale[row:, column:])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", TILES)
def test_only_the_tile_of_a_number_that_is_not_finite_is_nan(name: str, bad: float) -> None:
    x = torch.randn(300, 200)
    x[140, 3] = bad
    wanted = torch.zeros(300, 200, dtype=torch.bool)
    wanted[128:256, :128] = True
    assert torch.equal(decode(encode(x, name)).isnan(), wanted)


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-126, 2.0**100])
def test_numbers_at_the_ends_of_float32(name: str, scale: float) -> None:
    """A largest magnitude whose quotient is 0 gives zeros; no number becomes infinite."""
    decoded = decode(encode(torch.randn(130, 130) * scale, name))
    assert decoded.isfinite().all()


@pytest.mark.parametrize("name", TILES)
def test_rows_in_pieces_of_whole_tiles(name: str) -> None:
    x = torch.randn(400, 200).to(torch.bfloat16)
    encoder, whole = RowEncoder(name, 200, max_rows=256, measure=True), encode(x, name)
    parts = [(e.qdata.clone(), e.scale.clone()) for rows in (x[:256], x[256:]) for e in (encoder(rows),)]
    assert torch.equal(raw(torch.cat([qdata for qdata, _ in parts])), raw(whole.qdata))
    assert torch.equal(torch.cat([s for _, s in parts]), whole.scale)
    assert encoder.sqnr == pytest.approx(sqnr(x, decode(whole)), abs=1e-4)
