"""A folder that appears in full, by one rename, or not at all; and what is linked or copied into it.

A run that writes DST works in `<parent>/.<name>.partial/<name>`, with `journal.json` beside that. The folder
`.partial` is locked while the run lives; the system ends the lock when the process dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ascendit.checkpoint.file_copy import FULL, copy_file, disk_full, rename_new, room_for, write_error
from ascendit.checkpoint.resume import Journal
from ascendit.errors import Cancelled, CheckpointError, UsageError

logger = logging.getLogger("ascendit")

JOURNAL = "journal.json"


class Staging:
    """`path` is where to write; `publish` makes it `dst`. As a context manager it removes what is unfinished.

    `sources`: files and folders that are read. `fingerprint`: what is done to them, in full; with `resume`
    the complete files of a killed run with the same fingerprint are kept. `needs_bytes`: size of the output.
    After Ctrl-C complete files are kept for `resume`; after other errors only if `keep` is set.

    Raises UsageError: E-USE-03 `dst` exists, or another run writes it at this moment; E-USE-06 `dst` and a
    source lie inside each other; E-USE-01 no name, or `resume` of another work. EnvironmentProblem: E-ENV-04
    too little room, E-ENV-02 not writable.
    """

    def __init__(
        self,
        dst: Path,
        *,
        sources: Sequence[Path],
        fingerprint: str,
        resume: bool = False,
        needs_bytes: int = 0,
    ) -> None:
        self.dst = _absolute(Path(dst))
        self.keep = False
        self._folder = self.dst.parent / f".{self.dst.name}.partial"
        self._needs = needs_bytes
        _check_apart(self.dst, self._folder, sources)
        _check_free(self.dst)
        self._made: list[Path] = []
        self._lock = -1
        self.path = self._folder / self.dst.name
        try:
            self._made = _make_parents(self.dst.parent)
            self._lock = _lock(self._folder)
            _check_free(self.dst)  # a run that has just ended
            self.journal = self._take_over(fingerprint, resume)
            self._check_room()
        except OSError as e:
            told = write_error(self._folder, e, needs_bytes)
            self._release()
            raise told from e
        except BaseException:
            self._release()
            raise

    def _take_over(self, fingerprint: str, resume: bool) -> Journal:
        """Keep or remove what a killed run has left."""
        file = self._folder / JOURNAL
        found = set(os.listdir(self._folder))
        if found - {JOURNAL + ".new"} and JOURNAL not in found:
            raise _in_the_way(self._folder)
        old = Journal.read(file, self.path)
        if resume and old and old.usable:
            if old.fingerprint != fingerprint:
                raise _other_work(self._folder)
            logger.info("going on with %s: %d files are complete", self._folder, old.count)
            self.path.mkdir(exist_ok=True)
            return old
        if old and old.count:
            why = "the machine was started anew since" if resume else "resume would have gone on with it"
            logger.info("removing %s, which a killed run has left: %s", self._folder, why)
        if self.path.exists():
            shutil.rmtree(self.path)
        journal = Journal(file, self.path, fingerprint)
        journal.write()
        self.path.mkdir()
        return journal

    def _check_room(self) -> None:
        if self._needs > (free := room_for(self._folder)):
            if not self.journal.count:
                self._clear()
            raise disk_full(self._folder, self._needs, free)

    def publish(self) -> None:
        """Rename the folder to `dst`. If that came meanwhile the work is kept: UsageError E-USE-03."""
        try:
            rename_new(self.path, self.dst)
        except FileExistsError as e:
            self.keep = True
            raise UsageError(
                f"{self.dst} came while this run was writing",
                needs="a free name: nothing is overwritten",
                fix=f"the output is complete in {self.path}; move it where you want it",
                code="E-USE-03",
            ) from e
        except OSError as e:
            raise write_error(self._folder, e, self._needs) from e
        self._made = []
        self._clear()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock < 0:  # published
            return
        full = isinstance(error, OSError) and error.errno in FULL
        told = write_error(self._folder, error, self._needs) if full and isinstance(error, OSError) else None
        stopped = isinstance(error, KeyboardInterrupt | Cancelled) and self.journal.count > 0
        if self.keep or stopped:
            logger.info("kept %s: resume goes on with it", self._folder)
        else:
            self._clear()
        self._release()
        if told:
            raise told from error

    def _clear(self) -> None:
        """Remove all; the journal last, so that a rest is known for what it is."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            (self._folder / f"{JOURNAL}.new").unlink(missing_ok=True)
            (self._folder / JOURNAL).unlink(missing_ok=True)

    def _release(self) -> None:
        """End the lock. Empty folders that this run has made go before."""
        if self._lock >= 0:
            self._made.append(self._folder)
        with suppress(OSError):
            while self._made:
                os.rmdir(self._made.pop())
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _absolute(dst: Path) -> Path:
    """Absolute, links of its parent resolved; its own name is not followed."""
    if "\0" in str(dst) or (dst.name in ("", "..") and not os.path.lexists(dst)):
        raise UsageError(
            f"the output {str(dst)!r} has no name",
            needs="the name of a folder that will be made",
            fix="for example -o models/wan-mxfp8",
            code="E-USE-01",
        )
    whole = dst.name in ("", "..")  # "." and "/" and "a/..": they exist, and are refused for that
    return Path(os.path.realpath(dst)) if whole else Path(os.path.realpath(dst.parent)) / dst.name


