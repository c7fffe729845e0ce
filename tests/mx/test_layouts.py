from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascendit.errors import UsageError
from ascendit.mx import elements, layouts
from ascendit.mx.codec import encode
from ascendit.mx.formats import E2M1

sizes = st.integers(1, 9)


@given(st.tuples(sizes, sizes, sizes), st.integers(-3, 2))
def test_pairs_and_back(shape: tuple[int, int, int], axis: int) -> None:
    scale = torch.randint(0, 255, shape, dtype=torch.uint8)
    pairs = layouts.to_pairs(scale, axis)
    blocks = shape[axis]
    assert pairs.shape[-1] == 2 and pairs.shape[axis % 3] == (blocks + 1) // 2
    assert torch.equal(layouts.from_pairs(pairs, blocks, axis), scale)
    for j in range(blocks):
        element = pairs.select(-1, j % 2).select(axis % 3, j // 2)
        assert torch.equal(element, scale.select(axis, j))
    if blocks % 2:
        assert not pairs.select(-1, 1).select(axis % 3, blocks // 2).any()


def test_pairs_of_the_npu() -> None:
    """For x [70, 96], axis 0 gives [2, 96, 2], the last axis [70, 2, 2]."""
    x = torch.randn(70, 96).to(torch.bfloat16)
    assert layouts.to_pairs(encode(x, "mxfp8", axis=0).scale, 0).shape == (2, 96, 2)
    assert layouts.to_pairs(encode(x, "mxfp8").scale).shape == (70, 2, 2)


@given(st.integers(1, 300), st.integers(1, 11))
def test_cuda_tiles_and_back(rows: int, blocks: int) -> None:
    scale = torch.randint(1, 255, (rows, blocks), dtype=torch.uint8)
    tiles = layouts.to_cuda_tiles(scale)
    tile_columns = -(-blocks // 4)
    assert tiles.shape == (-(-rows // 128) * tile_columns * 512,)
    assert int((tiles != 0).sum()) == rows * blocks
    assert torch.equal(layouts.from_cuda_tiles(tiles, rows, blocks), scale)
    for r in range(0, rows, 37):
        for c in range(blocks):
            tile = (r // 128) * tile_columns + c // 4
            offset = (
                tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
            )  # cuBLAS, 1D block scaling factors
            assert tiles[offset] == scale[r, c]


def test_npu_dual_and_back() -> None:
    dual = torch.rand(5, 3, 1)
    turned = layouts.to_npu_dual(dual)
    assert turned.shape == (3, 5) and turned.is_contiguous()
    assert torch.equal(layouts.from_npu_dual(turned), dual)


@given(st.integers(1, 33), st.integers(0, 5))
def test_fp4_as_e4m3(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    qdata = torch.randint(0, 16, (3, length), dtype=torch.uint8, generator=generator)
    packed = elements.pack(qdata)
    as_e4m3 = layouts.to_e4m3_container(packed, length)
    values = elements.decode(qdata, E2M1)
    assert as_e4m3.dtype == torch.float8_e4m3fn
    assert torch.equal(as_e4m3.float(), values)
    assert torch.equal(torch.signbit(as_e4m3.float()), torch.signbit(values))


def test_layouts_of_a_wrong_shape() -> None:
    with pytest.raises(
        UsageError, match=r"pairs of scales of shape \(4, 3, 2\)\n  needs  \[.., 2, 2\] for 4 blocks"
    ):
        layouts.from_pairs(torch.zeros(4, 3, 2, dtype=torch.uint8), 4)
    with pytest.raises(UsageError, match=r"tiles of scales of shape \(512,\)\n  needs  1024 bytes"):
        layouts.from_cuda_tiles(torch.zeros(512, dtype=torch.uint8), 129, 4)
    with pytest.raises(UsageError, match=r"scales of shape \(2, 2, 2\)"):
        layouts.to_cuda_tiles(torch.zeros(2, 2, 2, dtype=torch.uint8))
