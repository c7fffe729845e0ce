"""Attention with quantized scores on a CUDA GPU: `qk_int8`, and the schemes of quantized attention.

| scheme       | scores                                               | values                              |
|--------------|------------------------------------------------------|-------------------------------------|
| qk_int8      | int8 matmul, scaled per query and key                | BF16, not quantized                 |
| int8         | int8 matmul, scaled per query and key                | int8 elements in BF16, exact        |
| fp8          | e4m3 matmul; below sm89 e4m3 values in BF16, exact   | e4m3 values in BF16, exact          |
| mxfp8, mxfp4 | dequantized to BF16, which is exact, and multiplied by PyTorch's attention                 |

Scores are float32; probabilities are rounded to BF16, as in every flash attention. The definition is
`kernels/quantized_attention.py`, whose emulation in float32 serves other dtypes and head sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.kernels import quantized_attention as definition
from ascendit.kernels.kernel import Attended, Function
from ascendit.ops.cuda import triton_attention, triton_kernels, triton_linear
from ascendit.quant.attention_schemes import ATTENTION_FORMATS

HEAD_SIZES = (64, 128)
"""Channels per head of the Triton kernels."""
BLOCKS = {64: (128, 128), 128: (128, 64)}
"""Head size -> queries and keys of one block of `triton_attention.attention`."""
WARPS, STAGES = 8, 3
ROW_BLOCK = 64
"""Tokens that one program quantizes, if each has its own scale."""
LARGEST = {"int8": 127, "fp8": 448.0}


@dataclass(frozen=True)
class Rows:
    """Q, K or V quantized per head and `tile` tokens.

    `values` [B, S, H, d]: elements as int8 or e4m3, or their values in bfloat16; `scale` float32
    [B, ceil(S / tile), H].
    """

    values: Tensor
    scale: Tensor
    tile: int


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernels support these [B, tokens, H, d]: bfloat16, d in HEAD_SIZES."""
    return {t.dtype for t in (q, k, v)} == {torch.bfloat16} and q.shape[3] in HEAD_SIZES


def qk_int8(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `kernels.quantized_attention.qk_int8`, up to the rounding of probabilities.

    q [B, S, H, d], k, v [B, L, H, d] bfloat16. Raises UsageError (E-USE-01) for other dtypes and head sizes.
    """
    if not fits(q, k, v):
        raise UsageError(
            f"attention qk_int8 on {str(q.dtype).removeprefix('torch.')} with heads of {q.shape[3]}",
            needs=f"bfloat16 and heads of {', '.join(map(str, HEAD_SIZES))}",
            fix="--attention sdpa",
        )
    mean = k.mean(1, keepdim=True, dtype=torch.float32)
    rows = quantize(q, "int8", 1), quantize(k, "int8", 1, mean=mean)
    return _restored(attend(*rows, v, return_lse=return_lse), q, mean)


def quantized(scheme: str, fp8_matmul: bool, emulated: Function) -> Function:
    """Attention in `scheme`, int8 or fp8; `emulated` for dtypes and head sizes that do not fit.

    `fp8_matmul`: the GPU multiplies e4m3, from sm89 on.
    """
    f = ATTENTION_FORMATS[scheme]

    def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
        if not fits(q, k, v):
            return emulated(q, k, v, return_lse=return_lse)
        mean = k.mean(1, keepdim=True, dtype=torch.float32) if f.smooth_key else None
        values = scheme == "fp8" and not fp8_matmul
        query = quantize(q, f.format, f.query_tile[0] or 1, values=values)
        key = quantize(k, f.format, f.key_tile[0] or 1, mean=mean, values=values)
        if f.value_tile[0] is None:
            operand = definition.quantize(v, f.format, f.value_tile)
            out = attend(query, key, operand.qdata.to(q.dtype), operand.scale, return_lse=return_lse)
        else:
            value = quantize(v, f.format, f.value_tile[0], values=True)
            out = attend(query, key, value, return_lse=return_lse)
        return out if mean is None else _restored(out, q, mean)

    return attention


def decoded(scheme: str, dense: Function, emulated: Function) -> Function:
    """Attention in `scheme`, mxfp8 or mxfp4: dequantized to bfloat16, multiplied by `dense`."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
        if q.dtype != torch.bfloat16:
            return emulated(q, k, v, return_lse=return_lse)
        q, k, v = (t.to(torch.bfloat16) for t in definition.dequantized(scheme, q, k, v))
        return dense(q, k, v, return_lse=return_lse)

    return attention


def _restored(out: Attended, q: Tensor, mean: Tensor) -> Attended:
    """The output of attention with smoothed keys, and the log-sum-exp, if any, of the keys before."""
    return (out[0], definition.restored_lse(out[1], q, mean)) if isinstance(out, tuple) else out


def quantize(x: Tensor, format: str, tile: int, *, mean: Tensor | None = None, values: bool = False) -> Rows:
    """Quantize x [B, S, H, d], minus float32 `mean` [B, 1, H, d], with one scale for `tile` tokens of a head.

    `format`: int8 or fp8. `values`: e4m3 values as bfloat16, not bit patterns.
    """
    batch, length, heads, d = x.shape
    x = triton_linear.dense_rows(x)
    dtype = torch.bfloat16 if values else torch.int8 if format == "int8" else torch.uint8
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(batch, -(-length // tile), heads, device=x.device)
    block = ROW_BLOCK if tile == 1 else tile
    triton_linear.launch(
        triton_attention.quantize, (-(-length // block), batch * heads), x, x if mean is None else mean, out,
        scale, length, heads, x.stride(0), x.stride(1), x.stride(2), TILE=tile, LARGEST=LARGEST[format],
        MEAN=mean is not None, D=d, BLOCK=block, num_warps=max(4, block * d // 2048),
    )  # fmt: skip
    return Rows(out.view(torch.float8_e4m3fn) if dtype == torch.uint8 else out, scale, tile)


def attend(
    query: Rows, key: Rows, value: Rows | Tensor, channels: Tensor | None = None, *, return_lse: bool
) -> Attended:
    """Attention of quantized rows [B, tokens, H, d] -> [B, S, H, d] bfloat16; see `reference.attention`.

    `value`: rows in bfloat16, or bfloat16 [B, L, H, d], whose channels `channels` float32 [B, 1, H, d]
    multiplies.
    """
    (batch, length, heads, d), keys = query.values.shape, key.values.shape[1]
    v, v_scale, v_tile = (
        (value.values, value.scale, value.tile) if isinstance(value, Rows) else (value, None, 0)
    )
    v = triton_linear.dense_rows(v)
    out = torch.empty(query.values.shape, dtype=torch.bfloat16, device=v.device)
    lse = torch.empty(batch, heads, length, device=v.device) if return_lse else None
    queries, block = BLOCKS[d]
    v_scale = next((t for t in (v_scale, channels) if t is not None), query.scale)
    triton_linear.launch(
        triton_attention.attention, (-(-length // queries), batch * heads), query.values, key.values, v,
        query.scale, key.scale, v_scale, out, out if lse is None else lse, length, keys, heads, v.stride(0),
        v.stride(1), v.stride(2), math.log2(math.e) * d**-0.5, QUERY_TILE=query.tile, KEY_TILE=key.tile,
        VALUE_TILE=v_tile, CHANNELS=channels is not None, LSE=return_lse, D=d,
        DOT=getattr(triton_kernels.tl, triton_linear.DOT), BM=queries, BN=block, num_warps=WARPS,
        num_stages=STAGES, enable_fp_fusion=True,
    )  # fmt: skip
    return out if lse is None else (out, lse)
