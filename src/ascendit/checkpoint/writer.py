"""Write safetensors shards as a stream: headers first, then the bytes of the tensors in order.

    with ShardWriter(folder, specs) as writer:
        for spec in specs:
            if not writer.done(spec.name):
                writer.append(spec.name, data)      # in any number of pieces

File names, index and metadata follow Diffusers. This module does not import torch. Like `cp`, it does not
call fsync: written bytes survive a killed process, but perhaps not a power failure.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ascendit.checkpoint.component import STEM
from ascendit.checkpoint.file_copy import PAGE, move_bytes, read_pieces, reserve, write_at, writing
from ascendit.checkpoint.journal import Journal
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.sources import sha256_of
from ascendit.checkpoint.tensor_info import DTYPE_BITS, TensorInfo

logger = logging.getLogger("ascendit")

MAX_SHARD_BYTES = 5_000_000_000

Data = bytes | bytearray | memoryview | mmap.mmap
"""Bytes to write. For a NumPy array, pass `array.data`."""


# ---- the layout of the files --------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: str
    """safetensors name: `BF16`, `F32`, `F8_E4M3`, ..."""
    shape: tuple[int, ...]
    source_start: int | None = field(default=None, compare=False)
    """Offset of its bytes in the source file, if they are copied. The header is padded to give them the same
    offset within a page in both files: copying is then 1.7 x as fast, and blocks can be shared."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class ShardLayout:
    """Name, header and tensors of a file to be written."""

    file: Path
    specs: tuple[TensorSpec, ...]
    header: bytes
    """Length, JSON and padding: all bytes before the first tensor."""

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs)


