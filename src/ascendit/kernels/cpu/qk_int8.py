"""Attention with int8 scores on a CPU: `native/attention_int8.cpp`, only on request.

Queries and keys are quantized per token and head, with the mean over tokens subtracted from the keys, so the
product of queries and keys takes half as long as in BF16. Values and probabilities are BF16.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ascendit.device.attention_kernels import ATTENTION_KERNELS
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.kernels.cpu.attention import attend_native
from ascendit.kernels.cpu.elementwise import all_bf16
from ascendit.kernels.kernel import Attended, Kernel
from ascendit.native.build import Built, declared, native
from ascendit.option_text import option

LIMITS = ATTENTION_KERNELS["qk_int8"]


@functools.cache
def library() -> Built:
    """The compiled kernel, or the reason for its absence. The first call compiles it."""
    return declared(native(LIMITS.source), {"attention_qk_int8": "ppppppiiiiii"})


def missing() -> str:
    """Why this machine has no such kernel, "" if it has."""
    built = library()
    return "" if built.library is not None else built.reason


def kernel() -> Kernel:
    """The kernel; nothing is compiled before it is chosen."""
    return Kernel(
        "attention",
        "cpu",
        attention,
        "native: scores from int8 queries and keys",
        "native/attention_int8.cpp",
        name="qk_int8",
        on_request=True,
        missing=missing,
    )


def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `quantized_attention.qk_int8`, up to BF16 rounding of the probabilities.

    q [B, S, H, d], k, v [B, L, H, d] bfloat16 -> [B, S, H, d]. Raises UsageError (E-USE-01) for other dtypes
    and head sizes, and EnvironmentProblem (E-CAP-01) if the processor lacks instructions, or a compiler.
    """
    return attend_native(_checked(q, k, v), q, k, v, return_lse=return_lse)


def _checked(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The compiled function. Raises the errors of `attention`."""
    d, step, most = q.shape[3], LIMITS.head_multiple, LIMITS.largest_head or 0
    if not all_bf16(q, k, v) or d % step or d > most or not k.shape[1]:
        dtypes = "/".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in (q, k, v)))
        raise UsageError(
            f"attention qk_int8 of {k.shape[1]} keys, {dtypes}, head size {d}",
            needs=f"bfloat16, keys, and a head size of {step} to {most} in steps of {step}",
            fix=option("attention", "sdpa"),
        )
    built = library()
    if built.library is None:
        raise EnvironmentProblem(
            f"attention qk_int8: {built.reason}",
            needs="AVX-512 with BF16, VNNI and VBMI, and a C++ compiler",
            fix=option("attention", "sdpa"),
            code="E-CAP-01",
        )
    return built.library.attention_qk_int8
