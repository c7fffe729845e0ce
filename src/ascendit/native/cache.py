"""The folder of compiled libraries: private to its user, and every file is verified before it is loaded.

A file is a library followed by its SHA-256, which loaders ignore. The folder is opened once and every access
goes through that handle, so that a folder or link with which another user replaces it is not followed. Files
are written under another name, synced and renamed: other processes see a complete file or none.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("ascendit")

DIGEST = hashlib.sha256().digest_size
LARGEST = 64 * 2**20
"""Bytes; ours have up to 300 kB. A larger file is damaged."""
LOCK_SECONDS = 300.0
"""After that a process compiles too, since the one with the lock may have been stopped."""
SHARED = stat.S_IWGRP | stat.S_IWOTH
ANOTHER_FOLDER = "export XDG_CACHE_HOME=/a/folder/of/your/own"


class CacheError(Exception):
    """The reason why the folder cannot be used, and `fix`, a command that changes that."""

    def __init__(self, reason: str, fix: str = ANOTHER_FOLDER) -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True)
class CacheFolder:
    """An open folder that only this user can write to."""

    path: Path
    fd: int

    def load(self, name: str, level: int = logging.WARNING) -> ctypes.CDLL | None:
        """Load the library `name`; None if it is absent, or unusable, which is logged with this level.

        Raises OSError if the system cannot load a library that is complete.
        """
        try:
            problem = self._problem(name)
        except FileNotFoundError:
            return None
        except OSError as e:
            problem = "a link" if e.errno == errno.ELOOP else e.strerror or str(e)
        if problem:
            log.log(level, "%s: %s; it is compiled again", self.path / name, problem)
            return None
        return ctypes.CDLL(str(self._location() / name))

    def store(self, name: str, content: bytes) -> None:
        """Write a library. Raises CacheError, for example if the disk is full."""
        temporary = f"{name}.{secrets.token_hex(4)}.tmp"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700, dir_fd=self.fd)
            try:
                with os.fdopen(fd, "wb") as f:
                    f.write(content + hashlib.sha256(content).digest())
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
                os.fsync(self.fd)
            finally:
                self._remove(temporary)
        except OSError as e:
            raise CacheError(f"{self.path}: cannot be written: {e.strerror or e}") from e

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the lock `name`, so that one process compiles; not if the file system has no locks."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._location() / f"{name}.lock", timeout=LOCK_SECONDS, mode=0o600)
        try:
            lock.acquire()
        except Timeout:
            log.warning("%s.lock: held for %g s; compiling without it", self.path / name, LOCK_SECONDS)
        except (OSError, NotImplementedError) as e:
            log.info("%s.lock: %s; compiling without it", self.path / name, e)
        try:
            yield
        finally:
            lock.release()

    def _problem(self, name: str) -> str:
        """The reason not to load a file, or "". Raises OSError if it cannot be opened."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would wait for a writer
        with os.fdopen(os.open(name, flags, dir_fd=self.fd), "rb") as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode):
                return "not a file"
            if reason := _not_private(status):
                return reason
            content = f.read(LARGEST + 1)
        if len(content) > LARGEST or hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
            return "damaged: its checksum is wrong"
        return ""

    def _location(self) -> Path:
        """The open folder as a path."""
        handle = Path(f"/proc/self/fd/{self.fd}")
        return handle if handle.is_dir() else self.path

    def _remove(self, name: str) -> None:
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass


@contextmanager
def open_folder(path: Path) -> Iterator[CacheFolder]:
    """Open the folder, and make it (mode 0700) if it is absent.

    Raises CacheError if it cannot be made or read, does not belong to this user, can be written by others,
    is a link, or is on a file system that does not run code.
    """
    try:
        fd = _open(path)
    except CacheError:
        raise
    except OSError as e:
        raise CacheError(f"{e.filename or path}: {e.strerror or e}") from e
    try:
        status = os.fstat(fd)
        if reason := _not_private(status):
            fix = f"chmod 700 {path}" if status.st_uid == os.geteuid() else ANOTHER_FOLDER
            raise CacheError(f"{path}: {reason}", fix)
        if os.fstatvfs(fd).f_flag & getattr(os, "ST_NOEXEC", 0):
            raise CacheError(f"{path}: its file system is mounted with noexec")
        yield CacheFolder(path, fd)
    finally:
        os.close(fd)


def _open(path: Path) -> int:
    if not path.is_absolute():
        raise CacheError(f"{path}: the home folder is not an absolute path")
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            folder.mkdir(0o700, exist_ok=True)
    if path.is_symlink():
        raise CacheError(f"{path}: a link", f"rm {path}")
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _not_private(status: os.stat_result) -> str:
    """The reason why others can change a file or folder, or ""."""
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to {os.geteuid()}"
    if status.st_mode & SHARED:
        return f"others can write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""
