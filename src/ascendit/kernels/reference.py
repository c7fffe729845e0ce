"""Reference implementation of every operator in plain PyTorch, always selectable (`--set ops=reference`).

Every other kernel, on every device, is tested against these functions. Dense operators take hidden states in
float32, bfloat16 or float16, compute in float32 and round once, at the end, to the input's dtype. Shapes: B
batch, S tokens, D hidden size, H heads, d head size, L keys, R modulation rows.

`spans`: lengths of R consecutive segments of the sequence, which add up to S. The tokens of a segment share a
timestep, so a modulation has R rows instead of S.

A quantized linear layer dequantizes both operands to float32 (`mx.decode`: element x scale), multiplies and
sums them in float32, adds the float32 bias and rounds once to the dtype of the activation. Native matmuls
differ only in the order of summation; an NPU also rounds the bias of W4A8 to that dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.kernels.kernel import Activation, Attended, Emulate, PreparedWeight, QuantLinearKernel
from ascendit.mx.codec import Encoded, decode, encode
from ascendit.mx.smoothing import smooth_input
from ascendit.quant.schemes import scheme_of

Spans = tuple[int, ...]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., K] @ weight [N, K].T + bias [N] -> [.., N]. All have one dtype, which the result keeps."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over all heads. x [.., D], in x's dtype; weight [D]."""
    return rms_scale(x, mean_square(x), weight, eps)


def mean_square(x: Tensor) -> Tensor:
    """First phase of `rms_norm`: x [.., D] -> mean(x^2), [.., 1] float32.

    Ranks that each hold an equal share of D average their results.
    """
    return x.float().square().mean(-1, keepdim=True)


def rms_scale(x: Tensor, mean_square: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Second phase of `rms_norm`: x / sqrt(mean_square + eps) * weight.

    x [.., D] and weight [D], or one rank's share of D; mean_square [.., 1] float32 -> x's dtype.
    """
    return (x.float() * torch.rsqrt(mean_square + eps) * weight.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm of x [.., D] over its last axis, in x's dtype; weight and bias [D] or None."""
    f = x.float()
    f = f - f.mean(-1, keepdim=True)
    f = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        f = f * weight.float()
    if bias is not None:
        f = f + bias.float()
    return f.to(x.dtype)


def adaln(x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift. x [B, S, D]; scale, shift [R, D] float32 -> x's dtype."""
    segments = [
        layer_norm(segment.float(), 1 + scale[r].float(), shift[r].float(), eps)
        for r, segment in enumerate(x.split(spans, dim=1))
    ]
    return torch.cat(segments, 1).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, spans: Spans) -> Tensor:
    """x + y * gate. x, y [B, S, D]; gate [R, D] float32 -> x's dtype."""
    pairs = zip(x.split(spans, dim=1), y.split(spans, dim=1), strict=True)
    segments = [a.float() + b.float() * gate[r].float() for r, (a, b) in enumerate(pairs)]
    return torch.cat(segments, 1).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x[2i], x[2i+1]). x [B, S, H, d]; cos, sin [S, d/2] float32 -> x's dtype."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). x [..], in x's dtype."""
    f = x.float()
    return (0.5 * f * (1 + torch.tanh(0.7978845608028654 * (f + 0.044715 * f * f * f)))).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """0.5 x (1 + erf(x / sqrt(2))). x [..], in x's dtype. `F.gelu` differs on some NPUs."""
    f = x.float()
    return (0.5 * f * (1 + torch.erf(f * 0.7071067811865476))).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """softmax(q k^T / sqrt(d)) v, no mask. q [B, S, H, d], k, v [B, L, H, d] -> [B, S, H, d], q's dtype.

    `return_lse`: also return log(sum(exp(q k^T / sqrt(d)))), the natural logarithm, float32 [B, H, S].
    Computes 256 queries at a time, so the scores take at most 256 x L per head.
    """
    kt, vt = k.float().permute(0, 2, 3, 1), v.float().transpose(1, 2)  # [B, H, d, L], [B, H, L, d]
    out, sums = [], []
    for queries in q.float().transpose(1, 2).split(256, dim=2):
        scores = (queries @ kt) * q.shape[-1] ** -0.5
        out.append(torch.softmax(scores, -1) @ vt)
        if return_lse:
            sums.append(torch.logsumexp(scores, -1))
    result = torch.cat(out, 2).transpose(1, 2).to(q.dtype)
    return (result, torch.cat(sums, 2)) if return_lse else result


