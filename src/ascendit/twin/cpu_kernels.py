"""Arithmetic of the twin's dense operators, with the kernels of `kernels/cpu`.

The CPU kernels round where the chips do, so a model makes the same frames on the CPU and on the twin, and a
difference between the two is a bug in the NPU path. Both are tested against plain PyTorch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ascendit.kernels.cpu import attention, elementwise
from ascendit.kernels.cpu import linear as cpu_linear
from ascendit.kernels.kernel import Activation, Function, QuantLinearKernel
from ascendit.mx.codec import Encoded
from ascendit.quant.schemes import LINEAR_SCHEMES

_QUERIES = 256
_CPU = torch.device("cpu")


@functools.cache
def _cpu_kernel(operator: str) -> Function:
    listed = (*elementwise.list_kernels(), *attention.list_kernels())
    return next(k.call for k in listed if k.operator == operator)


@functools.cache
def _cpu_linear_kernels() -> Mapping[str, QuantLinearKernel]:
    return {k.operator: k for k in cpu_linear.list_kernels(None)}


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) gamma in x's dtype. gamma [D]."""
    return _cpu_kernel("rms_norm")(x, gamma, epsilon)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Layer norm over the last axis, in x's dtype. weight, bias [D] in x's dtype or float32."""
    affine = (t if t is None else t.to(torch.float32) for t in (weight, bias))
    return _cpu_kernel("layer_norm")(x, *affine, epsilon)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    """layer_norm(x) (1 + scale) + shift in x's dtype. x [B, S, D]; scale, shift [B, 1, D]."""
    call, length = _cpu_kernel("adaln"), (x.shape[1],)
    return torch.cat([call(x[i : i + 1], scale[i], shift[i], length, epsilon) for i in range(len(x))])


def gelu(x: Tensor, approximate: str) -> Tensor:
    """Exact (`none`) or tanh, of x [..], in x's dtype."""
    return _cpu_kernel("gelu_tanh" if approximate == "tanh" else "gelu")(x)


def can_attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether `attend` takes these q, k, v [B, N, S, D]: same head counts, scale D^-0.5, supported dtype."""
    same_heads = q.shape[1] == k.shape[1] and q.shape[3] == v.shape[3]
    if not same_heads or not math.isclose(scale, q.shape[3] ** -0.5, rel_tol=1e-6):
        return False
    compiled = attention.library().library is not None
    return q.dtype == torch.float32 or (compiled and attention.fits_attention(*_heads_last(q, k, v)))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, S, D] -> output in q's dtype; largest score and sum of exponentials, float32 [B, N, S]."""
    heads = _heads_last(q, k, v)
    if q.dtype == torch.float32:
        return attention.attention(*heads).transpose(1, 2), *_sums(q, k, scale)
    out, top, total = attention.attention_with_sums(*heads)
    return out.transpose(1, 2), top, total


def _heads_last(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def _sums(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    tops, totals = [], []
    for queries in q.to(torch.float32).split(_QUERIES, 2):
        scores = (queries @ k.to(torch.float32).mT) * scale
        tops.append(scores.amax(-1))
        totals.append(torch.exp(scores - tops[-1].unsqueeze(-1)).sum(-1))
    return torch.cat(tops, 2), torch.cat(totals, 2)


def linear(x: Encoded, weight: Encoded, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [M, K] @ weight [N, K] transposed + bias [N] -> [M, N]: float32 sums, rounded once."""
    mixed = (x.format, weight.format) == ("mxfp8", "mxfp4")
    scheme = LINEAR_SCHEMES["w4a8" if mixed else weight.format]
    kernel = _cpu_linear_kernels()[scheme.name]
    m, k = x.shape
    a = Activation(scheme, (m,), k, dtype, x.qdata, x.scale, x.dual_scale)
    return kernel.call(a, kernel.prepare(weight, bias, _CPU))
