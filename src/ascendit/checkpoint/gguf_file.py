"""Read the header of a GGUF file strictly: its tensors, without their values, and its metadata.

Numbers of types and sizes of blocks are those of the package `gguf`. Its `GGUFReader` is not used: it maps
the file, and loops over counts that a damaged file may have. Layout: gguf.md of ggml. Does not import torch.
"""

from __future__ import annotations

import importlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ascendit.checkpoint.sources import FileState
from ascendit.checkpoint.tensor_info import TORCH_DTYPES, Encoding, TensorInfo
from ascendit.errors import CheckpointError, EnvironmentProblem
from ascendit.mx.stored_floats import TYPES

MAGIC, SUFFIX = b"GGUF", ".gguf"
VERSIONS = (2, 3)
MAX_HEADER = 100_000_000  # bytes; as for safetensors. The tokenizer of UMT5 takes 8 MB
MAX_ENTRIES = 1 << 17
MAX_DIMS = 8  # ggml has four, other tools write five
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Metadata key of the shape [..] of a tensor that was reshaped to be quantized, before its name."""
_NUMBERS = {
    "UINT8": "B",
    "INT8": "b",
    "UINT16": "H",
    "INT16": "h",
    "UINT32": "I",
    "INT32": "i",
    "UINT64": "Q",
    "INT64": "q",
    "FLOAT32": "f",
    "FLOAT64": "d",
    "BOOL": "?",
}
"""Type of a number in the metadata -> its letter in `struct`."""
_WITH_BATCH = ("modulation", "scale_shift_table", "emb_pos", "pos_embed")
"""Tensors [1, n, dim] of Wan, which ggml stores as [n, dim]."""

Value = str | int | float | bool | tuple[int, ...]


@dataclass(frozen=True)
class GgufHeader:
    """The header of one GGUF file."""

    metadata: dict[str, Value]
    """Texts, numbers, and arrays of at most `MAX_DIMS` whole numbers."""
    tensors: dict[str, TensorInfo]
    """The tensors in the order of their bytes, with shapes in the order of PyTorch."""


def read_gguf(path: Path, file: BinaryIO, size: int, state: FileState | None = None) -> GgufHeader:
    """Read the header of a GGUF file of `size` bytes, which `file` reads from its start.

    Raises CheckpointError: E-CKP-02, with the reason, for another version or byte order, counts and sizes
    that do not fit into the file, duplicates, overlaps, gaps and truncated files; E-CKP-04 for a type that is
    not read. Raises EnvironmentProblem (E-ENV-01) if the package `gguf` is missing.
    """
    gguf = _package()
    header = _Cursor(path, file, min(size, MAX_HEADER), size)
    if (start := header.take(len(MAGIC))) != MAGIC:
        raise _broken(path, f"not a GGUF file: it begins with {start!r}")
    _check_version(path, header.number("I"))
    tensors, entries = header.number("Q"), header.number("Q")
    for count, noun, least in ((entries, "metadata entries", 13), (tensors, "tensors", 24)):
        if count > MAX_ENTRIES or count * least > size:
            raise _broken(path, f"truncated or damaged: it lists {count} {noun} in {size} bytes")
    metadata: dict[str, Value] = {}
    keys: set[str] = set()
    for _ in range(entries):
        if (key := header.text()) in keys:
            raise _broken(path, f"has two metadata entries {key!r:.200}")
        keys.add(key)
        if (value := _value(header, key, gguf)) is not None:
            metadata[key] = value
    stored = [_entry(header, gguf) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _broken(path, f"has the alignment {alignment!r}, which is not a power of two")
    infos = _infos(path, stored, metadata, _aligned(header.position, alignment), state, gguf)
    _check_extents(path, infos, _aligned(header.position, alignment), alignment, size)
    return GgufHeader(metadata, {info.name: info for info in infos})


def general_metadata(path: Path) -> dict[str, Value]:
    """The entries `general.*` of a GGUF file, without `general.`; `file_type` with its name.

    Raises the errors of `read_gguf`.
    """
    with open(path, "rb") as file:
        metadata = read_gguf(path, file, path.stat().st_size).metadata
    general = {key.removeprefix("general."): v for key, v in metadata.items() if key.startswith("general.")}
    for kind in _package().LlamaFileType:
        if kind == general.get("file_type"):
            general["file_type"] = kind.name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return general


def _package() -> Any:
    """The package `gguf`. Raises EnvironmentProblem (E-ENV-01) if it is missing."""
    try:
        return importlib.import_module("gguf")
    except ImportError as e:
        raise EnvironmentProblem(
            f"the package gguf cannot be imported: {e}",
            needs="the package gguf, to read GGUF files",
            fix='pip install "gguf>=0.17"',
            code="E-ENV-01",
        ) from e


def _check_version(path: Path, version: int) -> None:
    if version in VERSIONS:
        return
    if version >> 16 and not version & 0xFFFF:
        raise _broken(path, "is big-endian", "download the little-endian file")
    needed = " and ".join(map(str, VERSIONS))
    raise _broken(path, f"has the GGUF version {version}; versions {needed} are read")


class _Cursor:
    """Reads the parts of a header in order. Raises CheckpointError (E-CKP-02) at its end."""

    def __init__(self, path: Path, file: BinaryIO, end: int, size: int) -> None:
        self.path, self._file, self._end, self._size = path, file, end, size
        self.position = 0

    def check(self, nbytes: int) -> None:
        """Check that `nbytes` more bytes are there."""
        if self.position + nbytes > self._end:
            limit = (
                self._size if self._end == self._size else f"{MAX_HEADER}, the largest header that is read"
            )
            raise _broken(
                self.path,
                f"truncated or damaged: its header needs {nbytes} bytes at byte {self.position} of {limit}",
            )

    def take(self, nbytes: int) -> bytes:
        self.check(nbytes)
        data = self._file.read(nbytes)
        if len(data) < nbytes:
            raise _broken(self.path, f"truncated at byte {self.position + len(data)}")
        self.position += nbytes
        return data

    def skip(self, nbytes: int) -> None:
        self.check(nbytes)
        self._file.seek(nbytes, 1)
        self.position += nbytes

    def skip_texts(self, count: int) -> None:
        """Skip `count` texts; a tokenizer has 256,000."""
        self.check(8 * count)
        read, seek = self._file.read, self._file.seek
        for _ in range(count):
            length = int.from_bytes(read(8), "little")
            if self.position + 8 + length > self._end:
                self.check(8 + length)
            seek(length, 1)
            self.position += 8 + length

    def number(self, letter: str) -> Any:
        (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))
        return value

    def text(self) -> str:
        start, data = self.position, self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as e:
            raise _broken(self.path, f"the text at byte {start} is not UTF-8") from e


def _value(header: _Cursor, key: str, gguf: Any) -> Value | None:
    """Read a value of the metadata; None for an array, except a short one of whole numbers."""
    kind = _type(header, key, gguf)
    if kind == "STRING":
        return header.text()
    if kind != "ARRAY":
        number: Value = header.number(_NUMBERS[kind])
        return number
    element, count = _type(header, key, gguf), header.number("Q")
    if element == "ARRAY":
        raise _broken(header.path, f"{key!r:.200} is an array of arrays")
    if element == "STRING":
        header.skip_texts(count)
        return None
    letter = _NUMBERS[element]
    if count > MAX_DIMS or element.startswith("FLOAT"):
        header.skip(count * struct.calcsize(f"<{letter}"))
        return None
    return tuple(int(header.number(letter)) for _ in range(count))


def _type(header: _Cursor, key: str, gguf: Any) -> str:
    """The name of the type of a value."""
    number = header.number("I")
    try:
        name: str = gguf.GGUFValueType(number).name
    except ValueError as e:
        raise _broken(header.path, f"{key!r:.200} has the unknown type {number}") from e
    return name


Entry = tuple[str, tuple[int, ...], int, int]
"""Name, shape in the order of PyTorch, number of the type, offset in the data."""


def _entry(header: _Cursor, gguf: Any) -> Entry:
    name, dims = header.text(), header.number("I")
    if dims > MAX_DIMS:
        raise _broken(header.path, f"{name!r:.200} has {dims} dimensions")
    shape = tuple(header.number("Q") for _ in range(dims))[::-1]
    return name, shape, header.number("I"), header.number("Q")


def _infos(
    path: Path,
    stored: list[Entry],
    metadata: Mapping[str, Value],
    start: int,
    state: FileState | None,
    gguf: Any,
) -> list[TensorInfo]:
    """The tensors in the order of their bytes. `start`: first byte of the data."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape, _, _ in stored:
        if name in shapes:
            raise _broken(path, f"has two tensors {name!r:.200}")
        shapes[name] = shape
    infos = []
    for name, shape, number, offset in stored:
        dtype, encoding, nbytes = _storage(path, name, shape, number, gguf)
        first = start + offset
        infos.append(
            TensorInfo(
                name=name,
                dtype=dtype,
                shape=_original_shape(path, name, shapes, metadata),
                file=path,
                start=first,
                end=first + nbytes,
                state=state,
                encoding=encoding,
                container="gguf",
            )
        )
    return sorted(infos, key=lambda info: (info.start, info.end))