def prepare_weight(
    encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
) -> PreparedWeight:
    """Move a quantized weight [N, K] to `device` as stored, and its bias [N] as float32. `nz` is ignored."""
    dual = None if encoded.dual_scale is None else encoded.dual_scale.to(device)
    n, k = encoded.shape
    bias = None if bias is None else bias.to(device, torch.float32)
    return PreparedWeight(
        encoded.format, (n, k), encoded.qdata.to(device), encoded.scale.to(device), dual, bias=bias
    )


def prepare_decoded(
    encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
) -> PreparedWeight:
    """`prepare_weight`, and `decoded` [N, K] in float32: four to eight times the memory."""
    weight = prepare_weight(encoded, bias, device)
    return replace(weight, decoded=decode(stored(weight)))


def stored(weight: PreparedWeight) -> Encoded:
    """Quantized weight [N, K] and its scales as stored on disk; dtypes as in `Encoded`."""
    return Encoded(weight.qdata, weight.scale, weight.dual_scale, weight.scheme, -1, weight.shape)


def quantize_activation(
    x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
) -> Activation:
    """See `Schemes.quantize_activation`."""
    resolved = scheme_of(scheme)
    rows = x.reshape(-1, x.shape[-1])
    if mul_scale is not None:
        rows = smooth_input(rows, mul_scale)
    e = encode(rows, resolved.activation, scale_rule=rule or resolved.rule)
    return Activation(resolved, tuple(x.shape[:-1]), x.shape[-1], x.dtype, e.qdata, e.scale, e.dual_scale)


def quantized_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """See `Schemes.quantized_linear`. Without `decoded`, the weight is dequantized on every call."""
    shape = (a.qdata.shape[0], a.width)
    x = decode(Encoded(a.qdata, a.scale, a.dual_scale, a.scheme.activation, -1, shape))
    out = x @ (decode(stored(weight)) if weight.decoded is None else weight.decoded).t()
    if weight.bias is not None:
        out += weight.bias
    return out.to(a.dtype).view(*a.lead, weight.shape[0])


INT8_TILE, INT8_ROWS = 128, 1024
"""K per scale, and rows of the first matrix per pass, whose float64 sums stay small."""
Int8Product = Callable[[Tensor, Tensor], Tensor]
"""int8 [M, k] times int8 [N, k].T, k up to 128 -> exact sums [M, N], int32 or float32."""


def float32_int8_product(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, k] times int8 [N, k].T -> float32 [M, N], exact: 128 products of int8 stay below 2^24."""
    return a.to(torch.float32) @ b.to(torch.float32).t()


def int8_tile_matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    product: Int8Product = float32_int8_product,
) -> Tensor:
    """int8 `a` [M, K] times int8 `b` [N, K].T, both with a scale per 128 of K, plus bias -> float32 [M, N].

    Scales: float32 [rows, ceil(K / 128)], or [ceil(rows / 128), ceil(K / 128)] for one per 128 x 128; bias
    float32 [N]. The exact sum over each 128 of K times both scales is added up in float64, rounded once.
    """
    (m, n), out = (len(a), len(b)), torch.empty(len(a), len(b), device=a.device)
    a_rows, b_rows = _scale_of_rows(a_scale, m), _scale_of_rows(b_scale, n)
    for start in range(0, m, INT8_ROWS):
        rows = slice(start, start + INT8_ROWS)
        total = torch.zeros(len(a[rows]), n, dtype=torch.float64, device=a.device)
        for i, (x, y) in enumerate(zip(a[rows].split(INT8_TILE, 1), b.split(INT8_TILE, 1), strict=True)):
            total += product(x, y).to(torch.float64) * (a_rows[rows, i, None] * b_rows[:, i])
        out[rows] = total if bias is None else total + bias
    return out


def int8_tile_linear(
    a: Activation, weight: PreparedWeight, product: Int8Product = float32_int8_product
) -> Tensor:
    """`quantized_linear` of int8_block by `int8_tile_matmul`: [.., N] in the dtype of the activation."""
    out = int8_tile_matmul(a.qdata, a.scale, weight.qdata, weight.scale, weight.bias, product)
    return out.to(a.dtype).view(*a.lead, weight.shape[0])


def _scale_of_rows(scale: Tensor, rows: int) -> Tensor:
    """float64 [rows, ..]."""
    if len(scale) != rows:
        scale = scale.repeat_interleave(INT8_TILE, 0)[:rows]
    return scale.to(torch.float64)


def quant_linear_kernel(scheme: str, emulate: Emulate | None, reason: str) -> QuantLinearKernel:
    """The reference kernel of a scheme."""
    return QuantLinearKernel(
        scheme,
        "reference",
        quantized_linear,
        reason,
        prepare=prepare_decoded if emulate == "decode-once" else prepare_weight,
        quantize_activation=quantize_activation,
        stored=stored,
    )
