"""Norms, modulation, RoPE and GELU on a CPU: the operators of `reference` in fewer passes over memory.

In PyTorch: the CPU layer norm accepts BF16 hidden states with float32 weights in one kernel, AdaLN is a layer
norm with the weight `1 + scale`, and a rotation is one complex product. In C++ (`native/elementwise.cpp`),
for BF16: one pass over memory, computed in float32 and rounded once; other dtypes use PyTorch.

The twin computes with these too (`twin/cpu_kernels.py`), so any difference between a video of the CPU path
and one of the Ascend path is due to the path, not to the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.kernels.kernel import Function, Kernel, in_dtype
from ascendit.kernels.reference import Spans
from ascendit.native.build import declared, native

SOURCE = "elementwise"


def list_kernels() -> tuple[Kernel, ...]:
    """The kernels, the best of each operator first. Modulation rows are rounded as on an NPU."""
    reason = "cpu: fused PyTorch kernel"
    fused = (Kernel(f.__name__, "cpu", f, reason, prepare=PREPARED_ROWS.get(f.__name__)) for f in FUSED)
    return (*_compiled_kernels(), *fused)


def _compiled_kernels() -> Iterator[Kernel]:
    """The C++ kernels; none without a compiler."""
    signatures = {f"{operator}_bf16": types for operator, (*_, types) in COMPILED.items()}
    built = declared(native(SOURCE), signatures, None)
    if built.library is None:
        return
    reason = f"native: {built.reason}, for BF16 activations"
    for operator, (compiled, fallback, tensors, _) in COMPILED.items():
        call = _for_bf16(compiled, fallback, tensors, getattr(built.library, f"{operator}_bf16"))
        yield Kernel(operator, "cpu", call, reason, f"native/{SOURCE}.cpp", PREPARED_ROWS.get(operator))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`, in two passes over x."""
    return rms_scale(x, mean_square(x), weight, eps)


def mean_square(x: Tensor) -> Tensor:
    """As `reference.mean_square`."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1])


def rms_scale(x: Tensor, mean_square: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_scale`."""
    out: Tensor = (x * (mean_square + eps).rsqrt_()).mul_(weight)
    return out.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.layer_norm`, in one kernel."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float) -> Tensor:
    """As `reference.adaln`, with one kernel per span."""
    weight, shift, shape = scale.float() + 1, shift.float(), x.shape[-1:]
    if len(spans) == 1:
        return F.layer_norm(x, shape, weight[0], shift[0], eps)
    return torch.cat(
        [F.layer_norm(p, shape, weight[r], shift[r], eps) for r, p in enumerate(x.split(spans, dim=1))], 1
    )


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, spans: Spans) -> Tensor:
    """As `reference.gated_residual`: summed in float32 and rounded once."""
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
    rotation = torch.complex(cos, sin)[:, None, :]  # [S, 1, d/2]
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """As `reference.gelu_tanh`, in one kernel."""
    return F.gelu(x, approximate="tanh")


def gelu(x: Tensor) -> Tensor:
    """As `reference.gelu`, in one kernel."""
    return F.gelu(x)


PHASES: tuple[Function, ...] = (mean_square, rms_scale)
FUSED: tuple[Function, ...] = (rms_norm, *PHASES, layer_norm, adaln, gated_residual, rope, gelu_tanh, gelu)
PREPARED_ROWS = {"adaln": in_dtype, "gated_residual": in_dtype}
"""Operator -> `Kernel.prepare` of its modulation rows."""


def all_bf16(*tensors: Tensor) -> bool:
    """Whether all tensors ([..]) are bfloat16 on the CPU."""
    return all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)


def pointers(*tensors: Tensor) -> tuple[int, ...]:
    """Addresses of tensors [..] of any dtype."""
    return tuple(t.data_ptr() for t in tensors)


def _gelu_tanh(call: Any, x: Tensor) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    call(*pointers(x, out), x.numel(), torch.get_num_threads())
    return out


def _rms_norm(call: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.contiguous(), weight.float().contiguous()
    out, d = torch.empty_like(x), x.shape[-1]
    call(*pointers(x, weight, out), x.numel() // d, d, torch.get_num_threads(), eps)
    return out


def _rope(call: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty_like(x)
    for sample, to in zip(x, out, strict=True):
        call(*pointers(sample, cos, sin, to), *x.shape[1:], torch.get_num_threads())
    return out


def _gated_residual(call: Any, x: Tensor, y: Tensor, gate: Tensor, spans: Spans) -> Tensor:
    x, y, gate = x.contiguous(), y.contiguous(), gate.float().contiguous()
    out, d = torch.empty_like(x), x.shape[-1]
    for a, b, to in zip(x, y, out, strict=True):
        start = 0
        for row, length in zip(gate, spans, strict=True):
            call(*pointers(a[start:], b[start:], row, to[start:]), length, d, torch.get_num_threads())
            start += length
    return out


COMPILED: dict[str, tuple[Function, Function, int, str]] = {
    "rms_norm": (_rms_norm, rms_norm, 1, "pppiiif"),
    "gated_residual": (_gated_residual, gated_residual, 2, "ppppiii"),
    "rope": (_rope, rope, 1, "ppppiiii"),
    "gelu_tanh": (_gelu_tanh, gelu_tanh, 1, "ppii"),
}
"""Operator -> compiled function, PyTorch function for other dtypes, number of leading arguments that must be
BF16, and the signature of `<operator>_bf16` for `declared`."""


def _for_bf16(compiled: Function, fallback: Function, tensors: int, call: Any) -> Function:
    """`compiled` with the C function `call` if the first `tensors` arguments are BF16, else `fallback`."""

    def chosen(*args: Any) -> Tensor:
        return compiled(call, *args) if all_bf16(*args[:tensors]) else fallback(*args)

    return chosen
