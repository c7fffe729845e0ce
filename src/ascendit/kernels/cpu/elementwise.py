"""Fast CPU forms of the operators: the same numbers as `reference`, in fewer passes over memory.

What makes them fast: PyTorch's CPU layer norm takes BF16 tokens with float32 weights in one kernel, and
AdaLN is a layer norm whose weight is `1 + scale`; a rotation is one complex product.

The twin computes with these too (`twin/arithmetic.py`), so what differs between a video made on a CPU and
one made by the Ascend path is the path, never the arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.kernels.reference import Spans

ROUNDED_ROWS = ("adaln", "gated_residual")
"""Operators whose rows come in the dtype of the tokens, because an NPU takes no others."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`. Two passes over x; the rest is one number a token."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
    inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
    out: Tensor = (x * inverse).mul_(weight)
    return out.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.layer_norm`. One kernel."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float) -> Tensor:
    """As `reference.adaln`. One kernel for each span, and one row of D for `1 + scale`."""
    weight, shift, shape = scale.float() + 1, shift.float(), x.shape[-1:]
    if len(spans) == 1:
        return F.layer_norm(x, shape, weight[0], shift[0], eps)
    return torch.cat(
        [F.layer_norm(p, shape, weight[r], shift[r], eps) for r, p in enumerate(x.split(spans, dim=1))], 1
    )


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, spans: Spans) -> Tensor:
    """As `reference.gated_residual`. The sum is float32 and is rounded once."""
    if len(spans) == 1:
        return torch.addcmul(x, y, gate[0]).to(x.dtype)
    out = torch.empty_like(x)
    for r, (o, a, b) in enumerate(
        zip(out.split(spans, dim=1), x.split(spans, dim=1), y.split(spans, dim=1), strict=True)
    ):
        o.copy_(torch.addcmul(a, b, gate[r]))
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rope`."""
    turn = torch.complex(cos, sin)[:, None, :]  # [S, 1, d/2]
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """As `reference.gelu_tanh`. One kernel."""
    return F.gelu(x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """As `reference.gelu`. One kernel."""
    return F.gelu(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `reference.attention`. PyTorch's blocked kernel: scores in float32, never stored."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)
