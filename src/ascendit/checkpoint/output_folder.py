"""A folder that appears complete, by one rename, or not at all; and what is linked or copied into it.

A run that writes DST works in `<parent>/.<name>.partial/<name>`, with `journal.json` beside that. The folder
`.partial` is locked while the run lives; the system ends the lock when the process dies, however it dies.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, Self

from ascendit.checkpoint.file_copy import FULL, check_room, copy_file, write_error, writing
from ascendit.errors import Cancelled, CheckpointError, UsageError

logger = logging.getLogger("ascendit")

JOURNAL = "journal.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


# ---- which files of a run are complete ----------------------------------------------------------


class CompleteFile(NamedTuple):
    """One complete file."""

    nbytes: int
    sha256: str | None


class Journal:
    """A JSON file that is replaced in one step whenever a file under `root` is complete.

    `fingerprint`: what the run does, namely source, scheme, recipe and versions.
    """

    def __init__(self, path: Path, root: Path, fingerprint: str) -> None:
        self.path = path
        self.root = root
        self.fingerprint = fingerprint
        self._done: dict[str, CompleteFile] = {}

    @classmethod
    def read(cls, path: Path, root: Path) -> Self | None:
        """What a run has left. None if it is unreadable, or the machine has restarted since: what a killed
        process has written may still be in the system's cache, which a power failure loses."""
        try:
            data = json.loads(path.read_bytes())
            journal = cls(path, root, str(data["fingerprint"]))
            journal._done = {name: CompleteFile(*entry) for name, entry in data["files"].items()}
            return journal if data["boot"] == _boot() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @property
    def count(self) -> int:
        """How many files are complete."""
        return len(self._done)

    def complete(self, file: Path) -> CompleteFile | None:
        """The entry of `file` if it is complete; its size on disk is compared."""
        done = self._done.get(os.path.relpath(file, self.root))
        return done if done and file.is_file() and file.stat().st_size == done.nbytes else None

    def add(self, file: Path, nbytes: int, sha256: str | None = None) -> None:
        """`file` is complete: its last byte is written. Raises OSError."""
        self._done[os.path.relpath(file, self.root)] = CompleteFile(nbytes, sha256)
        self.write()

    def write(self) -> None:
        """Replace the file. Raises OSError."""
        data = {"fingerprint": self.fingerprint, "boot": _boot(), "files": self._done}
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self.path)


