"""Encoding by `native/encode.cpp`. The rules come from here, as tables made by the reference.

The scale of a bfloat16 block depends on its largest magnitude alone, of which there are 32640: a table of
bytes is the whole rule, whatever it is.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ascendit.mx import msmodelslim, reference, scales
from ascendit.mx.formats import E2M1, Element, Format
from ascendit.mx.reference import Encoder, Parts
from ascendit.native.build import Built, declared, native

DTYPE_NUMBERS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ELEMENT_NUMBERS = {"e4m3": 0, "e5m2": 1, "e2m1": 2}
INT8 = 3
LARGE = 1 << 22
ENCODER_SIGNATURES = {
    "encode_table": "piiiiipppp",
    "encode_choice": "piiiipppp",
    "encode_rule": "piiiiiiiipp",
    "encode_dual": "piiiippppp",
    "encode_rows": "piiiiiipp",
    "search": "piiipp",
    "measure": "piiiiiipppp",
    "prefer_large_pages": "pi",
    "copy_bytes": "ppii",
}


@functools.cache
def library() -> Built:
    """The compiled kernels, or why there are none. Asking compiles them if that was never done."""
    return declared(native("encode"), ENCODER_SIGNATURES)


def encoder(
    form: Format, rule: str, rounding: str, dtype: torch.dtype, threads: int | None = None
) -> Encoder | None:
    """A compiled encoder for this, or None. `threads`: by default those of PyTorch."""
    lib = library().library
    if lib is None or not (rounding == "rint" or rule.startswith("msms:")):
        return None
    if form.kind == "row":
        kind = 2 if rule.startswith("msms:") else 1 if form.element else 0
        return _by_numbers(lib.encode_rows, threads, kind, -127 if rule == "msms:int8_legacy" else -128)
    if form.kind == "dual":
        return None if dtype == torch.float16 else _dual_encoder(lib, form, rule, threads)
    if dtype == torch.bfloat16:
        return _table_encoder(lib, form, rule, threads)
    if rule.startswith("msms:") or form.element is None:
        return None
    numbers = *scales.thresholds(rule, form.element), scales.fraction_mask(rule, form.element)
    return _by_numbers(lib.encode_rule, threads, ELEMENT_NUMBERS[form.element.name], *numbers)


def prefer_large_pages(fresh: Tensor) -> Tensor:
    """The same tensor, of several MB and not yet written: the first write is then 4 x as fast."""
    lib = library().library
    if lib is not None and fresh.nbytes > LARGE:
        lib.prefer_large_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def add_ceil_x_sums(rows: Tensor, sums: Tensor) -> bool:
    """As `encoder.add_ceil_x_sums`; False if this cannot be done here."""
    lib = library().library
    if lib is None or rows.dtype != torch.bfloat16:
        return False
    tables = search_tables()
    lib.search(rows.data_ptr(), *_shape(rows, None), tables.data_ptr(), sums.data_ptr())
    return True


def add_energies(rows: Tensor, parts: Parts, form: Format, sums: Tensor, threads: int | None = None) -> bool:
    """Adds sum x^2 and sum (x - decoded)^2 to `sums`, float64 [2]; False if this cannot be done here."""
    lib = library().library
    if lib is None:
        return False
    element = ELEMENT_NUMBERS[form.element.name] if form.element else INT8
    dual = 0 if parts.dual is None else parts.dual.data_ptr()
    at = parts.qdata.data_ptr(), parts.scale.data_ptr(), dual, sums.data_ptr()
    by_row = form.kind == "row"
    lib.measure(rows.data_ptr(), DTYPE_NUMBERS[rows.dtype], *_shape(rows, threads), element, by_row, *at)
    return True


def _table_encoder(lib: ctypes.CDLL, form: Format, rule: str, threads: int | None) -> Encoder:
    assert form.element is not None
    tables = rule_tables(form.element, rule)
    element, from_msms = ELEMENT_NUMBERS[form.element.name], rule.startswith("msms:")

    def encode(rows: Tensor, out: Parts) -> None:
        marks = torch.empty_like(out.scale) if from_msms else None
        at = tables.data_ptr(), out.qdata.data_ptr(), out.scale.data_ptr(), _at(marks)
        if len(tables) == 2:
            doubtful = lib.encode_choice(rows.data_ptr(), *_shape(rows, threads), element, *at)
        else:
            doubtful = lib.encode_table(rows.data_ptr(), *_shape(rows, threads), element, from_msms, *at)
        if doubtful and marks is not None:
            reference.encode_marked(rows, out, marks, form, rule, "half_away")

    return encode


def _dual_encoder(lib: ctypes.CDLL, form: Format, rule: str, threads: int | None) -> Encoder | None:
    table = rule_tables(E2M1, rule) if rule == "floor" else None
    early = early_powers() if table is None else None
    if table is None and early is None:
        return None

    def encode(rows: Tensor, out: Parts) -> None:
        at = _at(table), _at(early), out.qdata.data_ptr(), out.scale.data_ptr(), _at(out.dual)
        lib.encode_dual(rows.data_ptr(), DTYPE_NUMBERS[rows.dtype], *_shape(rows, threads), *at)

    return encode


def _by_numbers(call: Callable[..., int], threads: int | None, *numbers: int) -> Encoder:
    """An encoder whose rule is a few numbers."""

    def encode(rows: Tensor, out: Parts) -> None:
        at = out.qdata.data_ptr(), out.scale.data_ptr()
        call(rows.data_ptr(), DTYPE_NUMBERS[rows.dtype], *_shape(rows, threads), *numbers, *at)

    return encode


def rule_tables(element: Element, rule: str) -> Tensor:
    """uint8 [1 or 2, 32768]: scale bytes by the bits of the largest magnitude of a bfloat16 block."""
    amax = scales.every_bf16_amax()
    if rule.startswith("msms:"):
        exponents = msmodelslim.scale_candidates(amax, element, rule.removeprefix("msms:"))
    else:
        exponents = (scales.shared_exponents(amax.to(torch.float32), element, rule),)
    return torch.stack([scales.to_bytes(e, amax.isfinite()) for e in exponents])


@functools.cache
def search_tables() -> Tensor:
    """uint8 [3, 32768]: byte under the first constant, byte under the last, how many have the first."""
    every = torch.cat([rule_tables(E2M1, f"msms:ceil_x:{c}") for c in msmodelslim.CEIL_X_CANDIDATES])
    turn = (every == every[0]).sum(0)
    assert torch.equal(every.where(torch.arange(len(every)).unsqueeze(1) < turn, every[-1]), every)
    return torch.stack((every[0], every[-1], turn.to(torch.uint8)))


@functools.cache
def early_powers() -> Tensor | None:
    """int32 [256]: how many float32 just under 2^(i - 127) `torch.log2` rounds up to i - 127.

    None if it is not so simple here: numbers above a power of two that come out under it, or an answer that
    depends on how many there are.
    """
    powers = torch.arange(1, 255, dtype=torch.int32).unsqueeze(1)
    near = ((powers << 23) + torch.arange(-256, 256, dtype=torch.int32)).view(torch.float32)
    reached = torch.log2(near) >= powers - scales.BIAS
    some = near[:, ::37].contiguous()
    alone = torch.stack([torch.log2(x) for x in some.flatten()]).view_as(some) >= powers - scales.BIAS
    early = 256 - reached.to(torch.int32).argmax(1)
    simple = (reached.diff(dim=1).sum(1) == 1) & (early >= 0)
    if not simple.all() or not torch.equal(alone, reached[:, ::37]):
        return None
    return torch.nn.functional.pad(early, (1, 1)).to(torch.int32)


def _shape(rows: Tensor, threads: int | None) -> tuple[int, int, int]:
    """Rows, values of a row, threads."""
    return rows.shape[0], rows.shape[1], threads or torch.get_num_threads()


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
