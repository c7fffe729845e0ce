"""Changes of a file that its size does not show."""

from __future__ import annotations

import os
from pathlib import Path


def replace(path: Path) -> None:
    """Put an equal file in the place of this one."""
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    os.replace(new, path)


def write_in_place(path: Path) -> None:
    """Change one byte and restore the time of modification."""
    status = path.stat()
    with open(path, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\1")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
