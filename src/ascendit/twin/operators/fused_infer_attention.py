"""npu_fused_infer_attention_score, its second version, and MindIE-SD's FP8 form of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.twin import contract
from ascendit.twin.contract import HALF_DTYPES, require
from ascendit.twin.operators import attention_inputs as core
from ascendit.twin.operators import mx_quantize
from ascendit.twin.registry import Out, gate, operator

_MASKS = (torch.bool, torch.uint8, torch.int8)
_OUTPUTS = {"BNSD_BSND": "BSND", "BSH_BNSD": "BNSD", "BSND_BNSD": "BNSD", "NTD_TND": "TND", "TND_NTD": "NTD"}


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int,
    kv_heads: int,
    input_layout: str,
    scale: float,
    scale_name: str,
    mask: Tensor | None,
    ends: tuple[Any, Any],
    windows: tuple[int, int],
    lse: bool,
    out_dtype: torch.dtype,
    decode: Any = None,
) -> Iterator[Any]:
    """What both versions do. `decode` turns quantized q, k, v into float32 ones."""
    layout = input_layout.partition("_")[0]
    layout_out = _OUTPUTS.get(input_layout, layout)
    for name, t in (("query", q), ("key", k), ("value", v)):
        require(t.is_contiguous(), "infer.strides", name=name, t=t, strides=t.stride())
    z = core.sizes(q, k, v, layout, heads, kv_heads)
    require(z.d <= 512 and z.d % 16 == 0 and z.n <= 256 and z.b <= 65536, "infer.sizes", z=z)
    core.check_attention_scale(scale_name, scale, 1.0, z.d)
    core.check_mask(mask, z, _MASKS)
    packed = "T" in layout
    runs = core.pieces(z, *ends) if packed else None
    stats = (0,) if not lse else (z.s, z.n, 1) if packed else (z.b, z.n, z.s, 1)
    yield Out(core.shape_of(z, layout_out), out_dtype), Out(stats, torch.float32)
    wide = decode(q, k, v) if decode else (q, k, v)
    qb, kb, vb = (core.to_bnsd(t, layout, h) for t, h in zip(wide, (z.n, z.kv, z.kv), strict=True))
    if runs is None:
        hidden = core.either(core.masked_out(mask, z), core.by_length(z, ends[1]), core.band(z, *windows))
        out, top, total = core.attend(qb, kb, vb, scale, hidden)
    else:
        parts = [core.attend(qb[:, :, a], kb[:, :, b], vb[:, :, b], scale) for a, b in runs]
        out, top, total = (torch.cat(p, 2) for p in zip(*parts, strict=True))
    log = top + torch.log(total)
    row = (log[0].t() if packed else log).unsqueeze(-1).contiguous() if lse else torch.empty(0)
    yield core.from_bnsd(out, layout_out).to(out_dtype), row


def _unused(given: dict[str, Any], allowed: tuple[str, ...] = ()) -> None:
    extra = [n for n, v in given.items() if v is not None and n not in allowed and not n.endswith("_dtype")]
    require(not extra, "infer.unused", extra=extra)


def _same_dtype(q: Tensor, k: Tensor, v: Tensor) -> None:
    require(q.dtype == k.dtype == v.dtype and q.dtype in HALF_DTYPES, "infer.dtypes", q=q, k=k, v=v)


@operator("npu_fused_infer_attention_score")
def npu_fused_infer_attention_score(query: Tensor, key: Tensor, value: Tensor, **a: Any) -> Iterator[Any]:
    """(out, lse); lse [B, N, S, 1] with softmax_lse_flag, else empty."""
    numbers = ("num_heads", "scale", "pre_tokens", "next_tokens", "input_layout", "num_key_value_heads")
    own = {
        *numbers,
        *("atten_mask", "actual_seq_lengths", "actual_seq_lengths_kv", "softmax_lse_flag"),
        *("sparse_mode", "inner_precise", "block_size", "antiquant_mode", "key_antiquant_mode"),
        "value_antiquant_mode",
    }
    _unused({n: v for n, v in a.items() if n not in own})
    _sparse(a["sparse_mode"])
    _same_dtype(query, key, value)
    yield from _attention(
        query,
        key,
        value,
        heads=a["num_heads"],
        kv_heads=a["num_key_value_heads"],
        input_layout=a["input_layout"],
        scale=a["scale"],
        scale_name="scale",
        mask=a["atten_mask"],
        ends=(a["actual_seq_lengths"], a["actual_seq_lengths_kv"]),
        windows=(core.NO_LIMIT, core.NO_LIMIT) if a["atten_mask"] is None else _windows(a),
        lse=a["softmax_lse_flag"],
        out_dtype=query.dtype,
    )


def _windows(a: dict[str, Any]) -> tuple[int, int]:
    return a["pre_tokens"], a["next_tokens"]


def _sparse(mode: int) -> None:
    require(mode in (0, 1), "infer.sparse_mode", mode=mode)


def _second(name: str, query: Tensor, key: Tensor, value: Tensor, a: dict[str, Any]) -> Iterator[Any]:
    """Version 2, in bfloat16 or with FP8 codes and their scales."""
    modes = (a["query_quant_mode"], a["key_quant_mode"], a["value_quant_mode"])
    scaled = ("dequant_scale_query", "dequant_scale_key", "dequant_scale_value")
    tensors = {n: v for n, v in a.items() if isinstance(v, Tensor) and n != "atten_mask"}
    quantized = query.dtype == torch.float8_e4m3fn
    _unused(tensors, scaled if quantized else ())
    _sparse(a["sparse_mode"])
    out_dtype, decode = query.dtype, None
    if quantized:
        gate(name, "quantized")
        wanted = a["out_dtype"]
        number = contract.number_of(wanted) if isinstance(wanted, torch.dtype) else wanted
        out_dtype = contract.output_dtype(number, (torch.bfloat16, torch.float16), "FP8 attention")
        decode = _decoder(modes, [a[n] for n in scaled], a)
    else:
        _same_dtype(query, key, value)
        require(modes == (0, 0, 0), "infer.modes_without_codes", modes=modes, query=query)
    yield from _attention(
        query,
        key,
        value,
        heads=a["num_query_heads"],
        kv_heads=a["num_key_value_heads"],
        input_layout=a["input_layout"],
        scale=a["softmax_scale"],
        scale_name="softmax_scale",
        mask=a["atten_mask"],
        ends=(a["actual_seq_qlen"], a["actual_seq_kvlen"]),
        windows=(core.NO_LIMIT, core.NO_LIMIT) if a["atten_mask"] is None else _windows(a),
        lse=a["return_softmax_lse"],
        out_dtype=out_dtype,
        decode=decode,
    )


def _decoder(modes: tuple[int, ...], given: list[Any], a: dict[str, Any]) -> Any:
    """Codes to numbers; the probabilities stay float32, which the card may quantize (not documented)."""
    require(
        modes in ((7, 7, 7), (6, 6, 8)) and all(isinstance(s, Tensor) for s in given),
        "infer.modes",
        modes=modes,
        scaled=[isinstance(s, Tensor) for s in given],
    )
    if modes == (7, 7, 7):
        require(
            a["input_layout"].startswith("BNSD") and all(s.dim() == 4 and s.shape[0] == 1 for s in given),
            "infer.block_scales",
            shapes=[tuple(s.shape) for s in given],
            layout=a["input_layout"],
        )
        return lambda *qkv: [times_block_scales(t, s) for t, s in zip(qkv, given, strict=True)]
    require(
        a["input_layout"] == "TND"
        and all(
            a[f"{n}_dtype"] == contract.SCALE_E8M0
            for n in ("dequant_scale_query", "dequant_scale_key", "dequant_scale_value")
        ),
        "infer.mx_scales",
        layout=a["input_layout"],
    )
    element = mx_quantize.TARGETS[contract.FP8_E4M3].element
    return lambda q, k, v: [
        mx_quantize.dequantize(q, given[0], -1, element),
        mx_quantize.dequantize(k, given[1], -1, element),
        mx_quantize.dequantize(v, given[2], 0, element),
    ]


def times_block_scales(t: Tensor, scale: Tensor) -> Tensor:
    """float32 of codes [.., S, D] with one scale per tile, [.., blocks of S, blocks of D].

    The tile is found from the sizes: 128, 256 or 512 rows, 64 or 128 columns.
    """
    rows = next(r for r in (128, 256, 512, 64, t.shape[-2]) if -(-t.shape[-2] // r) == scale.shape[-2])
    columns = next(c for c in (128, 64, t.shape[-1]) if -(-t.shape[-1] // c) == scale.shape[-1])
    full = scale.repeat_interleave(rows, -2)[..., : t.shape[-2], :].repeat_interleave(columns, -1)
    return t.to(torch.float32) * full[..., : t.shape[-1]]


@operator("npu_fused_infer_attention_score_v2")
def npu_fused_infer_attention_score_v2(query: Tensor, key: Tensor, value: Tensor, **a: Any) -> Iterator[Any]:
    """(out, lse); lse [B, N, S, 1] with return_softmax_lse, else empty."""
    yield from _second("npu_fused_infer_attention_score_v2", query, key, value, a)


@operator("mindiesd::fused_infer_attention_score_v2")
def fused_infer_attention_score_v2(query: Tensor, key: Tensor, value: Tensor, **a: Any) -> Iterator[Any]:
    """As npu_fused_infer_attention_score_v2, in MindIE-SD's own kernel on a5."""
    yield from _second("mindiesd::fused_infer_attention_score_v2", query, key, value, a)
