"""Quantized attention: its definition for all devices, and its emulation in plain PyTorch.

Q, K and V are quantized per head with the format and tiles of `ATTENTION_FORMATS`, dequantized to float32 and
multiplied by a dense attention in float32; the output is rounded once, to q's dtype. Native kernels differ
only in the order of summation, and where a chip quantizes the probabilities. Q and K are rotated before, by
`attention.quantized`.

Scales are those of the NPU's operators: fp8 and int8 npu_dynamic_block_quant (amax / 448 or / 127), mxfp8 and
mxfp4 npu_dynamic_mx_quant (OCP's `floor`), except that it sets a block of values below 2^-118 (FP4: 2^-124)
to zeros, and that here a tile with an infinity or a NaN becomes NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascendit.kernels.kernel import Attended, Function, Kernel
from ascendit.kernels.reference import attention
from ascendit.mx import elements, reference
from ascendit.mx.codec import Encoded, decode, encode
from ascendit.mx.formats import lookup
from ascendit.quant.attention_schemes import ATTENTION_FORMATS

Tile = tuple[int | None, int | None]
"""Tokens and channels that share a scale; None: all."""


def operator_of(scheme: str) -> str:
    """The operator of a scheme in `ops.select`, e.g. `attention_fp8` for fp8."""
    return f"attention_{scheme}"


@dataclass(frozen=True, eq=False)
class Operand:
    """Q, K or V [B, S, H, d], quantized.

    `qdata`: int8, float8_e4m3fn, or for mxfp4 uint8 with two values per byte along the axis of the blocks;
    [B, S, H, d]. `scale` [B, tiles of S, H, tiles of d]: float32, for MX formats uint8 (E8M0).
    """

    format: str
    tile: Tile
    shape: tuple[int, ...]
    qdata: Tensor
    scale: Tensor


def quantize(x: Tensor, format: str, tile: Tile) -> Operand:
    """Quantize x [B, S, H, d] of a float dtype, per head; S and d are at least 1.

    `format` and `tile`: of `ATTENTION_FORMATS`. The last tile of an axis may be short.
    """
    fmt, shape = lookup(format), tuple(x.shape)
    if fmt.kind == "block":
        e = encode(x, format, axis=_axis(tile), scale_rule=fmt.npu_rules[0])
        return Operand(format, tile, shape, e.qdata, e.scale)
    size = (tile[0] or x.shape[1], tile[1] or x.shape[3])
    qdata, scale = reference.encode_tiles(x.transpose(1, 2), fmt, "rint", size)
    qdata = qdata.transpose(1, 2).contiguous().view(getattr(torch, fmt.qdata_dtype))
    return Operand(format, tile, shape, qdata, scale.transpose(1, 2).contiguous())


def dequantize(operand: Operand) -> Tensor:
    """An operand as float32 [B, S, H, d]: element x scale."""
    fmt, shape, tile = lookup(operand.format), operand.shape, operand.tile
    if fmt.kind == "block":
        return decode(Encoded(operand.qdata, operand.scale, None, operand.format, _axis(tile), shape))
    scale = operand.scale
    for axis, size in ((1, tile[0]), (3, tile[1])):
        scale = scale.repeat_interleave(size or shape[axis], axis).narrow(axis, 0, shape[axis])
    qdata = operand.qdata
    if fmt.element is not None:
        qdata = elements.decode_stored(qdata.view(torch.uint8), fmt.element, shape[3])
    return qdata.to(torch.float32) * scale


def _axis(tile: Tile) -> int:
    """The axis of [B, S, H, d] along which MX blocks run."""
    return -1 if tile[0] == 1 else 1


def smooth_key(k: Tensor) -> tuple[Tensor, Tensor]:
    """k [B, L, H, d] minus its mean over tokens, and the mean [B, 1, H, d]; both float32.

    It changes no probability: each query's scores change by the same number.
    """
    k = k.to(torch.float32)
    mean = k.mean(1, keepdim=True)
    return k - mean, mean


def restored_lse(lse: Tensor, q: Tensor, mean: Tensor) -> Tensor:
    """The log-sum-exp of the scores with k, from `lse` [B, H, S] of those with `smooth_key(k)`.

    q [B, S, H, d] before quantization, `mean` [B, 1, H, d]; lse and result float32.
    """
    shift: Tensor = (q.to(torch.float32) * mean).sum(-1) * q.shape[-1] ** -0.5
    return lse + shift.transpose(1, 2)


def dequantized(scheme: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, tokens, H, d] of a float dtype, quantized in `scheme` and back: float32, same shapes.

    `scheme`: a key of `ATTENTION_FORMATS`. The caller smooths k if the scheme does.
    """
    f = ATTENTION_FORMATS[scheme]
    pairs = ((q, f.query_tile), (k, f.key_tile), (v, f.value_tile))
    q, k, v = (dequantize(quantize(t, f.format, tile)) for t, tile in pairs)
    return q, k, v


def emulated(scheme: str, dense: Function) -> Function:
    """Attention in `scheme`: `dense` on dequantized q, k and v.

    `dense`: a dense attention that takes float32; its signature, of the result too: `reference.attention`.
    """
    smooth = ATTENTION_FORMATS[scheme].smooth_key

    def call(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
        mean = None
        if smooth:
            k, mean = smooth_key(k)
        out = dense(*dequantized(scheme, q, k, v), return_lse=return_lse)
        if not return_lse:
            return out.to(q.dtype)
        lse = out[1] if mean is None else restored_lse(out[1], q, mean)
        return out[0].to(q.dtype), lse

    return call


def qk_int8(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """Dense attention with scores from int8 q and k, as in the scheme int8; v is not quantized.

    q [B, S, H, d], k, v [B, L, H, d] of a float dtype -> [B, S, H, d] in q's, with the log-sum-exp of
    `kernels.reference.attention`. The kernels `qk_int8` also round probabilities to bfloat16.
    """
    f = ATTENTION_FORMATS["int8"]
    smooth, mean = smooth_key(k)
    query, key = quantize(q, f.format, f.query_tile), quantize(smooth, f.format, f.key_tile)
    out, lse = attention(dequantize(query), dequantize(key), v, return_lse=True)
    return (out.to(q.dtype), restored_lse(lse, q, mean)) if return_lse else out.to(q.dtype)


def emulated_kernels(backend: str, dense: Function) -> tuple[Kernel, ...]:
    """A kernel for each scheme, of operator `operator_of(scheme)`; `dense`: see `emulated`."""
    reason = "emulated: q, k and v dequantized, dense attention in float32; the same numbers, slower"
    return tuple(
        Kernel(operator_of(scheme), backend, emulated(scheme, dense), reason, name="emulated")
        for scheme in ATTENTION_FORMATS
    )
