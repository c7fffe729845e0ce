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
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from ascendit.checkpoint.component import STEM
from ascendit.checkpoint.file_copy import PAGE, move_bytes, reserve, truncated, write_at, writing
from ascendit.checkpoint.reader import DTYPE_BITS, TensorInfo
from ascendit.checkpoint.resume import Journal
from ascendit.errors import CheckpointError

MAX_SHARD_BYTES = 5_000_000_000

Data = bytes | bytearray | memoryview | mmap.mmap
"""Of a NumPy array it is `array.data`."""
_RUN = 256 << 20  # bytes moved in one call, so that progress is reported and Ctrl-C noticed
_BUFFER = 1 << 20


# ---- what goes into which file, at which byte ---------------------------------------------------


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: str
    """In safetensors' spelling: `BF16`, `F32`, `F8_E4M3`, ..."""
    shape: tuple[int, ...]
    source_start: int | None = field(default=None, compare=False)
    """Where its bytes begin in the file they will be moved from. The header is padded so that they lie alike
    on the pages of both files, which makes moving 1.7 x as fast (and sharing of blocks possible)."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class ShardLayout:
    """One file to be written."""

    file: Path
    specs: tuple[TensorSpec, ...]
    header: bytes
    """Length, JSON and padding: all that stands before the first tensor."""

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
    """Writes the files of one expert. Room for all of them is reserved before the first byte of a tensor.

    `hash`: sha256 of each file, in a thread. `journal`: files in it are complete, and are added as they come
    to be. Raises EnvironmentProblem E-ENV-04 when the disk is full, E-ENV-02 when it cannot be written.
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
        self._found = [self._found_complete(shard, hash) for shard in self.shards]
        todo = [shard for shard, found in zip(self.shards, self._found, strict=True) if not found]
        self._needed = sum(shard.nbytes for shard in todo)
        self._order = [(i, spec) for i, shard in enumerate(self.shards) for spec in shard.specs]
        self._where = {spec.name: i for i, spec in self._order}
        self._next = 0  # in _order
        self._filled = 0  # bytes of that tensor that are written or wait in _run
        self._shard = -1  # the one that is open
        self._fd = -1
        self._end = 0  # where its next byte goes
        self._run: tuple[int, int, int] | None = None  # source start, target start, count
        self._source: tuple[Path | None, int] = (None, -1)
        self._closed = False
        self._hasher = Hasher() if hash and todo else None
        with self._guarded():
            for shard in todo:
                _begin(shard)
            self._settle()

    def done(self, name: str) -> bool:
        """Whether an earlier run has completed the file of this tensor: leave it out."""
        return self._found[self._where[name]]

    def append(self, name: str, data: Data) -> None:
        """The next bytes of tensor `name`; any C-contiguous buffer, free to be used again on return."""
        view = memoryview(data)
        if not view.nbytes:
            return
        view = view.cast("B")
        self._check(name, len(view))
        with self._guarded():
            self._flush()
            fd = self._open(self._where[name])
            if self._hasher:
                self._hasher.feed(view)
            write_at(fd, view, self._end)
            self._advance(len(view))

    def move(self, info: TensorInfo, name: str) -> None:
        """The whole of tensor `name`, from where `info` says, inside the kernel.

        Tensors that follow each other in both files are moved together, so that the bytes may come to lie
        there with a later call. Raises CheckpointError E-CKP-02 when the source cannot be read to its end.
        """
        if not info.nbytes:
            return
        self._check(name, info.nbytes)
        assert info.nbytes == self._order[self._next][1].nbytes, f"{name}: a part of a tensor cannot be moved"
        with self._guarded():
            if not self._run or self._source[0] != info.file or not self._joins(info):
                self._flush()
                self._open(self._where[name])
                self._open_source(info.file)
                self._run = (info.start, self._end, 0)
            start, target, count = self._run
            self._run = (start, target, count + info.nbytes)
            self._advance(info.nbytes)

    def close(self) -> dict[str, str]:
        """Write the index where there are several files; {file name: sha256} if hashed, else {}."""
        if not self._closed:
            assert self._next == len(self._order), f"{self._order[self._next][1].name} is not complete"
            with self._guarded():
                self._write_index()
            self._release()
        return dict(self._sha256)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        self._release()

    # ---- what is written where ------------------------------------------------------------------

    def _found_complete(self, shard: ShardLayout, hash: bool) -> bool:
        """Whether the journal knows this file, with just this header, and its sha256 if that is wanted."""
        done = self._journal.complete(shard.file) if self._journal else None
        if not done or done.nbytes != shard.nbytes or (hash and not done.sha256):
            return False
        try:
            with open(shard.file, "rb") as f:
                same = f.read(len(shard.header)) == shard.header
        except OSError:
            return False
        if same and hash and done.sha256:
            self._sha256[shard.file.name] = done.sha256
        return same

    def _check(self, name: str, count: int) -> None:
        assert not self._closed and self._next < len(self._order), f"{name}: all is written"
        spec = self._order[self._next][1]
        assert spec.name == name, f"{name} comes before its turn, which is that of {spec.name}"
        assert self._filled + count <= spec.nbytes, f"{name} has {spec.nbytes} bytes, not more"

    def _advance(self, count: int) -> None:
        self._filled += count
        self._end += count
        self._settle()

    def _settle(self) -> None:
        """Go on to the next tensor with missing bytes; a file that has none of them is complete."""
        while self._next < len(self._order):
            index, spec = self._order[self._next]
            if self._filled < spec.nbytes and not self._found[index]:
                return
            self._next, self._filled = self._next + 1, 0
            last = self._next == len(self._order) or self._order[self._next][0] != index
            if last and not self._found[index]:
                self._complete(index)

    def _complete(self, index: int) -> None:
        self._flush()
        self._open(index)  # a file whose tensors are all empty
        shard = self.shards[index]
        fd, self._fd, self._shard = self._fd, -1, -1
        os.close(fd)
        digest = self._sha256[shard.file.name] = self._hasher.finish() if self._hasher else ""
        if not digest:
            del self._sha256[shard.file.name]
        if self._journal:
            self._journal.add(shard.file, shard.nbytes, digest or None)

    def _open(self, index: int) -> int:
        """The file of this shard, behind its header."""
        if self._shard != index:
            assert self._fd < 0
            shard = self.shards[index]
            self._fd = os.open(shard.file, os.O_RDWR | os.O_CLOEXEC)
            self._shard, self._end = index, len(shard.header)
            if self._hasher:
                self._hasher.feed(memoryview(shard.header))
        return self._fd

    def _write_index(self) -> None:
        if len(self.shards) == 1:
            return
        weight_map = {spec.name: shard.file.name for shard in self.shards for spec in shard.specs}
        total = sum(spec.nbytes for _, spec in self._order)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        file = self.folder / f"{self._stem}.safetensors.index.json"
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    # ---- moving ---------------------------------------------------------------------------------

    def _joins(self, info: TensorInfo) -> bool:
        assert self._run
        start, target, count = self._run
        same = self._shard == self._order[self._next][0] and target + count == self._end
        return same and start + count == info.start and count < _RUN

    def _open_source(self, file: Path) -> None:
        path, fd = self._source
        if path == file:
            return
        if fd >= 0:
            os.close(fd)
        self._source = (None, -1)
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise CheckpointError(
                f"{file}: {e.strerror}",
                needs="source files that stay as they are until the run is over",
                fix="run it again when they are there",
                code="E-CKP-02",
            ) from e
        self._source = (file, fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def _flush(self) -> None:
        """Move what waits."""
        if not self._run:
            return
        (start, target, count), self._run = self._run, None
        path, fd = self._source
        if not self._hasher:
            move_bytes(fd, start, self._fd, target, count, source=path or "")
            return
        buffer = memoryview(bytearray(min(_BUFFER, count)))
        moved = 0
        while moved < count:
            view = buffer[: count - moved]
            if not (done := os.preadv(fd, [view], start + moved)):
                raise truncated(path or "", start + moved)
            self._hasher.feed(view[:done])
            write_at(self._fd, view[:done], target + moved)
            moved += done

    # ---- the end --------------------------------------------------------------------------------

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever goes wrong, files are closed and the user gets to know what; nothing can follow then."""
        try:
            with writing(self.folder, self._needed):
                yield
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        self._closed = True
        for fd in (self._fd, self._source[1]):
            if fd >= 0:
                os.close(fd)
        self._fd, self._source = -1, (None, -1)
        if self._hasher:
            self._hasher.close()
            self._hasher = None


def _begin(shard: ShardLayout) -> None:
    """A file with its header and room for the rest."""
    fd = os.open(shard.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        reserve(fd, shard.nbytes)
        write_at(fd, memoryview(shard.header), 0)
    finally:
        os.close(fd)


# ---- sha256 in a thread -------------------------------------------------------------------------

CHUNK = 1 << 20  # bytes
_CHUNKS = 8  # that wait at most


class Hasher:
    """Hashes files one after the other while the caller goes on: `feed`, ..., `finish`, `feed`, ...

    `feed` copies, into buffers that are used again, so the caller's buffer is free when it returns. It waits
    when 8 MiB are ahead of the hash (about 2 GiB/s where the processor knows SHA).
    """

    def __init__(self) -> None:
        self._free: SimpleQueue[bytearray] = SimpleQueue()
        self._work: SimpleQueue[tuple[bytearray, int] | None] = SimpleQueue()
        self._digests: SimpleQueue[str] = SimpleQueue()
        for _ in range(_CHUNKS):
            self._free.put(bytearray(CHUNK))
        self._thread = threading.Thread(target=self._run, name="ascendit-sha256", daemon=True)
        self._thread.start()

    def feed(self, data: memoryview) -> None:
        """`data`: bytes."""
        for start in range(0, len(data), CHUNK):
            piece = data[start : start + CHUNK]
            buffer = self._free.get()
            buffer[: len(piece)] = piece
            self._work.put((buffer, len(piece)))

    def finish(self) -> str:
        """The digest of what was fed since the last one, in hex."""
        self._work.put((bytearray(), 0))
        return self._digests.get()

    def close(self) -> None:
        """End the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        digest = hashlib.sha256()
        while (item := self._work.get()) is not None:
            buffer, count = item
            if not count:
                self._digests.put(digest.hexdigest())
                digest = hashlib.sha256()
                continue
            digest.update(memoryview(buffer)[:count])
            self._free.put(buffer)
