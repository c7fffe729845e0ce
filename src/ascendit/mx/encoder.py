"""Who encodes: the compiled kernels, else PyTorch in small pieces, else `mx.reference`. Always the same bits.

An encoder takes rows [n, K], contiguous, on a CPU, and writes into tensors that are there. For each format,
rule, rounding and dtype the first that can do it is taken.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ascendit.mx import msmodelslim, native_encoder, reference, torch_encoder
from ascendit.mx.formats import SEARCH, Format
from ascendit.mx.reference import Encoder, Parts

REFERENCE_PIECE = 1 << 18
"""Values that the reference takes at a time: its intermediate results stay in the cache."""


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
        or torch_encoder.piece_encoder(form, rule, rounding, dtype)
        or functools.partial(_encode_by_reference, form, rule, rounding)
    )


def choice() -> tuple[str, str]:
    """("native" or "pytorch", why)."""
    built = native_encoder.library()
    return ("pytorch" if built.library is None else "native"), built.reason


def add_ceil_x_sums(rows: Tensor, sums: Tensor) -> None:
    """Adds `msms.ceil_x_sums(rows)` to `sums`, float64 [25]."""
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
