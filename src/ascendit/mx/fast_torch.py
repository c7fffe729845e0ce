"""Encoding without a compiler: PyTorch on pieces that fit the cache, in buffers that are used again.

bfloat16 blocks become codes in 16-bit integers, as `native/blocks.h` says. What the integers do not cover
(infinities and NaN, the smallest numbers) is done again by the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ascendit.mx import reference, scales
from ascendit.mx.elements import largest
from ascendit.mx.formats import E2M1, Element, Format
from ascendit.mx.reference import Parts

PIECE = 1 << 18
"""Values at a time: smaller ones cost more calls, larger ones leave the cache."""
FIRST_BYTE = 32
"""From this scale byte on a subnormal bfloat16 becomes 0 in every element."""
_INFINITY = 0x7F80
_Step = Callable[[Tensor, Parts], Tensor]
"""Encodes a piece; its answer marks the units that must be done again."""


def encoder(
    form: Format, rule: str, rounding: str, dtype: torch.dtype
) -> Callable[[Tensor, Parts], None] | None:
    """An encoder for this, or None: rounding `rint`, no rule of msModelSlim; blocks of bfloat16 only."""
    if rounding != "rint" or rule.startswith("msms:"):
        return None
    if form.kind == "row":
        return _in_pieces(lambda n, length: _row_step(form), form, rule)
    if dtype != torch.bfloat16:
        return None
    step = _dual_step if form.kind == "dual" else _block_step
    return _in_pieces(lambda n, length: step(form, rule, n, length), form, rule)


def _in_pieces(
    prepare: Callable[[int, int], _Step], form: Format, rule: str
) -> Callable[[Tensor, Parts], None]:
    def encode(rows: Tensor, out: Parts) -> None:
        unit = form.coarse or form.block or 1
        size = max(1, min(rows.shape[0], PIECE // rows.shape[1]))
        step = prepare(size, -(-rows.shape[1] // unit) * unit)
        for start in range(0, rows.shape[0], size):
            piece = rows[start : start + size]
            part = Parts(*(None if p is None else p[start : start + size] for p in out))  # type: ignore[arg-type]
            marks = step(piece, part)
            if marks.any():
                reference.encode_marked(piece, part, marks, form, rule, "rint")

    return encode


def _block_step(form: Format, rule: str, n: int, length: int) -> _Step:
    assert form.element is not None
    codes_of = _Integers(form.element, rule, n * length)
    filled = torch.zeros(n, length, dtype=torch.bfloat16)

    def step(rows: Tensor, out: Parts) -> Tensor:
        return codes_of(_fill(filled, rows), out)

    return step


def _dual_step(form: Format, rule: str, n: int, length: int) -> _Step:
    """See `reference._encode_dual`."""
    codes_of = _Integers(E2M1, rule, n * length)
    filled, divided = (torch.zeros(n, length, dtype=torch.bfloat16) for _ in range(2))
    wide = torch.empty(n, length)
    amax = scales.every_bf16_amax().to(torch.float32)
    duals = (amax * (1 / 6)).where(amax * (1 / 6) >= 2.0**-126, 0.0)

    def step(rows: Tensor, out: Parts) -> Tensor:
        values = _fill(filled, rows)
        count = values.shape[0]
        top = codes_of.largest(values).view(count, -1, form.coarse // form.block).amax(-1)
        dual = duals[top]
        assert out.dual is not None
        out.dual.copy_(dual)
        groups = wide[:count].copy_(values).view(count, -1, form.coarse)
        groups.div_(torch.where(dual == 0, torch.inf, dual).unsqueeze(-1))
        marks = codes_of(divided[:count].copy_(wide[:count]), out)
        doubtful = torch.nn.functional.pad(marks, (0, -marks.shape[1] % (form.coarse // form.block)))
        again: Tensor = doubtful.unflatten(1, (-1, form.coarse // form.block)).any(-1) | (top >= _INFINITY)
        return again

    return step


def _row_step(form: Format) -> _Step:
    """See `reference._encode_scaled_rows`."""

    def step(rows: Tensor, out: Parts) -> Tensor:
        wide = rows.to(torch.float32, copy=True)
        amax = wide.abs().amax(-1, keepdim=True)
        torch.mul(amax, 1 / (form.element.max if form.element else 127), out=out.scale)
        wide.div_(torch.where(out.scale == 0, torch.inf, out.scale))
        if form.element is None:
            out.codes.copy_(wide.round_().clamp_(-128, 127))
        else:
            out.codes.view(torch.float8_e4m3fn).copy_(wide.clamp_(-form.element.max, form.element.max))
        return ~amax.isfinite()

    return step


def _fill(filled: Tensor, rows: Tensor) -> Tensor:
    """`rows`, filled up with zeros to the width of `filled` if they are short."""
    if rows.shape[1] == filled.shape[1]:
        return rows
    filled[: rows.shape[0], : rows.shape[1]] = rows
    return filled[: rows.shape[0]]


class _Integers:
    """bfloat16 [n, whole blocks] -> codes and scale bytes, in buffers for `size` values.

    With t the bits of a scaled number, its exponent counted from the subnormals of the element, a code is t
    without its last bits, rounded; a subnormal code is the mantissa moved by the exponent. Both get 8 bits
    below the point first; the larger of the two is right.
    """

    def __init__(self, element: Element, rule: str, size: int) -> None:
        amax = scales.every_bf16_amax()
        exponents = scales.shared_exponents(amax.to(torch.float32), element, rule)
        self.element = element
        self.bytes = scales.to_bytes(exponents, amax.isfinite())
        self.bases = ((exponents + (scales.BIAS + element.emin - 1)) << 7).to(torch.int16)
        self.bases[0] = (scales.BIAS + element.emin - 1) << 7  # a block of zeros: any scale does
        top = amax.view(torch.int16)
        self.doubtful = ((self.bytes < FIRST_BYTE) & (top > 0)) | (top >= _INFINITY)
        self.buffers = [torch.empty(size // 32, 32, dtype=torch.int16) for _ in range(3)]

    def largest(self, rows: Tensor) -> Tensor:
        """int32, the bits of the largest magnitude of each block; _INFINITY or more if one is not finite."""
        magnitudes, odd = (b[: rows.numel() // 32] for b in self.buffers[:2])
        torch.bitwise_and(rows.view(torch.int16).view(-1, 32), 0x7FFF, out=magnitudes)
        pairs, shifted = magnitudes.view(torch.int32), odd.view(torch.int32)  # two values in one float32
        torch.bitwise_left_shift(pairs, 16, out=shifted)
        tops = [v.view(torch.float32).amax(-1).view(torch.int32) & 0x7FFFFFFF for v in (pairs, shifted)]
        return torch.maximum(*tops).bitwise_right_shift_(16)

    def __call__(self, rows: Tensor, out: Parts) -> Tensor:
        """Codes and scale into `out`; bool [n, blocks], the blocks to be done again."""
        mbits, (a, t, s) = self.element.mbits, (b[: rows.numel() // 32] for b in self.buffers)
        top = self.largest(rows)
        torch.sub(a, self.bases[top].unsqueeze(1), out=t)
        t.clamp_(min=-2048)
        torch.clamp(t, max=127, out=s).bitwise_right_shift_(7).add_(mbits)
        a.bitwise_and_(127).bitwise_or_(128)
        torch.bitwise_left_shift(a, s, out=a)
        torch.maximum(t.mul_(2 << mbits), a, out=t).clamp_(max=largest(self.element) << 8)
        torch.bitwise_right_shift(t, 8, out=s).bitwise_and_(1)
        t.add_(s).add_(127).bitwise_right_shift_(8)
        torch.bitwise_right_shift(rows.view(torch.int16).view(-1, 32), 15, out=s)
        t.add_(s, alpha=-(1 << (self.element.bits - 1)))
        if self.element.bits == 4:
            pairs = t.view(torch.int32)
            torch.bitwise_right_shift(pairs, 12, out=s.view(torch.int32))
            t = pairs.bitwise_or_(s.view(torch.int32))
        out.codes.copy_(t.view(rows.shape[0], -1)[:, : out.codes.shape[1]])
        shape = rows.shape[0], -1
        out.scale.copy_(self.bytes[top].view(shape)[:, : out.scale.shape[1]])
        return self.doubtful[top].view(shape)[:, : out.scale.shape[1]]
