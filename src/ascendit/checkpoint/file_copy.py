"""Bytes moved from file to file by the kernel, room reserved, folders renamed without replacing another.

Each call has a slower way behind it for the file systems and kernels that do not know it.
"""

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

from ascendit.errors import CheckpointError, EnvironmentProblem

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk, the quota or the largest file that is allowed has been reached."""
PAGE = 4096  # bytes; the block size of most file systems
_UNABLE = (
    errno.EXDEV,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EBADF,
    errno.ENOTSOCK,
)
"""Errors of a system call that cannot do this for these two files. EPERM: containers that forbid the call."""
_LARGE = 1 << 30  # bytes in one call; no call moves 2 GiB
_BUFFER = 1 << 20  # bytes; stays in the processor's cache
_PIPE = 1 << 16  # bytes that the kernel moves at once; 1.6 x as fast when they begin at a multiple of it
_KEEP_SIZE, _NOREPLACE, _AT_FDCWD = 1, 1, -100  # of <linux/falloc.h>, <linux/fs.h>, <fcntl.h>


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

    copy_file_range first (a file system may share the blocks, a server copy by itself), then sendfile, then
    a small buffer. The file positions of both may change. Raises CheckpointError E-CKP-02, which names
    `source`, when that file ends too early; OSError when the target cannot be written.
    """
    moved = 0
    if src_offset % PAGE == dst_offset % PAGE:  # the head apart: the rest is aligned to pipes, blocks
        moved = min(-dst_offset % _PIPE, count)
        _by_buffer(src_fd, src_offset, dst_fd, dst_offset, moved, source)
    for way in (_by_copy_file_range, _by_sendfile):
        moved += way(src_fd, src_offset + moved, dst_fd, dst_offset + moved, count - moved)
    _by_buffer(src_fd, src_offset + moved, dst_fd, dst_offset + moved, count - moved, source)


def _by_copy_file_range(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, count: int) -> int:
    """Bytes moved; fewer than `count` where the kernel cannot, or says that there are no more."""
    call = getattr(os, "copy_file_range", None)
    moved = 0
    try:
        while call and moved < count:
            size = min(_LARGE, count - moved)
            if not (done := call(src_fd, dst_fd, size, src_offset + moved, dst_offset + moved)):
                break
            moved += done
    except OSError as e:
        if e.errno not in _UNABLE:
            raise
    return moved


def _by_sendfile(src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, count: int) -> int:
    """As `_by_copy_file_range`. Writes at the target's file position, so it sets that first."""
    call = getattr(os, "sendfile", None)
    moved = 0
    try:
        if call and count:
            os.lseek(dst_fd, dst_offset, os.SEEK_SET)
        while call and moved < count:
            if not (done := call(dst_fd, src_fd, src_offset + moved, min(_LARGE, count - moved))):
                break
            moved += done
    except OSError as e:
        if e.errno not in _UNABLE:
            raise
    return moved


def _by_buffer(
    src_fd: int, src_offset: int, dst_fd: int, dst_offset: int, count: int, source: Path | str
) -> None:
    """The way that always works; here alone the end of the file is believed."""
    if count <= 0:
        return
    buffer = memoryview(bytearray(min(_BUFFER, count)))
    moved = 0
    while moved < count:
        view = buffer[: count - moved]
        if not (done := os.preadv(src_fd, [view], src_offset + moved)):
            raise truncated(source, src_offset + moved)
        write_at(dst_fd, view[:done], dst_offset + moved)
        moved += done


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """All of `data` (bytes) at this place. Raises OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + _LARGE], offset + done)


def copy_file(src: Path, dst: Path) -> None:
    """A new regular file with the bytes of another; never a second name for it. Raises OSError, E-CKP-02."""
    src_fd = os.open(src, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(src_fd).st_size
        dst_fd = os.open(dst, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            move_bytes(src_fd, 0, dst_fd, 0, size, source=src)
        finally:
            os.close(dst_fd)
    finally:
        os.close(src_fd)


def truncated(source: Path | str, position: int) -> CheckpointError:
    """The error for a source that ends at `position` and should not."""
    return CheckpointError(
        f"{source}: truncated while it was read, at byte {position}",
        needs="source files that stay as they are until the run is over",
        fix="find what changed the file; download it again if it is damaged",
        code="E-CKP-02",
    )


# ---- room on the disk ---------------------------------------------------------------------------


def reserve(fd: int, count: int) -> None:
    """Take `count` bytes of disk for a file without changing its size, so that a full disk shows at once.

    Writing into reserved room is faster too (1.7 x on ext4). Nothing happens where the file system cannot
    do it. Raises OSError, one of `FULL`.
    """
    if count > 0 and (call := getattr(_libc(), "fallocate", None)):
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
        if call(fd, _KEEP_SIZE, 0, count) and (number := ctypes.get_errno()) in FULL:
            raise OSError(number, os.strerror(number))


@contextmanager
def writing(folder: Path, needed: int) -> Iterator[None]:
    """Turn an OSError into the error for the user. `needed`: bytes that this run writes below `folder`."""
    try:
        yield
    except OSError as e:
        raise write_error(folder, e, needed) from e


def write_error(folder: Path, error: OSError, needed: int = 0) -> EnvironmentProblem:
    """E-ENV-04 for a full disk, with the bytes needed and free; E-ENV-02 for all else."""
    if error.errno in FULL:
        return disk_full(folder, needed, room_for(folder), error.strerror or "")
    return EnvironmentProblem(
        f"cannot write in {folder}: {error.strerror or error}",
        needs="a folder that can be written",
        fix="choose another place with -o",
        code="E-ENV-02",
    )


def disk_full(folder: Path, needed: int, free: int, why: str = "") -> EnvironmentProblem:
    """`needed` and `free` in bytes; `why`: what the system said, if it was asked."""
    got = f"{needed:,} bytes ({needed / 2**30:.2f} GiB) to write below {folder}, {free:,} free there"
    rule = "room for the whole output, within the quota and the limit on the size of one file"
    return EnvironmentProblem(
        f"{got} ({why})" if why else got,
        needs=f"{max(needed - free, 0):,} bytes more: {rule}" if needed > free else rule,
        fix="free disk space, or choose another disk with -o",
        code="E-ENV-04",
    )


def room_for(folder: Path) -> int:
    """Bytes that files below `folder` may have: what is free there, and what they occupy already."""
    taken = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                taken += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:  # it went away meanwhile
                continue
    try:
        return shutil.disk_usage(folder).free + taken
    except OSError:
        return taken


# ---- renaming -----------------------------------------------------------------------------------


def rename_new(src: Path, dst: Path) -> None:
    """Give a file or folder a name that nothing has, in one step. FileExistsError if something has it."""
    if call := getattr(_libc(), "renameat2", None):
        call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
        if not call(_AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), _NOREPLACE):
            return
        number = ctypes.get_errno()
        if number not in _UNABLE:
            raise OSError(number, os.strerror(number), str(src), None, str(dst))
    if os.path.lexists(dst):  # an empty folder would be replaced
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(dst))
    os.rename(src, dst)


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
