"""CPU operators on BF16 tokens in C++ (`native/*.cpp`): one pass over memory, float32 inside, rounded once.

What the sources do not cover (float32 tokens, odd head sizes, no compiler) goes to `kernels/cpu/elementwise.py`.
PyTorch's blocked attention takes 34 % of a denoiser's forward on a CPU for 12.5 % of its work; the one
here runs on the processor's BF16 products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascendit.kernels.cpu import elementwise as cpu
from ascendit.kernels.reference import Spans
from ascendit.native.build import Built, declared, native

SOURCES = {
    "rms_norm": "elementwise",
    "gated_residual": "elementwise",
    "rope": "elementwise",
    "gelu_tanh": "elementwise",
    "attention": "attention",
}
"""Operator -> source file."""
SIGNATURES = {
    "rms_norm": "pppiif",
    "gated_residual": "ppppii",
    "rope": "ppppiii",
    "gelu_tanh": "ppi",
    "attention": "ppppppiiii",
}
"""Operator -> arguments of its `<operator>_bf16`, as `declared` takes them."""
LARGEST_HEAD = 256


def forms() -> dict[str, tuple[Callable[..., Tensor], str]]:
    """Operator -> (function, reason) for those whose source could be compiled here."""
    built = {name: native(source) for name, source in SOURCES.items()}
    return {n: (_bound(n, b), b.reason) for n, b in built.items() if b.library is not None}


def _bound(name: str, built: Built) -> Callable[..., Tensor]:
    symbol = f"{name}_bf16"
    call = getattr(declared(built, {symbol: SIGNATURES[name]}, None).library, symbol)
    make: Callable[[Any], Callable[..., Tensor]] = globals()[f"_{name}"]
    return make(call)


def _ready(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)


def _at(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in tensors)


def _gelu_tanh(call: Any) -> Callable[..., Tensor]:
    def gelu_tanh(x: Tensor) -> Tensor:
        """As `reference.gelu_tanh`."""
        if not _ready(x):
            return cpu.gelu_tanh(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        call(*_at(x, out), x.numel())
        return out

    return gelu_tanh


def _rms_norm(call: Any) -> Callable[..., Tensor]:
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `reference.rms_norm`."""
        if not _ready(x):
            return cpu.rms_norm(x, weight, eps)
        x, weight = x.contiguous(), weight.float().contiguous()
        out, d = torch.empty_like(x), x.shape[-1]
        call(*_at(x, weight, out), x.numel() // d, d, eps)
        return out

    return rms_norm


def _rope(call: Any) -> Callable[..., Tensor]:
    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `reference.rope`."""
        if not _ready(x):
            return cpu.rope(x, cos, sin)
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out = torch.empty_like(x)
        for sample, to in zip(x, out, strict=True):
            call(*_at(sample, cos, sin, to), *x.shape[1:])
        return out

    return rope


def _gated_residual(call: Any) -> Callable[..., Tensor]:
    def gated_residual(x: Tensor, y: Tensor, gate: Tensor, spans: Spans) -> Tensor:
        """As `reference.gated_residual`."""
        if not _ready(x, y):
            return cpu.gated_residual(x, y, gate, spans)
        x, y, gate = x.contiguous(), y.contiguous(), gate.float().contiguous()
        out, d = torch.empty_like(x), x.shape[-1]
        for a, b, to in zip(x, y, out, strict=True):
            start = 0
            for row, length in zip(gate, spans, strict=True):
                call(*_at(a[start:], b[start:], row, to[start:]), length, d)
                start += length
        return out

    return gated_residual


def _attention(call: Any) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, sums: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """As `reference.attention`, as exact as its rounding to BF16.

        `sums`: float32 [B, H, S] each, to be filled where `fits_attention`: the largest score of each query,
        and the sum of exponentials below it.
        """
        if not fits_attention(q, k, v):
            return cpu.attention(q, k, v)
        (b, s, h, d), length = q.shape, k.shape[1]
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        for i in range(b):
            stats = _at(*(t[i] for t in sums)) if sums else (None, None)
            call(*_at(q[i], k[i], v[i], out[i]), *stats, s, length, h, d)
        return out

    return attention


def fits_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the C++ attention takes these [B, S, H, d]."""
    d = q.shape[3]
    return _ready(q, k, v) and not d % 32 and d <= LARGEST_HEAD and math.prod(k.shape) > 0
