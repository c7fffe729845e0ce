"""Quantized linear layers for tests: stored weights, activations, and their product in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ascendit import mx
from ascendit.kernels.kernel import Activation
from ascendit.mx.codec import Encoded
from ascendit.quant.schemes import LINEAR_SCHEMES

NATIVE = {**dict.fromkeys(("a2", "a3"), {"int8", "int8_block"}), "a5": set(LINEAR_SCHEMES)}


def weight_of(scheme: str, n: int, k: int, *, bias: bool = True) -> tuple[Encoded, Tensor | None]:
    """Quantized weight [N, K] with scales of many magnitudes, and a float32 bias not exact in BF16."""
    rows = torch.randn(n, k) * torch.logspace(-1, 0, n)[:, None]
    encoded = mx.encode(rows.to(torch.bfloat16), LINEAR_SCHEMES[scheme].weight)
    return encoded, 3 + torch.randn(n) if bias else None


def activation_of(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(2, m, k) * torch.logspace(-1, 0, m)[:, None]).to(dtype)


def on_disk(encoded: Encoded, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The first four arguments of prepare_weight."""
    return encoded.qdata, encoded.scale, encoded.dual_scale, bias


def exact(x: Tensor, scheme: str, encoded: Encoded, bias: Tensor | None, rule: str | None = None) -> Tensor:
    """float64: the decoded activation times the decoded weight, plus the bias. [.., N]"""
    row = LINEAR_SCHEMES[scheme]
    activation = mx.encode(x.flatten(0, -2), row.activation, scale_rule=rule or row.rule)
    out = mx.decode(activation).double() @ mx.decode(encoded).double().t()
    out = out if bias is None else out + bias.double()
    return out.unflatten(0, x.shape[:-1])


def decoded(a: Activation) -> Tensor:
    """float32 values [M, K] of a reference activation."""
    shape = (a.qdata.shape[0], a.width)
    return mx.decode(Encoded(a.qdata, a.scale, a.dual_scale, a.scheme.activation, -1, shape))
