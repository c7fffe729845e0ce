"""The product of two int8 matrices with float32 scales per 128 of K, exact up to one rounding, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TILE = 128
ROWS = 1024
"""Rows of the first matrix per pass: their float64 sums stay small."""
Product = Callable[[Tensor, Tensor], Tensor]
"""int8 [M, k] times int8 [N, k], k up to 128 -> the exact sums [M, N], int32 or float32."""


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """`Product` by a float32 matmul: sums of 128 products of int8 stay below 2^24, so they are exact."""
    return a.to(torch.float32) @ b.to(torch.float32).t()


def multiply(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    product: Product = float32_product,
) -> Tensor:
    """int8 `a` [M, K] times int8 `b` [N, K], with their scales, plus the float32 bias [N] -> float32 [M, N].

    Scales: float32, [rows, ceil(K / 128)] or, one per 128 rows, [ceil(rows / 128), ceil(K / 128)]. The exact
    sum of each 128 of K times both scales is added up in float64 and rounded once, to float32.
    """
    m, n = len(a), len(b)
    a_rows, b_rows = _per_row(a_scale, m), _per_row(b_scale, n)
    out = torch.empty(m, n, device=a.device)
    for start in range(0, m, ROWS):
        rows = slice(start, start + ROWS)
        total = torch.zeros(len(a[rows]), n, dtype=torch.float64, device=a.device)
        for i, (x, y) in enumerate(zip(a[rows].split(TILE, 1), b.split(TILE, 1), strict=True)):
            total += product(x, y).to(torch.float64) * (a_rows[rows, i, None] * b_rows[:, i])
        out[rows] = total if bias is None else total + bias
    return out


def _per_row(scale: Tensor, rows: int) -> Tensor:
    """float64 [rows, ..]."""
    if len(scale) != rows:
        scale = scale.repeat_interleave(TILE, 0)[:rows]
    return scale.to(torch.float64)
