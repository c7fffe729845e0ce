"""Limits of the control groups of this process, of versions 1 and 2. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def group_values(
    controller: str, version_1: tuple[str, ...], version_2: tuple[str, ...], root: Path | None = None
) -> Iterator[tuple[str, ...]]:
    """The texts of the files of each group of this process and of the groups that contain it.

    `controller`: of version 1, such as `memory`. `version_1`, `version_2`: names of the files; the text of a
    missing one is "". `root`: the folder with `proc` and `sys`.
    """
    root = root or ROOT
    mounts = root / "sys/fs/cgroup"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = mounts / controllers if controllers else mounts
        own = base / group.strip("/")
        for folder in (own, *own.parents):
            yield tuple(
                read_text(folder / name).strip() for name in (version_1 if controllers else version_2)
            )
            if folder == base:
                break


def read_text(file: Path) -> str:
    """The text of a file, "" if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
