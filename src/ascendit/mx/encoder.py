"""The encoder for CPU tensors: compiled kernels, else PyTorch in small pieces, else `mx.reference`.

An encoder takes contiguous rows [n, K] on the CPU and writes into preallocated tensors. For each format,
rule, rounding and dtype the first encoder that supports them is used; all give the same bits.

PyTorch pieces fit the cache. A bfloat16 block is scaled in bfloat16, and each element is looked up in a table
of the 65536 bfloat16 values. Blocks with an infinity or a NaN are encoded again by the reference.
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
"""Values per call of the reference, so that its intermediate results stay in the cache."""
PIECE = 1 << 19
"""Values per piece: smaller pieces cost more calls, larger ones do not fit the cache."""
_INFINITY = 0x7F80
_Step = Callable[[Format, str, Tensor, Parts], Tensor]
"""Encodes a piece; returns a mask of the units to encode again by the reference."""


def encode_rows(rows: Tensor, fmt: Format, rule: str, rounding: str) -> Parts:
    """Same as `reference.encode_rows`, but fast for tensors on the CPU."""
    if rows.device.type != "cpu" or type(rows) is not Tensor or not rows.numel():
        return reference.encode_rows(rows, fmt, rule, rounding)
    flat = rows.view(-1, rows.shape[-1])
    out = empty_parts(fmt, *flat.shape)
    encoder(fmt, rule, rounding, rows.dtype)(flat, out)
    if rows.ndim == 2:
        return out
    qdata, scale, dual = (None if p is None else p.view(*rows.shape[:-1], -1) for p in out)
    assert qdata is not None and scale is not None
    return Parts(qdata, scale, dual)


def empty_parts(fmt: Format, rows: int, length: int) -> Parts:
    """Uninitialized tensors for an encoder to write, for `rows` rows of `length` values."""
    qdata, scale, dual = fmt.shapes((rows, length))
    return Parts(
        native_encoder.prefer_large_pages(
            torch.empty(qdata, dtype=torch.uint8 if fmt.element else torch.int8)
        ),
        torch.empty(scale, dtype=getattr(torch, fmt.scale_dtype)),
        torch.empty(dual[:2]) if dual else None,
    )


@functools.cache
def encoder(fmt: Format, rule: str, rounding: str, dtype: torch.dtype, threads: int | None = None) -> Encoder:
    """The fastest encoder on this machine; cached.

    `threads`: threads of the compiled kernels; default: PyTorch's number of threads, which all other encoders
    use.
    """
    if rule == SEARCH:
        return functools.partial(_encode_after_search, fmt, rounding)
    return (
        native_encoder.encoder(fmt, rule, rounding, dtype, threads)
        or piece_encoder(fmt, rule, rounding, dtype)
        or functools.partial(_encode_by_reference, fmt, rule, rounding)
    )


def add_ceil_x_sums(rows: Tensor, sums: Tensor) -> None:
    """Add `msmodelslim.ceil_x_sums(rows)` of bfloat16 or float32 rows [n, K] to `sums`, float64 [25]."""
    if not native_encoder.add_ceil_x_sums(rows, sums):
        for piece in rows.split(max(1, REFERENCE_PIECE // rows.shape[-1])):
            sums += torch.tensor(msmodelslim.ceil_x_sums(piece), dtype=torch.float64)


def _encode_after_search(fmt: Format, rounding: str, rows: Tensor, out: Parts) -> None:
    sums = torch.zeros(len(msmodelslim.CEIL_X_CANDIDATES), dtype=torch.float64)
    add_ceil_x_sums(rows, sums)
    rule = f"msms:ceil_x:{msmodelslim.best_ceil_x(sums.tolist())}"
    encoder(fmt, rule, rounding, rows.dtype)(rows, out)


def reference_rows(fmt: Format, length: int) -> int:
    """Rows of `length` values per call of the reference, a multiple of `Format.tile`."""
    unit = fmt.tile or 1
    return max(1, REFERENCE_PIECE // length // unit) * unit


def _encode_by_reference(fmt: Format, rule: str, rounding: str, rows: Tensor, out: Parts) -> None:
    step = reference_rows(fmt, rows.shape[-1])
    for start in range(0, rows.shape[0], step):
        piece = reference.encode_rows(rows[start : start + step], fmt, rule, rounding)
        for to, part in zip(out.rows(start, start + step, fmt.tile), piece, strict=True):
            if to is not None and part is not None:
                to.copy_(part)


def piece_encoder(fmt: Format, rule: str, rounding: str, dtype: torch.dtype) -> Encoder | None:
    """A PyTorch encoder; None for other roundings, msModelSlim's rules, tiles, and blocks not in bfloat16."""
    if rounding != "rint" or rule.startswith("msms:") or fmt.kind == "tile":
        return None
    if fmt.kind != "row" and dtype != torch.bfloat16:
        return None
    return _in_pieces({"row": _row_step, "dual": _dual_step}.get(fmt.kind, _block_step), fmt, rule)


