"""Read tensors on disk: strict safetensors headers, the files of one component, tensors in blocks of rows.

`read_header` checks a file without reading its tensors. `Shards` joins the headers of one component.
`RowReader` reads tensors, or one rank's shard of them, into a reused buffer. torch and numpy are imported by
the functions that need them.

`RowReader` does not map files: mapped pages would count as memory of this process, and a file that shrinks
would kill it. Only `library_component` maps the parts that a library runs.
"""

from __future__ import annotations

import math
import mmap
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeGuard

from ascendit.checkpoint.component import (
    STEM,
    Part,
    irregular,
    loads,
    read_json,
    stays_inside,
)
from ascendit.checkpoint.sources import FileState, OpenFiles, check_state, record_source, unreadable
from ascendit.errors import CheckpointError
from ascendit.names import listed, problem_counts
from ascendit.report import shell_line

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
"""safetensors dtype -> torch dtype. F4 stores two elements per byte, so its last axis is halved in torch."""
DTYPE_BITS = {name: 8 if name == "BOOL" else int(re.findall(r"\d+", name)[0]) for name in TORCH_DTYPES}
"""safetensors dtype -> bits per element."""


def common_dtype(sizes: Iterable[tuple[str, int]]) -> str:
    """The torch dtype of most bytes; float32 for float64, in which no operator computes.

    `sizes`: (safetensors dtype, bytes) of each tensor.
    """
    count: Counter[str] = Counter()
    for dtype, nbytes in sizes:
        count[dtype] += nbytes
    name = TORCH_DTYPES[count.most_common(1)[0][0]] if count else "float32"
    return "float32" if name == "float64" else name


# ---- headers ------------------------------------------------------------------------------------

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")  # first bytes of files of torch.save


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is stored. `start` and `end` are byte offsets in `file`."""

    name: str
    dtype: str
    """safetensors name: `BF16`, `F32`, `F8_E4M3`, ..."""
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    state: FileState | None = field(default=None, compare=False, repr=False)
    """State of the file when its header was read; None if unknown."""

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file by name, in the order of their bytes.

    Raises CheckpointError (E-CKP-02), with the reason, for an invalid length, a header that is not a JSON
    object, sizes that do not match shape and dtype, overlaps, gaps, and truncated files.
    """
    try:
        if problem := irregular(path, os.stat(path)):
            raise _broken(path, problem)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as f:
            status = os.fstat(f.fileno())
            size, state = status.st_size, FileState.of(status)
            record_source(path, status)
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


def _read_json_header(path: Path, file: BinaryIO, size: int) -> dict[str, Any]:
    """Read the header object at the start of a file of `size` bytes."""
    if len(prefix := file.read(8)) < 8:
        raise _broken(path, f"{size} bytes long, too short for a header" if size else "empty")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        kind = "a PyTorch pickle" if prefix.startswith(_PICKLES) else f"header of {length} bytes"
        raise _broken(path, f"not a safetensors file ({kind})")
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


def _broken(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}",
        needs="a complete safetensors file",
        fix="download the file again and compare its size and sha256 with the source",
        code="E-CKP-02",
    )


# ---- the files of one component -----------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """The headers of all weight files of one component, as one set of tensors."""

    tensors: dict[str, TensorInfo]
    """All tensors, in the order of the files and of the bytes in each file."""
    files: tuple[Path, ...]

    @classmethod
    def open(cls, folder: Path, stem: str = STEM) -> Self:
        """Read and check the headers of `<stem>.safetensors`, or of the shards in its `.index.json`.

        Raises CheckpointError: E-CKP-02 for a missing or damaged file, E-CKP-03 for an index that lists a
        missing file or one outside the folder, E-CKP-04 for an index that does not match the shards, E-CKP-06
        for an index that is not JSON.
        """
        folder = Path(folder)
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if not index.exists():
            if not single.exists():
                raise _no_weights(single)
            return cls(read_header(single), (single,))
        shards = cls.from_index(index)
        if single.exists() and single not in shards.files:
            raise CheckpointError(
                f"{folder} has both {single.name} and {index.name}",
                needs="only one of them: they may contain different weights",
                fix="remove the outdated one",
                code="E-CKP-03",
            )
        return shards

    @classmethod
    def from_index(cls, index: Path) -> Self:
        """Read the shards listed in an index file. Raises CheckpointError as in `open`."""
        weight_map = _weight_map(index)
        names = sorted(set(weight_map.values()))
        files = tuple(dict.fromkeys(index.parent / name for name in names))  # `a` and `./a` are one file
        if missing := [
            path.name for path in files if not os.path.isfile(path)
        ]:  # False if a name is too long
            raise CheckpointError(
                f"{index} lists {len(files)} files, {len(missing)} of them missing: {listed(missing)}",
                needs="every shard that the index lists, in the same folder",
                fix="download the missing files",
                code="E-CKP-03",
            )
        return cls(_join(index, weight_map, files), files)

    @classmethod
    def from_files(cls, files: Sequence[Path]) -> Self:
        """Read files without an index.

        Raises CheckpointError: E-CKP-02 if damaged, E-CKP-09 for duplicates.
        """
        tensors: dict[str, TensorInfo] = {}
        for path in files:
            for name, info in read_header(path).items():
                if name in tensors:
                    first = tensors[name].file.name
                    raise CheckpointError(
                        f"{name} is in both {first} and {path.name}, in {path.parent}",
                        needs="each tensor in one file",
                        fix="remove the files of another model or an older run",
                        code="E-CKP-09",
                    )
                tensors[name] = info
        return cls(tensors, tuple(files))

    @classmethod
    def from_part(cls, part: Part) -> Self:
        """Read the weight files of `part`. Raises the errors of `open` and `from_files`."""
        if part.index is not None:
            return cls.from_index(part.index)
        return cls.from_files(part.files) if part.files else cls.open(part.path, part.stem)

    def check_unchanged(self) -> None:
        """Raise CheckpointError (E-CKP-02) if a file has changed since its header was read."""
        for file, state in {info.file: info.state for info in self.tensors.values()}.items():
            check_state(file, state)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{index} has no weight_map",
            needs="an object that maps each tensor to its file",
            fix="download the file again",
            code="E-CKP-06",
        )
    # Links inside the folder may point elsewhere (hub caches); names may not.
    if outside := [name for name in sorted(set(weight_map.values())) if not stays_inside(name)]:
        raise CheckpointError(
            f"{index} lists {outside[0]!r}, which is not inside the folder",
            needs="names of files in the folder of the index",
            fix="download the model from a trusted source",
            code="E-CKP-03",
        )
    return weight_map