def _boot() -> str:
    """The system's id of this boot; "" if it has none."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


# ---- the folder ---------------------------------------------------------------------------------


class Staging:
    """`path` is where to write; `publish` makes it `dst`. As a context manager it removes what is unfinished.

    `sources`: files and folders that are read. `fingerprint`: what is done to them, in full; with `resume`
    the complete files of a killed run with the same fingerprint are kept. `needs_bytes`: size of the output.
    After Ctrl-C complete files are kept for `resume`; after other errors only if `keep` is set.

    Raises UsageError: E-USE-03 `dst` exists, or another run writes it at this moment; E-USE-06 `dst` and a
    source are nested; E-USE-01 no name, or `resume` with other options or sources. EnvironmentProblem:
    E-ENV-04 too little room, E-ENV-02 not writable.
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
        self._made = [p for p in (*reversed(self.dst.parent.parents), self.dst.parent) if not p.exists()]
        self._lock = -1
        self.path = self._folder / self.dst.name
        with ExitStack() as undo, writing(self._folder, needs_bytes):
            undo.callback(self._release)
            self.dst.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._folder)
            _check_free(self.dst)  # a run that has just ended
            self.journal = self._take_over(fingerprint, resume)
            if not self.journal.count:
                undo.callback(self._clear)
            check_room(self._folder, needs_bytes)
            undo.pop_all()

    def _take_over(self, fingerprint: str, resume: bool) -> Journal:
        """Keep or remove what a killed run has left."""
        file = self._folder / JOURNAL
        names = set(os.listdir(self._folder))
        if names - {JOURNAL + ".new"} and JOURNAL not in names:
            raise _in_the_way(self._folder)
        old = Journal.read(file, self.path)
        if resume and old:
            if old.fingerprint != fingerprint:
                raise UsageError(
                    f"{self._folder} was left by a run that did something else",
                    needs="the same source, options and version as the run that is taken up again",
                    fix="run it without --resume, which starts anew, or with the options of that run",
                )
            logger.info("going on with %s: %d files are complete", self._folder, old.count)
            self.path.mkdir(exist_ok=True)
            return old
        if JOURNAL in names:
            why = (
                "it is damaged, or the machine has restarted"
                if resume
                else "resume would have gone on with it"
            )
            logger.info("removing %s, which a killed run has left: %s", self._folder, why)
        if self.path.exists():
            shutil.rmtree(self.path)
        journal = Journal(file, self.path, fingerprint)
        journal.write()
        self.path.mkdir()
        return journal

    def publish(self) -> None:
        """Rename the folder to `dst`. If that came meanwhile the work is kept: UsageError E-USE-03."""
        with writing(self._folder, self._needs):
            if os.path.lexists(self.dst):  # os.rename would replace an empty folder
                self.keep = True
                raise UsageError(
                    f"{self.dst} came while this run was writing",
                    needs="a free name: nothing is overwritten",
                    fix=f"the output is complete in {self.path}; move it where you want it",
                    code="E-USE-03",
                )
            os.rename(self.path, self.dst)
        self._made = []
        self._clear()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._lock < 0:  # published
            return
        problem = None
        if isinstance(error, OSError) and error.errno in FULL:
            problem = write_error(self._folder, error, self._needs)
        stopped = isinstance(error, KeyboardInterrupt | Cancelled) and self.journal.count > 0
        if self.keep or stopped:
            logger.info("kept %s: resume goes on with it", self._folder)
        else:
            self._clear()
        self._release()
        if problem:
            raise problem from error

    def _clear(self) -> None:
        """Remove all; the journal last, so that a rest is known for what it is."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            (self._folder / f"{JOURNAL}.new").unlink(missing_ok=True)
            (self._folder / JOURNAL).unlink(missing_ok=True)

    def _release(self) -> None:
        """End the lock, and remove the empty folders that this run has made."""
        for folder in (*([self._folder] if self._lock >= 0 else []), *reversed(self._made)):
            with suppress(OSError):
                os.rmdir(folder)
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
        )
    whole = dst.name in ("", "..")  # "." and "/" and "a/..": they exist, and are refused for that
    return Path(os.path.realpath(dst)) if whole else Path(os.path.realpath(dst.parent)) / dst.name


def _check_free(dst: Path) -> None:
    if not os.path.lexists(dst):
        return
    kind = "link" if dst.is_symlink() else "folder" if dst.is_dir() else "file"
    raise UsageError(
        f"the output {dst} exists already: a {kind}",
        needs="a name that is free: nothing is overwritten",
        fix="choose another with -o, or remove what is there",
        code="E-USE-03",
    )


def _check_apart(dst: Path, folder: Path, sources: Sequence[Path]) -> None:
    for source in sources:
        real = Path(os.path.realpath(source))
        if real.is_relative_to(folder):
            problem = f"{source} is the unfinished output of a run"
        elif dst.is_relative_to(real):
            problem = f"the output {dst} lies in the source {source}"
        elif real.is_relative_to(dst):
            problem = f"{source} lies in {dst}"
        else:
            continue
        raise UsageError(
            problem,
            needs="output and sources beside each other",
            fix=f"for example -o {real.parent / (real.name + '-new')}",
            code="E-USE-06",
        )


def _lock(folder: Path) -> int:
    """Make the folder, or find it, and lock it: its descriptor. Until then nothing in it may be touched."""
    while True:
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError as e:
            raise _in_the_way(folder) from e
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:  # its run has just ended
            continue
        except OSError as e:
            if folder.is_symlink():
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
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.lstat(folder)):
                return fd
        os.close(fd)


def _in_the_way(folder: Path) -> UsageError:
    return UsageError(
        f"{folder} is there, and it is not the work of a killed run",
        needs="this name for the unfinished output",
        fix="move it away, or choose another output with -o",
        code="E-USE-03",
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
