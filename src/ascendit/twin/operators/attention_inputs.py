"""Shared code of the attention operators: layouts, masks, lengths, and softmax attention in float32.

A mask is True, or 1, where a key is masked OUT, the opposite of F.scaled_dot_product_attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ascendit.twin import cpu_kernels
from ascendit.twin.contract import Call, require

_CHUNK = 256
_LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "NSD", "TND", "NTD")


@dataclass(frozen=True)
class Sizes:
    """Batch, query heads, key heads, queries, keys, head size, head size of the values. Packed: batch 1."""

    b: int
    n: int
    kv: int
    s: int
    keys: int
    d: int
    dv: int


def _axis(t: Tensor, layout: str, name: str) -> int | None:
    axis = layout.find(name)
    return int(t.shape[axis]) if axis >= 0 else None


def sizes(query: Tensor, key: Tensor, value: Tensor, layout: str, heads: int, kv_heads: int) -> Sizes:
    """Sizes of query, key and value ([..] of any dtype).

    Raises TwinError (E-TWN-01) if layout or heads do not fit.
    """
    call = Call(query=query, key=key, value=value, layout=layout, heads=heads)
    call.require(layout in _LAYOUTS, "attention.layout")
    call.require(heads > 0, "attention.heads")
    kv = kv_heads or heads
    for name, t in (("query", query), ("key", key), ("value", value)):
        call.require(t.dim() == len(layout), "attention.axes", name=name, t=t, axes=len(layout))
    query_axis = heads if "H" in layout else _axis(query, layout, "N")
    key_axis = _axis(key, layout, "N") or kv
    divisible = query_axis == heads and heads % kv == 0 and heads % key_axis == 0
    call.require(divisible and (key_axis == kv or not kv_heads), "attention.head_num", kv=kv)
    s, keys, values = (_axis(t, layout, "T" if "T" in layout else "S") or 0 for t in (query, key, value))
    per_head = ((query, heads), (key, key_axis), (value, key_axis))
    d, dk, dv = (_axis(t, layout, "D") or t.shape[-1] // h for t, h in per_head)
    b, batch = (_axis(t, layout, "B") or 1 for t in (query, key))
    call.require(d == dk >= dv and keys == values and batch == b, "attention.shapes")
    return Sizes(b, heads, key_axis, s, keys, d, dv)


def to_bnsd(t: Tensor, layout: str, heads: int) -> Tensor:
    """Convert from any layout to [B, N, S, D], same dtype; B is 1 for a packed layout."""
    if layout in ("BSH", "SBH"):
        t, layout = t.unflatten(-1, (heads, -1)), layout.replace("H", "ND")
    if layout in ("NSD", "TND", "NTD"):
        t, layout = t.unsqueeze(0), "B" + layout.replace("T", "S")
    return t.permute([layout.index(a) for a in "BNSD"])


def from_bnsd(t: Tensor, layout: str) -> Tensor:
    """Convert [B, N, S, D] to any layout: contiguous, same dtype."""
    if layout in ("BSH", "SBH"):
        return t.permute(["BNSD".index(a) for a in layout.replace("H", "ND")]).flatten(-2).contiguous()
    if layout in ("NSD", "TND", "NTD"):
        return t[0].permute(["NSD".index(a) for a in layout.replace("T", "S")]).contiguous()
    return t.permute(["BNSD".index(a) for a in layout]).contiguous()


def shape_of(z: Sizes, layout: str) -> tuple[int, ...]:
    """The shape of an output in this layout."""
    named = {"B": z.b, "N": z.n, "S": z.s, "T": z.s, "D": z.dv, "H": z.n * z.dv}
    return tuple(named[a] for a in layout)


def check_attention_scale(name: str, value: float, default: float, d: int) -> None:
    """Raise TwinError (E-TWN-01) for the operators' default scale, which is wrong for attention."""
    require(value != default or d == 1, "attention.scale", name=name, value=value, d=d, root=d**-0.5)


