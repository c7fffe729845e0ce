"""Dense attention on a CPU, in PyTorch or in C++ for bfloat16 (`native/attention.cpp`).

PyTorch's blocked attention takes 34 % of the time of a denoiser's forward on a CPU for 12.5 % of its FLOPs;
the C++ kernel uses the BF16 instructions of the processor. float32 and other head sizes use PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.kernels.cpu import qk_int8
from ascendit.kernels.cpu.elementwise import all_bf16, pointers
from ascendit.kernels.kernel import Function, Kernel
from ascendit.native.build import declared, native

LARGEST_HEAD = 256


def list_kernels() -> tuple[Kernel, ...]:
    """The attention kernels, best first."""
    fused = Kernel("attention", "cpu", attention, "cpu: fused PyTorch kernel", name="sdpa")
    built = declared(native("attention"), {"attention_bf16": "ppppppiiiiii"}, None)
    if built.library is None:
        return fused, qk_int8.kernel()
    reason = f"native: {built.reason}, for BF16 activations"
    compiled = _compiled(built.library.attention_bf16)
    cpp = Kernel("attention", "cpu", compiled, reason, "native/attention.cpp", name="cpu")
    return cpp, fused, qk_int8.kernel()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `reference.attention`, with PyTorch's blocked kernel: scores are float32 and never stored."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _compiled(call: Any) -> Function:
    def compiled(q: Tensor, k: Tensor, v: Tensor, sums: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """As `reference.attention`, up to BF16 rounding.

        `sums`: two float32 outputs [B, H, S], written if `fits_attention`: the largest score of each query,
        and the sum of exp(score - largest).
        """
        if not fits_attention(q, k, v):
            return attention(q, k, v)
        (b, s, h, d), length = q.shape, k.shape[1]
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        for i in range(b):
            stats = pointers(*(t[i] for t in sums)) if sums else (None, None)
            call(*pointers(q[i], k[i], v[i], out[i]), *stats, s, length, h, d, 2, torch.get_num_threads())
        return out

    return compiled


def fits_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the C++ attention supports these bfloat16 [B, S, H, d]: d a multiple of 32, at most 256."""
    d = q.shape[3]
    return all_bf16(q, k, v) and not d % 32 and d <= LARGEST_HEAD and math.prod(k.shape) > 0
