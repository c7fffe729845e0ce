"""Rotary position embedding. Wan rotates interleaved pairs: rotary_mode="interleave"."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.twin.contract import FLOAT_DTYPES, require
from ascendit.twin.registry import Out, check_capability, operator


def rotate_90(x: Tensor, mode: str) -> Tensor:
    """x [.., D], same dtype: (-x1, x0, -x3, x2, ..) for interleave, (-second half, first half) for half."""
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-odd, even), -1).flatten(-2)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
    """x [.., D] * cos + rotate_90(x) * sin in float32; the tables are first rounded to the dtype of x."""
    values, c, s = (t.to(x.dtype).to(torch.float32) for t in (x, cos, sin))
    return (values * c + rotate_90(values, mode) * s).to(x.dtype)


@operator("npu_rotary_mul")
def npu_rotary_mul(
    self: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, rotate: Tensor | None
) -> Iterator[Any]:
    """`self` [.., D], float dtype, rotated by r1 = cos, r2 = sin, each value twice (c0, c0, c1, c1, ..)."""
    require(rotary_mode in ("half", "interleave"), "rope.mode", rotary_mode=rotary_mode)
    require(rotate is None, "rope.rotate")
    floats = all(t.dtype in FLOAT_DTYPES for t in (self, r1, r2))
    valid = floats and self.dim() in (3, 4) and r1.shape == r2.shape
    require(valid, "rope.inputs", self=self, r1=r1, r2=r2)
    _check_table(self, r1, rotary_mode)
    yield Out(tuple(self.shape), self.dtype)
    yield apply_rotary(self, r1, r2, rotary_mode)


def _check_table(x: Tensor, table: Tensor, mode: str) -> None:
    d = x.shape[-1]
    require(d % 2 == 0 and d < 896, "rope.head_size", d=d)
    require(table.shape[-1] == d, "rope.table_width", table=table, d=d)
    broadcasts = table.dim() == x.dim() and all(
        t in (1, n) for t, n in zip(table.shape, x.shape, strict=True)
    )
    require(broadcasts, "rope.table_shape", table=table, x=x)
    axes = [i for i, n in enumerate(table.shape[:-1]) if n > 1]
    require(len(axes) <= (1 if mode == "interleave" else 3), "rope.table_axes", table=table, count=len(axes))
    if x.dim() == 4 and mode == "interleave":
        sequence = axes[0] if axes else 1
        others = [n for i, n in enumerate(x.shape[:-1]) if i != sequence]
        require(others[0] * others[1] < 1000, "rope.rows", size=others[0] * others[1])


@operator("npu_apply_rotary_pos_emb")
def npu_apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str, rotary_mode: str
) -> Iterator[Any]:
    """Rotate query and key [..] in place, in one launch; all of one float dtype."""
    if rotary_mode != "half":
        check_capability("npu_apply_rotary_pos_emb", "interleave")
    valid = rotary_mode in ("half", "interleave") and layout in ("BSND", "TND", "SBND", "BNSD")
    require(valid, "rope.apply_mode", rotary_mode=rotary_mode, layout=layout)
    axes = len(layout)
    for name, t in (("query", query), ("key", key)):
        valid = t.dtype == cos.dtype == sin.dtype and t.dim() == cos.dim() == axes
        require(valid, "rope.apply_dtypes", name=name, t=t, cos=cos, axes=axes)
        _check_table(t, cos, "half")
        valid = t.shape[-1] <= 1024 and cos.shape[layout.index("N")] == 1
        require(valid, "rope.apply_table", name=name, t=t, cos=cos)
    yield Out(tuple(query.shape), query.dtype), Out(tuple(key.shape), key.dtype)
    query.copy_(apply_rotary(query, cos, sin, rotary_mode))
    key.copy_(apply_rotary(key, cos, sin, rotary_mode))
    yield query, key


@operator("npu_interleave_rope")
def npu_interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Iterator[Any]:
    """Deinterleave x ([B, N, S, 64] of any dtype), then rotate halves: not the order that Wan needs."""
    require(x.dim() == 4 and x.shape[-1] == 64 and cos.shape[-1] == 64, "rope.interleave_shape", x=x)
    yield Out(tuple(x.shape), x.dtype)
    halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    yield apply_rotary(halves, cos, sin, "half")