def _storage(
    path: Path, name: str, shape: tuple[int, ...], number: int, gguf: Any
) -> tuple[str, Encoding | None, int]:
    """(dtype after reading, encoding, bytes) of a tensor. Raises CheckpointError (E-CKP-04)."""
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        kind = None
    if kind is None or kind.name not in TYPES + tuple(TORCH_DTYPES):
        label = f"type {number}, which this version of gguf lacks" if kind is None else kind.name
        raise CheckpointError(
            f"{path}: the GGUF tensor {name!r:.200} is stored as {label}",
            needs=f"F32, F16, BF16, {', '.join(TYPES)}",
            fix="download the model in another type, for example Q8_0 or Q4_K_M, or the original in BF16",
            code="E-CKP-04",
        )
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if (row := shape[-1] if shape else 1) % values:
        raise _broken(
            path, f"{name} has rows of {row} values, but {kind.name} stores {values} values together"
        )
    size = math.prod(shape) // values * nbytes
    if kind.name in TYPES:
        return "BF16", Encoding(kind.name, block=values), size
    return kind.name, None, size


def _original_shape(
    path: Path, name: str, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Value]
) -> tuple[int, ...]:
    """The shape before the tensor was written. ggml has four dimensions, and omits a first one of size 1.

    stable-diffusion.cpp joins the first two of a 3-D convolution, so that [N, C, T, H, W] is stored as
    [N * C, T, H, W]; N is the size of the bias.
    """
    shape, original = shapes[name], metadata.get(ORIGINAL_SHAPE + name)
    if original is not None:
        fits = isinstance(original, tuple) and math.prod(original) == math.prod(shape)
        if not isinstance(original, tuple) or not fits or any(n < 0 for n in original):
            raise _broken(path, f"{name} has {list(shape)}, but the original shape {original!r:.200}")
        return original
    if len(shape) == 2 and name.rpartition(".")[2] in _WITH_BATCH:
        return (1, *shape)
    bias = shapes.get(f"{name.removesuffix('weight')}bias") if name.endswith(".weight") else None
    if len(shape) == 4 and bias and len(bias) == 1 and bias[0] and shape[0] != bias[0]:
        channels, remainder = divmod(shape[0], bias[0])
        return shape if remainder else (bias[0], channels, *shape[1:])
    return shape


def _check_extents(path: Path, infos: list[TensorInfo], start: int, alignment: int, size: int) -> None:
    """Raise CheckpointError (E-CKP-02) unless the tensors follow each other, padded to the alignment."""
    end = expected = start
    for info in infos:
        if info.end > size:
            raise _broken(path, f"truncated: {info.name} ends at byte {info.end}, but the file at {size}")
        if info.start != expected:
            problem = "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            raise _broken(path, f"{info.name} {problem} (starts at byte {info.start}, not {expected})")
        end, expected = info.end, _aligned(info.end, alignment)
    if size > expected:
        raise _broken(path, f"{size - end} bytes follow the last tensor")


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _broken(path: Path, problem: str, fix: str = "") -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}",
        needs="a complete GGUF file",
        fix=fix or "download the file again and compare its size and sha256 with the source",
        code="E-CKP-02",
    )
