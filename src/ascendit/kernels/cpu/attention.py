"""Dense attention on a CPU, in PyTorch or in C++ for bfloat16 (`native/attention.cpp`).

The C++ kernel uses the BF16 instructions of the processor, at nine tenths of the rate of a BF16 matmul.
float32, float16 and other head sizes use PyTorch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.device.attention_kernels import ATTENTION_KERNELS, PROBABILITIES
from ascendit.kernels import reference
from ascendit.kernels.cpu.elementwise import all_bf16, pointers
from ascendit.kernels.kernel import Attended, Kernel
from ascendit.native.build import Built, declared, native

LIMITS = ATTENTION_KERNELS["cpu"]


def list_kernels() -> tuple[Kernel, ...]:
    """The attention kernels, best first."""
    fused = Kernel("attention", "cpu", attention, "cpu: fused PyTorch kernel", name="sdpa")
    built = library()
    if built.library is None:
        return (fused,)
    reason = f"native: {built.reason}, for BF16 activations"
    return Kernel("attention", "cpu", compiled, reason, "native/attention.cpp", name="cpu"), fused


def library() -> Built:
    """The compiled `native/attention.cpp`, or why there is none."""
    return declared(native(LIMITS.source), {"attention_bf16": "ppppppiiiiii"})


def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `reference.attention`, with PyTorch's blocked kernel: scores are float32 and never stored."""
    if not return_lse:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)
    if not (q.numel() and k.numel()):  # this operator would end the process
        return reference.attention(q, k, v, return_lse=True)
    heads = [(t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2) for t in (q, k, v)]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)
    return out.transpose(1, 2), lse


def compiled(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `reference.attention`, up to BF16 rounding; `attention` if these tensors do not fit the C++."""
    if not fits_attention(q, k, v):
        return attention(q, k, v, return_lse=return_lse)
    return attend_native(_attention_bf16(), q, k, v, return_lse=return_lse)


def attention_with_sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, S, H, d] that fit the C++ -> the output; and, float32 [B, H, S], the largest score of each query
    and the sum of exp(score - largest).
    """
    return _with_sums(_attention_bf16(), q, k, v)


def attend_native(call: Any, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool) -> Attended:
    """`run_native` of bfloat16 [B, S, H, d]; `return_lse`: also the natural log-sum-exp, float32 [B, H, S].

    Raises MemoryError like `run_native`.
    """
    if not return_lse:
        return run_native(call, q, k, v)
    out, top, total = _with_sums(call, q, k, v)
    return out, top + total.log()


def _attention_bf16() -> Any:
    return cast(Any, library().library).attention_bf16


def _with_sums(call: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, s, h, _ = q.shape
    sums = torch.empty(2, b, h, s)
    return run_native(call, q, k, v, sums), *sums


def run_native(call: Any, q: Tensor, k: Tensor, v: Tensor, sums: Tensor | None = None) -> Tensor:
    """Run a C++ attention on each sample of bfloat16 [B, S, H, d]; `sums`: float32 [2, B, H, S], written.

    Raises MemoryError if packed keys and values do not fit.
    """
    (b, s, h, d), length = q.shape, k.shape[1]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    parts, threads = 1 if PROBABILITIES.get() == "one" else 2, torch.get_num_threads()
    for i in range(b):
        statistics = (None, None) if sums is None else pointers(*sums[:, i])
        addresses = pointers(q[i], k[i], v[i], out[i])
        if not call(*addresses, *statistics, s, length, h, d, parts, threads):
            raise MemoryError(f"no memory for the packed keys and values of {length:,} tokens")
    return out


def fits_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the C++ takes these q [B, S, H, d] and k, v [B, L, H, d]: bfloat16, and `LIMITS`."""
    d = q.shape[3]
    head_fits = d % LIMITS.head_multiple == 0 and d <= (LIMITS.largest_head or d)
    return all_bf16(q, k, v) and head_fits and k.numel() > 0
