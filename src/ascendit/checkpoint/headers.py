"""Read the header of one weight file strictly: the tensors in it, without their values. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from ascendit.checkpoint.component import irregular, loads
from ascendit.checkpoint.gguf_file import MAGIC, SUFFIX, read_gguf
from ascendit.checkpoint.pickle_file import is_archive, older_format, read_pickle_file
from ascendit.checkpoint.sources import FileState, record_source
from ascendit.checkpoint.tensor_info import DTYPE_BITS, TensorInfo
from ascendit.checkpoint.weight_sets import PICKLED
from ascendit.errors import CheckpointError
from ascendit.report import shell_line

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_FORMATS = {SUFFIX: "GGUF", **dict.fromkeys(PICKLED, "torch.save, or of safetensors")}
"""Ending of a name -> the formats that a file with it has."""
POINTER = (rb"version https://git-lfs", "a pointer of Git LFS")
WEB_PAGE = (rb"(?i)\s*<(?:!doctype )?html", "a web page")
"""Start of a file, and the kind of file: a failed download leaves them."""


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file of safetensors, GGUF or `torch.save` by name, in the order of their bytes.

    The first bytes of the file determine its format. Raises CheckpointError (E-CKP-02), with the reason, for
    an invalid length, a header that is not a JSON object, sizes that do not match shape and dtype, overlaps,
    gaps, and truncated files; the errors of `read_gguf` and of `read_pickle_file`.
    """
    try:
        if problem := irregular(path, os.stat(path)):
            raise _broken(path, problem)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as f:
            status = os.fstat(f.fileno())
            size, state = status.st_size, FileState.of(status)
            record_source(path, status)
            if error := _placeholder(path, f.peek(64)):
                raise error
            if path.suffix.lower() == SUFFIX or f.peek(len(MAGIC)).startswith(MAGIC):
                return read_gguf(path, f, size, state).tensors
            if is_archive(f.peek(8)[:8]):
                return read_pickle_file(path, f, state).tensors
            header = _read_json_header(path, f, size)
            position = f.tell()
    except OSError as e:
        raise _broken(path, "missing" if isinstance(e, FileNotFoundError) else str(e.strerror)) from e
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "__metadata__ is not an object of texts")
    infos = [_entry(path, name, entry, position, state) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    for info in infos:
        if info.end > size:
            raise _broken(path, f"truncated: {info.name} ends at byte {info.end}, but the file at {size}")
        if info.start != position:
            problem = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise _broken(path, f"{info.name} {problem} (starts at byte {info.start}, not {position})")
        position = info.end
    if position != size:
        raise _broken(path, f"{size - position} bytes follow the last tensor")
    return {info.name: info for info in infos}


def begins_as_weights(path: Path) -> bool:
    """Whether the first bytes of a file are those of GGUF, an archive of torch.save or safetensors.

    Raises OSError.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start.startswith(MAGIC) or is_archive(start) or (start[8:] == b"{" and 2 <= length <= MAX_HEADER)


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in `__metadata__` of a safetensors file whose header `read_header` has read; else empty.

    Raises CheckpointError (E-CKP-02) for a file that can no longer be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if int.from_bytes(file.read(8), "little") > min(size, MAX_HEADER):
                return {}
            file.seek(0)
            metadata = _read_json_header(path, file, size).get("__metadata__")
    except OSError as e:
        raise _broken(path, str(e.strerror)) from e
    return {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}


def read_values(path: Path) -> dict[str, Any]:
    """The values beside the tensors of a file of `torch.save`, see `PickleFile`; empty for other formats.

    Raises CheckpointError (E-CKP-02) for a file that can no longer be read.
    """
    try:
        with open(path, "rb") as file:
            return read_pickle_file(path, file, None).values if is_archive(file.peek(8)[:8]) else {}
    except OSError as e:
        raise _broken(path, str(e.strerror)) from e


def _read_json_header(path: Path, file: BinaryIO, size: int) -> dict[str, Any]:
    """Read the header object at the start of a file of `size` bytes."""
    if len(prefix := file.read(8)) < 8:
        raise _broken(path, f"{size} bytes long, too short for a header" if size else "empty")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise older_format(path, file) or _broken(path, f"not a safetensors file (header of {length} bytes)")
    if 8 + length > size:
        raise _broken(path, f"truncated: header of {length} bytes in a file of {size}")
    try:
        header = loads(file.read(length).decode())
    except (ValueError, RecursionError) as e:
        raise _broken(path, f"header is not JSON ({e})") from e
    if not isinstance(header, dict):
        raise _broken(path, f"header is a JSON {type(header).__name__}, not an object")
    return header


def _entry(path: Path, name: str, entry: object, offset: int, state: FileState) -> TensorInfo:
    """Check one header entry: known dtype, valid shape, bytes = shape x dtype."""
    if not isinstance(entry, dict):
        raise _broken(path, f"the entry of {name} is not an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(path, f"{name} has the unknown dtype {dtype!r}")
    if not _naturals(shape):
        raise _broken(path, f"{name} has the invalid shape {shape!r}")
    if not _naturals(span) or len(span) != 2 or span[0] > span[1]:
        raise _broken(path, f"{name} has the invalid offsets {span!r}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (span[1] - span[0]):
        raise _broken(path, f"{name} has {span[1] - span[0]} bytes; {dtype} {shape} takes {bits / 8:g}")
    return TensorInfo(name, dtype, tuple(shape), path, offset + span[0], offset + span[1], state)


def _naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _placeholder(path: Path, start: bytes) -> CheckpointError | None:
    """The error E-CKP-02 for a file that a download left in place of the weights; else None."""
    again = "download the file itself, for example with `hf download`, and compare its sha256"
    pull = shell_line(["git", "-C", str(path.parent), "lfs", "pull"])
    for (pattern, kind), fix in ((POINTER, pull), (WEB_PAGE, again)):
        if re.match(pattern, start):
            return CheckpointError(
                f"{path} is {kind}, not weights",
                needs="the file itself: safetensors, GGUF or an archive of torch.save",
                fix=fix,
                code="E-CKP-02",
            )
    return None


def _broken(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}",
        needs=f"a complete file of {_FORMATS.get(path.suffix.lower(), 'safetensors')}",
        fix="download the file again and compare its size and sha256 with the source",
        code="E-CKP-02",
    )
