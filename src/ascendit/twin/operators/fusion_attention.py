"""npu_fusion_attention and npu_prompt_flash_attention, and the merging of partial results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.twin.contract import FLOAT_DTYPES, HALF_DTYPES, Call, require
from ascendit.twin.operators import attention_inputs as core
from ascendit.twin.registry import Out, operator

_MASKS = (torch.bool, torch.uint8)
_SCALES = ("deq_scale1", "quant_scale1", "deq_scale2", "quant_scale2", "quant_offset2")


def _check(a: Call, unused: tuple[str, ...]) -> None:
    """Refuse causal masks and arguments that the twin does not compute."""
    a.require(a.sparse_mode in (0, 1), "fusion.sparse_mode")
    extra = [name for name in unused if getattr(a, name) is not None]
    a.require(not extra, "infer.unused", extra=extra)


@operator("npu_fusion_attention")
def npu_fusion_attention(**arguments: Any) -> Iterator[Any]:
    """(out, softmax_max, softmax_sum, empty, 0, 0, 0); max and sum: float32 [B, N, S, 8], 8 equal values."""
    a = Call(**arguments)
    a.require(a.keep_prob == 1.0, "fusion.keep_prob")
    _check(a, ("pse", "padding_mask", "prefix", "sink", "dropout_mask"))
    layout, dtype = a.input_layout.upper(), a.query.dtype
    a.require(layout in ("BSH", "SBH", "BNSD", "BSND", "TND"), "fusion.layout")
    a.require(dtype == a.key.dtype == a.value.dtype and dtype in FLOAT_DTYPES, "fusion.dtypes")
    z = core.sizes(a.query, a.key, a.value, layout, a.head_num, 0)
    a.require(z.d <= 768, "fusion.head_size", z=z)
    core.check_attention_scale("scale", a.scale, 1.0, z.d)
    core.check_mask(a.atten_mask, z, _MASKS)
    runs = core.packed_sequences(z, a.actual_seq_qlen, a.actual_seq_kvlen) if layout == "TND" else None
    stats = (z.s, z.n, 8) if runs else (z.b, z.n, z.s, 8)
    softmax = Out(stats, torch.float32)
    yield Out(core.shape_of(z, layout), dtype), softmax, softmax, Out((0,), dtype), 0, 0, 0
    masked = core.combined_mask(a.atten_mask, z, (a.pre_tockens, a.next_tockens))
    qkv = (a.query, a.key, a.value)
    out, *sums = core.attend_in(qkv, z, (layout, layout), a.scale, masked, runs)
    repeated = [t.unsqueeze(-1).expand(stats).contiguous() for t in sums]
    yield out.to(dtype), *repeated, a.query.new_empty(0), 0, 0, 0


@operator("npu_prompt_flash_attention")
def npu_prompt_flash_attention(**arguments: Any) -> Iterator[Any]:
    """Attention on a2 and a3, in the layout of `input_layout`.

    With a mask, pre_tokens and next_tokens apply too, and the default next_tokens=0 makes the attention
    causal.
    """
    a = Call(**arguments)
    _check(a, ("padding_mask", "pse_shift", *_SCALES))
    layout, _, layout_out = a.input_layout.partition("_")
    dtype = a.query.dtype
    a.require(dtype == a.key.dtype == a.value.dtype and dtype in HALF_DTYPES, "fusion.prompt_dtypes")
    z = core.sizes(a.query, a.key, a.value, layout, a.num_heads, a.num_key_value_heads)
    core.check_attention_scale("scale_value", a.scale_value, 1.0, z.d)
    core.check_mask(a.atten_mask, z, (*_MASKS, torch.int8))
    a.require(a.actual_seq_lengths is None and layout != "TND", "fusion.prompt_lengths")
    layouts = (layout, layout_out or layout)
    yield Out(core.shape_of(z, layouts[1]), dtype)
    windows = (a.pre_tokens, a.next_tokens)
    masked = core.combined_mask(a.atten_mask, z, windows, a.actual_seq_lengths_kv)
    yield core.attend_in((a.query, a.key, a.value), z, layouts, a.scale_value, masked)[0].to(dtype)


@operator("npu_attention_update")
def npu_attention_update(lse: list[Tensor], local_out: list[Tensor], update_type: int) -> Iterator[Any]:
    """(out, lse) of partial attention merged by exp(lse): lse [T, N or 1], out [T, D], float dtypes."""
    valid = len(lse) == len(local_out) > 0 and update_type in (0, 1)
    counts = {"count": len(lse), "outputs": len(local_out)}
    require(valid, "fusion.update_counts", **counts, update_type=update_type)
    yield Out(tuple(local_out[0].shape), local_out[0].dtype), Out(tuple(lse[0].shape), lse[0].dtype)
    stacked = torch.stack([t.to(torch.float32) for t in lse])
    total = torch.logsumexp(stacked, 0)
    weights = torch.exp(stacked - total)
    weighted = [t.to(torch.float32) * _broadcast_to(w, t) for w, t in zip(weights, local_out, strict=True)]
    yield torch.stack(weighted).sum(0).to(local_out[0].dtype), total.to(lse[0].dtype)


def _broadcast_to(weight: Tensor, out: Tensor) -> Tensor:
    return weight if weight.dim() == out.dim() else weight.unsqueeze(-1)


@operator("npu_ring_attention_update")
def npu_ring_attention_update(**arguments: Any) -> Iterator[Any]:
    """Merge two results of npu_fusion_attention: outputs SBH, maxima and sums [B, N, S, 8]."""
    a = Call(**arguments)
    previous, current = a.prev_attn_out, a.cur_attn_out
    a.require(a.input_layout in ("SBH", "TND"), "fusion.ring_layout")
    same = (previous.shape, previous.dtype) == (current.shape, current.dtype)
    a.require(same, "fusion.ring_shapes")
    softmax = Out(tuple(a.prev_softmax_max.shape), torch.float32)
    yield Out(tuple(previous.shape), previous.dtype), softmax, softmax
    top = torch.maximum(a.prev_softmax_max, a.cur_softmax_max)
    sums = ((a.prev_softmax_sum, a.prev_softmax_max), (a.cur_softmax_sum, a.cur_softmax_max))
    shares = [s * torch.exp(m - top) for s, m in sums]
    total = shares[0] + shares[1]
    merged = torch.zeros((), dtype=torch.float32)
    for out, share in zip((previous, current), shares, strict=True):
        weight = (share / total)[..., 0]  # [B, N, S], TND: [T, N]
        values = out.to(torch.float32)
        if a.input_layout == "SBH":
            heads = values.unflatten(-1, (weight.shape[1], -1))
            merged = merged + (heads * weight.permute(2, 0, 1).unsqueeze(-1)).flatten(-2)
        else:
            merged = merged + values * weight.unsqueeze(-1)
    yield merged.to(previous.dtype), top, total
