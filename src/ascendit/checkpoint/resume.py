"""Which files of a run are complete, so that a killed run can be taken up again."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

JOURNAL_VERSION = 1
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class CompleteFile:
    """One complete file."""

    nbytes: int
    sha256: str | None


class Journal:
    """A JSON file that is replaced in one step whenever a file under `root` is complete.

    `fingerprint` says what the run does: source, scheme, recipe, versions. A run takes up only what a run
    with the same one has left, and only until the machine restarts: what a killed process has written may
    still be in the system's cache, which a power failure loses.
    """

    def __init__(self, path: Path, root: Path, fingerprint: str) -> None:
        self.path = path
        self.root = root
        self.fingerprint = fingerprint
        self.boot = _boot()
        self._done: dict[str, CompleteFile] = {}

    @classmethod
    def read(cls, path: Path, root: Path) -> Self | None:
        """What a run has left; None when there is nothing that can be understood."""
        try:
            data = json.loads(path.read_bytes())
            if data["version"] != JOURNAL_VERSION:
                return None
            journal = cls(path, root, str(data["fingerprint"]))
            journal.boot = str(data["boot"])
            journal._done = {name: CompleteFile(**entry) for name, entry in data["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return journal

    @property
    def usable(self) -> bool:
        """Whether the machine still runs since this was written."""
        return self.boot == _boot()

    @property
    def count(self) -> int:
        """How many files are complete."""
        return len(self._done)

    def complete(self, file: Path) -> CompleteFile | None:
        """What is known of `file` when it is complete; its size on disk is compared."""
        done = self._done.get(self._key(file))
        try:
            return done if done and file.stat().st_size == done.nbytes else None
        except OSError:
            return None

    def add(self, file: Path, nbytes: int, sha256: str | None = None) -> None:
        """`file` is complete: its last byte is written. Raises OSError."""
        self._done[self._key(file)] = CompleteFile(nbytes, sha256)
        self.write()

    def write(self) -> None:
        """Replace the file. Raises OSError."""
        data: dict[str, Any] = {
            "version": JOURNAL_VERSION,
            "fingerprint": self.fingerprint,
            "boot": self.boot,
        }
        data["files"] = {name: asdict(done) for name, done in self._done.items()}
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self.path)

    def _key(self, file: Path) -> str:
        return os.path.relpath(file, self.root)


def _boot() -> str:
    """The system's id of this boot; "" if it has none."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""