def _join(index: Path, weight_map: dict[str, str], files: tuple[Path, ...]) -> dict[str, TensorInfo]:
    """The tensors of all shards. Each must be in the file that `weight_map` lists, and in no other."""
    tensors: dict[str, TensorInfo] = {}
    unmapped: list[str] = []
    path_of = {name: index.parent / name for name in set(weight_map.values())}
    for path in files:
        for name, info in read_header(path).items():
            if name in weight_map and path_of[weight_map[name]] == path:
                tensors[name] = info
            else:
                unmapped.append(f"{name} in {path.name}")
    absent = [f"{name} in {weight_map[name]}" for name in weight_map if name not in tensors]
    kinds = {"not in the listed shard": absent, "in a shard but not in the index": unmapped}
    if not (problems := problem_counts(kinds)):
        return tensors
    raise CheckpointError(
        f"{index} does not match its shards: {problems}",
        needs="an index that lists exactly the tensors of the shards",
        fix="download the index and the shards again; they are from different versions",
        code="E-CKP-04",
    )


def _no_weights(file: Path) -> CheckpointError:
    """`file`: the expected path of weights in a single file."""
    folder, fix = file.parent, "download the weights of this component, in safetensors format"
    if file.is_symlink():
        return CheckpointError(
            f"{file} is a dangling symlink to {os.readlink(file)}",
            needs="the weight file, or a link to it",
            fix="copy the weight file, or correct the link",
            code="E-CKP-03",
        )
    got = f"no {file.name} in {folder}" if folder.is_dir() else f"no folder {folder}"
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", *PICKLED))
    if pickled := [name for name in others if name.endswith(PICKLED)]:
        fix += f"; or convert {pickled[0]}: {convert_command(folder / pickled[0], file)}"
    needs = f"{file.name}, or {file.name}.index.json and its shards"
    return CheckpointError(
        got + (f" (it has {listed(others)})" if others else ""), needs=needs, fix=fix, code="E-CKP-02"
    )


PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
"""Endings of files of torch.save. They are never opened: unpickling can run code."""


def convert_command(pickled: Path, file: Path) -> str:
    """A command that writes the tensors of a pickle to a safetensors file, without running code."""
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "d = torch.load(sys.argv[1], weights_only=True, mmap=True); d = d.get('state_dict', d); "
        "save_file({k: v.clone().contiguous() for k, v in d.items()}, sys.argv[2])"
    )
    return shell_line(["python", "-c", code, str(pickled), str(file)])


# ---- blocks of rows -----------------------------------------------------------------------------

BLOCK_BYTES = 4 << 20
_LARGE = 1 << 30  # bytes in one call; no system reads 2 GiB


