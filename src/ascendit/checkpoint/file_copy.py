"""Bytes copied from file to file by the kernel, disk space reserved, and errors of writing in words."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ascendit.checkpoint.component import unreadable
from ascendit.errors import EnvironmentProblem

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, the quota or the largest file that is allowed has been reached."""
PAGE = 4096  # bytes; the block size of most file systems
_UNABLE = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)
"""Errors of copy_file_range between two files that it cannot copy. EPERM: containers that forbid the call."""
_LARGE = 1 << 30  # bytes in one call; no call moves 2 GiB
_BUFFER = 1 << 20  # bytes; stays in the processor's cache
_PIPE = 1 << 16  # bytes that the kernel moves at once; 1.6 x as fast when they begin at a multiple of it
_KEEP_SIZE = 1  # of <linux/falloc.h>


def move_bytes(
    src_fd: int,
    src_offset: int,
    dst_fd: int,
    dst_offset: int,
    count: int,
    *,
    source: Path | str = "the source",
) -> None:
    """Copy `count` bytes from one open file to a place in another, which grows if it must.

    By copy_file_range (a file system may share the blocks, a server copy by itself); what that cannot do goes
    through a small buffer. Raises CheckpointError E-CKP-02, which names `source`, when that file ends too
    early; OSError when the target cannot be written.
    """
    shift, end = dst_offset - src_offset, src_offset + count
    if shift % PAGE == 0:  # the head apart: the rest is aligned to pipes, blocks
        head = min(src_offset + -dst_offset % _PIPE, end)
        _by_buffer(src_fd, src_offset, head, dst_fd, shift, source)
        src_offset = head
    call = getattr(os, "copy_file_range", None)
    try:
        while call and src_offset < end:
            size = min(_LARGE, end - src_offset)
            if not (done := call(src_fd, dst_fd, size, src_offset, src_offset + shift)):
                break
            src_offset += done
    except OSError as e:
        if e.errno not in _UNABLE:
            raise
    _by_buffer(src_fd, src_offset, end, dst_fd, shift, source)


def _by_buffer(src_fd: int, start: int, end: int, dst_fd: int, shift: int, source: Path | str) -> None:
    for data in read_pieces(src_fd, start, end, source):
        write_at(dst_fd, data, start + shift)
        start += len(data)


def read_pieces(fd: int, start: int, end: int, source: Path | str) -> Iterator[memoryview]:
    """The bytes from `start` to `end`, 1 MiB at most, in a buffer that is used again.

    Raises CheckpointError E-CKP-02, which names `source`, if the file ends before.
    """
    buffer = memoryview(bytearray(min(_BUFFER, max(end - start, 0))))
    while start < end:
        if not (count := os.preadv(fd, [buffer[: end - start]], start)):
            raise unreadable(source, f"truncated while it was read, at byte {start}")
        yield buffer[:count]
        start += count


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """All of `data` (bytes) at this place. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + _LARGE], offset + done)


def copy_file(src: Path, dst: Path) -> None:
    """A new regular file with the bytes of another; never a second name for it. Raises OSError, E-CKP-02."""
    with open(src, "rb", buffering=0) as old, open(dst, "wb", buffering=0) as new:
        size = os.fstat(old.fileno()).st_size
        move_bytes(old.fileno(), 0, new.fileno(), 0, size, source=src)


def reserve(fd: int, count: int) -> None:
    """Take `count` bytes of disk for a file without changing its size, so that a full disk shows at once.

    Writing into reserved space is faster too (1.7 x on ext4). Nothing happens where the file system cannot
    do it (posix_fallocate would write there instead). Raises OSError, one of `FULL`.
    """
    if count > 0 and (call := _fallocate()):
        if call(fd, _KEEP_SIZE, 0, count) and (number := ctypes.get_errno()) in FULL:
            raise OSError(number, os.strerror(number))


@functools.cache
def _fallocate() -> Any:
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if call:
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    return call


def check_room(folder: Path, needed: int) -> None:
    """Raise OSError ENOSPC when `needed` bytes do not fit below `folder`, what is there included."""
    if needed > room_for(folder):
        raise OSError(errno.ENOSPC, "")


def room_for(folder: Path) -> int:
    """Bytes that files below `folder` may have: what is free there, and what they occupy already."""
    taken = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if not path.is_dir())
    return taken + (shutil.disk_usage(folder).free if folder.is_dir() else 0)


@contextmanager
def writing(folder: Path, needed: int) -> Iterator[None]:
    """Turn an OSError into the error for the user. `needed`: bytes that this run writes below `folder`."""
    try:
        yield
    except OSError as e:
        raise write_error(folder, e, needed) from e


def write_error(folder: Path, error: OSError, needed: int = 0) -> EnvironmentProblem:
    """E-ENV-04 for a full disk, with the bytes needed and free; E-ENV-02 for all else."""
    if error.errno not in FULL:
        return EnvironmentProblem(
            f"cannot write in {folder}: {error.strerror or error}",
            needs="a folder that can be written",
            fix="choose another place with -o",
            code="E-ENV-02",
        )
    free = room_for(folder)
    got = f"{needed:,} bytes ({needed / 2**30:.2f} GiB) to write below {folder}, {free:,} free there"
    rule = "room for the whole output, within the quota and the limit on the size of one file"
    return EnvironmentProblem(
        f"{got} ({error.strerror})" if error.strerror else got,
        needs=f"{needed - free:,} bytes more: {rule}" if needed > free else rule,
        fix="free disk space, or choose another disk with -o",
        code="E-ENV-04",
    )
