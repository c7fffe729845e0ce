"""The encoder of a CPU: compiled kernels, else PyTorch in small pieces, else `mx.reference`.

An encoder takes contiguous rows [n, K] on a CPU and writes into given tensors. For each format, rule,
rounding and dtype the first one that supports it is taken; all give the same bits.

In PyTorch, pieces fit the cache. A bfloat16 block is scaled in bfloat16, and its codes come from a table of
the 65536 such numbers. Where there is an infinity or a NaN, the reference does it again.
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
_INFINITY = 0x7F80
_Step = Callable[[Format, str, Tensor, Parts], Tensor]
"""Encodes a piece; its answer marks the units that must be done again."""


def encode_rows(rows: Tensor, form: Format, rule: str, rounding: str) -> Parts:
    """`reference.encode_rows`, but fast where it can be: on a CPU."""
    if rows.device.type != "cpu" or type(rows) is not Tensor or not rows.numel():
        return reference.encode_rows(rows, form, rule, rounding)
    flat = rows.view(-1, rows.shape[-1])
    out = empty_parts(form, *flat.shape)
    encoder(form, rule, rounding, rows.dtype)(flat, out)
    qdata, scale, dual = (None if p is None else p.view(*rows.shape[:-1], -1) for p in out)
    assert qdata is not None and scale is not None
    return Parts(qdata, scale, dual)


def empty_parts(form: Format, rows: int, length: int) -> Parts:
    """The tensors that an encoder fills."""
    qdata, scale, dual = form.shapes((rows, length))
    return Parts(
        native_encoder.prefer_large_pages(
            torch.empty(qdata, dtype=torch.uint8 if form.element else torch.int8)
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


def piece_encoder(form: Format, rule: str, rounding: str, dtype: torch.dtype) -> Encoder | None:
    """An encoder for this, or None: rounding `rint`, no rule of msModelSlim; blocks of bfloat16 only."""
    if rounding != "rint" or rule.startswith("msms:") or (form.kind != "row" and dtype != torch.bfloat16):
        return None
    return _in_pieces({"row": _row_step, "dual": _dual_step}.get(form.kind, _block_step), form, rule)


def _in_pieces(step: _Step, form: Format, rule: str) -> Encoder:
    def encode(rows: Tensor, out: Parts) -> None:
        size = max(1, PIECE // rows.shape[1])
        for start in range(0, rows.shape[0], size):
            piece, part = rows[start : start + size], out.rows(start, start + size)
            marks = step(form, rule, piece, part)
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


def _block_step(form: Format, rule: str, rows: Tensor, out: Parts) -> Tensor:
    assert form.element is not None
    rows = _filled(rows, form.block)
    top = _largest(rows)
    _fill_blocks(rows, top, form.element, rule, out)
    return top >= _INFINITY


def _dual_step(form: Format, rule: str, rows: Tensor, out: Parts) -> Tensor:
    """See `reference._encode_dual`."""
    rows = _filled(rows, form.coarse)
    top: Tensor = _largest(rows).unflatten(1, (-1, form.coarse // form.block)).amax(-1)
    dual = top.view(torch.bfloat16).to(torch.float32) * (1 / 6)
    dual = dual.where(dual >= 2.0**-126, 0.0)
    assert out.dual is not None
    out.dual.copy_(dual)
    groups = rows.to(torch.float32).view(*dual.shape, form.coarse)
    groups.div_(torch.where(dual == 0, torch.inf, dual).unsqueeze(-1))
    divided = groups.to(torch.bfloat16).view(rows.shape)
    _fill_blocks(divided, _largest(divided), E2M1, rule, out)
    return top >= _INFINITY


def _row_step(form: Format, rule: str, rows: Tensor, out: Parts) -> Tensor:
    """See `reference._encode_scaled_rows`."""
    wide = rows.to(torch.float32, copy=True)
    amax = wide.abs().amax(-1, keepdim=True)
    torch.mul(amax, 1 / (form.element.max if form.element else 127), out=out.scale)
    wide.div_(torch.where(out.scale == 0, torch.inf, out.scale))
    if form.element is None:
        out.qdata.copy_(wide.round_().clamp_(-128, 127))
    else:
        float8 = getattr(torch, form.qdata_dtype)
        out.qdata.view(float8).copy_(wide.clamp_(-form.element.max, form.element.max))
    return ~amax.isfinite()


def _filled(rows: Tensor, unit: int) -> Tensor:
    """Rows with zeros behind them, to whole units."""
    short = -rows.shape[1] % unit
    return torch.nn.functional.pad(rows, (0, short)) if short else rows


def _largest(rows: Tensor) -> Tensor:
    """bfloat16 [n, 32 b] -> int16 [n, b], bits of the largest magnitudes; from _INFINITY on not finite."""
    magnitudes = (rows.view(torch.int16) & 0x7FFF).view(torch.bfloat16)
    top: Tensor = magnitudes.to(torch.float32).unflatten(1, (-1, 32)).amax(-1).to(torch.bfloat16)
    return top.view(torch.int16).bitwise_and_(0x7FFF)  # a NaN may have come out negative


def _fill_blocks(rows: Tensor, top: Tensor, element: Element, rule: str, out: Parts) -> None:
    """Codes and scale of bfloat16 [n, 32 b], whose largest magnitudes are `top`, into `out`."""
    shift, threshold = scales.thresholds(rule, element)
    byte = (top + (127 - (threshold >> 16))).bitwise_right_shift_(7).sub_(shift).clamp_(min=0)
    out.scale.copy_(byte[:, : out.scale.shape[1]])
    powers = byte.neg_().add_(2 * scales.BIAS).mul_(128).view(torch.bfloat16)
    scaled = (rows.unflatten(1, (-1, 32)) * powers.unsqueeze(2)).view(torch.int16)
    index = scaled.flatten().to(torch.int32).add_(0x8000)
    qdata = _codes_by_bits(element.name).index_select(0, index)
    if element.bits == 4:
        pairs = qdata.view(torch.int16)
        qdata = pairs.bitwise_or_(pairs >> 4)  # of which the copy takes the low byte
    out.qdata.copy_(qdata.view(len(rows), -1)[:, : out.qdata.shape[1]])


@functools.cache
def _codes_by_bits(name: str) -> Tensor:
    """uint8 [65536]: the code of each bfloat16 number, by its bits as an int16 + 32768."""
    every = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return elements.encode(every.to(torch.float32), elements.ELEMENTS[name], "rint")
