"""Parts of a model that are taken over as they are: linked, or copied by the kernel."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from ascendit.checkpoint.move import copy_file
from ascendit.errors import CheckpointError

MAX_FILES = 100_000
"""In one folder that is copied; more come from a maze of links."""


def link_or_copy(src: Path, dst: Path, *, copy: bool) -> None:
    """Make `dst` a link to the real place of the file or folder `src`, or a copy of it.

    In a copy every link is followed (hub caches link to their blobs), so that it stands alone; a file that
    is there in full already, from a killed run, is left. Raises CheckpointError E-CKP-03 for links in a
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
