"""The kernels of a CUDA GPU: PyTorch's own, and dense operators in Triton if they are correct on that GPU.

Contracts are in `kernels/reference.py`. The Triton operators take one pass over memory instead of five to
ten. PyTorch has no fused kernel for them: its CUDA layer norm and RMS norm need weights in the dtype of the
hidden states, and a BF16 weight would round 1 + scale.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ascendit.device.device import Device
from ascendit.kernels import reference
from ascendit.kernels.cpu.elementwise import PHASES, gelu, gelu_tanh
from ascendit.kernels.kernel import Function, Kernel, Wish
from ascendit.kernels.reference import Spans
from ascendit.ops.cuda import attention, linear, triton_kernels
from ascendit.ops.cuda.triton_linear import dense_rows, launch, triton_steps

log = logging.getLogger("ascendit")
ERROR_LIMIT = 4e-3
"""Largest relative error of a correct operator on bfloat16 hidden states."""

_CALLS: tuple[Function, ...] = (gelu_tanh, gelu, *PHASES)
PYTORCH = tuple(Kernel(f.__name__, "cuda", f, "cuda: fused PyTorch kernel") for f in _CALLS)
"""Operators with a fused PyTorch kernel, called as on a CPU."""


def list_kernels(device: Device, wish: Wish) -> Sequence[Kernel]:
    """All kernels, the best of each operator first."""
    return (
        *triton_kernels_on(device.torch_name),
        *PYTORCH,
        *attention.list_kernels(device, wish),
        *linear.list_kernels(device, wish.emulate),
    )


def triton_kernels_on(device: str) -> tuple[Kernel, ...]:
    """The dense operators in Triton. Before its first use each must reproduce `reference` on this GPU."""
    fast, version = triton_steps()
    if fast is None or not torch.cuda.is_available():
        return ()
    reason = f"cuda: one pass over memory by Triton {version}"
    return tuple(
        Kernel(f.__name__, "cuda", f, reason, "Triton", missing=partial(problem_of_operator, f, device))
        for f in (rms_norm, layer_norm, adaln, gated_residual, rope)
    )


@functools.cache
def problem_of_operator(function: Function, device: str) -> str:
    """Describe and log how an operator fails on a device; "" if it reproduces `reference`."""
    args = _sample(device)[function.__name__]
    expected = getattr(reference, function.__name__)(*args).double()
    problem = linear.problem_of(lambda: function(*args), expected, ERROR_LIMIT)
    if problem:
        log.info("%s on %s does not use Triton: %s", function.__name__, device, problem)
    return problem


def _sample(device: str) -> dict[str, tuple[Any, ...]]:
    """Operator -> arguments, with bfloat16 hidden states. Uses its own generator."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, y, heads = (random(1, 9, 192).to(torch.bfloat16) for _ in range(3))
    rows, spans = [random(2, 192) for _ in range(3)], (2, 7)
    return {
        "rms_norm": (x, rows[0][0], 1e-6),
        "layer_norm": (x, rows[0][0], rows[1][0], 1e-6),
        "adaln": (x, rows[0], rows[1], spans, 1e-6),
        "gated_residual": (x, y, rows[2], spans),
        "rope": (heads.unflatten(2, (6, 32)), random(9, 16), random(9, 16)),
    }


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    d = x.shape[-1]
    rows = _flat(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        triton_kernels.rms_norm, (rows.shape[0],), rows, weight.contiguous(), out, d, rows.stride(0), eps,
        **_size(d),
    )  # fmt: skip
    return out


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.layer_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d = x.shape[-1]
    rows = _flat(x)
    _normalize(rows[None], weight, bias, 0.0, eps, out.view(1, -1, d))
    return out


def adaln(x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float) -> Tensor:
    """As `reference.adaln`, with one kernel per span."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for r, (segment, to) in enumerate(zip(x.split(spans, dim=1), out.split(spans, dim=1), strict=True)):
        _normalize(segment, scale[r], shift[r], 1.0, eps, to)
    return out


def _normalize(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, one: float, eps: float, out: Tensor
) -> None:
    """out = layer_norm(x) * (one + scale) + shift. x and out [B, S, D]; the tokens of out are contiguous."""
    x = dense_rows(x)
    batch, length, d = x.shape
    launch(
        triton_kernels.layer_norm, (length, batch), x, _ptr(scale, x), _ptr(shift, x), out, d, x.stride(0),
        x.stride(1), out.stride(0), eps, SCALE=scale is not None, ONE=one, SHIFT=shift is not None,
        **_size(d),
    )  # fmt: skip


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, spans: Spans) -> Tensor:
    """As `reference.gated_residual`, with one kernel per span."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d = x.shape[-1]
    for r, (a, b, to) in enumerate(
        zip(x.split(spans, dim=1), y.split(spans, dim=1), out.split(spans, dim=1), strict=True)
    ):
        a, b = dense_rows(a), dense_rows(b)
        launch(
            triton_kernels.gated_residual, (a.shape[1], a.shape[0]), a, b, gate[r].contiguous(), to, d,
            a.stride(0), a.stride(1), b.stride(0), b.stride(1), to.stride(0), **_size(d),
        )  # fmt: skip
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rope`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat = dense_rows(x.flatten(2))
    pairs = flat.shape[2] // 2
    launch(
        triton_kernels.rope, (x.shape[1], x.shape[0]), flat, cos.contiguous(), sin.contiguous(), out, pairs,
        cos.shape[1], flat.stride(0), flat.stride(1), out.stride(0), **_size(pairs),
    )  # fmt: skip
    return out


def _flat(x: Tensor) -> Tensor:
    """x [.., D] as [rows, D], without a copy if the strides allow it."""
    return dense_rows(x.reshape(-1, x.shape[-1]))


def _ptr(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A launch needs a pointer even for an absent tensor."""
    return other if tensor is None else tensor.contiguous()


def _size(elements: int) -> dict[str, Any]:
    """Block size of one program, and its warps: 16 to 32 elements per thread."""
    block = 1 << (elements - 1).bit_length()
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 1024))}
