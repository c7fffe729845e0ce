"""The encoder of a CPU: compiled kernels, else PyTorch in small pieces, else `mx.reference`.

An encoder takes contiguous rows [n, K] on a CPU and writes into given tensors. For each format, rule,
rounding and dtype the first one that supports it is taken; all give the same bits.

In PyTorch, pieces fit the cache and buffers are reused. A bfloat16 block is scaled in bfloat16, and its codes
come from a table of the 65536 such numbers. Where there is an infinity or a NaN, the reference does it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor

from ascendit.mx import elements, msmodelslim, native_encoder, reference, scales
from ascendit.mx.formats import E2M1, SEARCH, Element, Format
from ascendit.mx.reference import Encoder, Parts

REFERENCE_PIECE = 1 << 18
"""Values that the reference takes at a time: its intermediate results stay in the cache."""
PIECE = 1 << 19
"""Values at a time: smaller ones cost more calls, larger ones leave the cache."""
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
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
    codes, scale, dual = form.shapes((rows, length))
    return Parts(
        native_encoder.prefer_large_pages(
            torch.empty(codes, dtype=torch.uint8 if form.element else torch.int8)
        ),
        torch.empty(scale, dtype=torch.uint8 if form.block else torch.float32),
        torch.empty(dual[:2]) if dual else None,
    )


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
        codes_of(divided[:count].copy_(wide[:count]), out)
        return top >= _INFINITY

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
        self.shift, threshold = scales.thresholds(rule, element)
        self.round_up = 127 - (threshold >> 16)
        self.packed, self.table = element.bits == 4, _codes_by_bits(element.name)
        self.wide = torch.empty(size // 32, 32)
        self.narrow = torch.empty(size // 32, 32, dtype=torch.int16)
        self.index = torch.empty(size, dtype=torch.int32)
        self.codes = torch.empty(size, dtype=torch.uint8)
        # As a tensor, since a Python number is converted again in each call.
        self.no_sign = torch.tensor(0x7FFF, dtype=torch.int16)

    def largest(self, rows: Tensor) -> Tensor:
        """int16 [blocks], the bits of the largest magnitude; _INFINITY or more if one is not finite."""
        count = rows.numel() // 32
        magnitudes, wide = self.narrow[:count], self.wide[:count]
        torch.bitwise_and(rows.view(torch.int16).view(-1, 32), self.no_sign, out=magnitudes)
        top = wide.copy_(magnitudes.view(torch.bfloat16)).amax(-1).to(torch.bfloat16)
        return top.view(torch.int16).bitwise_and_(self.no_sign)  # a NaN may have come out negative

    def __call__(self, rows: Tensor, out: Parts) -> Tensor:
        """Codes and scale into `out`; bool [n, blocks], the blocks to be done again."""
        top, shape = self.largest(rows), (rows.shape[0], -1)
        byte = (top + self.round_up).bitwise_right_shift_(7).sub_(self.shift).clamp_(min=0)
        out.scale.copy_(byte.view(shape)[:, : out.scale.shape[1]])
        powers = byte.neg_().add_(2 * scales.BIAS).mul_(128).view(torch.bfloat16)
        scaled = self.narrow[: byte.numel()].view(torch.bfloat16)
        torch.mul(rows.view(-1, 32), powers.unsqueeze(1), out=scaled)
        index, codes = self.index[: rows.numel()], self.codes[: rows.numel()]
        index.copy_(scaled.view(torch.int16).view(-1)).add_(0x8000)
        torch.index_select(self.table, 0, index, out=codes)
        if self.packed:
            pairs = codes.view(torch.int16)
            codes = pairs.bitwise_or_(pairs >> 4)  # of which the copy takes the low byte
        out.codes.copy_(codes.view(shape)[:, : out.codes.shape[1]])
        return (top >= _INFINITY).view(shape)[:, : out.scale.shape[1]]


@functools.cache
def _codes_by_bits(name: str) -> Tensor:
    """uint8 [65536]: the code of each bfloat16 number, by its bits as an int16 + 32768."""
    every = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return elements.to_codes(every.to(torch.float32), elements.ELEMENTS[name], "rint")
