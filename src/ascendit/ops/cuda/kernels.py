"""The kernels of a CUDA card: PyTorch's own, and dense operators by Triton where they are right on that card.

Contracts: `kernels/reference.py`. What it does in five to ten passes over memory, Triton does in one. PyTorch
has no fused kernel for these: its layer norm and RMS norm on CUDA want weights in the dtype of the hidden
states, and a weight of BF16 rounds 1 + scale.
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
from ascendit.kernels.cpu.attention import attention
from ascendit.kernels.cpu.elementwise import PHASES, gelu, gelu_tanh
from ascendit.kernels.kernel import Function, Kernel, Wish
from ascendit.kernels.reference import Spans
from ascendit.ops.cuda import linear, triton_kernels
from ascendit.ops.cuda.triton_linear import dense_rows, launch, triton_steps

log = logging.getLogger("ascendit")
ERROR_LIMIT = 4e-3
"""Largest relative error of an operator on bfloat16 tokens that is right."""

_CALLS: tuple[Function, ...] = (gelu_tanh, gelu, *PHASES, attention)
PYTORCH = tuple(Kernel(f.__name__, "cuda", f, "cuda: fused PyTorch kernel") for f in _CALLS)
"""PyTorch has a fused kernel for these, called as on a CPU."""


def list_kernels(device: Device, wish: Wish) -> Sequence[Kernel]:
    """The best of each operator first."""
    return (*triton_kernels_on(device.torch_name), *PYTORCH, *linear.list_kernels(device, wish.emulate))


def triton_kernels_on(place: str) -> tuple[Kernel, ...]:
    """Each is tried when it is chosen: it must give the numbers of `reference` on that very card."""
    fast, version = triton_steps()
    if fast is None or not torch.cuda.is_available():
        return ()
    reason = f"cuda: one pass over memory by Triton {version}"
    return tuple(
        Kernel(f.__name__, "cuda", f, reason, "Triton", missing=partial(problem_of_operator, f, place))
        for f in (rms_norm, layer_norm, adaln, gated_residual, rope)
    )


@functools.cache
def problem_of_operator(function: Function, place: str) -> str:
    """What is wrong with an operator on a device, "" if it gives the numbers of `reference`. Logged."""
    given = _sample(place)[function.__name__]
    wanted = getattr(reference, function.__name__)(*given).double()
    found = linear.problem_of(lambda: function(*given), wanted, ERROR_LIMIT)
    if found:
        log.info("%s on %s is not computed by Triton: %s", function.__name__, place, found)
    return found


def _sample(place: str) -> dict[str, tuple[Any, ...]]:
    """Operator -> arguments, tokens in bfloat16. The user's seed is not touched."""
    draw = torch.Generator().manual_seed(5)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(place)

    x, y, heads = (numbers(1, 9, 192).to(torch.bfloat16) for _ in range(3))
    rows, spans = [numbers(2, 192) for _ in range(3)], (2, 7)
    return {
        "rms_norm": (x, rows[0][0], 1e-6),
        "layer_norm": (x, rows[0][0], rows[1][0], 1e-6),
        "adaln": (x, rows[0], rows[1], spans, 1e-6),
        "gated_residual": (x, y, rows[2], spans),
        "rope": (heads.unflatten(2, (6, 32)), numbers(9, 16), numbers(9, 16)),
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
    """As `reference.adaln`. One kernel for each span."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for r, (part, to) in enumerate(zip(x.split(spans, dim=1), out.split(spans, dim=1), strict=True)):
        _normalize(part, scale[r], shift[r], 1.0, eps, to)
    return out


def _normalize(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, one: float, eps: float, out: Tensor
) -> None:
    """x [B, S, D] into out [B, S, D], whose tokens lie side by side."""
    x = dense_rows(x)
    batch, length, d = x.shape
    launch(
        triton_kernels.layer_norm, (length, batch), x, _or(scale, x), _or(shift, x), out, d, x.stride(0),
        x.stride(1), out.stride(0), eps, SCALE=scale is not None, ONE=one, SHIFT=shift is not None,
        **_size(d),
    )  # fmt: skip


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, spans: Spans) -> Tensor:
    """As `reference.gated_residual`. One kernel for each span."""
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
    tokens = dense_rows(x.flatten(2))
    pairs = tokens.shape[2] // 2
    launch(
        triton_kernels.rope, (x.shape[1], x.shape[0]), tokens, cos.contiguous(), sin.contiguous(), out, pairs,
        cos.shape[1], tokens.stride(0), tokens.stride(1), out.stride(0), **_size(pairs),
    )  # fmt: skip
    return out


def _flat(x: Tensor) -> Tensor:
    """[rows, D], a view where the strides allow it."""
    return dense_rows(x.reshape(-1, x.shape[-1]))


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer is needed, though the kernel will not use it."""
    return other if tensor is None else tensor.contiguous()


def _size(numbers: int) -> dict[str, Any]:
    """Numbers of one program, and warps: 16 to 32 of them for each thread."""
    block = 1 << (numbers - 1).bit_length()
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 1024))}
