"""Read the files of a checkpoint and compare them with their record.

The record is `ascendit.json`, with the sizes and, after `quantize --hash` or `repack --check`, the sha256 of
the files; or the cache of a hub, where the name of a file's content is its hash.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ascendit.checkpoint.component import irregular, read_json, stays_inside
from ascendit.checkpoint.layout import RECORD_FILE, Layout
from ascendit.checkpoint.sources import FileState
from ascendit.checkpoint.trust import blob_hash
from ascendit.errors import AscenditError, CheckpointError
from ascendit.names import listed
from ascendit.progress import Advance, Meter, OnProgress
from ascendit.report import counted, json_data

Status = Literal["ok", "same size", "differs", "missing", "not recorded"]
MAX_FILES = 100_000
_BLOCK = 1 << 22  # bytes
_NOT_RECORDED = (RECORD_FILE, "README.md")


@dataclass(frozen=True, kw_only=True)
class FileStatus:
    """The comparison of one file."""

    name: str
    """Relative to the folder of the record."""
    status: Status
    """`ok`: equal hash; `same size`: no hash is recorded."""
    record: str = ""
    """The origin of the recorded values: `ascendit.json`, `hub`, or "" if nothing is recorded."""
    detail: str = ""
    nbytes: int = 0


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """The comparison of all files of a checkpoint."""

    root: Path
    files: tuple[FileStatus, ...]

    @property
    def problem(self) -> CheckpointError | None:
        """E-CKP-10 for files that differ or are missing, E-CKP-11 if no hash is recorded; else None."""
        wrong = [
            f"{f.name} ({f.detail or f.status})" for f in self.files if f.status in ("differs", "missing")
        ]
        if wrong:
            return CheckpointError(
                f"{counted(len(wrong), 'file')} of {self.root} not as recorded: {listed(wrong)}",
                needs="files with the size and sha256 that were recorded when they were written",
                fix="download them again, or make the folder again with the command in ascendit.json",
                code="E-CKP-10",
            )
        if any(f.status == "ok" for f in self.files):
            return None
        sizes = any(f.status == "same size" for f in self.files)
        return CheckpointError(
            f"{self.root}: "
            + ("only sizes are recorded, and they agree" if sizes else "nothing is recorded"),
            needs=f"a sha256 of its files, in {RECORD_FILE} or in the cache of a hub",
            fix="quantize with --hash or repack with --check, which record them; or check the name on a hub, "
            "for example ascendit inspect hf:org/name --check",
            code="E-CKP-11",
        )

    def lines(self) -> list[str]:
        """One line per file, then the counts."""
        texts = [f"{f.status:<13} {f.name}" + (f"   {f.detail}" if f.detail else "") for f in self.files]
        counts = Counter(f.status for f in self.files)
        total = ", ".join(f"{number} {status}" for status, number in counts.items())
        return [*texts, f"{counted(len(self.files), 'file')}: {total or 'nothing to check'}"]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"problem": json_data(self.problem), "files": json_data(self.files)}


def check_files(layout: Layout, on_progress: OnProgress | None = None) -> FileCheck:
    """Read every file of a checkpoint whose size or hash is recorded, and compare them.

    Raises CheckpointError: E-CKP-06 for a damaged `ascendit.json`, E-CKP-03 if it names a file elsewhere.
    """
    folder = layout.root if layout.root.is_dir() else layout.root.parent
    home = next((p for p in (folder, folder.parent) if (p / RECORD_FILE).is_file()), folder)
    digests, sizes = _recorded(home)
    if layout.kind == "file":
        names = [layout.root.relative_to(home).as_posix()]
    else:
        below = folder.relative_to(home).as_posix()
        inside = {n for n in digests.keys() | sizes.keys() if below == "." or n.startswith(f"{below}/")}
        names = sorted(inside | {p.relative_to(home).as_posix() for p in _walk(folder)} - {*_NOT_RECORDED})
    expected = {name: _expected(home / name, digests.get(name)) for name in names}
    hashed = [name for name in names if expected[name][0]]
    meter = Meter(sum(_size(home / name) or 0 for name in hashed), on_progress)
    advance = meter.stage_counter("check")
    return FileCheck(
        root=layout.root,
        files=tuple(_compare(home, name, *expected[name], sizes.get(name), advance) for name in names),
    )


def _recorded(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """(path -> sha256, path -> size) in `ascendit.json`; both empty without it."""
    file = folder / RECORD_FILE
    data = read_json(file) if file.is_file() else {}
    digests, sizes = data.get("files", {}), data.get("sizes", {})
    valid = isinstance(digests, dict) and isinstance(sizes, dict)
    valid = valid and all(isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) for v in digests.values())
    if not valid or not all(type(v) is int and v >= 0 for v in sizes.values()):
        raise CheckpointError(
            f"{file} has an invalid list of files",
            needs='"files": path -> sha256 in 64 hexadecimal digits, and "sizes": path -> bytes',
            fix="restore ascendit.json, or make the folder again",
            code="E-CKP-06",
        )
    if outside := sorted(name for name in digests.keys() | sizes.keys() if not stays_inside(name)):
        raise CheckpointError(
            f"{file} lists {outside[0]!r}, which is not inside the folder",
            needs="names of files in the folder of the record",
            fix="download the model from a trusted source",
            code="E-CKP-03",
        )
    return digests, sizes


def _walk(folder: Path) -> list[Path]:
    """The files below a folder, with links followed, without hidden ones."""
    paths: list[Path] = []
    visited: set[str] = set()
    for parent, names, files in os.walk(folder, followlinks=True):
        names[:] = [name for name in names if not name.startswith(".")]
        if (real := os.path.realpath(parent)) in visited or len(paths) > MAX_FILES:
            names.clear()
            continue
        visited.add(real)
        paths += [Path(parent, name) for name in files if not name.startswith(".")]
    return paths


def _expected(path: Path, sha256: str | None) -> tuple[str, str]:
    """(hash, record) of a file; empty if there is none."""
    if sha256 is not None:
        return sha256, RECORD_FILE
    digest = blob_hash(path)
    return digest, "hub" if digest else ""


def _compare(
    home: Path, name: str, digest: str, record: str, size: int | None, advance: Advance
) -> FileStatus:
    path, record = home / name, record or (RECORD_FILE if size is not None else "")
    nbytes = _size(path)

    def status(status: Status, detail: str = "") -> FileStatus:
        return FileStatus(name=name, status=status, record=record, detail=detail, nbytes=nbytes or 0)

    if not record:
        return status("not recorded")
    if nbytes is None:
        gone = not os.path.lexists(path)
        return status("missing") if gone else status("differs", "not a regular file")
    if size is not None and nbytes != size:
        advance(name, nbytes if digest else 0)
        return status("differs", f"{nbytes:,} bytes, not {size:,}")
    if not digest:
        return status("same size", "no sha256 recorded")
    try:
        actual = _digest(path, digest, nbytes, lambda count: advance(name, count))
    except OSError as e:
        return status("differs", f"unreadable: {e.strerror}")
    except AscenditError as e:
        return status("differs", e.got)
    kind = "sha256" if len(digest) == 64 else "git hash"
    return (
        status("ok")
        if actual == digest
        else status("differs", f"{kind} {actual[:12]}..., not {digest[:12]}...")
    )


def _digest(path: Path, expected: str, size: int, advance: Callable[[int], None]) -> str:
    """The hash of a file: sha256, or git's sha1 for a hash of 40 digits."""
    digest = hashlib.sha256() if len(expected) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb", buffering=0) as f:
        before = FileState.of(os.fstat(f.fileno()))
        while data := f.read(_BLOCK):
            digest.update(data)
            advance(len(data))
        if FileState.of(os.fstat(f.fileno())) != before:
            raise CheckpointError(
                "changed while it was read", needs="a file at rest", fix="run it again", code="E-CKP-02"
            )
    return digest.hexdigest()


def _size(path: Path) -> int | None:
    """Bytes of a regular file; None for anything else."""
    try:
        status = path.stat()
    except OSError:
        return None
    return None if irregular(path, status) else status.st_size
