"""The record of one implementation of one operator: `Kernel`.

A kernel is a function, `call`, with what is needed to choose it: its backend, what it needs, and the reason
that the log shows. `prepare` lays out once what many calls share: the tables of RoPE, the rows of a
modulation, a weight. `ops/select.py` chooses; `kernels/reference.py` has the contract of each operator.

A linear layer in a scheme of `quant/schemes.py` is a `QuantLinearKernel`:

    weight = kernel.prepare(encoded, bias, device)                # once, when it is loaded -> PreparedWeight
    a = kernel.quantize_activation(x, scheme, mul_scale)          # once for Q, K and V     -> Activation
    y = kernel.call(a, weight)                                    # x's dtype, x's leading axes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ascendit.mx.codec import Encoded
from ascendit.quant.schemes import Scheme

Function = Callable[..., Tensor]
Prepare = Callable[..., Any]
Emulate = Literal["decode-on-use", "decode-once"]
"""For schemes without a matmul: weights are dequantized on each call, or once, which takes memory."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operator."""

    operator: str
    """A field of `Ops`, or the scheme of a quantized linear layer."""
    backend: str
    """cpu, cuda, npu or reference."""
    call: Function
    reason: str
    """Why it is taken, for the log."""
    needs: str = ""
    """What it calls that may be absent: an operator of torch.ops, a compiled source, Triton."""
    prepare: Prepare | None = None
    name: str = ""
    """What a `Wish` calls it by."""
    on_request: bool = False
    """Taken only if a `Wish` names it."""
    missing: Callable[[], str] = str
    """Why it cannot be used on this device, "" if it can. Called only when no better kernel was found."""


@dataclass(frozen=True, eq=False)
class Activation:
    """A quantized activation in the layout of its kernel, for one or more weights."""

    scheme: Scheme
    lead: tuple[int, ...]
    """The axes before the last one; the codes have them as one."""
    width: int
    """K, as numbers."""
    dtype: torch.dtype
    """Of the activation before quantization, and so of the output."""
    qdata: Tensor
    scale: Tensor
    dual_scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """A quantized weight in the layout of its kernel; `QuantLinearKernel.stored` is the way back."""

    scheme: str
    """Of the weight: never w4a8."""
    shape: tuple[int, int]
    """N and K, as numbers."""
    qdata: Tensor
    scale: Tensor
    dual_scale: Tensor | None = None
    bias: Tensor | None = None
    """float32 [N]."""
    row_bias: Tensor | None = None
    """The bias as W4A8 on an NPU takes it, bfloat16 [1, N]."""
    decoded: Tensor | None = None
    """Dequantized once, [N, K]; dtype and layout are the kernel's own."""

    @property
    def tensors(self) -> list[Tensor]:
        """Those that it has."""
        parts = (self.qdata, self.scale, self.dual_scale, self.bias, self.row_bias, self.decoded)
        return [t for t in parts if t is not None]

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True, kw_only=True)
class QuantLinearKernel(Kernel):
    """A linear layer in one scheme: `call(Activation, PreparedWeight)` -> [.., N].

    `reason` begins with `native: ` or `emulated: `. Arguments of the others: see `Schemes`.
    """

    prepare: Callable[..., PreparedWeight]
    """(encoded, bias, torch device, *, nz): `nz` is a wish that only an NPU can grant."""
    quantize_activation: Callable[..., Activation]
    stored: Callable[[PreparedWeight], Encoded]
    """The codes and scales as on disk."""


@dataclass(frozen=True)
class Wish:
    """What a user asks for in place of the fastest kernels."""

    reference: bool = False
    """Plain PyTorch everywhere."""
    emulate: Emulate | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    """Operator -> `Kernel.name`."""


def in_dtype(*rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A `Kernel.prepare`: rows of a modulation in the dtype of the hidden states."""
    return tuple(t.to(dtype) for t in rows)
