"""`Kernel`: one implementation of one operator.

A kernel is a function, `call`, with the data to choose it: its backend, its requirements and the reason shown
in the log. `prepare` converts tensors that many calls share once: RoPE tables, modulation rows, weights.
`ops/select.py` chooses a kernel; `kernels/reference.py` documents the contract of each operator.

A linear layer in a scheme of `quant/schemes.py` is a `QuantLinearKernel`:

    weight = kernel.prepare(encoded, bias, device)                # once, at load       -> PreparedWeight
    a = kernel.quantize_activation(x, scheme, mul_scale)          # once for Q, K and V -> Activation
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
Attended = Any
"""Output of an attention: [B, S, H, d], or a pair of it and its log-sum-exp, float32 [B, H, S]."""
Prepare = Callable[..., Any]
Emulate = Literal["decode-on-use", "decode-once"]
"""When to dequantize weights of a scheme without a matmul: on each call, or once, which takes memory."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operator."""

    operator: str
    """A field of `Ops`, or the scheme of a quantized linear layer."""
    backend: str
    """cpu, cuda, npu or reference."""
    call: Function
    reason: str
    """Why it is chosen, for the log."""
    needs: str = ""
    """A requirement that may be absent: an operator of torch.ops, a compiled source, Triton."""
    prepare: Prepare | None = None
    name: str = ""
    """The name by which a `Wish` selects it."""
    on_request: bool = False
    """Chosen only if a `Wish` names it."""
    missing: Callable[[], str] = str
    """Why it cannot be used on this device, "" if it can. Called only if no better kernel is usable."""


@dataclass(frozen=True, eq=False)
class Activation:
    """A quantized activation in the layout of its kernel, for one or more weights.

    In the reference layout `qdata` is [M, K] (packed FP4: uint8 [M, K / 2]) with the dtype of the format, and
    scales are as in `mx.Encoded`.
    """

    scheme: Scheme
    lead: tuple[int, ...]
    """The leading axes of the activation; M is their product."""
    width: int
    """K, in elements."""
    dtype: torch.dtype
    """dtype of the activation before quantization and of the output."""
    qdata: Tensor
    scale: Tensor
    dual_scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """A quantized weight in the layout of its kernel; `QuantLinearKernel.stored` restores the stored one."""

    scheme: str
    """The scheme of the weight: never w4a8."""
    shape: tuple[int, int]
    """N and K, in elements."""
    qdata: Tensor
    scale: Tensor
    dual_scale: Tensor | None = None
    bias: Tensor | None = None
    """float32 [N]."""
    row_bias: Tensor | None = None
    """The bias in the layout of W4A8 on an NPU, bfloat16 [1, N]."""
    decoded: Tensor | None = None
    """The dequantized weight [N, K] of decode-once; dtype and layout depend on the kernel."""

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that are not None, of any shape [..] and dtype."""
        tensors = (self.qdata, self.scale, self.dual_scale, self.bias, self.row_bias, self.decoded)
        return [t for t in tensors if t is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True, kw_only=True)
class QuantLinearKernel(Kernel):
    """A linear layer in one scheme: `call(Activation, PreparedWeight)` -> [.., N].

    `reason` begins with `native: ` or `emulated: `. `Schemes` documents the functions.
    """

    prepare: Callable[..., PreparedWeight]
    """(encoded, bias, torch device, *, nz) -> PreparedWeight. Only NPU kernels use `nz`."""
    quantize_activation: Callable[..., Activation]
    stored: Callable[[PreparedWeight], Encoded]
    """The inverse of `prepare`."""


@dataclass(frozen=True)
class Wish:
    """A user's requests that replace the fastest kernels."""

    reference: bool = False
    """Plain PyTorch everywhere."""
    emulate: Emulate | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    """Operator -> `Kernel.name`."""


def in_dtype(*rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A `Kernel.prepare`: cast modulation rows [.., D] to the dtype of the hidden states."""
    return tuple(t.to(dtype) for t in rows)
