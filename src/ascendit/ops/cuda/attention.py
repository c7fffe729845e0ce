"""Attention on a CUDA GPU: PyTorch's backends, the flash-attn package, and quantized attention in Triton.

Every function has the signature of `kernels.reference.attention`, with q [B, S, H, d]. All backends return
the natural logarithm of the sum of exponentials, in these shapes:

| operator                                  | log-sum-exp float32                          |
|-------------------------------------------|----------------------------------------------|
| aten::_scaled_dot_product_flash_attention     | [B, H, S]                                |
| aten::_scaled_dot_product_cudnn_attention     | [B, H, S, 1]                             |
| aten::_scaled_dot_product_efficient_attention | [B, H, S rounded up to a multiple of 32] |
| flash_attn.flash_attn_func                    | [B, H, S]                                |

Before its first use each kernel must reproduce the reference on this GPU. One that cannot is skipped, and the
reason of the one used instead says so.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ascendit.device.attention_kernels import ATTENTION_KERNELS
from ascendit.device.device import Device
from ascendit.kernels import reference
from ascendit.kernels.kernel import Attended, Function, Kernel, Wish
from ascendit.kernels.quantized_attention import emulated, emulated_kernels, operator_of, qk_int8
from ascendit.ops.cuda import quantized_attention
from ascendit.ops.cuda.linear import MIN_CAPABILITY, CudaCard, problem_of
from ascendit.ops.cuda.triton_linear import triton_steps
from ascendit.quant.attention_schemes import ATTENTION_FORMATS

log = logging.getLogger("ascendit")

FP8_CAPABILITY = (8, 9)
"""Lowest compute capability that multiplies e4m3."""
ERROR_LIMIT, LSE_LIMIT = 5e-3, 1e-3
"""Largest relative errors of a correct kernel on bfloat16 q, k and v, and of its log-sum-exp."""


# ---- dense kernels ------------------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `reference.attention`, in the backend that PyTorch prefers for these inputs on this GPU.

    With `return_lse` the same backend is called directly; if it returns no log-sum-exp, the reference.
    """
    if not return_lse:
        return _plain(q, k, v)
    choice = SDPBackend(torch._fused_sdp_choice(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
    return _WITH_LSE.get(choice, reference.attention)(q, k, v, return_lse=True)


def sdpa_flash(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `reference.attention`, by PyTorch's FlashAttention."""
    return _backend(SDPBackend.FLASH_ATTENTION, q, k, v, return_lse)


def sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `reference.attention`, by cuDNN's attention."""
    return _backend(SDPBackend.CUDNN_ATTENTION, q, k, v, return_lse)


def sdpa_efficient(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `reference.attention`, by PyTorch's memory-efficient attention."""
    return _backend(SDPBackend.EFFICIENT_ATTENTION, q, k, v, return_lse)


def flash(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `reference.attention`, by `flash_attn_func` of the flash-attn package."""
    call = importlib.import_module("flash_attn").flash_attn_func
    if not return_lse:
        out: Tensor = call(q, k, v)
        return out
    out, lse, _ = call(q, k, v, return_attn_probs=True)
    return out, lse


_WITH_LSE: dict[SDPBackend, Function] = {
    SDPBackend.FLASH_ATTENTION: sdpa_flash,
    SDPBackend.CUDNN_ATTENTION: sdpa_cudnn,
    SDPBackend.EFFICIENT_ATTENTION: sdpa_efficient,
}


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _backend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Attended:
    """Attention in one of PyTorch's backends; with the log-sum-exp through its own operator."""
    if not return_lse:
        with sdpa_kernel(backend):
            return _plain(q, k, v)
    inputs = tuple(t.transpose(1, 2) for t in (q, k, v))
    if backend == SDPBackend.FLASH_ATTENTION:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(*inputs)[:2]
    elif backend == SDPBackend.CUDNN_ATTENTION:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*inputs, None, True)[:2]
        lse = lse.view(lse.shape[:3])
    else:
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(*inputs, None, True)[:2]
        lse = lse[:, :, : q.shape[1]]
    return out.transpose(1, 2), lse


# ---- trials -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """The requirements of a kernel, and the attention that it must reproduce."""

    expected: Function
    capability: tuple[int, int] = MIN_CAPABILITY
    nvidia: bool = False
    triton: bool = False

    def problem(self, call: Function, card: CudaCard | None, device: str) -> str:
        """Why `call` is not used on `device`, "" if it is correct or there is no GPU to try it on."""
        if card is None:
            return ""
        if self.nvidia and card.hip:
            return "needs an NVIDIA GPU"
        if not card.hip and card.capability < self.capability:
            return "needs compute capability {}.{}".format(*self.capability)
        if self.triton and triton_steps()[0] is None:
            return triton_steps()[1]
        return problem_of_attention(call, self.expected, device)


@functools.cache
def problem_of_attention(call: Function, expected: Function, device: str) -> str:
    """Describe and log how a kernel fails on a device; "" if it reproduces `expected`, with log-sum-exp."""
    q, k, v = _sample()
    out, lse = expected(q, k, v, return_lse=True)
    on_device: Any = [t.to(device) for t in (q, k, v)]
    problem = problem_of(lambda: call(*on_device), out.double(), ERROR_LIMIT)
    for i, (right, limit) in enumerate(((out, ERROR_LIMIT), (lse, LSE_LIMIT))):
        problem = problem or problem_of(partial(_part, call, on_device, i), right.double(), limit)
    if problem:
        log.info(
            "attention kernel on %s is not used: %s: %s", device, getattr(call, "__name__", call), problem
        )
    return problem


def _part(call: Function, inputs: Sequence[Tensor], i: int) -> Tensor:
    part: Tensor = call(*inputs, return_lse=True)[i]
    return part


def _sample() -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v bfloat16 with several blocks of odd lengths. Uses its own generator."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, n, 2, 128, generator=generator).to(torch.bfloat16) for n in (157, 333, 333))
    return q, k + 1, v


# ---- lists --------------------------------------------------------------------------------------

_DENSE: tuple[tuple[Function, str, Trial], ...] = (
    (sdpa, "PyTorch's choice for each shape", Trial(reference.attention, (0, 0))),
    (sdpa_flash, "PyTorch's FlashAttention", Trial(reference.attention)),
    (sdpa_cudnn, "cuDNN's attention through PyTorch", Trial(reference.attention, nvidia=True)),
    (sdpa_efficient, "PyTorch's memory-efficient attention", Trial(reference.attention)),
    (flash, "the flash-attn package", Trial(reference.attention)),
)
"""Kernel, description and trial."""


def list_kernels(device: Device, wish: Wish) -> Sequence[Kernel]:
    """The attention kernels, dense and quantized, the best of each operator first."""
    card, name = CudaCard.from_device(device), device.torch_name
    dense = tuple(
        _kernel("attention", call.__name__, call, f"cuda: {about}", trial, card, name)
        for call, about, trial in (_DENSE if card else _DENSE[:1])
    )
    return dense + (_quantized(card, name) if card else ()) + emulated_kernels("cuda", sdpa)


def _kernel(
    operator: str, name: str, call: Function, reason: str, trial: Trial, card: CudaCard | None, device: str
) -> Kernel:
    missing = partial(trial.problem, call, card, device)
    on_request = operator == "attention" and ATTENTION_KERNELS[name].on_request
    return Kernel(
        operator, "cuda", call, reason, "a GPU on which it is correct", None, name, on_request, missing
    )


@functools.cache
def _quantized(card: CudaCard, device: str) -> tuple[Kernel, ...]:
    """`qk_int8`, and the kernels of the schemes on the tensor cores."""
    fp8 = not card.hip and card.capability >= FP8_CAPABILITY
    by = f"by Triton {triton_steps()[1]}"
    scores = {"int8": "int8 scores", "fp8": "e4m3 scores" if fp8 else "scores of e4m3 values in BF16"}
    int8 = quantized_attention.qk_int8, f"cuda: int8 scores {by}"
    trial = Trial(qk_int8, nvidia=True, triton=True)
    kernels = [_kernel("attention", "qk_int8", *int8, trial, card, device)]
    for scheme in ATTENTION_FORMATS:
        slow, native = emulated(scheme, sdpa), scheme in scores
        trial = Trial(emulated(scheme, reference.attention), nvidia=native, triton=native)
        if native:
            call, reason = quantized_attention.quantized(scheme, fp8, slow), f"native: {scores[scheme]} {by}"
        else:
            call = quantized_attention.decoded(scheme, sdpa, slow)
            reason = "emulated: q, k and v decoded to BF16, PyTorch's attention"
        kernels.append(_kernel(operator_of(scheme), scheme, call, reason, trial, card, device))
    return tuple(kernels)
