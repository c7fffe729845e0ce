"""Encoding with the compiled `native/encode.cpp`; scale rules are tables computed by the reference.

The scale of a bfloat16 block depends only on its largest magnitude, which has 32640 finite values, so that a
table of scale bytes represents any rule.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ascendit.mx import msmodelslim, reference, scales
from ascendit.mx.formats import E2M1, E4M3, Element, Format
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
    "encode_tiles": "piiiiipp",
    "search": "piiipp",
    "measure": "piiiiiipppp",
    "prefer_large_pages": "pi",
    "copy_bytes": "ppii",
}


@functools.cache
def library() -> Built:
    """The compiled kernels, or the reason why they are unavailable. The first call compiles them."""
    return declared(native("encode"), ENCODER_SIGNATURES)


def encoder(
    fmt: Format, rule: str, rounding: str, dtype: torch.dtype, threads: int | None = None
) -> Encoder | None:
    """A compiled encoder, or None if unsupported. `threads`: default: PyTorch's number of threads."""
    lib = library().library
    if lib is None or not (rounding == "rint" or rule.startswith("msms:")):
        return None
    if fmt.kind in ("row", "tile") and (fmt.element not in (None, E4M3) or fmt.block not in (0, 128)):
        return None
    if fmt.kind == "tile":
        return _by_numbers(lib.encode_tiles, threads, 1 if fmt.element else 0)
    if fmt.kind == "row":
        variant = 2 if rule.startswith("msms:") else 1 if fmt.element else 0
        return _by_numbers(lib.encode_rows, threads, variant, -127 if rule == "msms:int8_legacy" else -128)
    if fmt.kind == "dual":
        return None if dtype == torch.float16 else _dual_encoder(lib, fmt, rule, threads)
    if dtype == torch.bfloat16:
        return _table_encoder(lib, fmt, rule, threads)
    if rule.startswith("msms:") or fmt.element is None:
        return None
    numbers = *scales.thresholds(rule, fmt.element), scales.fraction_mask(rule, fmt.element)
    return _by_numbers(lib.encode_rule, threads, ELEMENT_NUMBERS[fmt.element.name], *numbers)


def prefer_large_pages(fresh: Tensor) -> Tensor:
    """Return the unwritten tensor `fresh` ([..] of any dtype).

    Above 4 MB, large pages make its first write 4 x as fast.
    """
    lib = library().library
    if lib is not None and fresh.nbytes > LARGE:
        lib.prefer_large_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def add_ceil_x_sums(rows: Tensor, sums: Tensor) -> bool:
    """Same as `encoder.add_ceil_x_sums`; returns False if there is no compiled kernel for it."""
    lib = library().library
    if lib is None or rows.dtype != torch.bfloat16:
        return False
    tables = search_tables()
    lib.search(rows.data_ptr(), *_shape(rows, None), tables.data_ptr(), sums.data_ptr())
    return True


def add_energies(rows: Tensor, parts: Parts, fmt: Format, sums: Tensor, threads: int | None = None) -> bool:
    """Add sum x^2 and sum (x - decoded)^2 of rows [n, K] to `sums`, float64 [2].

    Returns False if there is no compiled kernel.
    """
    lib = library().library
    if lib is None or fmt.kind == "tile":
        return False
    element = ELEMENT_NUMBERS[fmt.element.name] if fmt.element else INT8
    dual = 0 if parts.dual is None else parts.dual.data_ptr()
    pointers = parts.qdata.data_ptr(), parts.scale.data_ptr(), dual, sums.data_ptr()
    by_row = fmt.kind == "row"
    lib.measure(
        rows.data_ptr(), DTYPE_NUMBERS[rows.dtype], *_shape(rows, threads), element, by_row, *pointers
    )
    return True


