"""Activations. float32 inside, rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.twin import cpu_kernels
from ascendit.twin.contract import require
from ascendit.twin.operators.mx_quantize import FLOATS
from ascendit.twin.registry import Out, operator


def _float(x: Tensor) -> None:
    require(
        x.dtype in FLOATS,
        f"input of {x.dtype}",
        needs="floating point",
        fix="cast the activation to bfloat16",
    )


@operator("npu_gelu")
def npu_gelu(self: Tensor, approximate: str) -> Iterator[Any]:
    """Exact (`none`) or tanh, on every chip; F.gelu is tanh on a2 and a3 whatever it is told."""
    _float(self)
    require(
        approximate in ("none", "tanh"),
        f"approximate={approximate!r}",
        needs="none or tanh",
        fix='approximate="tanh" for Wan',
    )
    yield Out(tuple(self.shape), self.dtype)
    yield cpu_kernels.gelu(self, approximate)


def _fast_gelu(self: Tensor) -> Iterator[Any]:
    """x sigmoid(1.702 x): another function, up to 0.021 away from GELU."""
    _float(self)
    yield Out(tuple(self.shape), self.dtype)
    wide = self.to(torch.float32)
    yield (wide * torch.sigmoid(1.702 * wide)).to(self.dtype)


operator("npu_fast_gelu")(_fast_gelu)
operator("fast_gelu")(_fast_gelu)


@operator("npu_silu")
def npu_silu(self: Tensor) -> Iterator[Any]:
    _float(self)
    yield Out(tuple(self.shape), self.dtype)
    yield F.silu(self.to(torch.float32)).to(self.dtype)


def _halves(x: Tensor, dim: int) -> tuple[int, ...]:
    _float(x)
    require(
        1 <= x.dim() <= 8 and -x.dim() <= dim < x.dim(),
        f"attribute [dim] out of range [-{x.dim()}, {x.dim() - 1}]",
        needs="an axis of the input",
        fix="dim=-1",
    )
    require(
        x.shape[dim] % 2 == 0,
        f"x shape: {list(x.shape)}. Dim [{dim}] of x should be divisible by 2, but get [{x.shape[dim]}]",
        needs="an even axis",
        fix="the two halves are gate and value",
    )
    at = dim % x.dim()
    return (*x.shape[:at], x.shape[at] // 2, *x.shape[at + 1 :])


@operator("npu_swiglu")
def npu_swiglu(self: Tensor, dim: int) -> Iterator[Any]:
    """silu(first half) x second half."""
    yield Out(_halves(self, dim), self.dtype)
    a, b = self.to(torch.float32).chunk(2, dim)
    yield (F.silu(a) * b).to(self.dtype)


@operator("npu_geglu")
def npu_geglu(self: Tensor, dim: int, approximate: int, activate_left: bool) -> Iterator[Any]:
    """(value x gelu(gate), gelu(gate)); the gate is the second half unless `activate_left`."""
    require(
        approximate in (0, 1),
        f"approximate={approximate}",
        needs="0 (exact) or 1 (tanh)",
        fix="leave approximate out",
    )
    half = Out(_halves(self, dim), self.dtype)
    yield half, half
    a, b = self.to(torch.float32).chunk(2, dim)
    value, gate = (b, a) if activate_left else (a, b)
    gelu = F.gelu(gate, approximate="tanh" if approximate else "none")
    yield (value * gelu).to(self.dtype), gelu.to(self.dtype)
