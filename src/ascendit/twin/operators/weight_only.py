"""npu_weight_quant_batchmatmul: W8A16 and W4A16, the weight decoded on the way in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.mx import elements
from ascendit.twin.faults import require
from ascendit.twin.registry import Out, operator


@operator("npu_weight_quant_batchmatmul")
def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    bias: Tensor | None,
    antiquant_group_size: int,
    inner_precise: int,
    weight_dtype: int | None,
) -> Iterator[Any]:
    """x @ ((weight + offset) x scale) + bias; weight int8 [K, N], or int32 [K, N / 8] of int4.

    Scale and offset: [N], [1, N], or [K / group, N] with `antiquant_group_size`.
    """
    require(
        x.dim() == 2 and weight.dim() == 2 and x.dtype in (torch.float16, torch.bfloat16),
        f"x {tuple(x.shape)} of {x.dtype}, weight {tuple(weight.shape)}",
        needs="x [M, K] in float16 or bfloat16, weight [K, N]",
        fix="x.reshape(-1, K)",
    )
    require(
        weight.dtype in (torch.int8, torch.int32) and weight_dtype is None and quant_scale is None,
        f"weight of {weight.dtype}, weight_dtype={weight_dtype}, quant_scale={quant_scale is not None}",
        needs="int8, or int32 from npu_convert_weight_to_int4pack; a floating-point output",
        fix="the twin computes no FP4 or int8 output here",
    )
    n = weight.shape[1] * (8 if weight.dtype == torch.int32 else 1)
    k = weight.shape[0]
    require(k == x.shape[1], f"K {x.shape[1]} and {k}", needs="weight [K, N]", fix="weight.t() for [N, K]")
    groups = -(-k // antiquant_group_size) if antiquant_group_size else 1
    shapes = [(groups, n)] + ([(n,)] if groups == 1 else [])
    for name, tensor in (("antiquant_scale", antiquant_scale), ("antiquant_offset", antiquant_offset)):
        require(
            tensor is None or (tuple(tensor.shape) in shapes and tensor.dtype == x.dtype),
            f"{name} {tensor is not None and (tuple(tensor.shape), tensor.dtype)}",
            needs=f"{' or '.join(map(str, shapes))} of {x.dtype}",
            fix="give antiquant_group_size with scales per group",
        )
    yield Out((x.shape[0], n), x.dtype)
    values = weight.to(torch.float32) if weight.dtype == torch.int8 else _int4(weight, n)
    if antiquant_offset is not None:
        values = values + _rows(antiquant_offset, k, antiquant_group_size)
    values = values * _rows(antiquant_scale, k, antiquant_group_size)
    out = x.to(torch.float32) @ values
    yield (out if bias is None else out + bias.to(torch.float32)).to(x.dtype)


def _int4(weight: Tensor, n: int) -> Tensor:
    """int32 [K, N / 8] -> float32 [K, N]."""
    nibbles = elements.unpack(weight.contiguous().view(torch.uint8), n).to(torch.float32)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def _rows(t: Tensor, k: int, group: int) -> Tensor:
    """A scale or offset for every row of the weight."""
    wide = t.to(torch.float32).view(-1, t.shape[-1])
    return wide.repeat_interleave(group, 0)[:k] if group else wide
