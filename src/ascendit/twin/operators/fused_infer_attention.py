"""npu_fused_infer_attention_score, its version 2, and MindIE-SD's FP8 variant."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.twin import contract
from ascendit.twin.contract import HALF_DTYPES, Call
from ascendit.twin.operators import attention_inputs as core
from ascendit.twin.operators import mx_quantize
from ascendit.twin.operators.row_quantize import dequantize_tiles
from ascendit.twin.registry import Out, check_capability, operator

_MASKS = (torch.bool, torch.uint8, torch.int8)
_OUTPUTS = {"BNSD_BSND": "BSND", "BSH_BNSD": "BNSD", "BSND_BNSD": "BNSD", "NTD_TND": "TND", "TND_NTD": "NTD"}
_QKV = ("query", "key", "value")
_SCALES = tuple(f"dequant_scale_{name}" for name in _QKV)
_TILE_MODES, _MX_MODES = (7, 7, 7), (6, 6, 8)
"""Quant modes of query, key and value: a float32 scale per tile; an E8M0 scale per 32 values."""
_ROWS, _AXES = (128, 256, 256), (-1, -1, 0)
"""Tokens per tile, of 128 channels; the axes of the MX blocks of [T, N, D]."""
_FIRST = frozenset(
    (*_QKV, "num_heads", "scale", "pre_tokens", "next_tokens", "input_layout", "num_key_value_heads")
    + ("atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv", "softmax_lse_flag", "sparse_mode")
    + ("inner_precise", "block_size", "antiquant_mode", "key_antiquant_mode", "value_antiquant_mode")
)
"""Arguments of version 1 that are read, or that have no effect without others."""


def _attention(
    a: Call,
    heads: int,
    scale_name: str,
    ends: tuple[Any, Any],
    lse: bool,
    out_dtype: torch.dtype,
    dequantize: Any = None,
) -> Iterator[Any]:
    """Both versions. `dequantize` converts quantized query, key and value to float32."""
    layout = a.input_layout.partition("_")[0]
    layout_out = _OUTPUTS.get(a.input_layout, layout)
    for name in _QKV:
        t = getattr(a, name)
        a.require(t.is_contiguous(), "infer.strides", name=name, shape=t.shape, strides=t.stride())
    z = core.sizes(a.query, a.key, a.value, layout, heads, a.num_key_value_heads)
    a.require(z.d <= 512 and z.d % 16 == 0 and z.n <= 256 and z.b <= 65536, "infer.sizes", z=z)
    scale = getattr(a, scale_name)
    core.check_attention_scale(scale_name, scale, 1.0, z.d)
    core.check_mask(a.atten_mask, z, _MASKS)
    runs = core.packed_sequences(z, *ends) if "T" in layout else None
    stats = (0,) if not lse else (z.s, z.n, 1) if runs else (z.b, z.n, z.s, 1)
    yield Out(core.shape_of(z, layout_out), out_dtype), Out(stats, torch.float32)
    qkv = (a.query, a.key, a.value)
    windows = (a.pre_tokens, a.next_tokens)
    masked = None if runs else core.combined_mask(a.atten_mask, z, windows, ends[1])
    inputs = dequantize(*qkv) if dequantize else qkv
    out, top, total = core.attend_in(inputs, z, (layout, layout_out), scale, masked, runs)
    row = (top + torch.log(total)).unsqueeze(-1).contiguous() if lse else torch.empty(0)
    yield out.to(out_dtype), row


def _check(a: Call, unused: Collection[str]) -> None:
    """Refuse arguments that the twin does not compute, and causal masks."""
    extra = [n for n in unused if getattr(a, n) is not None and not n.endswith("_dtype")]
    a.require(not extra, "infer.unused", extra=extra)
    a.require(a.sparse_mode in (0, 1), "infer.sparse_mode")


def _check_dtypes(a: Call) -> None:
    same = a.query.dtype == a.key.dtype == a.value.dtype
    a.require(same and a.query.dtype in HALF_DTYPES, "infer.dtypes")


@operator("npu_fused_infer_attention_score")
def npu_fused_infer_attention_score(**arguments: Any) -> Iterator[Any]:
    """(out, lse); lse is float32 [B, N, S, 1] with softmax_lse_flag, else empty."""
    a = Call(**arguments)
    _check(a, [n for n in arguments if n not in _FIRST])
    _check_dtypes(a)
    ends = (a.actual_seq_lengths, a.actual_seq_lengths_kv)
    yield from _attention(a, a.num_heads, "scale", ends, a.softmax_lse_flag, a.query.dtype)


def _version_2(name: str, a: Call) -> Iterator[Any]:
    """Version 2, in bfloat16 or float16, or in FP8 with scales."""
    modes = (a.query_quant_mode, a.key_quant_mode, a.value_quant_mode)
    quantized = a.query.dtype == torch.float8_e4m3fn
    computed = (*_QKV, "atten_mask", *(_SCALES if quantized else ()))
    _check(a, [n for n, v in vars(a).items() if isinstance(v, Tensor) and n not in computed])
    out_dtype, dequantize = a.query.dtype, None
    if quantized:
        check_capability(name, "mxfp8" if modes == _MX_MODES else "fp8")
        number = a.out_dtype
        number = contract.number_of(number) if isinstance(number, torch.dtype) else number
        out_dtype = contract.output_dtype(number, (torch.bfloat16, torch.float16), "FP8 attention")
        dequantize = _dequantizer(a, modes)
    else:
        _check_dtypes(a)
        a.require(modes == (0, 0, 0), "infer.modes_without_qdata", modes=modes)
    ends = (a.actual_seq_qlen, a.actual_seq_kvlen)
    lse = a.return_softmax_lse
    yield from _attention(a, a.num_query_heads, "softmax_scale", ends, lse, out_dtype, dequantize)


def _dequantizer(a: Call, modes: tuple[int, ...]) -> Any:
    """Dequantizer of query, key and value. Probabilities stay float32; a card may quantize them."""
    scales = [getattr(a, name) for name in _SCALES]
    scaled = [isinstance(s, Tensor) for s in scales]
    a.require(modes in (_TILE_MODES, _MX_MODES) and all(scaled), "infer.modes", modes=modes, scaled=scaled)
    qkv = (a.query, a.key, a.value)
    shapes = [tuple(s.shape) for s in scales]
    if modes == _TILE_MODES:
        tiles = [
            (1, t.shape[1], -(-t.shape[2] // rows), -(-t.shape[3] // 128))
            for t, rows in zip(qkv, _ROWS, strict=True)
            if t.dim() == 4
        ]
        valid = a.input_layout.startswith("BNSD") and len(a.query) == 1 and shapes == tiles
        a.require(valid, "infer.block_scales", shapes=shapes, tiles=tiles)
        return lambda *qkv: [dequantize_blocks(t, s) for t, s in zip(qkv, scales, strict=True)]
    dtypes = {getattr(a, f"{name}_dtype") for name in _SCALES}
    a.require(a.input_layout == "TND" and dtypes == {contract.SCALE_E8M0}, "infer.mx_scales")
    target = mx_quantize.TARGETS[contract.FP8_E4M3]
    pairs = [
        mx_quantize.outs(tuple(t.shape), axis % 3, target, 32)[1].shape
        for t, axis in zip(qkv, _AXES, strict=True)
    ]
    a.require(shapes == pairs, "infer.mx_scale_shapes", shapes=shapes, pairs=pairs)
    return lambda *qkv: [
        mx_quantize.dequantize(t, s, axis, target.element).contiguous()
        for t, s, axis in zip(qkv, scales, _AXES, strict=True)
    ]


def dequantize_blocks(t: Tensor, scale: Tensor) -> Tensor:
    """Dequantize qdata [.., S, D] to float32, with one scale per tile: [.., blocks of S, blocks of D].

    The tile size follows from the shapes: 128, 256 or 512 rows, 64 or 128 columns.
    """
    rows = next(r for r in (128, 256, 512, 64, t.shape[-2]) if -(-t.shape[-2] // r) == scale.shape[-2])
    columns = next(c for c in (128, 64, t.shape[-1]) if -(-t.shape[-1] // c) == scale.shape[-1])
    return dequantize_tiles(t, scale, rows, columns)


@operator("npu_fused_infer_attention_score_v2")
def npu_fused_infer_attention_score_v2(**arguments: Any) -> Iterator[Any]:
    """(out, lse); lse is float32 [B, N, S, 1] with return_softmax_lse, else empty."""
    yield from _version_2("npu_fused_infer_attention_score_v2", Call(**arguments))


@operator("mindiesd::fused_infer_attention_score_v2")
def fused_infer_attention_score_v2(**arguments: Any) -> Iterator[Any]:
    """Same as npu_fused_infer_attention_score_v2, in MindIE-SD's own kernel on a5."""
    yield from _version_2("mindiesd::fused_infer_attention_score_v2", Call(**arguments))
