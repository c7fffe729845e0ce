"""Every operator in plain PyTorch: the oracle, always selectable (`--set ops=reference`).

Each dense operator computes in float32 whatever it is given and rounds once, at the end, to the input's
dtype. Every fast path, on every device, is tested against these. Shapes: B batch, S tokens, D width, H heads,
d head size, R modulation rows.

Spans: tokens that share a timestep lie side by side, so a modulation is R rows and R lengths that add up
to S, never a tensor of S rows.

A quantized linear layer has the numbers of `mx.decode`: values = codes x scales in float32, their products
summed in float32, plus the float32 bias, rounded once to the dtype of the activation. Devices that have the
matmul stay within the order of the sums of it; an NPU also rounds the bias of W4A8 to that dtype.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.kernels.kernel import Activation, Emulate, PreparedWeight, QuantLinearKernel
from ascendit.mx.codec import Encoded, decode, encode
from ascendit.mx.smoothing import smooth_input
from ascendit.quant.schemes import scheme_of

Spans = tuple[int, ...]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K].T + bias [N] -> [..., N], in x's dtype."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, which spans all heads. x [..., D]."""
    return rms_scale(x, mean_square(x), weight, eps)


def mean_square(x: Tensor) -> Tensor:
    """Phase one of `rms_norm`, [..., 1] float32; ranks that have parts of D take the mean of theirs."""
    return x.float().square().mean(-1, keepdim=True)


def rms_scale(x: Tensor, mean_square: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Phase two of `rms_norm`: x / sqrt(mean_square + eps) * weight. x [..., D], or a part of it."""
    return (x.float() * torch.rsqrt(mean_square + eps) * weight.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last axis, x [..., D]; weight and bias [D] or None."""
    f = x.float()
    f = f - f.mean(-1, keepdim=True)
    f = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        f = f * weight.float()
    if bias is not None:
        f = f + bias.float()
    return f.to(x.dtype)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift. x [B, S, D]; scale, shift [R, D] float32."""
    parts = [
        layer_norm(part.float(), 1 + scale[r].float(), shift[r].float(), eps)
        for r, part in enumerate(x.split(spans, dim=1))
    ]
    return torch.cat(parts, 1).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, spans: Spans) -> Tensor:
    """x + y * gate. x, y [B, S, D]; gate [R, D] float32."""
    pairs = zip(x.split(spans, dim=1), y.split(spans, dim=1), strict=True)
    parts = [a.float() + b.float() * gate[r].float() for r, (a, b) in enumerate(pairs)]
    return torch.cat(parts, 1).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (x[2i], x[2i+1]). x [B, S, H, d]; cos, sin [S, d/2] float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), any shape."""
    f = x.float()
    return (0.5 * f * (1 + torch.tanh(0.7978845608028654 * (f + 0.044715 * f * f * f)))).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + erf(x / sqrt(2))), any shape. `F.gelu` differs on some NPUs: `ops/npu/elementwise.py`."""
    f = x.float()
    return (0.5 * f * (1 + torch.erf(f * 0.7071067811865476))).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v without a mask. q [B, S, H, d], k and v [B, L, H, d] -> [B, S, H, d].

    Runs over blocks of 256 queries, so that the scores never take more than 256 x L per head.
    """
    kt, vt = k.float().permute(0, 2, 3, 1), v.float().transpose(1, 2)  # [B, H, d, L], [B, H, L, d]
    out = []
    for part in q.float().transpose(1, 2).split(256, dim=2):
        scores = (part @ kt) * q.shape[-1] ** -0.5
        out.append(torch.softmax(scores, -1) @ vt)
    return torch.cat(out, 2).transpose(1, 2).to(q.dtype)


def prepare_weight(
    encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
) -> PreparedWeight:
    """A weight [N, K] as on disk, on `device`."""
    dual = None if encoded.dual_scale is None else encoded.dual_scale.to(device)
    n, k = encoded.shape
    wide = None if bias is None else bias.to(device, torch.float32)
    return PreparedWeight(
        encoded.format, (n, k), encoded.qdata.to(device), encoded.scale.to(device), dual, bias=wide
    )


def prepare_decoded(
    encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
) -> PreparedWeight:
    """The same with the weight in float32 too: four to eight times the memory."""
    weight = prepare_weight(encoded, bias, device)
    return replace(weight, decoded=decode(stored(weight)))


def stored(weight: PreparedWeight) -> Encoded:
    """Codes and scales as on disk."""
    return Encoded(weight.qdata, weight.scale, weight.dual_scale, weight.scheme, -1, weight.shape)


def quantize_activation(
    x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
) -> Activation:
    """See `Schemes.quantize_activation`."""
    row = scheme_of(scheme)
    tokens = x.reshape(-1, x.shape[-1])
    if mul_scale is not None:
        tokens = smooth_input(tokens, mul_scale)
    e = encode(tokens, row.activation, scale_rule=rule or row.rule)
    return Activation(row, tuple(x.shape[:-1]), x.shape[-1], x.dtype, e.qdata, e.scale, e.dual_scale)


def quantized_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """See `Schemes.quantized_linear`. Without `decoded` the weight is decoded on every call."""
    shape = (a.qdata.shape[0], a.width)
    tokens = decode(Encoded(a.qdata, a.scale, a.dual_scale, a.scheme.activation, -1, shape))
    out = tokens @ (decode(stored(weight)) if weight.decoded is None else weight.decoded).t()
    if weight.bias is not None:
        out += weight.bias
    return out.to(a.dtype).view(*a.lead, weight.shape[0])


def quant_linear_kernel(scheme: str, emulate: Emulate | None, reason: str) -> QuantLinearKernel:
    """The plain kernel of a scheme."""
    return QuantLinearKernel(
        scheme,
        "reference",
        quantized_linear,
        reason,
        prepare=prepare_decoded if emulate == "decode-once" else prepare_weight,
        quantize_activation=quantize_activation,
        stored=stored,
    )