def check_mask(mask: Tensor | None, z: Sizes, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise TwinError (E-TWN-01) unless the mask is None, or of one of `dtypes` and a shape that the
    operators take: [S, keys], [B, S, keys] or [B, N, S, keys].
    """
    if mask is None:
        return
    require(mask.dtype in dtypes, "attention.mask_dtype", mask=mask, dtypes=dtypes)
    shapes = [(z.s, z.keys), *((b, n, z.s, z.keys) for b in (1, z.b) for n in (1, z.n)), (z.b, z.s, z.keys)]
    require(tuple(mask.shape) in shapes, "attention.mask_shape", mask=mask, z=z)


def masked_out(mask: Tensor | None, z: Sizes) -> Tensor | None:
    """The mask as bool, broadcast to [B, N, S, keys].

    Raises TwinError (E-TWN-01) if a query has no key left.
    """
    if mask is None:
        return None
    out = mask.to(torch.bool)
    out = out.unsqueeze(1) if out.dim() == 3 else out
    require(not bool(out.all(-1).any()), "attention.mask_row")
    return out


def length_mask(z: Sizes, lengths: Sequence[int] | None) -> Tensor | None:
    """bool [B, 1, 1, keys], True beyond each sample's length.

    Raises TwinError (E-TWN-01) for invalid lengths.
    """
    if lengths is None:
        return None
    fits = len(lengths) in (1, z.b) and all(0 < n <= z.keys for n in lengths)
    require(fits, "attention.lengths", lengths=lengths, z=z)
    limits = torch.tensor(list(lengths)).expand(z.b)
    return torch.arange(z.keys) >= limits[:, None, None, None]


def packed_sequences(
    z: Sizes, ends_q: Sequence[int] | None, ends_kv: Sequence[int] | None
) -> list[tuple[slice, slice]]:
    """Query and key slices of each sequence, from cumulative lengths.

    Raises TwinError (E-TWN-01) if invalid.
    """
    ends_q, ends_kv = ends_q or (), ends_kv or ()
    require(0 < len(ends_q) == len(ends_kv), "attention.packed_lengths")
    for name, ends, total in (("q", ends_q, z.s), ("kv", ends_kv, z.keys)):
        shortest = min(b - a for a, b in pairwise((0, *ends)))
        valid = shortest >= (0 if name == "kv" else 1) and ends[-1] == total
        require(valid, "attention.packed_ends", name=name, ends=ends, total=total)
    bounds = zip(pairwise((0, *ends_q)), pairwise((0, *ends_kv)), strict=True)
    return [(slice(*q), slice(*kv)) for q, kv in bounds]


def attend_in(
    tensors: Iterable[Tensor],
    z: Sizes,
    layouts: tuple[str, str],
    scale: float,
    hidden: Tensor | None = None,
    runs: Sequence[tuple[slice, slice]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` from one layout to another; float32 scores and sums are [S, N] if packed (`runs`)."""
    q, k, v = (to_bnsd(t, layouts[0], h) for t, h in zip(tensors, (z.n, z.kv, z.kv), strict=True))
    if runs is None:
        out, top, total = attend(q, k, v, scale, hidden)
    else:
        parts = [attend(q[:, :, a], k[:, :, b], v[:, :, b], scale) for a, b in runs]
        out, top, total = (torch.cat(p, 2) for p in zip(*parts, strict=True))
        top, total = top[0].t(), total[0].t()
    return from_bnsd(out, layouts[1]), top, total


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, out_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, S, D] -> output, largest score and sum of exponentials per query, float32 [B, N, S].

    Without a mask the CPU kernel is used if it supports the inputs, with output in q's dtype; otherwise
    float32 in blocks of 256 queries. If there are fewer key heads than query heads, each serves a group.
    """
    if out_mask is None and cpu_kernels.can_attend(q, k, v, scale):
        return cpu_kernels.attend(q, k, v, scale)
    group = q.shape[1] // k.shape[1]
    keys, values = (t.to(torch.float32).repeat_interleave(group, 1) for t in (k, v))
    outs, tops, sums = [], [], []
    for start in range(0, q.shape[2], _CHUNK):
        scores = (q[:, :, start : start + _CHUNK].to(torch.float32) @ keys.mT) * scale
        if out_mask is not None:
            rows = out_mask[..., start : start + _CHUNK, :] if out_mask.shape[-2] > 1 else out_mask
            scores = scores.masked_fill(rows, -math.inf)
        top = scores.amax(-1)
        weights = torch.exp(scores - top.unsqueeze(-1))
        total = weights.sum(-1)
        outs.append((weights @ values) / total.unsqueeze(-1))
        tops.append(top)
        sums.append(total)
    return torch.cat(outs, 2), torch.cat(tops, 2), torch.cat(sums, 2)


def combined_mask(
    mask: Tensor | None, z: Sizes, windows: tuple[int, int], lengths: Sequence[int] | None = None
) -> Tensor | None:
    """bool [.., S, keys], True where the mask, a length or, if there is a mask, a window masks a key out."""
    window = None if mask is None else _window_mask(z, *windows)
    combined = None
    for single in (masked_out(mask, z), length_mask(z, lengths), window):
        if single is not None:
            combined = single if combined is None else combined | single
    return combined


def _window_mask(z: Sizes, before: int, after: int) -> Tensor | None:
    """bool [S, keys], True for keys more than `before` behind or `after` ahead of a query."""
    if before >= max(z.s, z.keys) and after >= max(z.s, z.keys):
        return None
    step = torch.arange(z.keys)[None, :] - torch.arange(z.s)[:, None]
    return (step > after) | (step < -before)
