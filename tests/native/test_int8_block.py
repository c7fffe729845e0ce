"""The product of int8 by blocks in native/int8_block.h, exact against float64 in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ascendit.kernels.cpu import linear as cpu_linear

INT8_BLOCK = 6
SIDE = 128
SHAPES = [  # M, N, K
    (1, 1, 1),
    (1, 130, 640),
    (3, 64, 31),
    (6, 65, 128),
    (7, 63, 513),
    (131, 200, 385),
    (260, 70, 1030),
    (1025, 40, 260),
]


class Operands:
    """Quantized activation [M, K] and weight [N, K], one scale per 128 x 128 values, and a bias [N]."""

    def __init__(self, m: int, n: int, k: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.shape = m, n, k
        self.blocks = -(-k // SIDE)
        self.activation = random.integers(-128, 128, (m, k), dtype=np.int8)
        self.weight = random.integers(-128, 128, (n, k), dtype=np.int8)
        self.activation_scale = self.scales(random, m, 1e-2)
        self.weight_scale = self.scales(random, n, 1e-3)
        self.bias: np.ndarray | None = random.standard_normal(n, dtype=np.float32)

    def scales(self, random: Any, rows: int, size: float) -> np.ndarray:
        exponents = random.standard_normal((-(-rows // SIDE), self.blocks))
        return (size * np.exp(exponents)).astype(np.float32)

    def wanted(self, dtype: torch.dtype) -> torch.Tensor:
        m, n, k = self.shape
        total = np.zeros((m, n)) if self.bias is None else np.tile(self.bias.astype(np.float64), (m, 1))
        for b in range(self.blocks):
            at = slice(b * SIDE, (b + 1) * SIDE)
            dots = self.activation[:, at].astype(np.int64) @ self.weight[:, at].astype(np.int64).T
            rows = self.activation_scale[:, b].astype(np.float64).repeat(SIDE)[:m, None]
            total += dots * (rows * self.weight_scale[:, b].astype(np.float64).repeat(SIDE)[:n])
        return torch.from_numpy(total).to(torch.float32).to(dtype)

    def product(self, dtype: torch.dtype, threads: int = 2) -> torch.Tensor:
        """`linear` of native/linear.cpp."""
        library = cpu_linear.library().library
        if library is None:
            pytest.skip(f"no compiled linear layers here: {cpu_linear.library().reason}")
        m, n, k = self.shape
        work = np.empty(min(m, 1024) * -(-k // 512) * 1024, dtype=np.uint8)
        out = torch.full((m, n), -77.0, dtype=dtype)
        inputs = (self.activation, self.activation_scale, None, self.weight, self.weight_scale, None, None)
        pointers = (0 if x is None else x.ctypes.data for x in (*inputs, self.bias, work, None))
        to_float32 = dtype == torch.float32
        assert library.linear(INT8_BLOCK, m, n, k, threads, *pointers, out.data_ptr(), to_float32) == 0
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_float64_rounded(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    operands = Operands(*shape)
    assert torch.equal(operands.product(dtype), operands.wanted(dtype))
    operands.bias = None
    assert torch.equal(operands.product(dtype), operands.wanted(dtype))


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_magnitudes(sign: int) -> None:
    operands = Operands(6, 64, 2048)
    operands.activation[:], operands.weight[:] = -128, min(127, -128 * sign)
    assert torch.equal(operands.product(torch.float32), operands.wanted(torch.float32))


def test_zero_and_nan_scales() -> None:
    """Scale NaN: its 128 rows or channels are NaN, and no others. Scale 0: the block adds nothing."""
    operands = Operands(300, 200, 256)
    operands.activation_scale[0, 1] = operands.weight_scale[0, 0] = 0
    assert torch.equal(operands.product(torch.float32), operands.wanted(torch.float32))
    operands.activation_scale[1, 0] = operands.weight_scale[1, 1] = np.nan
    is_nan = torch.zeros(300, 200, dtype=torch.bool)
    is_nan[128:256], is_nan[:, 128:] = True, True
    out, wanted = operands.product(torch.bfloat16), operands.wanted(torch.bfloat16)
    assert torch.equal(out.isnan(), is_nan)
    assert torch.equal(out[~is_nan], wanted[~is_nan])


def test_sums_beyond_float32_are_infinite() -> None:
    operands = Operands(20, 70, 256)
    operands.activation_scale[:], operands.weight_scale[:] = 3e20, 1e18
    out = operands.product(torch.float32)
    assert out.isinf().any() and torch.equal(out, operands.wanted(torch.float32))


def test_the_number_of_threads_changes_nothing() -> None:
    operands = Operands(400, 130, 700)
    one = operands.product(torch.bfloat16, threads=1)
    assert all(torch.equal(one, operands.product(torch.bfloat16, threads=n)) for n in (2, 3))
