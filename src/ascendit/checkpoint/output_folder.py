"""Write an output folder that appears complete, by one rename, or not at all; link or copy files into it.

A run that writes DST works in `<parent>/.<name>.partial/<name>`, with `journal.json` next to it. The folder
`.partial` is locked during the run; the system releases the lock when the process ends for any reason.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import chain, count
from pathlib import Path
from typing import Self

from ascendit.checkpoint.file_copy import DISK_FULL_ERRNOS, check_free_space, copy_file, write_error, writing
from ascendit.checkpoint.journal import Journal
from ascendit.checkpoint.replacement import ASIDE, check_replaceable, exchange, restore
from ascendit.checkpoint.sources import check_sources
from ascendit.checkpoint.trust import Home
from ascendit.errors import Cancelled, CheckpointError, EnvironmentProblem, UsageError
from ascendit.names import listed
from ascendit.report import shell_line

logger = logging.getLogger("ascendit")

JOURNAL = "journal.json"


# ---- the folder ---------------------------------------------------------------------------------


class Staging:
    """Write into `path`; `publish` renames it to `dst`. As a context manager it removes unfinished output.

    `sources`: files and folders that are read. `fingerprint`: identifies sources, options and version;
    `resume` reuses the complete files of a killed run with the same fingerprint. `needs_bytes`: size of the
    output. `overwrite`: `dst` may exist, see `check_replaceable`; it is unchanged until `publish` exchanges
    it for the new folder. After Ctrl-C, complete files are kept for `resume`; after other errors, only if
    `keep` is set.

    Raises UsageError: E-USE-03 if `dst` exists or another run is writing it, E-USE-06 if `dst` and a source
    are nested, E-USE-01 if `dst` has no name, or for `resume` with other options or sources;
    EnvironmentProblem: E-ENV-04 for a full disk, E-ENV-02 if the folder is not writable.
    """

    def __init__(
        self,
        dst: Path,
        *,
        sources: Sequence[Path],
        fingerprint: str,
        resume: bool = False,
        needs_bytes: int = 0,
        overwrite: bool = False,
    ) -> None:
        self.dst = _absolute(Path(dst))
        self.keep = False
        self._overwrite = overwrite
        self._folder = self.dst.parent / f".{self.dst.name}.partial"
        self._needs = needs_bytes
        _check_apart(self.dst, self._folder, sources)
        self._check_dst()
        self._created = [p for p in (*reversed(self.dst.parent.parents), self.dst.parent) if not p.exists()]
        self._lock = -1
        self.path = self._folder / self.dst.name
        with ExitStack() as undo, writing(self._folder, needs_bytes):
            undo.callback(self._release)
            self.dst.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._folder)
            self._remove_replaced()
            self._check_dst()  # again: another run may have published it before the lock
            self.journal = self._open_journal(fingerprint, resume)
            self._identity = os.lstat(self.path)
            if not self.journal.count:
                undo.callback(self._clear)
            check_free_space(self._folder, needs_bytes)
            undo.pop_all()

    def _check_dst(self) -> None:
        """Raise UsageError (E-USE-03, E-USE-06) if `dst` exists and is not to be replaced."""
        if self._overwrite:
            check_replaceable(self.dst)
        else:
            _check_free(self.dst)

    def _remove_replaced(self) -> None:
        """After a kill while a folder was replaced: remove it, or give it its name again. Raises OSError."""
        if replaced := restore(self._folder, self.dst):
            shutil.rmtree(replaced)

    def _open_journal(self, fingerprint: str, resume: bool) -> Journal:
        """Reuse or remove the output of a killed run."""
        file = self._folder / JOURNAL
        names = set(os.listdir(self._folder))
        if names - {JOURNAL + ".new"} and JOURNAL not in names:
            raise _name_taken(self._folder)
        old = Journal.read(file, self.path)
        if resume and old:
            if old.fingerprint != fingerprint:
                raise UsageError(
                    f"{self._folder} is from a run with another source, other options or another version",
                    needs="the same source, options and version as the run to resume",
                    fix="run it without --resume, which starts from the beginning, or with the same options",
                )
            logger.info("resuming %s: %d files are complete", self._folder, old.count)
            if os.path.lexists(self.path) and (self.path.is_symlink() or not self.path.is_dir()):
                self.path.unlink()
            self.path.mkdir(exist_ok=True)
            old.remove_others()
            return old
        if JOURNAL in names:
            reason = (
                "it is damaged, or the machine has restarted"
                if resume
                else "the resume option would have continued it"
            )
            logger.info("removing %s, the output of a killed run: %s", self._folder, reason)
        if self.path.is_symlink() or self.path.is_file():
            self.path.unlink()
        elif self.path.exists():
            shutil.rmtree(self.path)
        journal = Journal(file, self.path, fingerprint)
        journal.write()
        self.path.mkdir()
        return journal

    def publish(self) -> None:
        """Rename the folder to `dst`, if the sources that `recording` collected are unchanged.

        With `overwrite`, an existing folder is exchanged for the new one and then removed.

        Raises CheckpointError (E-CKP-02) if a source has changed, UsageError (E-USE-03) if `dst` exists and
        is not to be replaced, with the output kept, EnvironmentProblem (E-ENV-02) if the folder or a file was
        removed during the run.
        """
        check_sources()
        self._check_intact()
        with writing(self._folder, self._needs):
            if not os.path.lexists(self.dst):  # os.rename would replace an empty folder
                os.rename(self.path, self.dst)
            else:
                self._replace()
        self._created = []
        self._clear()
        self._release()

    def _replace(self) -> None:
        """Exchange the output for the existing folder. Raises as `publish`, and OSError."""
        try:
            self._check_dst()
        except UsageError as e:
            self.keep = True
            verb = "changed" if self._overwrite else "created"
            raise UsageError(
                f"{self.dst} was {verb} by another program during this run",
                needs=e.needs,
                fix=f"the output is complete in {self.path}; move it to another name",
                code="E-USE-03",
            ) from e
        self.journal.clear()  # a later run must not take the files of the old folder for complete ones
        exchange(self.path, self.dst)

    def _check_intact(self) -> None:
        """Raise EnvironmentProblem (E-ENV-02) unless folder and complete files are those of this run."""
        if not self._exists():
            raise self._tampered(f"{self.path} was removed")
        if missing := self.journal.missing():
            raise self._tampered(f"{listed(missing)} in {self.path}: removed or changed by another program")

    def _exists(self) -> bool:
        try:
            intact = os.path.samestat(os.fstat(self._lock), os.lstat(self._folder))
            return intact and os.path.samestat(self._identity, os.lstat(self.path))
        except OSError:
            return False

    def _tampered(self, problem: str) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"{problem} during this run",
            needs="an output folder that only this run changes",
            fix="stop the program that changes the folder, then run the same command again",
            code="E-ENV-02",
        )

    def _problem(self, error: BaseException | None) -> EnvironmentProblem | None:
        """The error of writing the output that `error` means; None if it is another one."""
        failed = isinstance(error, OSError) or getattr(error, "code", "") == "E-ENV-02"
        if failed and not self._exists():
            return self._tampered(f"{self.path} was removed")
        if not isinstance(error, OSError):
            return None
        names = [os.fsdecode(x) for x in (error.filename, error.filename2) if isinstance(x, str | bytes)]
        inside = any(Path(name).is_relative_to(self._folder) for name in names)
        if error.errno in DISK_FULL_ERRNOS or inside:
            return write_error(self._folder, error, self._needs)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._lock < 0:  # published
            return
        problem = self._problem(error)
        stopped = isinstance(error, KeyboardInterrupt | Cancelled) and self.journal.count > 0
        if self.keep or stopped:
            logger.info("kept %s: the resume option continues it", self._folder)
        else:
            self._clear()
        self._release()
        if problem:
            raise problem from error

    def _clear(self) -> None:
        """Remove the output, then the journal, so that a partly removed output is still recognised."""
        for folder in (self.path, self._folder / ASIDE):
            shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            (self._folder / f"{JOURNAL}.new").unlink(missing_ok=True)
            (self._folder / JOURNAL).unlink(missing_ok=True)

    def _release(self) -> None:
        """Release the lock, and remove the empty folders that this run has created."""
        for folder in (*([self._folder] if self._lock >= 0 else []), *reversed(self._created)):
            with suppress(OSError):
                os.rmdir(folder)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _absolute(dst: Path) -> Path:
    """Absolute path. Links are resolved in its parents, not in its own name."""
    if "\0" in str(dst) or (dst.name in ("", "..") and not os.path.lexists(dst)):
        raise UsageError(
            f"the output {str(dst)!r} has no name",
            needs="the name of a new folder",
            fix="-o models/wan-mxfp8",
        )
    nameless = dst.name in ("", "..")  # ".", "/", "a/..": existing folders, which `_check_free` rejects
    return Path(os.path.realpath(dst)) if nameless else Path(os.path.realpath(dst.parent)) / dst.name


def option_for(dst: Path) -> str:
    """`-o` with this name, or the first of `DST-2`, `DST-3`, .. that does not exist."""
    later = (Path(f"{dst}-{n}" if dst.name else f"out-{n}") for n in count(2))
    return shell_line(["-o", str(next(path for path in chain([dst], later) if not os.path.lexists(path)))])


def _check_free(dst: Path) -> None:
    if not os.path.lexists(dst):
        return
    kind = "link" if dst.is_symlink() else "folder" if dst.is_dir() else "file"
    raise UsageError(
        f"the output {dst} already exists: a {kind}",
        needs="a name that does not exist: nothing is overwritten without --overwrite",
        fix=f"{option_for(dst)}{_or_overwrite(dst)}",
        code="E-USE-03",
    )


def _or_overwrite(dst: Path) -> str:
    """The other way to use this name, without a loss of files of others."""
    if not dst.is_dir() or dst.is_symlink():
        return ", or remove it"
    try:
        check_replaceable(dst)
    except UsageError:
        return ""
    return ", or add --overwrite"


def _check_apart(dst: Path, folder: Path, sources: Sequence[Path]) -> None:
    for source in sources:
        real = Path(os.path.realpath(source))
        if real.is_relative_to(folder):
            problem = f"{source} is the unfinished output of a run"
        elif dst.is_relative_to(real):
            problem = f"the output {dst} is inside the source {source}"
        elif real.is_relative_to(dst):
            problem = f"the source {source} is inside the output {dst}"
        else:
            continue
        raise UsageError(
            problem,
            needs="an output folder that neither is inside a source folder nor contains one",
            fix=option_for(Path(f"{real}-new")),
            code="E-USE-06",
        )


def _lock(folder: Path) -> int:
    """Create the folder if needed, lock it, and return its descriptor. Only the lock owner may change it."""
    while True:
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError as e:
            raise _name_taken(folder) from e
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # its run has just ended
            continue
        except OSError as e:
            if folder.is_symlink():
                raise _name_taken(folder) from e
            raise
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(fd)
            raise UsageError(
                f"another run is writing {folder.name} in {folder.parent}",
                needs="one run per output",
                fix="wait for it, or choose another output name",
                code="E-USE-03",
            ) from e
        except OSError as e:
            logger.debug("no locks in %s: %s", folder, e)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.lstat(folder)):
                return fd
        os.close(fd)


def _name_taken(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} exists, and it is not the output of a killed run",
        needs="this name for the unfinished output",
        fix="move it to another name, or choose another output name",
        code="E-USE-03",
    )


# ---- components that are linked or copied -------------------------------------------------------

MAX_FILES = 100_000
"""Limit for one copied folder; only nested links exceed it."""
_LARGE = 1 << 20  # bytes; smaller files are copied again


def link_or_copy(
    src: Path, dst: Path, *, copy: bool, home: Home | None = None, journal: Journal | None = None
) -> None:
    """Make `dst` a link to the resolved path of the file or folder `src`, or a copy of it.

    A copy follows every link (hub caches link to their blobs), so it is self-contained; `home`: except links
    that lead out of it, which are omitted. Complete files of a killed run are not copied again: `journal`
    gets the large ones, as `Staging` removes other files of that run. Raises
    CheckpointError (E-CKP-03) for cyclic and dangling links and for anything but files and folders; OSError
    if `dst` cannot be written.
    """
    real = _real(src)
    if copy:
        _copy(real, dst, (), [0], home, journal)
        return
    if dst.is_symlink() or dst.is_file():
        dst.unlink()
    elif dst.is_dir():
        shutil.rmtree(dst)
    os.symlink(real, dst)


def _copy(
    real: Path,
    dst: Path,
    above: tuple[tuple[int, int], ...],
    count: list[int],
    home: Home | None,
    journal: Journal | None,
) -> None:
    """`above`: device and inode of the parent folders."""
    state = real.stat()
    count[0] += 1
    if count[0] > MAX_FILES:
        raise _bad_link(real, f"more than {MAX_FILES} files and folders, including linked ones")
    if dst.is_symlink():
        dst.unlink()
    if stat.S_ISREG(state.st_mode):
        if not dst.is_file() or dst.stat().st_size != state.st_size:
            copy_file(real, dst)
            if journal and state.st_size >= _LARGE:
                journal.add(dst, state.st_size)
    elif not stat.S_ISDIR(state.st_mode):
        raise _bad_link(real, "neither a file nor a folder")
    elif (own := (state.st_dev, state.st_ino)) in above:
        raise _bad_link(real, "a link leads back to a folder that contains it")
    else:
        dst.mkdir(exist_ok=True)
        for name in sorted(os.listdir(real)):
            if home is None or home.copies(real / name):
                _copy(_real(real / name), dst / name, (*above, own), count, home, journal)


def _real(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path, strict=True))
    except OSError as e:
        raise _bad_link(path, e.strerror or str(e)) from e


def _bad_link(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}",
        needs="files and folders, or links to them",
        fix="download this component of the model again",
        code="E-CKP-03",
    )
