"""Safetensors shards written as a stream: every header is known beforehand, the bytes follow in order.

    with ShardWriter(folder, specs) as writer:
        for spec in specs:
            if not writer.done(spec.name):
                writer.append(spec.name, data)      # in as many pieces as you like

Names of files, index and metadata are those that Diffusers writes. No torch. Like `cp`, nothing is forced
to the disk: a killed process loses nothing that was written, a power failure may.
"""

from __future__ import annotations

import hashlib
import json
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
from ascendit.checkpoint.output_folder import Journal
from ascendit.checkpoint.reader import DTYPE_BITS, RowReader, TensorInfo

MAX_SHARD_BYTES = 5_000_000_000

Data = bytes | bytearray | memoryview | mmap.mmap
"""Of a NumPy array it is `array.data`."""


# ---- what goes into which file, at which byte ---------------------------------------------------


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: str
    """In safetensors' spelling: `BF16`, `F32`, `F8_E4M3`, ..."""
    shape: tuple[int, ...]
    source_start: int | None = field(default=None, compare=False)
    """Where its bytes begin in the file they will be moved from. The header is padded so that both files have
    them at the same place in a page, which makes moving 1.7 x as fast (and sharing of blocks possible)."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class ShardLayout:
    """One file to be written."""

    file: Path
    specs: tuple[TensorSpec, ...]
    header: bytes
    """Length, JSON and padding: all bytes before the first tensor."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(spec.nbytes for spec in self.specs)


def lay_out_shards(
    folder: Path,
    specs: Sequence[TensorSpec],
    *,
    stem: str = STEM,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> tuple[ShardLayout, ...]:
    """Files for `specs`, in their order. A new one begins where `max_shard_bytes` of tensors would be passed;
    None: one file. No tensor is split. `metadata` is `{"format": "pt"}` unless given."""
    assert specs and len({spec.name for spec in specs}) == len(specs), "no tensor, or a name twice"
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
    """Padded with spaces to a multiple of 8 bytes, as the safetensors library does, and to the page that most
    bytes have in their sources."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    weights: Counter[int] = Counter()  # where the first tensor would have to begin, modulo a page -> bytes
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
    """Writes the files of one expert. Space for all of them is reserved before the first byte of a tensor.

    `hash`: sha256 of each file, in a thread. `journal`: files in it are complete, and are added when they
    are. Raises EnvironmentProblem E-ENV-04 when the disk is full, E-ENV-02 when it cannot be written.
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
        self._left = deque(_places(todo))
        self._filled = 0  # bytes of the first of _left
        self._fd = -1  # of its file
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
        """Whether an earlier run has completed the file of this tensor: leave it out."""
        return name not in self._missing

    def append(self, name: str, data: Data) -> None:
        """The next bytes of tensor `name`; any C-contiguous buffer, free to be used again on return."""
        view = memoryview(data)
        if view.nbytes:
            view = view.cast("B")
            self._write(name, len(view), lambda fd, offset: self._put(fd, view, offset))

    def move(self, info: TensorInfo, name: str) -> None:
        """The whole of tensor `name`, from the place that `info` gives; in the kernel where it can.

        Raises CheckpointError E-CKP-02 when the source cannot be read to its end.
        """
        if info.nbytes:
            source = self._sources.open(info.file)

            def copy(fd: int, offset: int) -> None:
                if self._pool is None:
                    move_bytes(source, info.start, fd, offset, info.nbytes, source=info.file)
                    return
                for piece in read_pieces(source, info.start, info.end, info.file):
                    self._put(fd, piece, offset)
                    offset += len(piece)

            self._write(name, info.nbytes, copy)

    def close(self) -> dict[str, str]:
        """Write the index if there are several files; {file name: sha256} if hashed, else {}."""
        if not self._closed:
            assert not self._left, f"{self._left[0][1].name} is not complete"
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
        """Whether the journal has this file, with just this header, and its sha256 if that is wanted."""
        entry = self._journal.complete(shard.file) if self._journal else None
        if not entry or entry.nbytes != shard.nbytes or (hash and not entry.sha256):
            return False
        try:
            with open(shard.file, "rb") as f:
                same = f.read(len(shard.header)) == shard.header
        except OSError:
            return False
        if same and hash and entry.sha256:
            self._sha256[shard.file.name] = entry.sha256
        return same

    def _put(self, fd: int, piece: memoryview, offset: int) -> None:
        """Write bytes, and hash the same bytes meanwhile."""
        hashing = self._pool.submit(self._digest.update, piece) if self._pool else None
        write_at(fd, piece, offset)
        if hashing:
            hashing.result()

    def _write(self, name: str, count: int, write: Callable[[int, int], None]) -> None:
        """Let `write(fd, offset)` put the next `count` bytes of a tensor in their place."""
        assert self._left and not self._closed, f"{name}: all is written"
        shard, spec, start = self._left[0]
        assert spec.name == name, f"{name} comes before its turn, which is that of {spec.name}"
        assert self._filled + count <= spec.nbytes, f"{name} has {spec.nbytes} bytes, not more"
        with self._guarded():
            fd = self._open_target(shard)
            write(fd, start + self._filled)
            self._filled += count
            if self._filled == spec.nbytes:
                self._left.popleft()
                self._filled = 0
                if not self._left or self._left[0][0] is not shard:
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
        """Close the files on any error, after which nothing can be written, and say what went wrong."""
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


def _places(shards: Sequence[ShardLayout]) -> Iterator[tuple[ShardLayout, TensorSpec, int]]:
    """Each tensor that has bytes, with its file and its place there."""
    for shard in shards:
        offset = len(shard.header)
        for spec in shard.specs:
            if spec.nbytes:
                yield shard, spec, offset
            offset += spec.nbytes
