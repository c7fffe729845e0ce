"""The steps of a quantized linear layer on a CUDA card, here in plain PyTorch; `triton_linear` has Triton's.

Tokens [M, K] become either codes, for a matmul that the card has, or values: the decoded numbers in bfloat16,
[M, `width_of(K)`], for one in bfloat16. Both are exact: an e4m3 or e2m1 number times a power of two is a
bfloat16 number (down to 2^-133, where MX stops at 2^-136).

Where nothing else multiplies the sums (MX), three ones follow the K numbers of each token, and the float32
bias those of each channel, in three parts that add up to it. So the matmul adds the bias to its float32 sums
and rounds once, which no epilogue of cuBLAS does.
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
"""bfloat16 numbers of 8 bits each, for the 24 of a float32."""
ALIGNMENT = 64
"""Numbers: rows of values begin at a multiple of 128 bytes."""
QDATA_ALIGNMENT = 32
"""Of N and K of codes for a matmul of the card, filled up with zeros: 16 for scaled_mm, 8 for _int_mm, whole
blocks for MX."""
GROUP = 512


@dataclass(frozen=True)
class LinearSteps:
    """One implementation of the steps. Arguments as in the functions below."""

    name: str
    to_values: Callable[[Tensor, str, str, Tensor | None], tuple[Tensor, Tensor | None]]
    to_codes: Callable[[Tensor, str, str, Tensor | None], tuple[Tensor, Tensor]]
    decode_weight: Callable[[Encoded, Tensor | None], Tensor]
    finish: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor], None]
    matmul: (
        Callable[[Tensor, Tensor | None, Encoded, Tensor | None, Tensor | None, torch.dtype], Tensor] | None
    )
    """Decode and multiply in one kernel; only Triton has it."""


def width_of(k: int) -> int:
    """Numbers in a row of values: K, those for the bias, and zeros."""
    return -(-(k + BIAS_PARTS) // ALIGNMENT) * ALIGNMENT


def padded(n: int) -> int:
    """The next multiple of CODES_ALIGNMENT."""
    return -(-n // QDATA_ALIGNMENT) * QDATA_ALIGNMENT


def has_outer_scales(format: str) -> bool:
    """Whether something multiplies the sums: scales of rows, or level 0 of the dual scale."""
    return lookup(format).kind != "block"


def to_values(x: Tensor, format: str, rule: str, mul_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens [M, K] -> bfloat16 values [M, width] and what multiplies the sums.

    None for MX, float32 [M] for int8 and fp8, [M, ceil(K / 512)] for the dual scale.
    """
    m, k = x.shape
    values = torch.zeros(m, width_of(k), dtype=torch.bfloat16, device=x.device)
    e = encode(x if mul_scale is None else smooth_input(x, mul_scale), format, scale_rule=rule)
    values[:, :k] = decode(inner(e), torch.bfloat16)
    if not has_outer_scales(format):
        values[:, k : k + BIAS_PARTS] = 1
    return values, outer_scale(e)


def to_codes(x: Tensor, format: str, rule: str, mul_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [M, K] -> codes [M, padded(K)] and scales: float32 [M], or E8M0 bytes [M, padded(K) / 32].

    int8, else float8_e4m3fn: FP4 codes are put into e4m3, which has all of their numbers.
    """
    k = x.shape[1]
    e = encode(x if mul_scale is None else smooth_input(x, mul_scale), format, scale_rule=rule)
    qdata = layouts.to_e4m3_container(e.qdata, k) if lookup(format).packed else e.qdata
    raw = torch.nn.functional.pad(qdata.view(torch.uint8), (0, padded(k) - k))
    return raw.view(qdata.dtype), e.scale.flatten() if has_outer_scales(format) else e.scale


def decode_weight(encoded: Encoded, bias: Tensor | None) -> Tensor:
    """A weight [N, K] -> bfloat16 [N, width], without what multiplies the sums; the bias behind it."""
    n, k = encoded.shape
    values = torch.zeros(n, width_of(k), dtype=torch.bfloat16, device=encoded.qdata.device)
    values[:, :k] = decode(inner(encoded), torch.bfloat16)
    if bias is not None and not has_outer_scales(encoded.format):
        values[:, k : k + BIAS_PARTS] = in_parts(bias)
    return values


def finish(sums: Tensor, row: Tensor | None, column: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """int32 or float32 sums [M, >= N] times row [M] and column [N], + bias [N], into out [M, N]."""
    f = sums[:, : out.shape[1]].to(torch.float32)
    if row is not None:
        f = f * row.unsqueeze(1)
    if column is not None:
        f = f * column
    out.copy_(f if bias is None else f + bias)


PLAIN = LinearSteps("PyTorch", to_values, to_codes, decode_weight, finish, None)


def inner(e: Encoded) -> Encoded:
    """The same without what multiplies the sums: its numbers are bfloat16 numbers."""
    kind = lookup(e.format).kind
    if kind == "dual":
        return Encoded(e.qdata, e.scale, None, "mxfp4", e.axis, e.shape)
    return Encoded(e.qdata, torch.ones_like(e.scale), None, e.format, e.axis, e.shape) if kind == "row" else e


def outer_scale(e: Encoded) -> Tensor | None:
    """What multiplies the sums: float32 [rows] or [rows, groups], None for MX."""
    if e.dual_scale is not None:
        return e.dual_scale.squeeze(-1)
    return e.scale.flatten() if lookup(e.format).kind == "row" else None


def in_parts(bias: Tensor) -> Tensor:
    """float32 [N] -> bfloat16 [N, 3] that add up to it, to the bit above 2^-109."""
    high = bias.to(torch.bfloat16)
    middle = (bias - high.float()).to(torch.bfloat16)
    low = (bias - high.float() - middle.float()).to(torch.bfloat16)
    return torch.stack((high, middle, low), 1)
