"""Linear, norms, AdaLN, RoPE and GELU on an Ascend NPU, with torch.ops.npu, torch.ops.mindiesd and aten.

Differences between an NPU and a CPU:
- F.gelu always computes the tanh approximation on a2 and a3; npu_gelu computes the requested one.
  npu_fast_gelu is neither.
- F.rms_norm launches six kernels. npu_rms_norm accepts a float32 gamma with BF16 hidden states.
- npu_rotary_mul rounds its tables to the dtype of its input, which is therefore cast to float32. cos and sin
  hold each value of a pair twice. a5 silently accepts any `rotary_mode`.
- mindiesd adaln needs scale and shift in the dtype of the hidden states; aten layer_norm accepts float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.kernels.reference import Spans


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear`. The kernel gets 2-D rows [M, K]."""
    return F.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    out: Tensor = torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]
    return out


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.layer_norm`. Weight and bias are both in x's dtype or both in float32."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def mindiesd_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.layer_norm`, with impl_mode 0, the precise one."""
    out: Tensor = torch.ops.mindiesd.layernorm(x, x.shape[-1:], weight, bias, eps, 0)[0]
    return out


def layer_norm_adaln(x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float) -> Tensor:
    """As `reference.adaln`: a layer norm with the weight 1 + scale, in float32."""

    def norm(segment: Tensor, r: int) -> Tensor:
        return F.layer_norm(segment, segment.shape[-1:], scale[r].float() + 1, shift[r].float(), eps)

    return _by_span(norm, x, spans)


def mindiesd_adaln(x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float) -> Tensor:
    """As `reference.adaln`, with scale and shift rounded to x's dtype; for a2 and a3."""
    return _mindiesd_adaln(torch.ops.mindiesd.adaln, x, scale, shift, spans, eps)


def mindiesd_adaln_v2(x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float) -> Tensor:
    """As `reference.adaln`, with scale and shift rounded to x's dtype; for a5."""

    def adaln_v2(*args: Any) -> Tensor:
        out: Tensor = torch.ops.mindiesd.adaln_v2(*args)[0]
        return out

    return _mindiesd_adaln(adaln_v2, x, scale, shift, spans, eps)


def _mindiesd_adaln(
    call: Callable[..., Tensor], x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float
) -> Tensor:
    scale, shift = scale.to(x.dtype), shift.to(x.dtype)

    def norm(segment: Tensor, r: int) -> Tensor:
        rows = (t[r].expand(segment.shape[0], -1) for t in (scale, shift))  # one row per sample
        return call(segment, *rows, None, None, eps)

    return _by_span(norm, x, spans)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, spans: Spans) -> Tensor:
    """As `reference.gated_residual`, with the gate rounded to x's dtype: float32 would take four kernels."""
    gate = gate.to(x.dtype)
    ys = y.split(spans, dim=1)
    return _by_span(lambda segment, r: torch.addcmul(segment, ys[r], gate[r]), x, spans)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rope`; also accepts tables from `prepare_rope`. Rotates in float32."""
    if cos.dim() == 2:
        cos, sin = prepare_rope(cos, sin, dtype=x.dtype)
    out: Tensor = torch.ops.npu.npu_rotary_mul(x.float(), cos, sin, rotary_mode="interleave")
    return out.to(x.dtype)


def prepare_rope(*tables: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """cos and sin [S, d/2] -> [1, S, 1, d] with each value twice; float32 for any `dtype`."""
    return tuple(torch.stack((t, t), -1).flatten(-2)[None, :, None, :].float() for t in tables)


def gelu_tanh(x: Tensor) -> Tensor:
    """As `reference.gelu_tanh`."""
    out: Tensor = torch.ops.npu.npu_gelu(x, approximate="tanh")
    return out


def gelu(x: Tensor) -> Tensor:
    """As `reference.gelu`, on every chip."""
    out: Tensor = torch.ops.npu.npu_gelu(x, approximate="none")
    return out


def _by_span(function: Callable[[Tensor, int], Tensor], x: Tensor, spans: Spans) -> Tensor:
    """Concatenate `function(segment, row)` over the segments of `spans`."""
    if len(spans) == 1:
        return function(x, 0)
    return torch.cat([function(segment, r) for r, segment in enumerate(x.split(spans, dim=1))], 1)
