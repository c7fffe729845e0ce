"""npu_fusion_attention and npu_prompt_flash_attention, and the merging of partial results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.twin.contract import FLOAT_DTYPES, HALF_DTYPES, require
from ascendit.twin.operators import attention_inputs as core
from ascendit.twin.registry import Out, operator

_MASKS = (torch.bool, torch.uint8)


def _inference(keep_prob: float, sparse_mode: int, given: dict[str, Any]) -> None:
    require(keep_prob == 1.0, "fusion.keep_prob", keep_prob=keep_prob)
    require(sparse_mode in (0, 1), "fusion.sparse_mode", sparse_mode=sparse_mode)
    extra = [name for name, value in given.items() if value is not None]
    require(not extra, "infer.unused", extra=extra)


@operator("npu_fusion_attention")
def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None,
    padding_mask: Tensor | None,
    atten_mask: Tensor | None,
    scale: float,
    keep_prob: float,
    pre_tockens: int,
    next_tockens: int,
    sparse_mode: int,
    actual_seq_qlen: list[int] | None,
    actual_seq_kvlen: list[int] | None,
    **rest: Any,
) -> Iterator[Any]:
    """(out, softmax_max, softmax_sum, empty, 0, 0, 0). Maximum and sum come 8 times, [B, N, S, 8]."""
    given = {n: rest[n] for n in ("prefix", "sink", "dropout_mask")}
    _inference(keep_prob, sparse_mode, {"pse": pse, "padding_mask": padding_mask, **given})
    layout = input_layout.upper()
    require(layout in ("BSH", "SBH", "BNSD", "BSND", "TND"), "fusion.layout", input_layout=input_layout)
    require(
        query.dtype == key.dtype == value.dtype and query.dtype in FLOAT_DTYPES,
        "fusion.dtypes",
        query=query,
        key=key,
        value=value,
    )
    z = core.sizes(query, key, value, layout, head_num, 0)
    require(z.d <= 768, "fusion.head_size", z=z)
    core.check_attention_scale("scale", scale, 1.0, z.d)
    core.check_mask(atten_mask, z, _MASKS)
    runs = core.pieces(z, actual_seq_qlen, actual_seq_kvlen) if layout == "TND" else None
    stats = (z.s, z.n, 8) if runs else (z.b, z.n, z.s, 8)
    softmax = Out(stats, torch.float32)
    yield Out(core.shape_of(z, layout), query.dtype), softmax, softmax, Out((0,), query.dtype), 0, 0, 0
    q, k, v = (core.to_bnsd(t, layout, h) for t, h in ((query, z.n), (key, z.kv), (value, z.kv)))
    hidden = core.masked_out(atten_mask, z)
    if hidden is not None:
        hidden = core.either(hidden, core.band(z, pre_tockens, next_tockens))
    if runs is None:
        out, top, total = core.attend(q, k, v, scale, hidden)
    else:
        parts = [core.attend(q[:, :, a], k[:, :, b], v[:, :, b], scale) for a, b in runs]
        out, top, total = (torch.cat(p, 2) for p in zip(*parts, strict=True))
        top, total = top[0].t(), total[0].t()
    lanes = [t.unsqueeze(-1).expand(stats).contiguous() for t in (top, total)]
    yield core.from_bnsd(out, layout).to(query.dtype), *lanes, query.new_empty(0), 0, 0, 0


@operator("npu_prompt_flash_attention")
def npu_prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    atten_mask: Tensor | None,
    actual_seq_lengths: list[int] | None,
    num_heads: int,
    scale_value: float,
    pre_tokens: int,
    next_tokens: int,
    input_layout: str,
    num_key_value_heads: int,
    actual_seq_lengths_kv: list[int] | None,
    sparse_mode: int,
    **rest: Any,
) -> Iterator[Any]:
    """Attention of a2 and a3. Without a mask the token windows are not looked at; with one they are, and the
    default next_tokens=0 then makes the attention causal."""
    _inference(1.0, sparse_mode, rest)
    layout, _, layout_out = input_layout.partition("_")
    require(
        query.dtype == key.dtype == value.dtype and query.dtype in HALF_DTYPES,
        "fusion.prompt_dtypes",
        query=query,
        key=key,
        value=value,
    )
    z = core.sizes(query, key, value, layout, num_heads, num_key_value_heads)
    core.check_attention_scale("scale_value", scale_value, 1.0, z.d)
    core.check_mask(atten_mask, z, (torch.bool, torch.uint8, torch.int8))
    require(actual_seq_lengths is None and layout != "TND", "fusion.prompt_lengths")
    yield Out(core.shape_of(z, layout_out or layout), query.dtype)
    q, k, v = (core.to_bnsd(t, layout, h) for t, h in ((query, z.n), (key, z.kv), (value, z.kv)))
    hidden = core.masked_out(atten_mask, z)
    if hidden is not None:
        hidden = core.either(hidden, core.band(z, pre_tokens, next_tokens))
    out = core.attend(q, k, v, scale_value, core.either(hidden, core.by_length(z, actual_seq_lengths_kv)))[0]
    yield core.from_bnsd(out, layout_out or layout).to(query.dtype)


@operator("npu_attention_update")
def npu_attention_update(lse: list[Tensor], local_out: list[Tensor], update_type: int) -> Iterator[Any]:
    """Merge partial attention: outputs weighted by exp(lse). lse [T, N or 1], outputs [T, D]; (out, lse)."""
    require(
        len(lse) == len(local_out) > 0 and update_type in (0, 1),
        "fusion.update_counts",
        count=len(lse),
        outputs=len(local_out),
        update_type=update_type,
    )
    yield Out(tuple(local_out[0].shape), local_out[0].dtype), Out(tuple(lse[0].shape), lse[0].dtype)
    stacked = torch.stack([t.to(torch.float32) for t in lse])
    total = torch.logsumexp(stacked, 0)
    weights = torch.exp(stacked - total)
    parts = [t.to(torch.float32) * _like(w, t) for w, t in zip(weights, local_out, strict=True)]
    yield torch.stack(parts).sum(0).to(local_out[0].dtype), total.to(lse[0].dtype)


def _like(weight: Tensor, out: Tensor) -> Tensor:
    return weight if weight.dim() == out.dim() else weight.unsqueeze(-1)


@operator("npu_ring_attention_update")
def npu_ring_attention_update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    actual_seq_qlen: Tensor | None,
    input_layout: str,
    input_softmax_layout: str,
) -> Iterator[Any]:
    """Merge two results of npu_fusion_attention: outputs SBH, maxima and sums [B, N, S, 8]."""
    require(input_layout in ("SBH", "TND"), "fusion.ring_layout", input_layout=input_layout)
    require(
        prev_attn_out.shape == cur_attn_out.shape and prev_attn_out.dtype == cur_attn_out.dtype,
        "fusion.ring_shapes",
    )
    softmax = Out(tuple(prev_softmax_max.shape), torch.float32)
    yield Out(tuple(prev_attn_out.shape), prev_attn_out.dtype), softmax, softmax
    top = torch.maximum(prev_softmax_max, cur_softmax_max)
    before, now = (
        s * torch.exp(m - top)
        for s, m in ((prev_softmax_sum, prev_softmax_max), (cur_softmax_sum, cur_softmax_max))
    )
    total = before + now
    shares = [(share / total)[..., 0] for share in (before, now)]  # [B, N, S], TND: [T, N]
    outs = [t.to(torch.float32) for t in (prev_attn_out, cur_attn_out)]
    if input_layout == "SBH":
        heads = shares[0].shape[1]
        merged = sum(
            o.unflatten(-1, (heads, -1)) * w.permute(2, 0, 1).unsqueeze(-1)
            for o, w in zip(outs, shares, strict=True)
        )
        merged = torch.as_tensor(merged).flatten(-2)
    else:
        merged = torch.as_tensor(sum(o * w.unsqueeze(-1) for o, w in zip(outs, shares, strict=True)))
    yield merged.to(prev_attn_out.dtype), top, total
