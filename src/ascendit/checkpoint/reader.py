"""Tensors on disk: strict safetensors headers, the files of one part, tensors read in blocks of rows.

`read_header` checks a file without reading a byte of its tensors. `Shards` joins the headers of one part.
`RowReader` reads tensors, or one rank's part of them, into memory that is used again.
torch and numpy are imported by the calls that need them.

Files are not mapped: the pages of one would count as memory of this process, and a shrinking file would kill
it.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeGuard

from ascendit.checkpoint.component import STEM, Part, is_plain, loads, read_json, stays_inside, unreadable
from ascendit.errors import CheckpointError
from ascendit.names import listed, problem_counts

if TYPE_CHECKING:
    import torch

Buffer = bytes | bytearray | memoryview

TORCH_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (64, 32, 16)},
    **{f"I{bits}": f"int{bits}" for bits in (64, 32, 16, 8)},
    **{f"U{bits}": f"uint{bits}" for bits in (64, 32, 16, 8)},
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}
"""safetensors spelling -> name in torch. F4 holds two elements in a byte, so its last axis is halved."""
DTYPE_BITS = {name: 8 if name == "BOOL" else int(re.findall(r"\d+", name)[0]) for name in TORCH_DTYPES}
"""safetensors spelling -> bits of one element."""


# ---- headers ------------------------------------------------------------------------------------

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is stored. `start` and `end` are byte offsets in `file`."""

    name: str
    dtype: str
    """In safetensors' spelling: `BF16`, `F32`, `F8_E4M3`, ..."""
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file, by name, in the order of the bytes.

    Raises CheckpointError E-CKP-02 that says what is wrong: an impossible length, a header that
    is no JSON object, sizes that disagree with shape and dtype, overlaps, gaps, a truncated file.
    """
    try:
        if not is_plain(os.stat(path)):
            raise _broken(path, "no regular file")
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            header = _read_json_header(path, f, size)
            position = f.tell()
    except OSError as e:
        raise _broken(path, "missing" if isinstance(e, FileNotFoundError) else str(e.strerror)) from e
    infos = [_entry(path, name, entry, position) for name, entry in header.items() if name != "__metadata__"]
    infos.sort(key=lambda info: (info.start, info.end))
    for info in infos:
        if info.end > size:
            raise _broken(path, f"truncated: {info.name} ends at byte {info.end}, the file at {size}")
        if info.start != position:
            problem = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise _broken(path, f"{info.name} {problem} (starts at byte {info.start}, not {position})")
        position = info.end
    if position != size:
        raise _broken(path, f"{size - position} bytes follow the last tensor")
    return {info.name: info for info in infos}


def _read_json_header(path: Path, file: BinaryIO, size: int) -> dict[str, Any]:
    """The header object, read from the start of a file of `size` bytes."""
    if len(prefix := file.read(8)) < 8:
        raise _broken(path, f"{size} bytes long, too short for a header" if size else "empty")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise _broken(path, f"no safetensors file (header of {length} bytes)")
    if 8 + length > size:
        raise _broken(path, f"truncated: header of {length} bytes in a file of {size}")
    try:
        header = loads(file.read(length).decode())
    except (ValueError, RecursionError) as e:
        raise _broken(path, f"header is not JSON ({e})") from e
    if not isinstance(header, dict):
        raise _broken(path, f"header is a JSON {type(header).__name__}, not an object")
    return header


def _entry(path: Path, name: str, entry: object, offset: int) -> TensorInfo:
    """Check one entry of the header: dtype known, shape legal, bytes = shape x dtype."""
    if not isinstance(entry, dict):
        raise _broken(path, f"entry of {name} is no object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(path, f"{name} has the unknown dtype {dtype!r}")
    if not _naturals(shape):
        raise _broken(path, f"{name} has the shape {shape!r}")
    if not _naturals(span) or len(span) != 2 or span[0] > span[1]:
        raise _broken(path, f"{name} has the offsets {span!r}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (span[1] - span[0]):
        raise _broken(path, f"{name} has {span[1] - span[0]} bytes; {dtype} {shape} takes {bits / 8:g}")
    return TensorInfo(name, dtype, tuple(shape), path, offset + span[0], offset + span[1])


def _naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _broken(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}",
        needs="a whole safetensors file",
        fix="download the file again and compare its size and sha256 with the source",
        code="E-CKP-02",
    )


# ---- the files of one part ----------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """The weight files of one part, seen as one set of tensors: their headers."""

    tensors: dict[str, TensorInfo]
    """In the order of the files, and of the bytes in each."""
    files: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path, stem: str = STEM) -> Self:
        """`<stem>.safetensors`, or `<stem>.safetensors.index.json` and the shards it names.

        Every header is read and checked. Raises CheckpointError: E-CKP-02 for a missing or damaged
        file, E-CKP-03 for an index that names a missing file or one outside the folder, E-CKP-04 for
        an index that disagrees with the shards, E-CKP-06 for an index that is no JSON.
        """
        folder = Path(folder)
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if not index.exists():
            if not single.exists():
                raise _no_weights(single)
            return cls(read_header(single), (single,))
        shards = cls.of_index(index)
        if single.exists() and single not in shards.files:
            raise CheckpointError(
                f"{folder} has both {single.name} and {index.name}",
                needs="one of them; they can hold different weights",
                fix="remove the one that is out of date",
                code="E-CKP-03",
            )
        return shards

    @classmethod
    def of_index(cls, index: Path) -> Self:
        """The shards that an index file names; errors as in `open`."""
        weight_map = _weight_map(index)
        names = sorted(set(weight_map.values()))
        files = tuple(dict.fromkeys(index.parent / name for name in names))  # it may spell one in two ways
        if missing := [path.name for path in files if not os.path.isfile(path)]:  # False for a name too long
            raise CheckpointError(
                f"{index} names {len(files)} files, and {len(missing)} missing: {listed(missing)}",
                needs="every shard that the index names, in the same folder",
                fix="download the missing files",
                code="E-CKP-03",
            )
        return cls(_join(index, weight_map, files), files)

    @classmethod
    def of_files(cls, files: Sequence[Path]) -> Self:
        """These files of one folder, without an index. A tensor that is in two of them is E-CKP-09."""
        tensors: dict[str, TensorInfo] = {}
        for path in files:
            for name, info in read_header(path).items():
                if name in tensors:
                    first = tensors[name].file.name
                    raise CheckpointError(
                        f"{name} stands in {first} and again in {path.name}, in {path.parent}",
                        needs="each tensor once",
                        fix="remove the files that belong to another model or an older run",
                        code="E-CKP-09",
                    )
                tensors[name] = info
        return cls(tensors, tuple(files))

    @classmethod
    def of_part(cls, part: Part) -> Self:
        """The weight files of `part`, wherever its layout keeps them."""
        if part.index is not None:
            return cls.of_index(part.index)
        return cls.of_files(part.files) if part.files else cls.open(part.path, part.stem)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{index} has no weight_map",
            needs="an object that maps each tensor to the file that holds it",
            fix="download the file again",
            code="E-CKP-06",
        )
    # Links inside the folder may point elsewhere (hub caches); names may not.
    if outside := [name for name in sorted(weight_map.values()) if not stays_inside(name)]:
        raise CheckpointError(
            f"{index} names {outside[0]!r}, which is not inside the folder",
            needs="names of files beside the index",
            fix="get the model from a source you trust",
            code="E-CKP-03",
        )
    return weight_map


def _join(index: Path, weight_map: dict[str, str], files: tuple[Path, ...]) -> dict[str, TensorInfo]:
    """The tensors of all shards; each must be where `weight_map` says, and nowhere else."""
    tensors: dict[str, TensorInfo] = {}
    unmapped: list[str] = []
    for path in files:
        for name, info in read_header(path).items():
            if name in weight_map and index.parent / weight_map[name] == path:
                tensors[name] = info
            else:
                unmapped.append(f"{name} in {path.name}")
    absent = [f"{name} in {weight_map[name]}" for name in weight_map if name not in tensors]
    kinds = {"not where the index says": absent, "in a shard and not in the index": unmapped}
    if not (problems := problem_counts(kinds)):
        return tensors
    raise CheckpointError(
        f"{index} disagrees with its shards: {problems}",
        needs="an index that says exactly what the shards hold",
        fix="download the index and the shards again; they are from different versions",
        code="E-CKP-04",
    )


def _no_weights(file: Path) -> CheckpointError:
    """`file`: the name that weights in one file would have."""
    folder, fix = file.parent, "download the weights of this part, in safetensors format"
    if file.is_symlink():
        return CheckpointError(
            f"{file} is a link to {os.readlink(file)}, which leads to no file",
            needs="the weights themselves, or a link to them",
            fix="copy the file that the link is meant for, or make the link anew",
            code="E-CKP-03",
        )
    got = f"no {file.name} in {folder}" if folder.is_dir() else f"no folder {folder}"
    others = [p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pth", ".pt")]
    needs = f"{file.name}, or {file.name}.index.json and its shards"
    return CheckpointError(
        got + (f" (there is {listed(others)})" if others else ""), needs=needs, fix=fix, code="E-CKP-02"
    )


# ---- blocks of rows -----------------------------------------------------------------------------

BLOCK_BYTES = 4 << 20
_LARGE = 1 << 30  # bytes in one call; no system reads 2 GiB


@dataclass(frozen=True)
class ShardSpec:
    """One rank's part of a tensor: `count` rows (axis 0) or columns (axis 1) from `start`; whole by default.

    Counted in elements of the tensor as it is stored.
    """

    axis: int = 0
    start: int = 0
    count: int | None = None
    """None: to the end."""

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part."""
        if self == WHOLE:
            return shape
        count = shape[self.axis] - self.start if self.count is None else self.count
        assert 0 <= self.start and 0 < count and self.start + count <= shape[self.axis], (self, shape)
        return (*shape[: self.axis], count, *shape[self.axis + 1 :])


