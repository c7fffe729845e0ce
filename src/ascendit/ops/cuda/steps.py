"""The steps of a quantized linear layer for CUDA in plain PyTorch; `triton_linear` has them in Triton.

An activation [M, K] is either quantized, for a quantized matmul, or quantized and dequantized to bfloat16
[M, `width_of(K)`], for a bfloat16 matmul. Dequantizing is exact: an e4m3 or e2m1 element times a power of two
is representable in bfloat16 (down to 2^-133, while MX reaches 2^-136).

Outer scales multiply the sums after the matmul: the scales of rows (int8, fp8), or level 0 of the dual scale.
Formats without them (MX) add the bias in the matmul itself: three ones follow the K values of each row, and
the float32 bias, split into three bfloat16 values, follows those of each channel. The matmul adds it to its
float32 sums and rounds once, which no cuBLAS epilogue does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ascendit.mx import layouts
from ascendit.mx.codec import Encoded, decode, encode
from ascendit.mx.formats import lookup
from ascendit.mx.smoothing import smooth_input

BIAS_PARTS = 3
"""bfloat16 values, of 8 significant bits each, that hold the 24 bits of a float32."""
ALIGNMENT = 64
"""Elements: each row of bfloat16 values starts at a multiple of 128 bytes."""
QDATA_ALIGNMENT = 32
"""N and K of a quantized matmul are zero-padded to a multiple of this: scaled_mm needs 16, _int_mm 8, MX
complete blocks of 32."""
GROUP = 512
"""Elements along K that share level 0 of the dual scale."""


@dataclass(frozen=True)
class LinearSteps:
    """One implementation of the steps, with the arguments of the functions below."""

    name: str
    fake_quantize: Callable[[Tensor, str, str, Tensor | None], tuple[Tensor, Tensor | None]]
    """Activation [M, K] -> bfloat16 [M, width_of(K)], quantized and dequantized; and its outer scales."""
    quantize: Callable[[Tensor, str, str, Tensor | None], tuple[Tensor, Tensor]]
    """Activation [M, K] -> qdata [M, padded(K)] (int8 or float8_e4m3fn) and scales."""
    decode_weight: Callable[[Encoded, Tensor | None], Tensor]
    """Weight [N, K] and bias [N] -> bfloat16 [N, width_of(K)]."""
    finish: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor], None]
    """Sums [M, N] -> output [M, N]: multiply by the scales, add the bias, round once."""
    matmul: (
        Callable[[Tensor, Tensor | None, Encoded, Tensor | None, Tensor | None, torch.dtype], Tensor] | None
    )
    """Dequantize a weight and multiply in one kernel, see `triton_linear.matmul`; None in plain PyTorch."""


def width_of(k: int) -> int:
    """Row length of dequantized values: K, the values for the bias, and padding."""
    return -(-(k + BIAS_PARTS) // ALIGNMENT) * ALIGNMENT


def padded(n: int) -> int:
    """The next multiple of QDATA_ALIGNMENT."""
    return -(-n // QDATA_ALIGNMENT) * QDATA_ALIGNMENT


def has_outer_scales(format: str) -> bool:
    """Whether the sums are multiplied by scales after the matmul."""
    return lookup(format).kind != "block"


def fake_quantize(
    x: Tensor, format: str, rule: str, mul_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Quantize and dequantize an activation [M, K]: bfloat16 [M, width_of(K)], and its outer scales.

    Outer scales: None for MX, float32 [M] for int8 and fp8, [M, ceil(K / 512)] for the dual scale.
    """
    m, k = x.shape
    values = torch.zeros(m, width_of(k), dtype=torch.bfloat16, device=x.device)
    e = encode(x if mul_scale is None else smooth_input(x, mul_scale), format, scale_rule=rule)
    values[:, :k] = decode(inner(e), torch.bfloat16)
    if not has_outer_scales(format):
        values[:, k : k + BIAS_PARTS] = 1
    return values, outer_scale(e)


def quantize(x: Tensor, format: str, rule: str, mul_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize an activation [M, K]: qdata [M, padded(K)]; scales float32 [M] or E8M0 [M, ceil(K / 32)].

    qdata is int8, or float8_e4m3fn, in which every FP4 value is exact.
    """
    k = x.shape[1]
    e = encode(x if mul_scale is None else smooth_input(x, mul_scale), format, scale_rule=rule)
    qdata = layouts.to_e4m3_container(e.qdata, k) if lookup(format).packed else e.qdata
    raw = torch.nn.functional.pad(qdata.view(torch.uint8), (0, padded(k) - k))
    return raw.view(qdata.dtype), e.scale.flatten() if has_outer_scales(format) else e.scale


def decode_weight(encoded: Encoded, bias: Tensor | None) -> Tensor:
    """Dequantize a weight [N, K] without outer scales: bfloat16 [N, width_of(K)], with the bias for MX."""
    n, k = encoded.shape
    values = torch.zeros(n, width_of(k), dtype=torch.bfloat16, device=encoded.qdata.device)
    values[:, :k] = decode(inner(encoded), torch.bfloat16)
    if bias is not None and not has_outer_scales(encoded.format):
        values[:, k : k + BIAS_PARTS] = split_bias(bias)
    return values


def finish(sums: Tensor, row: Tensor | None, column: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """out [M, N] = sums [M, >= N] (int32 or float32) * row [M] * column [N] + bias [N], rounded once."""
    f = sums[:, : out.shape[1]].to(torch.float32)
    if row is not None:
        f = f * row.unsqueeze(1)
    if column is not None:
        f = f * column
    out.copy_(f if bias is None else f + bias)


PLAIN = LinearSteps("PyTorch", fake_quantize, quantize, decode_weight, finish, None)


def inner(e: Encoded) -> Encoded:
    """`e` without its outer scales, which dequantizes exactly to bfloat16; qdata [M, K] is shared."""
    kind = lookup(e.format).kind
    if kind == "dual":
        return Encoded(e.qdata, e.scale, None, "mxfp4", e.axis, e.shape)
    return Encoded(e.qdata, torch.ones_like(e.scale), None, e.format, e.axis, e.shape) if kind == "row" else e


def outer_scale(e: Encoded) -> Tensor | None:
    """The outer scales of `e`: float32 [rows] or [rows, groups], None for MX."""
    if e.dual_scale is not None:
        return e.dual_scale.squeeze(-1)
    return e.scale.flatten() if lookup(e.format).kind == "row" else None


def split_bias(bias: Tensor) -> Tensor:
    """float32 [N] -> bfloat16 [N, 3] whose sum is exactly the bias (above 2^-109)."""
    high = bias.to(torch.bfloat16)
    middle = (bias - high.float()).to(torch.bfloat16)
    low = (bias - high.float() - middle.float()).to(torch.bfloat16)
    return torch.stack((high, middle, low), 1)