def _table_encoder(lib: ctypes.CDLL, fmt: Format, rule: str, threads: int | None) -> Encoder:
    assert fmt.element is not None
    tables = rule_tables(fmt.element, rule)
    element, is_msms = ELEMENT_NUMBERS[fmt.element.name], rule.startswith("msms:")

    def encode(rows: Tensor, out: Parts) -> None:
        mask = torch.empty_like(out.scale) if is_msms else None
        pointers = tables.data_ptr(), out.qdata.data_ptr(), out.scale.data_ptr(), _pointer(mask)
        if len(tables) == 2:
            unresolved = lib.encode_choice(rows.data_ptr(), *_shape(rows, threads), element, *pointers)
        else:
            unresolved = lib.encode_table(
                rows.data_ptr(), *_shape(rows, threads), element, is_msms, *pointers
            )
        if unresolved and mask is not None:
            reference.encode_marked(rows, out, mask, fmt, rule, "half_away")

    return encode


def _dual_encoder(lib: ctypes.CDLL, fmt: Format, rule: str, threads: int | None) -> Encoder | None:
    table = rule_tables(E2M1, rule) if rule == "floor" else None
    early = early_powers() if table is None else None
    if table is None and early is None:
        return None

    def encode(rows: Tensor, out: Parts) -> None:
        pointers = (
            _pointer(table),
            _pointer(early),
            out.qdata.data_ptr(),
            out.scale.data_ptr(),
            _pointer(out.dual),
        )
        lib.encode_dual(rows.data_ptr(), DTYPE_NUMBERS[rows.dtype], *_shape(rows, threads), *pointers)

    return encode


def _by_numbers(call: Callable[..., int], threads: int | None, *numbers: int) -> Encoder:
    """An encoder that passes its rule as integers."""

    def encode(rows: Tensor, out: Parts) -> None:
        pointers = out.qdata.data_ptr(), out.scale.data_ptr()
        call(rows.data_ptr(), DTYPE_NUMBERS[rows.dtype], *_shape(rows, threads), *numbers, *pointers)

    return encode


def rule_tables(element: Element, rule: str) -> Tensor:
    """uint8 [1 or 2, 32768]: candidate scale bytes by the bits of a bfloat16 block's largest magnitude."""
    amax = scales.every_bf16_amax()
    if rule.startswith("msms:"):
        exponents = msmodelslim.scale_candidates(amax, element, rule.removeprefix("msms:"))
    else:
        exponents = (scales.shared_exponents(amax.to(torch.float32), element, rule),)
    return torch.stack([scales.to_bytes(e, amax.isfinite()) for e in exponents])


@functools.cache
def search_tables() -> Tensor:
    """uint8 [3, 32768]: byte of the first candidate, of the last, number of candidates with the first."""
    tables = torch.cat([rule_tables(E2M1, f"msms:ceil_x:{c}") for c in msmodelslim.CEIL_X_CANDIDATES])
    turn = (tables == tables[0]).sum(0)
    assert torch.equal(tables.where(torch.arange(len(tables)).unsqueeze(1) < turn, tables[-1]), tables)
    return torch.stack((tables[0], tables[-1], turn.to(torch.uint8)))


@functools.cache
def early_powers() -> Tensor | None:
    """int32 [256]: how many float32 values just below 2^(i - 127) `torch.log2` rounds up to i - 127.

    None if `torch.log2` is less regular on this machine: the result of a value above a power of two is below
    it, or depends on the size of the tensor.
    """
    powers = torch.arange(1, 255, dtype=torch.int32).unsqueeze(1)
    near = ((powers << 23) + torch.arange(-256, 256, dtype=torch.int32)).view(torch.float32)
    reached = torch.log2(near) >= powers - scales.BIAS
    sample = near[:, ::37].contiguous()
    alone = torch.stack([torch.log2(x) for x in sample.flatten()]).view_as(sample) >= powers - scales.BIAS
    early = 256 - reached.to(torch.int32).argmax(1)
    regular = (reached.diff(dim=1).sum(1) == 1) & (early >= 0)
    if not regular.all() or not torch.equal(alone, reached[:, ::37]):
        return None
    return torch.nn.functional.pad(early, (1, 1)).to(torch.int32)


def _shape(rows: Tensor, threads: int | None) -> tuple[int, int, int]:
    """Number of rows, values per row, threads."""
    return rows.shape[0], rows.shape[1], threads or torch.get_num_threads()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
