"""MindIE-SD's own operators: AdaLN, layer norm, residual, laser attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.twin import cpu_kernels
from ascendit.twin.contract import Call, require
from ascendit.twin.operators import attention_inputs as core
from ascendit.twin.operators import elementwise
from ascendit.twin.registry import Out, operator


def _modulation(t: Tensor, x: Tensor) -> Tensor:
    """[B, H] or [B, 1, H] -> [B, 1, H]."""
    return t.unsqueeze(-2) if t.dim() == x.dim() - 1 else t


def _check_adaln(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    require(2 <= x.dim() <= 8, "mindie.x", x=x)
    lead, h = tuple(x.shape[:-2]), x.shape[-1]
    for name, t in (("scale", scale), ("shift", shift)):
        row, rows = (*lead, h), (*lead, 1, h)
        require(tuple(t.shape) in (row, rows), "mindie.rows", name=name, t=t, x=x, row=row, rows=rows)
        require(t.dtype == x.dtype, "mindie.row_dtype", name=name, t=t, x=x)
    elementwise.check_layer(x, (h,), weight, bias)


def _adaln(x: Tensor, scale: Tensor, shift: Tensor, weight: Any, bias: Any, epsilon: float | None) -> Any:
    eps = 1e-5 if epsilon is None else epsilon
    scale, shift = _modulation(scale, x), _modulation(shift, x)
    if weight is bias is None and x.dim() == 3:
        out, (mean, rstd) = cpu_kernels.adaln(x, scale, shift, eps), elementwise.moments(x, 1, eps)
    else:
        y, mean, rstd = elementwise.layer(x, 1, weight, bias, eps)
        out = (y * (1 + scale.to(torch.float32)) + shift.to(torch.float32)).to(x.dtype)
    return out, mean.to(x.dtype), rstd.to(x.dtype)


@operator("mindiesd::adaln")
def adaln(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float | None
) -> Iterator[Any]:
    """layer_norm(x) * (1 + scale) + shift on a2 and a3: x [B, S, H], others in the dtype of x."""
    _check_adaln(x, scale, shift, weight, bias)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            require(t.dtype == x.dtype, "mindie.weight_dtype", name=name, t=t, x=x)
    yield Out(tuple(x.shape), x.dtype)
    yield _adaln(x, scale, shift, weight, bias, epsilon)[0]


@operator("mindiesd::adaln_v2")
def adaln_v2(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float | None
) -> Iterator[Any]:
    """(out, mean, rstd) on a5; mean and rstd [B, S, 1] in the dtype of x [B, S, H]."""
    _check_adaln(x, scale, shift, weight, bias)
    row = Out((*x.shape[:-1], 1), x.dtype)
    yield Out(tuple(x.shape), x.dtype), row, row
    yield _adaln(x, scale, shift, weight, bias, epsilon)


@operator("mindiesd::layernorm")
def layernorm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    impl_mode: int,
) -> Iterator[Any]:
    """(out, mean, rstd) of `input` [.., *normalized_shape], in its dtype.

    impl_mode is 0 (precise), 1 (fast) or 2 (float16); the twin computes all three as 0.
    """
    require(impl_mode in (0, 1, 2), "mindie.impl_mode", impl_mode=impl_mode)
    shape = tuple(normalized_shape)
    elementwise.check_layer(input, shape, weight, bias)
    row = Out((*input.shape[: input.dim() - len(shape)], *[1] * len(shape)), input.dtype)
    yield Out(tuple(input.shape), input.dtype), row, row
    if len(shape) == 1:
        out = cpu_kernels.layer_norm(input, weight, bias, eps)
        mean, rstd = elementwise.moments(input, 1, eps)
    else:
        out, mean, rstd = elementwise.layer(input, len(shape), weight, bias, eps)
    yield out.to(input.dtype), mean.to(input.dtype), rstd.to(input.dtype)


@operator("mindiesd::la")
def la(**arguments: Any) -> Iterator[Any]:
    """(lse [B, N, S], out [B, N, S, D]), float32: laser attention on a2 and a3.

    A `pre_tokens` below 256 is the number of padding keys at the end of sequences padded to multiples of 256.
    """
    a = Call(**arguments)
    has_mask = any(m is not None for m in (a.atten_mask, a.alibi_mask, a.drop_mask))
    a.require(not has_mask and a.input_layout == "BNSD" and a.keep_prob == 1.0, "mindie.la_masks")
    a.require(a.query.dtype == a.key.dtype == a.value.dtype == torch.float16, "mindie.la_dtype")
    z = core.sizes(a.query, a.key, a.value, "BNSD", a.head_num, 0)
    a.require(z.s % 256 == 0 and z.keys % 256 == 0 and z.d == 128, "mindie.la_sizes", z=z)
    core.check_attention_scale("scale_value", a.scale_value, 1.0, z.d)
    yield Out((z.b, z.n, z.s), torch.float32), Out(tuple(a.query.shape), torch.float32)
    padding = a.pre_tokens if a.pre_tokens < 256 else 0
    masked = core.length_mask(z, [z.keys - padding])
    out, top, total = core.attend(a.query, a.key, a.value, a.scale_value, masked)
    yield (top + torch.log(total)).to(torch.float32), out.to(torch.float32)