@dataclass(frozen=True)
class ShardSpec:
    """One rank's shard of a tensor: `count` rows (axis 0) or columns (axis 1) from `start`; default: all.

    `start` and `count` are in elements of the stored tensor.
    """

    axis: int = 0
    start: int = 0
    count: int | None = None
    """None: to the end."""

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this shard of a tensor with the shape `shape`."""
        if self == WHOLE:
            return shape
        count = shape[self.axis] - self.start if self.count is None else self.count
        assert 0 <= self.start and 0 < count and self.start + count <= shape[self.axis], (self, shape)
        return (*shape[: self.axis], count, *shape[self.axis + 1 :])


WHOLE = ShardSpec()


class RowReader:
    """Read tensors, or one rank's shard of them, with a bounded number of open files.

    Raises CheckpointError (E-CKP-02) for a file that was written, replaced, truncated or removed after its
    header was read: when it opens the file, closes it to open others, and at the end of a `with` block.
    """

    def __init__(self) -> None:
        self._buffer: memoryview | None = None
        self._files = OpenFiles()

    def read_blocks(
        self,
        info: TensorInfo,
        *,
        shard: ShardSpec = WHOLE,
        multiple: int = 1,
        block_bytes: int | None = None,
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield (index of the first row in the tensor, bytes of the rows) for all rows of the shard.

        The bytes are valid until the next block is read.
        """
        first, count, row_bytes = _shard_rows(info, shard)
        step = max((block_bytes or BLOCK_BYTES) // max(row_bytes, 1) // multiple * multiple, multiple)
        if self._buffer is None or step * row_bytes > len(self._buffer):
            self._buffer = memoryview(mmap.mmap(-1, max(step * row_bytes, BLOCK_BYTES)))
        for start in range(first, first + count, step):
            rows = min(step, first + count - start)
            view = self._buffer[: rows * row_bytes]
            self._read_rows(info, shard, start, rows, view)
            yield start, view

    def read_all(self, info: TensorInfo, shard: ShardSpec = WHOLE) -> bytes:
        """Return all bytes of a small tensor, or of a shard of it, as a copy."""
        _, count, row_bytes = _shard_rows(info, shard)
        data = bytearray(count * row_bytes)
        self.read_into(info, memoryview(data), shard)
        return bytes(data)

    def read_into(self, info: TensorInfo, view: memoryview, shard: ShardSpec = WHOLE) -> None:
        """Read all bytes of a tensor, or of a shard of it, into `view`."""
        first, count, row_bytes = _shard_rows(info, shard)
        self._read_rows(info, shard, first, count, view[: count * row_bytes])

    def read_tensor(self, info: TensorInfo, shard: ShardSpec = WHOLE) -> torch.Tensor:
        """Return a tensor, or a shard of it, in a new CPU tensor of the stored dtype and shape [N, ...]."""
        import torch

        shape = shard.shape_of(info.shape)
        if info.dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        tensor = torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]))
        if tensor.numel():
            self.read_into(info, as_bytes(tensor), shard)
        return tensor

    def _read_rows(self, info: TensorInfo, shard: ShardSpec, start: int, rows: int, view: memoryview) -> None:
        """Read `rows` rows of the shard from row `start` of the tensor. Columns are read row by row."""
        stride = rows_of(info)[1]
        if shard.axis == 0:
            self._read(info, info.start + start * stride, view)
            return
        width = len(view) // max(rows, 1)
        offset = info.start + shard.start * (stride // info.shape[1])
        for row in range(rows):
            self._read(info, offset + (start + row) * stride, view[row * width : (row + 1) * width])

    def _read(self, info: TensorInfo, offset: int, view: memoryview) -> None:
        fd = self.open(info)
        while len(view):
            if not (count := os.preadv(fd, [view[:_LARGE]], offset)):
                raise unreadable(info.file, f"truncated during the read of {info.name}")
            view, offset = view[count:], offset + count

    def open(self, info: TensorInfo) -> int:
        """Return the descriptor of the file of a tensor, valid until the next call of any method."""
        return self._files.open(info.file, info.state)

    def close(self) -> None:
        """Close the files. Later calls open them again."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._files.check()
        finally:
            self.close()


def _shard_rows(info: TensorInfo, shard: ShardSpec) -> tuple[int, int, int]:
    """(first row, number of rows, bytes of one row) of a shard."""
    count, row_bytes = rows_of(info)
    if shard == WHOLE:
        return 0, count, row_bytes
    shape = shard.shape_of(info.shape)
    if shard.axis == 0:
        return shard.start, shape[0], row_bytes
    return 0, count, row_bytes // info.shape[1] * shape[1]


def rows_of(info: TensorInfo) -> tuple[int, int]:
    """(number of rows, bytes per row). Rows are along the first axis; a scalar is one row."""
    count = info.shape[0] if info.shape else 1
    return count, info.nbytes // max(count, 1)


# ---- bytes and tensors --------------------------------------------------------------------------


def as_tensor(view: memoryview, info: TensorInfo) -> torch.Tensor:
    """Return the rows in `view` as a tensor [rows, ...] with the dtype of `info`, sharing the memory."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
    flat = torch.frombuffer(view, dtype=dtype)
    row_shape = info.shape[1:]
    return flat.view(-1, *row_shape) if math.prod(row_shape) else flat


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor [..] of any dtype. The tensor must outlive the view."""
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def float_bytes(data: Buffer, dtype: str) -> bytes:
    """Convert the bytes of BF16, F16 or F32 numbers to F32, exactly."""
    if dtype == "F32":
        return bytes(data)
    if dtype == "BF16":  # the upper half of a float32
        as_float32 = bytearray(2 * len(data))
        as_float32[2::4], as_float32[3::4] = data[0::2], data[1::2]
        return bytes(as_float32)
    import numpy as np

    assert dtype == "F16", dtype
    return np.frombuffer(data, np.float16).astype(np.float32).tobytes()
