"""The encoder of a CPU: compiled kernels, else PyTorch in small pieces, else `mx.reference`.

An encoder takes contiguous rows [n, K] on a CPU and writes into given tensors. For each format, rule,
rounding and dtype the first one that supports it is taken; all give the same bits.

In PyTorch, pieces fit the cache and buffers are reused. bfloat16 blocks become 8-bit codes by PyTorch's own
casts, 4-bit codes in 16-bit integers. What this does not cover (infinities, NaN, the smallest numbers) is
encoded again by the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor

from ascendit.mx import msmodelslim, native_encoder, reference, scales
from ascendit.mx.elements import largest
from ascendit.mx.formats import E2M1, SEARCH, Element, Format
from ascendit.mx.reference import Encoder, Parts

REFERENCE_PIECE = 1 << 18
"""Values that the reference takes at a time: its intermediate results stay in the cache."""
PIECE = 1 << 19
"""Values at a time: smaller ones cost more calls, larger ones leave the cache."""
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FIRST_BYTE = 32
"""From this scale byte on a subnormal bfloat16 becomes 0 in every element."""
_INFINITY = 0x7F80
_Step = Callable[[Tensor, Parts], Tensor]
"""Encodes a piece; its answer marks the units that must be done again."""
_Prepare = Callable[[Format, str, int, int], _Step]
"""Makes the step for pieces of so many rows, of a length filled up to whole units."""


# ---- choice of an encoder -----------------------------------------------------------------------


def encode_rows(rows: Tensor, form: Format, rule: str, rounding: str) -> Parts:
    """`reference.encode_rows`, but fast where it can be: on a CPU."""
    if rows.device.type != "cpu" or type(rows) is not Tensor or not rows.numel():
        return reference.encode_rows(rows, form, rule, rounding)
    flat = rows.view(-1, rows.shape[-1])
    out = empty_parts(form, *flat.shape)
    encoder(form, rule, rounding, rows.dtype)(flat, out)
    codes, scale, dual = (None if p is None else p.view(*rows.shape[:-1], -1) for p in out)
    assert codes is not None and scale is not None
    return Parts(codes, scale, dual)


def empty_parts(form: Format, rows: int, length: int) -> Parts:
    """The tensors that an encoder fills."""
    width = -(-length // 2) if form.packed else length
    codes = torch.empty(rows, width, dtype=torch.uint8 if form.element else torch.int8)
    codes = native_encoder.prefer_large_pages(codes)
    if form.kind == "row":
        return Parts(codes, torch.empty(rows, 1), None)
    scale = torch.empty(rows, -(-length // form.block), dtype=torch.uint8)
    return Parts(codes, scale, torch.empty(rows, -(-length // form.coarse)) if form.coarse else None)


@functools.cache
def encoder(
    form: Format, rule: str, rounding: str, dtype: torch.dtype, threads: int | None = None
) -> Encoder:
    """The best encoder for this machine; remembered.

    `threads`: for the compiled kernels, by default those of PyTorch, which the other ways always take.
    """
    if rule == SEARCH:
        return functools.partial(_encode_after_search, form, rounding)
    return (
        native_encoder.encoder(form, rule, rounding, dtype, threads)
        or piece_encoder(form, rule, rounding, dtype)
        or functools.partial(_encode_by_reference, form, rule, rounding)
    )


def choice() -> tuple[str, str]:
    """("native" or "pytorch", why)."""
    built = native_encoder.library()
    return ("pytorch" if built.library is None else "native"), built.reason


def add_ceil_x_sums(rows: Tensor, sums: Tensor) -> None:
    """Adds `msmodelslim.ceil_x_sums(rows)` to `sums`, float64 [25]."""
    if not native_encoder.add_ceil_x_sums(rows, sums):
        for piece in rows.split(max(1, REFERENCE_PIECE // rows.shape[-1])):
            sums += torch.tensor(msmodelslim.ceil_x_sums(piece), dtype=torch.float64)


def _encode_after_search(form: Format, rounding: str, rows: Tensor, out: Parts) -> None:
    sums = torch.zeros(len(msmodelslim.CEIL_X_CANDIDATES), dtype=torch.float64)
    add_ceil_x_sums(rows, sums)
    rule = f"msms:ceil_x:{msmodelslim.best_ceil_x(sums.tolist())}"
    encoder(form, rule, rounding, rows.dtype)(rows, out)


def _encode_by_reference(form: Format, rule: str, rounding: str, rows: Tensor, out: Parts) -> None:
    step = max(1, REFERENCE_PIECE // rows.shape[-1])
    for start in range(0, rows.shape[0], step):
        piece = reference.encode_rows(rows[start : start + step], form, rule, rounding)
        for to, part in zip(out.rows(start, start + step), piece, strict=True):
            if to is not None and part is not None:
                to.copy_(part)


# ---- PyTorch in small pieces --------------------------------------------------------------------


def piece_encoder(form: Format, rule: str, rounding: str, dtype: torch.dtype) -> Encoder | None:
    """An encoder for this, or None: rounding `rint`, no rule of msModelSlim; blocks of bfloat16 only."""
    if rounding != "rint" or rule.startswith("msms:") or (form.kind != "row" and dtype != torch.bfloat16):
        return None
    return _in_pieces({"row": _row_step, "dual": _dual_step}.get(form.kind, _block_step), form, rule)


def _in_pieces(prepare: _Prepare, form: Format, rule: str) -> Encoder:
    unit = form.coarse or form.block or 1

    def encode(rows: Tensor, out: Parts) -> None:
        size = max(1, min(rows.shape[0], PIECE // rows.shape[1]))
        step = prepare(form, rule, size, -(-rows.shape[1] // unit) * unit)
        for start in range(0, rows.shape[0], size):
            piece, part = rows[start : start + size], out.rows(start, start + size)
            marks = step(piece, part)
            if marks.any():
                reference.encode_marked(piece, part, marks, form, rule, "rint")

    return lambda rows, out: _on_threads(encode, rows, out)


def _on_threads(encode: Encoder, rows: Tensor, out: Parts) -> None:
    """Each thread some of the rows, alone with its operators.

    PyTorch would share every single operator among its threads, and on a machine with other work each of
    these thousands of times one of them waits for the other.
    """
    threads = min(torch.get_num_threads(), rows.numel() // PIECE, rows.shape[0])
    if threads < 2:
        return encode(rows, out)
    cuts = [rows.shape[0] * i // threads for i in range(threads + 1)]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            done = [
                pool.submit(encode, rows[first:last], out.rows(first, last)) for first, last in pairwise(cuts)
            ]
        for future in done:
            future.result()
    finally:
        torch.set_num_threads(torch.get_num_threads())  # threads of others start with this number again


def _block_step(form: Format, rule: str, n: int, length: int) -> _Step:
    assert form.element is not None
    codes_of = _Blocks(form.element, rule, n * length)
    return lambda rows, out: codes_of(_filled(rows, length), out)


def _dual_step(form: Format, rule: str, n: int, length: int) -> _Step:
    """See `reference._encode_dual`."""
    codes_of = _Blocks(E2M1, rule, n * length)
    divided, wide = torch.empty(n, length, dtype=torch.bfloat16), torch.empty(n, length)
    amax = scales.every_bf16_amax().to(torch.float32)
    duals = (amax * (1 / 6)).where(amax * (1 / 6) >= 2.0**-126, 0.0)

    def step(rows: Tensor, out: Parts) -> Tensor:
        values = _filled(rows, length)
        count = values.shape[0]
        top = codes_of.largest(values).view(count, -1, form.coarse // form.block).amax(-1)
        dual = duals[top.to(torch.int64)]
        assert out.dual is not None
        out.dual.copy_(dual)
        groups = wide[:count].copy_(values).view(count, -1, form.coarse)
        groups.div_(torch.where(dual == 0, torch.inf, dual).unsqueeze(-1))
        marks = codes_of(divided[:count].copy_(wide[:count]), out)
        doubtful = torch.nn.functional.pad(marks, (0, -marks.shape[1] % (form.coarse // form.block)))
        again: Tensor = doubtful.unflatten(1, (-1, form.coarse // form.block)).any(-1) | (top >= _INFINITY)
        return again

    return step


def _row_step(form: Format, rule: str, n: int, length: int) -> _Step:
    """See `reference._encode_scaled_rows`."""

    def step(rows: Tensor, out: Parts) -> Tensor:
        wide = rows.to(torch.float32, copy=True)
        amax = wide.abs().amax(-1, keepdim=True)
        torch.mul(amax, 1 / (form.element.max if form.element else 127), out=out.scale)
        wide.div_(torch.where(out.scale == 0, torch.inf, out.scale))
        if form.element is None:
            out.codes.copy_(wide.round_().clamp_(-128, 127))
        else:
            out.codes.view(FLOAT8[form.element.name]).copy_(wide.clamp_(-form.element.max, form.element.max))
        return ~amax.isfinite()

    return step


def _filled(rows: Tensor, length: int) -> Tensor:
    """Rows that are short with zeros behind them."""
    short = length - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, short)) if short else rows


class _Blocks:
    """bfloat16 [n, whole blocks of 32] -> codes and scale bytes, in buffers for `size` values."""

    def __init__(self, element: Element, rule: str, size: int) -> None:
        self.element = element
        self.shift, threshold = scales.thresholds(rule, element)
        self.saturates = rule not in ("ceil", "pow2")
        self.round_up = 127 - (threshold >> 16)
        self.wide = torch.empty(size // 32, 32)
        self.buffers = [torch.empty(size // 32, 32, dtype=torch.int16) for _ in range(3)]
        # As tensors, since a Python number is converted again in each call.
        self.number = {n: torch.tensor(n, dtype=torch.int16) for n in (1, 7, 8, 15, 127, 128, 0x7FFF)}
        self.twelve = torch.tensor(12, dtype=torch.int32)

    def largest(self, rows: Tensor) -> Tensor:
        """int16 [blocks], the bits of the largest magnitude; _INFINITY or more if one is not finite."""
        count = rows.numel() // 32
        magnitudes, wide = self.buffers[0][:count], self.wide[:count]
        torch.bitwise_and(rows.view(torch.int16).view(-1, 32), self.number[0x7FFF], out=magnitudes)
        top = wide.copy_(magnitudes.view(torch.bfloat16)).amax(-1).to(torch.bfloat16)
        return top.view(torch.int16).bitwise_and_(self.number[0x7FFF])  # a NaN may have come out negative

    def __call__(self, rows: Tensor, out: Parts) -> Tensor:
        """Codes and scale into `out`; bool [n, blocks], the blocks to be done again."""
        top = self.largest(rows)
        byte = (top + self.round_up).bitwise_right_shift_(self.number[7]).sub_(self.shift).clamp_(min=0)
        again = top >= _INFINITY
        shape = rows.shape[0], -1
        out.scale.copy_(byte.view(shape)[:, : out.scale.shape[1]])
        if self.element.bits == 8:
            scaled = self._scaled(rows, byte).view(shape)[:, : out.codes.shape[1]]
            out.codes.view(FLOAT8[self.element.name]).copy_(scaled)  # rounds as IEEE does
        else:
            again |= (byte < FIRST_BYTE) & (top > 0)
            out.codes.copy_(self._packed(rows, byte).view(shape)[:, : out.codes.shape[1]])
        return again.view(shape)[:, : out.scale.shape[1]]

    def _scaled(self, rows: Tensor, byte: Tensor) -> Tensor:
        """bfloat16 within the range of the element."""
        powers = byte.neg_().add_(2 * scales.BIAS).mul_(128).view(torch.bfloat16)
        scaled = self.buffers[0][: byte.numel()].view(torch.bfloat16)
        torch.mul(rows.view(-1, 32), powers.unsqueeze(1), out=scaled)
        return scaled.clamp_(-self.element.max, self.element.max) if self.saturates else scaled

    def _packed(self, rows: Tensor, byte: Tensor) -> Tensor:
        """int32 whose low bytes are pairs of 4-bit codes. Magnitudes are in the first buffer.

        With t the bits of a scaled number, its exponent counted from the subnormals of the element, a code
        is t without its last bits, rounded; a subnormal code is the mantissa moved by the exponent. Both get
        8 bits below the point first; the larger of the two is right.
        """
        mbits, number = self.element.mbits, self.number
        a, t, s = (b[: byte.numel()] for b in self.buffers)
        base = byte.clamp_(min=FIRST_BYTE).add_(self.element.emin - 1).mul_(128)
        torch.sub(a, base.unsqueeze(1), out=t)
        t.clamp_(min=-2048)
        torch.clamp(t, max=127, out=s).bitwise_right_shift_(number[7]).add_(mbits)
        a.bitwise_and_(number[127]).bitwise_or_(number[128]).bitwise_left_shift_(s)
        torch.maximum(t.mul_(2 << mbits), a, out=t).clamp_(max=largest(self.element) << 8)
        torch.bitwise_right_shift(t, number[8], out=s).bitwise_and_(number[1])
        t.add_(s).add_(127).bitwise_right_shift_(number[8])
        torch.bitwise_right_shift(rows.view(torch.int16).view(-1, 32), number[15], out=s)
        pairs = t.add_(s, alpha=-(1 << (self.element.bits - 1))).view(torch.int32)
        return pairs.bitwise_or_(torch.bitwise_right_shift(pairs, self.twelve, out=s.view(torch.int32)))