def _check_free(dst: Path) -> None:
    if not os.path.lexists(dst):
        return
    kind = "folder" if dst.is_dir() else "file"
    raise UsageError(
        f"the output {dst} exists already: a {'link' if dst.is_symlink() else kind}",
        needs="a name that is free: nothing is overwritten",
        fix="choose another with -o, or remove what is there",
        code="E-USE-03",
    )


def _check_apart(dst: Path, folder: Path, sources: Sequence[Path]) -> None:
    for source in sources:
        real = Path(os.path.realpath(source))
        inside = dst.is_relative_to(real)
        if inside or real.is_relative_to(dst) or real.is_relative_to(folder):
            what = f"the output {dst} lies in the source {source}" if inside else f"{source} lies in {dst}"
            raise UsageError(
                what if not real.is_relative_to(folder) else f"{source} is the unfinished output of a run",
                needs="output and sources beside each other",
                fix=f"for example -o {real.parent / (real.name + '-new')}",
                code="E-USE-06",
            )


def _make_parents(folder: Path) -> list[Path]:
    """The folders that were missing, outermost first."""
    made: list[Path] = []
    for part in (*reversed(folder.parents), folder):
        if not part.is_dir():
            try:
                part.mkdir()
            except FileExistsError:
                if not part.is_dir():
                    raise
            else:
                made.append(part)
    return made


def _lock(folder: Path) -> int:
    """Make the folder, or find it, and lock it: its descriptor. Until then nothing in it may be touched."""
    while True:
        try:
            os.mkdir(folder)
        except FileExistsError:
            pass
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # its run has just ended
            continue
        except OSError as e:
            if e.errno in (errno.ENOTDIR, errno.ELOOP):  # a file, a link
                raise _in_the_way(folder) from e
            raise
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(fd)
            raise UsageError(
                f"another run is writing {folder.name} in {folder.parent} at this moment",
                needs="one run for each output",
                fix="wait for it, or choose another output with -o",
                code="E-USE-03",
            ) from e
        except OSError as e:
            logger.debug("no locks in %s: %s", folder, e)
        try:
            if os.path.samestat(os.fstat(fd), os.lstat(folder)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)


def _in_the_way(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} is there, and it is not the work of a killed run",
        needs="this name for the unfinished output",
        fix="move it away, or choose another output with -o",
        code="E-USE-03",
    )


def _other_work(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} was left by a run that did something else",
        needs="the same source, options and version as the run that is taken up again",
        fix="run it without --resume, which starts anew, or with the options of that run",
        code="E-USE-01",
    )


# ---- parts of a model that are taken over as they are -------------------------------------------

MAX_FILES = 100_000
"""In one folder that is copied; more come from a maze of links."""


def link_or_copy(src: Path, dst: Path, *, copy: bool) -> None:
    """Make `dst` a link to the real place of the file or folder `src`, or a copy of it.

    In a copy every link is followed (hub caches link to their blobs), so that it depends on nothing; a file
    that is there in full already, from a killed run, is left. Raises CheckpointError E-CKP-03 for links in a
    circle or to nothing, and for what is neither file nor folder; OSError when `dst` cannot be written.
    """
    real = _real(src)
    if copy:
        _copy(real, dst, (), [0])
        return
    if dst.is_symlink() or dst.is_file():
        dst.unlink()
    elif dst.is_dir():
        shutil.rmtree(dst)
    os.symlink(real, dst)


def _copy(real: Path, dst: Path, above: tuple[tuple[int, int], ...], count: list[int]) -> None:
    """`above`: device and inode of the folders that lead here."""
    state = real.stat()
    count[0] += 1
    if count[0] > MAX_FILES:
        raise _bad_link(real, f"more than {MAX_FILES} files and folders, links followed")
    if dst.is_symlink():
        dst.unlink()
    if stat.S_ISREG(state.st_mode):
        if not dst.is_file() or dst.stat().st_size != state.st_size:
            copy_file(real, dst)
    elif not stat.S_ISDIR(state.st_mode):
        raise _bad_link(real, "neither a file nor a folder")
    elif (own := (state.st_dev, state.st_ino)) in above:
        raise _bad_link(real, "a link leads back to a folder that it lies in")
    else:
        dst.mkdir(exist_ok=True)
        for name in sorted(os.listdir(real)):
            _copy(_real(real / name), dst / name, (*above, own), count)


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path, strict=True))
    except OSError as e:
        raise _bad_link(path, e.strerror or str(e)) from e


def _bad_link(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {why}",
        needs="files and folders, or links that end at one",
        fix="download this part of the model again",
        code="E-CKP-03",
    )
