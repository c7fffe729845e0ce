"""Replace an output folder by a new one: which folders may be replaced, and the exchange of two folders.

Only a folder that `quantize` or `repack` has written is replaced, and only if it contains nothing else: its
`ascendit.json` lists its files.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from pathlib import Path
from typing import Any

from ascendit.checkpoint.component import check_regular
from ascendit.checkpoint.layout import RECORD_FILE
from ascendit.checkpoint.sources import files_below, recorded_sources
from ascendit.errors import CheckpointError, UsageError
from ascendit.names import listed

EDITABLE = (RECORD_FILE, "README.md")
"""Files of an output whose size is not recorded."""
ASIDE = "replaced"
"""Name of the old folder in the partial folder while two renames replace it."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # of <linux/fs.h>


def check_replaceable(dst: Path) -> None:
    """Raise UsageError unless `dst` is absent, or a folder that a new output may replace.

    E-USE-03: it is a link or a file, no folder that ascendit wrote, or it contains other files. E-USE-06:
    this run reads files in it.
    """
    if not os.path.lexists(dst):
        return
    if dst.is_symlink() or not dst.is_dir():
        raise _refused(f"{dst} is a {'link' if dst.is_symlink() else 'file'}, not a folder")
    real = Path(os.path.realpath(dst))
    read = dict.fromkeys(Path(os.path.realpath(path)) for path in recorded_sources())
    if inside := [path for path in read if path.is_relative_to(real)]:
        raise UsageError(
            f"this run reads files in {dst}, which it would replace: {listed(map(str, inside))}",
            needs="an output that is no source of the run; components of the source may be links into it",
            fix=f"for example -o {dst.parent / (dst.name + '-new')}",
            code="E-USE-06",
        )
    if not os.listdir(dst):
        return
    sizes = _recorded_sizes(dst)
    if sizes is None:
        raise _refused(
            f"{dst} was not written by ascendit quantize or repack: no list of files in {RECORD_FILE}"
        )
    if others := sorted(_others(dst, sizes)):
        raise _refused(f"{dst} contains more than the model that ascendit wrote: {listed(others)}")


def _recorded_sizes(folder: Path) -> dict[str, int] | None:
    """Path in the folder -> bytes, from `ascendit.json`; None without a valid record."""
    try:
        check_regular(folder / RECORD_FILE)
        record = json.loads((folder / RECORD_FILE).read_bytes())
    except (CheckpointError, OSError, RecursionError, ValueError):
        return None
    if not isinstance(record, dict):
        return None
    sizes, by = record.get("sizes"), record.get("made_by")
    valid = isinstance(sizes, dict) and isinstance(by, str) and by.startswith("ascendit ")
    return sizes if valid else None


def _others(folder: Path, sizes: dict[str, int]) -> list[str]:
    """The files below `folder` that are not recorded, or have another size; not links at its top."""
    others = []
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        is_component = path.is_symlink() and path.parent == folder
        is_own = not path.is_symlink() and (name in EDITABLE or sizes.get(name) == path.stat().st_size)
        if not (is_component or is_own):
            others.append(name)
    return others


def _refused(problem: str) -> UsageError:
    return UsageError(
        problem,
        needs=f"a folder that ascendit wrote, and that contains only the files in its {RECORD_FILE}",
        fix="choose another name with -o, or move the other files to another folder first",
        code="E-USE-03",
    )


# ---- the exchange -------------------------------------------------------------------------------


def exchange(new: Path, old: Path) -> None:
    """Exchange the names of two folders of one file system.

    It is one step on Linux. Where a file system lacks that step, the old folder is renamed to `ASIDE` beside
    `new` first; `restore` repairs a run that is killed between the two renames. Raises OSError.
    """
    if _exchange_at_once(new, old):
        return
    aside = new.parent / ASIDE
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise


def restore(folder: Path, old: Path) -> Path | None:
    """After a kill within `exchange`: give the old folder its name again.

    Returns the replaced folder in `folder`, which is to be removed, if there is one. Raises OSError.
    """
    aside = folder / ASIDE
    if not os.path.lexists(aside):
        return None
    if os.path.lexists(old):
        return aside
    os.rename(aside, old)
    return None


def _exchange_at_once(new: Path, old: Path) -> bool:
    """Whether the system has exchanged them."""
    call = _renameat2()
    names = os.fsencode(new), os.fsencode(old)
    return bool(call) and call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


@functools.cache
def _renameat2() -> Any:
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call:
        call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return call