def lay_out_shards(
    folder: Path,
    specs: Sequence[TensorSpec],
    *,
    stem: str = STEM,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> tuple[ShardLayout, ...]:
    """Distribute `specs` over files, in order and without splitting tensors.

    A file has at most `max_shard_bytes` of tensors, unless one tensor is larger; None: one file.
    `metadata`: default `{"format": "pt"}`.
    """
    assert specs and len({spec.name for spec in specs}) == len(specs), "no tensors, or a duplicate name"
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and max_shard_bytes is not None and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if len(groups) == 1:
        names = [f"{stem}.safetensors"]
    metadata = {"format": "pt"} if metadata is None else metadata
    return tuple(
        ShardLayout(folder / name, tuple(group), _header(group, metadata))
        for name, group in zip(names, groups, strict=True)
    )


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The header, padded with spaces to a multiple of 8 bytes, like the safetensors library, and so that most
    bytes have the same offset within a page as in their sources."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    weights: Counter[int] = Counter()  # required offset of the first tensor within a page -> bytes
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        if spec.source_start is not None and (spec.source_start - offset) % 8 == 0:
            weights[(spec.source_start - offset) % PAGE] += spec.nbytes
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if weights:
        text += b" " * ((weights.most_common(1)[0][0] - 8 - len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


# ---- writing ------------------------------------------------------------------------------------


class ShardWriter:
    """Write the files of one expert. Reserves the disk space of all files before the first tensor.

    `hash`: compute the sha256 of each file, in a thread. `journal`: its files are not written again; complete
    files are added to it. Raises EnvironmentProblem: E-ENV-04 if the disk is full, E-ENV-02 if the folder is
    not writable.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        *,
        stem: str = STEM,
        max_shard_bytes: int | None = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        hash: bool = False,
        journal: Journal | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.shards = lay_out_shards(
            self.folder, specs, stem=stem, max_shard_bytes=max_shard_bytes, metadata=metadata
        )
        self._stem = stem
        self._journal = journal
        self._sha256: dict[str, str] = {}
        todo = [shard for shard in self.shards if not self._is_complete(shard, hash)]
        self._needed = sum(shard.nbytes for shard in todo)
        self._missing = {spec.name for shard in todo for spec in shard.specs}
        self._pending = deque(_tensor_offsets(todo))
        self._filled = 0  # bytes written of the first pending tensor
        self._fd = -1  # its file
        self._sources = RowReader()
        self._closed = False
        self._pool = ThreadPoolExecutor(1, "ascendit-sha256") if hash and todo else None
        self._digest = hashlib.sha256()
        with self._guarded():
            for shard in todo:
                with open(shard.file, "wb", buffering=0) as f:
                    reserve(f.fileno(), shard.nbytes)
                    write_at(f.fileno(), memoryview(shard.header), 0)
                if shard.nbytes == len(shard.header):
                    self._complete(shard)

    def done(self, name: str) -> bool:
        """Whether an earlier run has completed the file of this tensor, which must then not be appended."""
        return name not in self._missing

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of tensor `name`, a C-contiguous buffer that may be reused after the call."""
        view = memoryview(data)
        if view.nbytes:
            view = view.cast("B")
            self._write(name, len(view), lambda fd, offset: self._write_and_hash(fd, view, offset))

    def move(self, info: TensorInfo, name: str) -> None:
        """Copy tensor `name` from its source `info`, by a system call if possible.

        Raises CheckpointError (E-CKP-02) if the source is truncated or cannot be read.
        """
        if info.nbytes:
            source = self._sources.open(info)

            def copy(fd: int, offset: int) -> None:
                if self._pool is None:
                    move_bytes(source, info.start, fd, offset, info.nbytes, source=info.file)
                    return
                for piece in read_pieces(source, info.start, info.end, info.file):
                    self._write_and_hash(fd, piece, offset)
                    offset += len(piece)

            self._write(name, info.nbytes, copy)

    def close(self) -> dict[str, str]:
        """Write the index if there are several files. Return {file name: sha256} with `hash`, else {}."""
        if not self._closed:
            assert not self._pending, f"{self._pending[0][1].name} is not complete"
            with self._guarded():
                self._write_index()
            self._release()
        return dict(self._sha256)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        self._release()

    def _is_complete(self, shard: ShardLayout, hash: bool) -> bool:
        """Whether the journal has this file with the same header, and its sha256 if `hash`.

        A file whose sha256 was recorded is read again: it may have been damaged since.
        """
        entry = self._journal.complete(shard.file) if self._journal else None
        if not entry or entry.nbytes != shard.nbytes or (hash and not entry.sha256):
            return False
        try:
            with open(shard.file, "rb") as f:
                same = f.read(len(shard.header)) == shard.header
            same = same and (not entry.sha256 or sha256_of(shard.file) == entry.sha256)
        except OSError:
            return False
        if not same:
            logger.warning("%s was changed after it was written; it is written again", shard.file)
        if same and hash and entry.sha256:
            self._sha256[shard.file.name] = entry.sha256
        return same

    def _write_and_hash(self, fd: int, piece: memoryview, offset: int) -> None:
        """Write bytes, and hash them at the same time if `hash`."""
        hashing = self._pool.submit(self._digest.update, piece) if self._pool else None
        write_at(fd, piece, offset)
        if hashing:
            hashing.result()

    def _write(self, name: str, count: int, write: Callable[[int, int], None]) -> None:
        """Write the next `count` bytes of a tensor with `write(fd, offset)`."""
        assert self._pending and not self._closed, f"{name}: all tensors are written"
        shard, spec, start = self._pending[0]
        assert spec.name == name, f"{name} is out of order, {spec.name} is next"
        assert self._filled + count <= spec.nbytes, f"{name} has only {spec.nbytes} bytes"
        with self._guarded():
            fd = self._open_target(shard)
            write(fd, start + self._filled)
            self._filled += count
            if self._filled == spec.nbytes:
                self._pending.popleft()
                self._filled = 0
                if not self._pending or self._pending[0][0] is not shard:
                    self._complete(shard)

    def _complete(self, shard: ShardLayout) -> None:
        os.close(self._open_target(shard))
        self._fd = -1
        if self._pool:
            self._sha256[shard.file.name] = self._digest.hexdigest()
        if self._journal:
            self._journal.add(shard.file, shard.nbytes, self._sha256.get(shard.file.name))

    def _open_target(self, shard: ShardLayout) -> int:
        if self._fd < 0:
            self._fd = os.open(shard.file, os.O_WRONLY | os.O_CLOEXEC)
            self._digest = hashlib.sha256(shard.header)
        return self._fd

    def _write_index(self) -> None:
        if len(self.shards) == 1:
            return
        weight_map = {spec.name: shard.file.name for shard in self.shards for spec in shard.specs}
        total = sum(spec.nbytes for shard in self.shards for spec in shard.specs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        file = self.folder / f"{self._stem}.safetensors.index.json"
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """On an error, close the files for good and convert an OSError for the user."""
        try:
            with writing(self.folder, self._needed):
                yield
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        self._closed = True
        if self._pool:
            self._pool.shutdown()
        self._sources.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _tensor_offsets(shards: Sequence[ShardLayout]) -> Iterator[tuple[ShardLayout, TensorSpec, int]]:
    """Each non-empty tensor, with its file and its offset in that file."""
    for shard in shards:
        offset = len(shard.header)
        for spec in shard.specs:
            if spec.nbytes:
                yield shard, spec, offset
            offset += spec.nbytes
