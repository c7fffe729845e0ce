"""Encoding without torch: memory in, memory out, by the compiled kernels that `mx` uses too.

Importing torch takes longer than quantizing a gigabyte, so the common way does without it: the rules that are
two integers (see `mx.scales`), int8, fp8 and the NPU's dual scale, of weights that are encoded as they lie in
the file. Everything else, and machines without a compiler, go through `mx.rows`; the bits are the same.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
from dataclasses import dataclass

from ascendit.mx.formats import E2M1, Element, Format, lookup
from ascendit.native.build import native

TYPES = {"BF16": 0, "F16": 1, "F32": 2}
ELEMENTS = {"e4m3": 0, "e5m2": 1, "e2m1": 2}
INT8 = 3
BIAS, NAN_BYTE, INFINITY = 127, 255, 0x7F80
FRACTION = (1 << 23) - 1
MOST_THREADS = 4
"""More than these no disk can feed."""
RING = 3
_ARGUMENTS = {  # p: pointer, i: int64
    "encode_table": "piiiiipppp",
    "encode_rule": "piiiiiiiipp",
    "encode_dual": "piiiippppp",
    "encode_rows": "piiiiiipp",
    "measure": "piiiiiipppp",
}


@dataclass(frozen=True)
class Coded:
    """Some rows, valid until the next are encoded; the codes of a DirectEncoder until RING more have been."""

    codes: memoryview
    scale: memoryview
    dual: memoryview | None
    bad_row: int | None
    """The first row that holds an infinity or a NaN."""
    rows: int


def direct_encoder(
    format: str, rule: str, length: int, dtype: str, max_rows: int, *, measure: bool = False
) -> DirectEncoder | None:
    """An encoder of rows [n <= max_rows, length] of `dtype` (`BF16`, ...), or None where torch must do it."""
    form = lookup(format)
    library = _library()
    if library is None or dtype not in TYPES or rule.startswith("msms:") or form.kind == "tile":
        return None
    if form.kind == "dual" and dtype == "F16":
        return None
    return DirectEncoder(library, form, rule, length, dtype, max_rows, measure)


class DirectEncoder:
    """Encodes blocks of rows into buffers of its own: RING for the codes, which take turns."""

    def __init__(
        self,
        library: ctypes.CDLL,
        form: Format,
        rule: str,
        length: int,
        dtype: str,
        max_rows: int,
        measure: bool,
    ) -> None:
        self._library, self._form, self._rule = library, form, rule
        self._length, self._type = length, TYPES[dtype]
        self._row_bytes = length * (2 if dtype != "F32" else 4)
        self._threads = _threads(library)
        codes = -(-length // 2) if form.packed else length
        scale = 4 if form.kind == "row" else -(-length // form.block)
        dual = 4 * -(-length // form.coarse) if form.coarse else 0
        self._ring = [_Buffer(max_rows, codes) for _ in range(RING)]
        self._scale = _Buffer(max_rows, scale)
        self._dual = _Buffer(max_rows, dual) if dual else None
        self._table = rule_table(E2M1 if form.element is None else form.element, rule) if form.block else b""
        self._sums = (ctypes.c_double * 2)()
        self._measure = measure

    def __call__(self, rows: memoryview) -> Coded:
        """`rows`: bytes of some rows, writable memory as `stream.RowReader` gives it."""
        count = len(rows) // self._row_bytes
        self._ring.append(codes := self._ring.pop(0))
        source = ctypes.addressof(ctypes.c_char.from_buffer(rows))
        shape = (count, self._length, self._threads)
        self._encode(source, shape, codes.address)
        if self._measure:
            element = INT8 if self._form.element is None else ELEMENTS[self._form.element.name]
            at = (codes.address, self._scale.address, self._dual.address if self._dual else 0)
            sums = ctypes.addressof(self._sums)
            self._library.measure(source, self._type, *shape, element, self._form.kind == "row", *at, sums)
        scale = self._scale.rows(count)
        dual = self._dual.rows(count) if self._dual else None
        return Coded(codes.rows(count), scale, dual, self._bad_row(scale), count)

    def _encode(self, source: int, shape: tuple[int, int, int], codes: int) -> None:
        form, lib, scale = self._form, self._library, self._scale.address
        if form.kind == "row":
            lib.encode_rows(source, self._type, *shape, int(form.element is not None), 0, codes, scale)
        elif self._dual:
            lib.encode_dual(source, self._type, *shape, self._table, 0, codes, scale, self._dual.address)
        elif self._type == 0:
            assert form.element is not None
            element = ELEMENTS[form.element.name]
            lib.encode_table(source, *shape, element, 0, self._table, codes, scale, 0)
        else:
            assert form.element is not None
            numbers = (ELEMENTS[form.element.name], *two_integers(form.element, self._rule))
            lib.encode_rule(source, self._type, *shape, *numbers, codes, scale)

    def _bad_row(self, scale: memoryview) -> int | None:
        if self._form.kind == "row":
            return next((row for row, x in enumerate(scale.cast("f")) if x != x), None)
        found = bytes(scale).find(NAN_BYTE)
        return None if found < 0 else found // self._scale.row_bytes

    def restart(self) -> None:
        """Forget what was measured."""
        self._sums[:] = [0.0, 0.0]

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise since the last `restart`, in dB."""
        return decibels(*self._sums)


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise): inf without noise, -inf without signal, nan if either is not finite."""
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


class _Buffer:
    """Memory for rows of so many bytes."""

    def __init__(self, rows: int, row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self._memory = mmap.mmap(-1, max(rows * row_bytes, 1))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def rows(self, count: int) -> memoryview:
        return memoryview(self._memory)[: count * self.row_bytes]


# ---- rules --------------------------------------------------------------------------------------


def two_integers(element: Element, rule: str) -> tuple[int, int, int]:
    """(shift, threshold, mask), as in `mx.scales`: exponent = E - shift + ((frac & mask) > threshold)."""
    cut = element is E2M1 and rule.startswith("max:") and float(rule[4:]) in (6.0, 7.0)
    mask = FRACTION & ~0xFFFF if cut else FRACTION
    if rule == "floor":
        return element.emax, FRACTION, mask
    if rule == "pow2":
        return element.emax, 0, mask
    if rule == "even":
        return element.emax, FRACTION - (1 << (22 - element.mbits)), mask
    bound = element.max if rule == "ceil" else float(rule.removeprefix("max:"))
    fraction, exponent = math.frexp(bound)
    return exponent - 1, int((2 * fraction - 1) * (1 << 23)), mask


@functools.cache
def rule_table(element: Element, rule: str) -> bytes:
    """Scale byte for the bits of each bfloat16 magnitude, the largest of a block."""
    shift, threshold, mask = two_integers(element, rule)

    def byte(bits: int) -> int:
        if bits >= INFINITY:
            return NAN_BYTE
        up = ((bits << 16) & mask) > threshold
        return min(max((bits >> 7) - shift + up, 0), 2 * BIAS)

    return bytes(map(byte, range(0x8000)))


# ---- the library --------------------------------------------------------------------------------


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = native("encode").library
    if library is not None:
        for name, kinds in _ARGUMENTS.items():
            function = getattr(library, name)
            function.argtypes = [ctypes.c_void_p if kind == "p" else ctypes.c_int64 for kind in kinds]
            function.restype = ctypes.c_int64
    return library


def _threads(library: ctypes.CDLL) -> int:
    """Half of what OpenMP would take (it hears OMP_NUM_THREADS): writing needs the others, and threads that
    wait for each other spin."""
    try:
        count = int(library.omp_get_max_threads())
    except AttributeError:  # built without OpenMP
        return 1
    return min(max(count // 2, 1), MOST_THREADS)