WHOLE = ShardSpec()


class RowReader:
    """Reads tensors, or one rank's part of them, from files that stay open until `close`.

    Every call raises CheckpointError E-CKP-02 if the file has shrunk or gone since its header was read.
    """

    def __init__(self) -> None:
        self._buffer: memoryview | None = None
        self._files: dict[Path, int] = {}

    def blocks(
        self,
        info: TensorInfo,
        *,
        shard: ShardSpec = WHOLE,
        multiple: int = 1,
        block_bytes: int | None = None,
    ) -> Iterator[tuple[int, memoryview]]:
        """(index of the row in the tensor, bytes of the rows), from the first row of the part to its last.

        The bytes are valid until the next block is read.
        """
        first, count, row_bytes = _part(info, shard)
        step = max((block_bytes or BLOCK_BYTES) // max(row_bytes, 1) // multiple * multiple, multiple)
        if self._buffer is None or step * row_bytes > len(self._buffer):
            self._buffer = memoryview(mmap.mmap(-1, max(step * row_bytes, BLOCK_BYTES)))
        for start in range(first, first + count, step):
            rows = min(step, first + count - start)
            view = self._buffer[: rows * row_bytes]
            self._read_rows(info, shard, start, rows, view)
            yield start, view

    def whole(self, info: TensorInfo, shard: ShardSpec = WHOLE) -> bytes:
        """All bytes of a small tensor, or of a part of it, in memory of their own."""
        _, count, row_bytes = _part(info, shard)
        data = bytearray(count * row_bytes)
        self.into(info, memoryview(data), shard)
        return bytes(data)

    def into(self, info: TensorInfo, view: memoryview, shard: ShardSpec = WHOLE) -> None:
        """All bytes of a tensor, or of a part of it, into `view`."""
        first, count, row_bytes = _part(info, shard)
        self._read_rows(info, shard, first, count, view[: count * row_bytes])

    def tensor(self, info: TensorInfo, shard: ShardSpec = WHOLE) -> torch.Tensor:
        """A tensor, or a part of it, on the CPU, in memory of its own."""
        import torch

        shape = shard.of(info.shape)
        if info.dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        tensor = torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]))
        if tensor.numel():
            self.into(info, as_bytes(tensor), shard)
        return tensor

    def _read_rows(self, info: TensorInfo, shard: ShardSpec, start: int, rows: int, view: memoryview) -> None:
        """Rows of the part from row `start` of the tensor on. Columns are read row by row."""
        stride = rows_of(info)[1]
        if shard.axis == 0:
            self._read(info, info.start + start * stride, view)
            return
        width = len(view) // max(rows, 1)
        offset = info.start + shard.start * (stride // info.shape[1])
        for row in range(rows):
            self._read(info, offset + (start + row) * stride, view[row * width : (row + 1) * width])

    def _read(self, info: TensorInfo, offset: int, view: memoryview) -> None:
        fd = self.open(info.file)
        while len(view):
            if not (count := os.preadv(fd, [view[:_LARGE]], offset)):
                raise unreadable(info.file, f"truncated while it was read, in {info.name}")
            view, offset = view[count:], offset + count

    def open(self, file: Path) -> int:
        """The descriptor of a file, which `close` closes."""
        if file not in self._files:
            try:
                fd = self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                raise unreadable(file, str(e.strerror)) from e
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._files[file]

    def close(self) -> None:
        """Close the files. A later call opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close()


def _part(info: TensorInfo, shard: ShardSpec) -> tuple[int, int, int]:
    """(first row, number of rows, bytes of one row) of a part."""
    count, row_bytes = rows_of(info)
    if shard == WHOLE:
        return 0, count, row_bytes
    shape = shard.of(info.shape)
    if shard.axis == 0:
        return shard.start, shape[0], row_bytes
    return 0, count, row_bytes // info.shape[1] * shape[1]


def rows_of(info: TensorInfo) -> tuple[int, int]:
    """(number of rows, bytes of one): rows lie along the first axis; a scalar is one row."""
    count = info.shape[0] if info.shape else 1
    return count, info.nbytes // max(count, 1)


# ---- bytes and tensors --------------------------------------------------------------------------


def as_tensor(view: memoryview, info: TensorInfo) -> torch.Tensor:
    """The rows in `view` as a tensor [rows, ...] of the dtype of `info`. It shares the memory."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
    flat = torch.frombuffer(view, dtype=dtype)
    rest = info.shape[1:]
    return flat.view(-1, *rest) if math.prod(rest) else flat


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which must outlive the view."""
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def float_bytes(data: Buffer, dtype: str) -> bytes:
    """BF16, F16 or F32 numbers as F32, exact."""
    if dtype == "F32":
        return bytes(data)
    if dtype == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return bytes(wide)
    import numpy as np

    assert dtype == "F16", dtype
    return np.frombuffer(data, np.float16).astype(np.float32).tobytes()
