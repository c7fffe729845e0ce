"""The journal of an unfinished output: which of its files are complete, for a run that resumes it."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from ascendit.checkpoint.component import check_regular
from ascendit.errors import CheckpointError
from ascendit.names import listed

logger = logging.getLogger("ascendit")

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class CompleteFile(NamedTuple):
    nbytes: int
    sha256: str | None


class Journal:
    """The complete files below `root`, stored as a JSON file that is replaced atomically for each new one.

    `fingerprint`: hash of the source, options and version of the run.
    """

    def __init__(self, path: Path, root: Path, fingerprint: str) -> None:
        self.path = path
        self.root = root
        self.fingerprint = fingerprint
        self._done: dict[str, CompleteFile] = {}

    @classmethod
    def read(cls, path: Path, root: Path) -> Self | None:
        """Read the journal of a killed run; None if it is invalid or from an earlier boot.

        A power failure may have lost bytes that were still in the page cache.
        """
        try:
            check_regular(path)
            data = json.loads(path.read_bytes())
            journal = cls(path, root, str(data["fingerprint"]))
            journal._done = {name: CompleteFile(*entry) for name, entry in data["files"].items()}
            return journal if data["boot"] == _boot() else None
        except (CheckpointError, OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @property
    def count(self) -> int:
        """Number of complete files."""
        return len(self._done)

    def complete(self, file: Path) -> CompleteFile | None:
        """The entry of `file`, if it is a regular file, not a link, and its size on disk matches."""
        done = self._done.get(os.path.relpath(file, self.root))
        if done is None or file.is_symlink() or not file.is_file():
            return None
        return done if file.stat().st_size == done.nbytes else None

    def missing(self) -> list[str]:
        """The complete files that have been removed or have another size."""
        return [name for name in self._done if self.complete(self.root / name) is None]

    def add(self, file: Path, nbytes: int, sha256: str | None = None) -> None:
        """Record that `file` is completely written. Raises OSError."""
        self._done[os.path.relpath(file, self.root)] = CompleteFile(nbytes, sha256)
        self.write()

    def remove(self, file: Path) -> None:
        """Remove a complete file that is not part of the output. Does nothing without it. Raises OSError."""
        if self._done.pop(os.path.relpath(file, self.root), None) is not None:
            self.write()
            file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all complete files; they stay on disk. Raises OSError."""
        self._done = {}
        self.write()

    def remove_others(self) -> None:
        """Remove everything below `root` that is not a complete file. Raises OSError."""
        removed = []
        for parent, folders, files in os.walk(self.root, topdown=False):
            for path in (Path(parent, name) for name in sorted(folders + files)):
                if path.is_dir() and not path.is_symlink():
                    with suppress(OSError):  # it has complete files
                        path.rmdir()
                elif self.complete(path) is None:
                    path.unlink()
                    removed.append(str(path.relative_to(self.root)))
        if removed:
            logger.info("removed from %s: %s, not complete", self.root, listed(removed))

    def write(self) -> None:
        """Replace the journal file. Raises OSError."""
        data = {"fingerprint": self.fingerprint, "boot": _boot(), "files": self._done}
        new = self.path.with_name(f"{self.path.name}.new")
        new.unlink(missing_ok=True)  # a link would be followed
        new.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self.path)


def _boot() -> str:
    """The id of this boot; "" if the system has none."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""
