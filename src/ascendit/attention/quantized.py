"""Attention in a scheme of `ATTENTION_FORMATS`: rotate Q and K, then the kernel of the device.

    attend = quantized_attention("fp8", ops)                          # the Hadamard rotation of msModelSlim
    attend = quantized_attention("fp8", ops, block.attn1.q_rot, block.attn1.k_rot)
    out = attend(q, k, v)                                             # as `reference.attention`

Both are multiplied by the same orthogonal matrix, which changes no score and spreads outliers over the head.
Rotations of a checkpoint are used in every scheme; without them, the schemes that rotate take
`mx.smoothing.rotation`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ascendit.kernels.kernel import Attended, Function
from ascendit.mx.smoothing import rotation
from ascendit.ops.operators import Ops
from ascendit.quant.attention_schemes import ATTENTION_FORMATS


@dataclass(frozen=True, eq=False)
class QuantizedAttention:
    """`call(q, k, v, *, return_lse=False)` as `reference.attention`, quantized."""

    scheme: str
    kernel: Function
    linear: Function
    """`Ops.linear`, so that a twin and a CPU rotate to the same bits."""
    weights: tuple[Tensor, Tensor] | None = None
    """q_rot^T and k_rot^T [d, d], weights of `linear`; None: those of `rotation`, if the scheme rotates."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
        """q [B, S, H, d], k, v [B, L, H, d] -> [B, S, H, d] in q's dtype.

        `return_lse`: a pair of it and the natural log-sum-exp, float32 [B, H, S].
        """
        weights = self.weights
        if weights is None and ATTENTION_FORMATS[self.scheme].rotate:
            weights = (_default_weight(q.shape[-1], q.dtype, q.device),) * 2
        if weights is not None:
            q, k = (self.linear(x, w.to(x.dtype)) for x, w in zip((q, k), weights, strict=True))
        return self.kernel(q, k, v, return_lse=return_lse)


def quantized_attention(
    scheme: str, ops: Ops, q_rot: Tensor | None = None, k_rot: Tensor | None = None
) -> QuantizedAttention:
    """Attention in `scheme` with the kernel of `ops`.

    `q_rot`, `k_rot`: rotations of the checkpoint, [d, d] of a float dtype. Raises EnvironmentProblem
    (E-CAP-01) if this chip does not support the scheme, UsageError (E-USE-01), when called, for a head size
    without a default rotation.
    """
    weights = None
    if q_rot is not None and k_rot is not None:
        weights = q_rot.t().contiguous(), k_rot.t().contiguous()
    return QuantizedAttention(scheme, ops.quantized.attention(scheme).call, ops.linear, weights)


@functools.cache
def _default_weight(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return rotation(size).to(dtype).t().contiguous().to(device)
