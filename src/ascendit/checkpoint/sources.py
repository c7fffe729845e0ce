"""The files that a run reads: their state when they were read, and a few of them open at a time.

`recording` collects the state of every file that the readers of `checkpoint` open, so that `quantize` and
`repack` notice a source that changes during the run. `OpenFiles` closes the file that was used least recently
when there are many, and notices a file that is not the one whose header was read.
"""

from __future__ import annotations

import hashlib
import os
import resource
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple, Self

from ascendit.errors import CheckpointError
from ascendit.names import listed
from ascendit.report import counted

MAX_OPEN = 64
"""Files of one reader that are open at a time; fewer if the process may open only few."""


class FileState(NamedTuple):
    """Identity and state of a file: another one after the file is written, replaced or restored."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The state in the result of `os.stat`."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def unreadable(file: Path | str, problem: str) -> CheckpointError:
    """The error E-CKP-02 for a source file that changed after it was first read."""
    return CheckpointError(
        f"{file}: {problem}",
        needs="source files that do not change during the run",
        fix="stop the program that changes the file; download it again if it is damaged",
        code="E-CKP-02",
    )


def check_state(file: Path, expected: FileState | None) -> None:
    """Raise CheckpointError (E-CKP-02) unless a file has the state that it had when its header was read."""
    if expected is not None and (state := _state(file)) != expected:
        raise _changed(file, state, expected)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. Raises OSError."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---- the sources of a run -----------------------------------------------------------------------


class _Recorder:
    """The files that a run has read, each with its state at that time."""

    def __init__(self) -> None:
        self.states: dict[Path, FileState] = {}
        self.folders: dict[Path, dict[Path, FileState]] = {}

    def changed(self) -> set[Path]:
        """The files that have another state, or were added or removed."""
        paths = {path for path, state in self.states.items() if _state(path) != state}
        for folder, before in self.folders.items():
            after = files_below(folder)
            paths |= {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        return paths


_RECORDER: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording() -> Iterator[None]:
    """Record the files that the readers of `checkpoint` open in this block, for `check_sources`."""
    token = _RECORDER.set(_Recorder())
    try:
        yield
    finally:
        _RECORDER.reset(token)


def record_source(path: Path, status: os.stat_result | None = None) -> None:
    """Record a file, if a run records its sources. `status`: of the open file, if there is one.

    Raises CheckpointError (E-CKP-02) if it is missing, or was recorded before with another state.
    """
    if (recorder := _RECORDER.get()) is None:
        return
    try:
        state = FileState.of(status or path.stat())
    except OSError as e:
        raise unreadable(path, str(e.strerror)) from e
    if recorder.states.setdefault(path, state) != state:
        raise unreadable(path, "changed during the run")


def record_folder(folder: Path) -> None:
    """Record all files below a folder that is linked or copied as a unit, if a run records its sources."""
    if (recorder := _RECORDER.get()) is not None:
        recorder.folders.setdefault(folder, files_below(folder))


def recorded_sources() -> list[Path]:
    """The files that this run has recorded so far."""
    if (recorder := _RECORDER.get()) is None:
        return []
    return [*recorder.states, *(path for below in recorder.folders.values() for path in below)]


def check_sources() -> None:
    """Raise CheckpointError (E-CKP-02), which names the files, if a recorded one has changed."""
    recorder = _RECORDER.get()
    if recorder is None or not (changed := recorder.changed()):
        return
    raise CheckpointError(
        f"{counted(len(changed), 'source file')} changed during the run: {listed(map(str, changed))}",
        needs="source files that do not change between the first read and the end of the run",
        fix="stop the program that changes them, then run the same command again",
        code="E-CKP-02",
    )


def files_below(folder: Path) -> dict[Path, FileState]:
    """The state of each file below a folder; links to folders inside it are not followed."""
    paths = []
    for parent, names, files in os.walk(folder):
        paths += [Path(parent, name) for name in files]
        paths += [path for name in names if (path := Path(parent, name)).is_symlink()]
    return {path: state for path in paths if (state := _state(path)) is not None}


def _state(path: Path) -> FileState | None:
    try:
        return FileState.of(path.stat())
    except OSError:
        return None


# ---- open files ---------------------------------------------------------------------------------


class OpenFiles:
    """Descriptors of files for reading, at most `MAX_OPEN` of them, the least recently used closed first."""

    def __init__(self) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max = MAX_OPEN if limit == resource.RLIM_INFINITY else max(2, min(MAX_OPEN, limit // 16))
        self._descriptors: OrderedDict[Path, int] = OrderedDict()
        self._states: dict[Path, FileState] = {}

    def open(self, file: Path, expected: FileState | None = None) -> int:
        """Return a descriptor, valid until the next call. `expected`: its state when its header was read.

        Raises CheckpointError (E-CKP-02) if the file cannot be opened, or is not the expected one.
        """
        if (descriptor := self._descriptors.get(file)) is not None:
            self._descriptors.move_to_end(file)
            return descriptor
        while len(self._descriptors) >= self._max:
            self._close(*self._descriptors.popitem(last=False))
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise unreadable(file, str(e.strerror)) from e
        state = FileState.of(os.fstat(descriptor))
        if (first := self._states.setdefault(file, expected or state)) != state:
            os.close(descriptor)
            raise _changed(file, state, first)
        self._descriptors[file] = descriptor
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return descriptor

    def check(self) -> None:
        """Raise CheckpointError (E-CKP-02) if an open file has been written since its header was read."""
        for file, descriptor in self._descriptors.items():
            if (state := FileState.of(os.fstat(descriptor))) != self._states[file]:
                raise _changed(file, state, self._states[file])

    def close(self) -> None:
        """Close all files. Later calls open them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _close(self, file: Path, descriptor: int) -> None:
        state = FileState.of(os.fstat(descriptor))
        os.close(descriptor)
        if state != self._states[file]:
            raise _changed(file, state, self._states[file])


def _changed(file: Path, state: FileState | None, expected: FileState) -> CheckpointError:
    if state is not None and state.nbytes < expected.nbytes:
        return unreadable(file, f"truncated since its header was read, from {expected.nbytes:,} bytes")
    return unreadable(file, "changed since its header was read: written, or replaced by another file")