def _in_pieces(step: _Step, fmt: Format, rule: str) -> Encoder:
    def encode(rows: Tensor, out: Parts) -> None:
        size = max(1, PIECE // rows.shape[1])
        for start in range(0, rows.shape[0], size):
            piece, piece_out = rows[start : start + size], out.rows(start, start + size)
            mask = step(fmt, rule, piece, piece_out)
            if mask.any():
                reference.encode_marked(piece, piece_out, mask, fmt, rule, "rint")

    return lambda rows, out: _on_threads(encode, rows, out)


def _on_threads(encode: Encoder, rows: Tensor, out: Parts) -> None:
    """Split the rows over threads, each of which runs its operators single-threaded.

    PyTorch would split each of the thousands of small operators over its threads, which then wait for each
    other if the machine is busy.
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
        torch.set_num_threads(torch.get_num_threads())  # reset the number for threads started later


def _block_step(fmt: Format, rule: str, rows: Tensor, out: Parts) -> Tensor:
    assert fmt.element is not None
    rows = _padded(rows, fmt.block)
    top = _largest(rows)
    _fill_blocks(rows, top, fmt.element, rule, out)
    return top >= _INFINITY


def _dual_step(fmt: Format, rule: str, rows: Tensor, out: Parts) -> Tensor:
    """See `reference._encode_dual`."""
    rows = _padded(rows, fmt.coarse)
    top: Tensor = _largest(rows).unflatten(1, (-1, fmt.coarse // fmt.block)).amax(-1)
    dual = top.view(torch.bfloat16).to(torch.float32) * (1 / 6)
    dual = dual.where(dual >= 2.0**-126, 0.0)
    assert out.dual is not None
    out.dual.copy_(dual)
    groups = rows.to(torch.float32).view(*dual.shape, fmt.coarse)
    groups.div_(torch.where(dual == 0, torch.inf, dual).unsqueeze(-1))
    divided = groups.to(torch.bfloat16).view(rows.shape)
    _fill_blocks(divided, _largest(divided), E2M1, rule, out)
    return top >= _INFINITY


def _row_step(fmt: Format, rule: str, rows: Tensor, out: Parts) -> Tensor:
    """See `reference._encode_scaled_rows`."""
    values = rows.to(torch.float32, copy=True)
    amax = values.abs().amax(-1, keepdim=True)
    torch.mul(amax, 1 / fmt.largest, out=out.scale)
    values.div_(torch.where(out.scale == 0, torch.inf, out.scale))
    if fmt.element is None:
        out.qdata.copy_(values.round_().clamp_(-128, 127))
    else:
        float8 = getattr(torch, fmt.qdata_dtype)
        out.qdata.view(float8).copy_(values.clamp_(-fmt.element.max, fmt.element.max))
    return ~amax.isfinite()


def _padded(rows: Tensor, unit: int) -> Tensor:
    """Rows padded with zeros to a multiple of `unit`."""
    padding = -rows.shape[1] % unit
    return torch.nn.functional.pad(rows, (0, padding)) if padding else rows


def _largest(rows: Tensor) -> Tensor:
    """bfloat16 [n, 32 b] -> int16 [n, b], bits of the largest magnitudes; not finite from _INFINITY on."""
    magnitudes = (rows.view(torch.int16) & 0x7FFF).view(torch.bfloat16)
    top: Tensor = magnitudes.to(torch.float32).unflatten(1, (-1, 32)).amax(-1).to(torch.bfloat16)
    return top.view(torch.int16).bitwise_and_(0x7FFF)  # the cast may have made a NaN negative


def _fill_blocks(rows: Tensor, top: Tensor, element: Element, rule: str, out: Parts) -> None:
    """Write qdata and scale of bfloat16 [n, 32 b] to `out`; `top` [n, b]: bits of the largest magnitudes."""
    shift, threshold = scales.thresholds(rule, element)
    byte = (top + (127 - (threshold >> 16))).bitwise_right_shift_(7).sub_(shift).clamp_(min=0)
    out.scale.copy_(byte[:, : out.scale.shape[1]])
    powers = byte.neg_().add_(2 * scales.BIAS).mul_(128).view(torch.bfloat16)
    scaled = (rows.unflatten(1, (-1, 32)) * powers.unsqueeze(2)).view(torch.int16)
    index = scaled.flatten().to(torch.int32).add_(0x8000)
    qdata = _encodings_by_bits(element.name).index_select(0, index)
    if element.bits == 4:
        pairs = qdata.view(torch.int16)
        qdata = pairs.bitwise_or_(pairs >> 4)  # the copy keeps the low byte
    out.qdata.copy_(qdata.view(len(rows), -1)[:, : out.qdata.shape[1]])


@functools.cache
def _encodings_by_bits(name: str) -> Tensor:
    """uint8 [65536]: the encoding of each bfloat16 value, indexed by its bits as an int16 + 32768."""
    values = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return elements.encode(values.to(torch.float32), elements.ELEMENTS[name], "rint")
