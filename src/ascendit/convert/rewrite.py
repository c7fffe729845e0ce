"""Tensors that change on the way: other containers, wider floats, one row made many. Values never change.

Each way is a generator of bytes, some rows at a time, so that no tensor is ever whole in memory. numpy is
imported by the call; torch only for FP8 in tiles.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ascendit.checkpoint import values
from ascendit.checkpoint.store import DTYPE_BITS, TensorInfo
from ascendit.checkpoint.write import TensorSpec
from ascendit.convert import stream
from ascendit.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

    Table = np.ndarray[Any, Any]

How = Literal["move", "copy", "widen", "repeat", "recode", "untile", "fill"]
Check = Literal["", "scale_bytes", "scale", "zero", "positive"]
TILE = 128


@dataclass(frozen=True, kw_only=True)
class Step:
    """One tensor of the output: what it is, and the way from the source to it."""

    spec: TensorSpec
    """By the name that it gets in the file."""
    name: str
    """By its Diffusers name."""
    how: How
    """move: by the kernel; copy: as it is, but seen; widen: to float32; repeat: one number for all rows;
    recode: FP4 in another container; untile: FP8 in tiles to bfloat16; fill: a constant without a source."""
    sources: tuple[TensorInfo, ...] = ()
    check: Check = ""
    containers: tuple[str, str] = ("", "")
    """Of `recode`: from, to."""
    value: float = 0.0
    """Of `fill`."""

    @property
    def rewritten(self) -> bool:
        """Whether the bytes of the output are others than those of the source."""
        return self.how not in ("move", "copy")


def produce(step: Step, reader: stream.RowReader) -> Iterator[Any]:
    """The bytes of the tensor, in order. Each buffer is valid until the next is asked for.

    Raises CheckpointError E-CKP-08 for a scale, offset or smoothing factor that cannot be, E-CKP-04 for a
    number in a wide container that is no FP4 number.
    """
    return _WAYS[step.how](step, reader)


def _copy(step: Step, reader: stream.RowReader) -> Iterator[Any]:
    (info,) = step.sources
    for _, view in reader.blocks(info):
        _examine(step, info, view)
        yield view


def _widen(step: Step, reader: stream.RowReader) -> Iterator[Any]:
    (info,) = step.sources
    for _, view in reader.blocks(info):
        _examine(step, info, view)
        yield _floats(step, info, view)


def _repeat(step: Step, reader: stream.RowReader) -> Iterator[Any]:
    (info,) = step.sources
    data = reader.whole(info)
    _examine(step, info, data)
    yield _floats(step, info, data) * math.prod(step.spec.shape)


def _floats(step: Step, info: TensorInfo, data: bytes | memoryview) -> bytes:
    """The numbers as float32. Offsets, which are zeros by now, may be of any type."""
    if step.check == "zero":
        return bytes(4 * len(data) * 8 // DTYPE_BITS[info.dtype])
    return to_float32(data, info.dtype, info.name)


def to_float32(data: bytes | memoryview, dtype: str, name: str) -> bytes:
    """Float numbers as float32, exact. CheckpointError E-CKP-04 for float64 that float32 cannot hold."""
    if dtype != "F64":
        return stream.float_bytes(bytes(data), dtype)
    import numpy as np

    wide = np.frombuffer(data, np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if not np.array_equal(narrow.astype(np.float64), wide, equal_nan=True):
        raise CheckpointError(
            f"{name} holds float64 numbers that float32 cannot hold",
            needs="scales and biases in float32, or in a type that fits into it",
            fix="export the model again; no known tool writes float64",
            code="E-CKP-04",
        )
    return narrow.tobytes()


def _fill(step: Step, reader: stream.RowReader) -> Iterator[Any]:
    import struct

    assert step.spec.dtype == "F32"
    yield struct.pack("<f", step.value) * (step.spec.nbytes // 4)


def _examine(step: Step, info: TensorInfo, data: bytes | memoryview) -> None:
    if step.check == "scale_bytes":
        values.check_scale_bytes(data, info.name)
    elif step.check == "scale":
        values.check_scale(data, info.dtype, info.name)
    elif step.check == "zero":
        values.check_zero(data, info.dtype, info.name)
    elif step.check == "positive":
        values.check_positive(data, info.dtype, info.name)


# ---- FP4 ----------------------------------------------------------------------------------------

_E4M3 = (0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C)
_BF16 = (0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0)
"""0, 0.5, 1, 1.5, 2, 3, 4, 6: the numbers of E2M1 in the order of their codes."""
_NO_CODE, _NO_BYTE = 0xFF, 0xFFFF


def _recode(step: Step, reader: stream.RowReader) -> Iterator[Any]:
    (info,) = step.sources
    source, target = step.containers
    length = (step.spec if source == "packed" else info).shape[-1]
    for _, view in reader.blocks(info):
        yield recode(view, length, source, target, info.name)


def recode(rows: bytes | memoryview, length: int, source: str, target: str, name: str = "") -> bytes:
    """FP4 rows of `length` numbers from one container to another: `packed`, `e4m3`, `bf16` (source only).

    Packed: two codes in a byte, the even index in the low nibble; an odd row ends with code 0.
    """
    import numpy as np

    if source == "packed":
        assert target == "e4m3", target
        pairs = _pairs_of_e4m3()[np.frombuffer(rows, np.uint8)].view(np.uint8)
        return bytes(pairs.reshape(-1, length + length % 2)[:, :length].tobytes())
    wide = np.frombuffer(rows, np.uint8 if source == "e4m3" else np.uint16).reshape(-1, length)
    if (source, target) == ("e4m3", "packed") and not length % 2:
        packed = _bytes_of_pairs()[wide.reshape(-1).view(np.uint16)]
        if int(packed.max(initial=0)) < _NO_BYTE:
            return bytes(packed.astype(np.uint8).tobytes())
    codes = _codes_of(source)[wide]
    if (bad := int((codes == _NO_CODE).sum())) > 0:
        raise _not_fp4(name, bad)
    if target == "e4m3":
        return bytes(_e4m3_of_codes()[codes].tobytes())
    codes = np.pad(codes, ((0, 0), (0, length % 2)))
    return bytes((codes[:, 0::2] | codes[:, 1::2] << 4).tobytes())


@functools.cache
def _codes_of(container: str) -> Table:
    """Bit pattern of a number -> its code, or `_NO_CODE`."""
    import numpy as np

    patterns, bits = (_E4M3, 8) if container == "e4m3" else (_BF16, 16)
    table = np.full(1 << bits, _NO_CODE, np.uint8)
    for code, pattern in enumerate(patterns):
        table[pattern], table[pattern | 1 << (bits - 1)] = code, code | 8
    return table


@functools.cache
def _e4m3_of_codes() -> Table:
    import numpy as np

    return np.asarray([*_E4M3, *(0x80 | x for x in _E4M3)], np.uint8)


@functools.cache
def _pairs_of_e4m3() -> Table:
    """Byte of two codes -> two e4m3 numbers, the first in the low byte."""
    import numpy as np

    codes = np.arange(256)
    numbers = _e4m3_of_codes().astype(np.uint16)
    return np.asarray(numbers[codes & 15] | numbers[codes >> 4] << 8, "<u2")


@functools.cache
def _bytes_of_pairs() -> Table:
    """Two e4m3 numbers, the first in the low byte -> byte of two codes, or `_NO_BYTE`."""
    import numpy as np

    codes = _codes_of("e4m3").astype(np.uint16)
    low, high = codes[None, :], codes[:, None]
    return np.where((low == _NO_CODE) | (high == _NO_CODE), _NO_BYTE, low | high << 4).reshape(-1)


def _not_fp4(name: str, count: int) -> CheckpointError:
    return CheckpointError(
        f"{name} holds {count} numbers that are not in FP4",
        needs="0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, in a layer that the manifest calls FP4",
        fix="export the model again; this file and its manifest do not belong together",
        code="E-CKP-04",
    )


# ---- FP8 in tiles -------------------------------------------------------------------------------


def _untile(step: Step, reader: stream.RowReader) -> Iterator[Any]:
    """Code x scale of its tile in float32, rounded once to bfloat16."""
    import torch

    weight, inverse = step.sources
    found = reader.whole(inverse)
    values.check_scale(found, inverse.dtype, inverse.name)
    rows = bytearray(to_float32(found, inverse.dtype, inverse.name))
    scale = torch.frombuffer(rows, dtype=torch.float32).view(inverse.shape)
    for start, view in reader.blocks(weight, multiple=TILE):
        codes = stream.as_tensor(view, weight)
        yield stream.as_bytes(stream.tile_values(codes, scale, start).to(torch.bfloat16))


_WAYS: dict[str, Callable[[Step, stream.RowReader], Iterator[Any]]] = {
    "copy": _copy,
    "widen": _widen,
    "repeat": _repeat,
    "recode": _recode,
    "untile": _untile,
    "fill": _fill,
}
