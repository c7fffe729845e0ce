"""What the attention operators share: layouts, masks, lengths, and softmax attention in float32.

A mask is True, or 1, where a key is masked OUT; F.scaled_dot_product_attention means the opposite.
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
    """Batch, query heads, key heads, tokens, keys, head size, head size of the values. Packed: batch 1."""

    b: int
    n: int
    kv: int
    s: int
    keys: int
    d: int
    dv: int


def _axis(t: Tensor, layout: str, name: str) -> int | None:
    at = layout.find(name)
    return int(t.shape[at]) if at >= 0 else None


def sizes(query: Tensor, key: Tensor, value: Tensor, layout: str, heads: int, kv_heads: int) -> Sizes:
    """Refuses shapes that do not fit the layout and the numbers of heads."""
    call = Call(query=query, key=key, value=value, layout=layout, heads=heads)
    call.require(layout in _LAYOUTS, "attention.layout")
    call.require(heads > 0, "attention.heads")
    kv = kv_heads or heads
    for name, t in (("query", query), ("key", key), ("value", value)):
        call.require(t.dim() == len(layout), "attention.axes", name=name, t=t, axes=len(layout))
    found = heads if "H" in layout else _axis(query, layout, "N")
    found_kv = _axis(key, layout, "N") or kv
    matching = found == heads and heads % kv == 0 and heads % found_kv == 0
    call.require(matching and (found_kv == kv or not kv_heads), "attention.head_num", kv=kv)
    s, keys, values = (_axis(t, layout, "T" if "T" in layout else "S") or 0 for t in (query, key, value))
    per_head = ((query, heads), (key, found_kv), (value, found_kv))
    d, dk, dv = (_axis(t, layout, "D") or t.shape[-1] // h for t, h in per_head)
    b, batch = (_axis(t, layout, "B") or 1 for t in (query, key))
    call.require(d == dk >= dv and keys == values and batch == b, "attention.shapes")
    return Sizes(b, heads, found_kv, s, keys, d, dv)


def to_bnsd(t: Tensor, layout: str, heads: int) -> Tensor:
    """Any layout -> [B, N, S, D]; a packed one has batch 1."""
    if layout in ("BSH", "SBH"):
        t, layout = t.unflatten(-1, (heads, -1)), layout.replace("H", "ND")
    if layout in ("NSD", "TND", "NTD"):
        t, layout = t.unsqueeze(0), "B" + layout.replace("T", "S")
    return t.permute([layout.index(a) for a in "BNSD"])


def from_bnsd(t: Tensor, layout: str) -> Tensor:
    """The inverse, contiguous."""
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
    """The default of these operators is never what attention means."""
    require(value != default or d == 1, "attention.scale", name=name, value=value, d=d, root=d**-0.5)


def check_mask(mask: Tensor | None, z: Sizes, dtypes: tuple[torch.dtype, ...]) -> None:
    """dtype and shape. An additive mask is refused: this one says which keys to leave out."""
    if mask is None:
        return
    require(mask.dtype in dtypes, "attention.mask_dtype", mask=mask, dtypes=dtypes)
    shapes = [(z.s, z.keys), *((b, n, z.s, z.keys) for b in (1, z.b) for n in (1, z.n)), (z.b, z.s, z.keys)]
    require(tuple(mask.shape) in shapes, "attention.mask_shape", mask=mask, z=z)


def masked_out(mask: Tensor | None, z: Sizes) -> Tensor | None:
    """bool, broadcast to [B, N, S, keys]. Refuses a row with no key left: its result has no meaning."""
    if mask is None:
        return None
    out = mask.to(torch.bool)
    out = out.unsqueeze(1) if out.dim() == 3 else out
    require(not bool(out.all(-1).any()), "attention.mask_row")
    return out


def by_length(z: Sizes, lengths: Sequence[int] | None) -> Tensor | None:
    """A mask of the keys beyond each sample's length, [B, 1, 1, keys]."""
    if lengths is None:
        return None
    fits = len(lengths) in (1, z.b) and all(0 < n <= z.keys for n in lengths)
    require(fits, "attention.lengths", lengths=lengths, z=z)
    each = torch.tensor(list(lengths)).expand(z.b)
    return torch.arange(z.keys) >= each[:, None, None, None]


def pieces(
    z: Sizes, ends_q: Sequence[int] | None, ends_kv: Sequence[int] | None
) -> list[tuple[slice, slice]]:
    """The sequences of a packed batch, from cumulative lengths without a leading zero."""
    ends_q, ends_kv = ends_q or (), ends_kv or ()
    require(0 < len(ends_q) == len(ends_kv), "attention.packed_lengths")
    for name, ends, total in (("q", ends_q, z.s), ("kv", ends_kv, z.keys)):
        shortest = min(b - a for a, b in pairwise((0, *ends)))
        rising = shortest >= (0 if name == "kv" else 1) and ends[-1] == total
        require(rising, "attention.packed_ends", name=name, ends=ends, total=total)
    both = zip(pairwise((0, *ends_q)), pairwise((0, *ends_kv)), strict=True)
    return [(slice(*q), slice(*kv)) for q, kv in both]


def attend_in(
    tensors: Iterable[Tensor],
    z: Sizes,
    layouts: tuple[str, str],
    scale: float,
    hidden: Tensor | None = None,
    runs: Sequence[tuple[slice, slice]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` from one layout into another. Largest scores and sums [B, N, S], packed (`runs`) [S, N]."""
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

    Without a mask as a CPU attends, where it can, and the output in q's dtype; else in float32, over blocks
    of 256 queries. Fewer key heads than query heads: each serves its group.
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


def hidden_keys(
    mask: Tensor | None, z: Sizes, windows: tuple[int, int], lengths: Sequence[int] | None = None
) -> Tensor | None:
    """Keys masked out by a mask, by its windows of tokens, which mean nothing without one, or by a length."""
    masks = (masked_out(mask, z), by_length(z, lengths), None if mask is None else _band(z, *windows))
    hidden = None
    for part in masks:
        if part is not None:
            hidden = part if hidden is None else hidden | part
    return hidden


def _band(z: Sizes, before: int, after: int) -> Tensor | None:
    """Keys more than `before` back or `after` ahead of a query, masked out, [S, keys]."""
    if before >= max(z.s, z.keys) and after >= max(z.s, z.keys):
        return None
    step = torch.arange(z.keys)[None, :] - torch.arange(z.s)[:, None]
    return (step > after) | (step < -before)
