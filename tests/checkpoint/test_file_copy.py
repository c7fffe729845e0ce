"""Copies by the kernel and without it, reserved disk space, error messages."""

import errno
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascendit.checkpoint.file_copy import (
    available_bytes,
    check_free_space,
    copy_file,
    move_bytes,
    reserve,
    write_error,
)
from ascendit.errors import CheckpointError

METHODS = ("copy_file_range", "buffer")
DATA = bytes(itertools.islice(itertools.cycle(range(251)), 3_000_000))


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """File descriptors of a source of 3 MB and an empty target."""
    (tmp_path / "src").write_bytes(DATA)
    src = os.open(tmp_path / "src", os.O_RDONLY)
    dst = os.open(tmp_path / "dst", os.O_RDWR | os.O_CREAT)
    yield src, dst
    os.close(src)
    os.close(dst)


def fail(number: int) -> Any:
    def call(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    return call


def only(method: str, monkeypatch: pytest.MonkeyPatch, number: int = errno.EXDEV) -> list[str]:
    """Make the kernel support only this method; the returned list collects the calls."""
    called: list[str] = []

    def counted(name: str, real: Any) -> Any:
        def call(*arguments: Any) -> int:
            called.append(name)
            return int(real(*arguments))

        return call

    real = os.copy_file_range if method == "copy_file_range" else fail(number)
    monkeypatch.setattr(os, "copy_file_range", counted("copy_file_range", real))
    return called


# ---- moving


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "src_offset,dst_offset,count",
    [(0, 0, len(DATA)), (8, 104, 2_500_000), (5000, 904, 100_001), (4096, 0, 1), (17, 3, 0), (100, 4196, 50)],
)
def test_each_method_copies_the_same_bytes(
    files: tuple[int, int],
    method: str,
    src_offset: int,
    dst_offset: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    src, dst = files
    called = only(method, monkeypatch)
    os.pwrite(dst, b"\xff" * (dst_offset + count + 9), 0)
    move_bytes(src, src_offset, dst, dst_offset, count)
    copied = os.pread(dst, 4_000_000, 0)
    assert copied == b"\xff" * dst_offset + DATA[src_offset : src_offset + count] + b"\xff" * 9
    if method != "buffer" and count > 5000:
        assert method in called


@pytest.mark.parametrize("src_offset,dst_offset", [(4096, 4096), (904, 904 + 8192), (70_000, 4464)])
def test_bytes_with_equal_alignment_are_moved_from_the_next_64_kib(
    files: tuple[int, int], src_offset: int, dst_offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the kernel copies complete pages (1.6 x as fast), and blocks can be shared."""
    offsets: list[int] = []
    real = os.copy_file_range

    def call(src: int, dst: int, count: int, src_at: int, dst_at: int) -> int:
        offsets.append(dst_at)
        assert (src_at - dst_at) % 4096 == 0
        return real(src, dst, count, src_at, dst_at)

    monkeypatch.setattr(os, "copy_file_range", call)
    move_bytes(files[0], src_offset, files[1], dst_offset, 2_000_000)
    assert offsets[0] == -(-dst_offset // 65536) * 65536
    assert os.pread(files[1], 2_000_000, dst_offset) == DATA[src_offset : src_offset + 2_000_000]


@pytest.mark.parametrize("number", ["EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "EPERM"])
def test_a_call_that_the_kernel_does_not_support_is_replaced(
    files: tuple[int, int], number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = only("buffer", monkeypatch, getattr(errno, number))
    move_bytes(*files[:1], 8, files[1], 16, 1_000_000)
    assert os.pread(files[1], 1_000_000, 16) == DATA[8:1_000_008]
    assert called == ["copy_file_range"]


def test_a_system_without_the_calls(files: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    move_bytes(files[0], 8, files[1], 16, 1_000_000)
    assert os.pread(files[1], 1_000_000, 16) == DATA[8:1_000_008]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.integers(0, 300_000), min_size=1, max_size=6),
    src_offset=st.integers(0, 9000),
    dst_offset=st.integers(0, 9000),
    then=st.sampled_from([errno.EXDEV, errno.EINVAL, 0]),
)
def test_partial_counts_and_a_change_of_method(
    files: tuple[int, int], steps: list[int], src_offset: int, dst_offset: int, then: int
) -> None:
    """A call moves fewer bytes than requested, then none, or fails: the next method moves the others."""
    src, dst = files
    os.ftruncate(dst, 0)
    with pytest.MonkeyPatch.context() as patch:
        left, real = list(steps), os.copy_file_range

        def call(src: int, dst: int, count: int, src_at: int, dst_at: int) -> int:
            if not left:
                if then:
                    raise OSError(then, os.strerror(then))
                return 0
            size = min(left.pop(), count)
            return real(src, dst, size, src_at, dst_at) if size else 0

        patch.setattr(os, "copy_file_range", call)
        move_bytes(src, src_offset, dst, dst_offset, 2_000_000)
    assert os.pread(dst, 3_000_000, dst_offset) == DATA[src_offset : src_offset + 2_000_000]


@pytest.mark.parametrize("method", METHODS)
def test_a_truncated_source(files: tuple[int, int], method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only(method, monkeypatch)
    with pytest.raises(CheckpointError) as e:
        move_bytes(files[0], 1000, files[1], 0, len(DATA), source=Path("a/model.safetensors"))
    assert e.value.code == "E-CKP-02"
    assert e.value.got == f"a/model.safetensors: truncated during the read, at byte {len(DATA)}"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_other_errors_are_not_retried(
    files: tuple[int, int], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    only("buffer", monkeypatch, number)
    with pytest.raises(OSError) as e:
        move_bytes(files[0], 0, files[1], 0, 1000 * 1000)
    assert e.value.errno == number


def test_files_of_two_file_systems(tmp_path: Path) -> None:
    shm, other = Path("/dev/shm"), tmp_path
    if not shm.is_dir() or shm.stat().st_dev == other.stat().st_dev:
        pytest.skip("there is one file system only")
    (other / "src").write_bytes(DATA)
    target = shm / f"ascendit-test-{os.getpid()}"
    try:
        copy_file(other / "src", target)
        assert target.read_bytes() == DATA
    finally:
        target.unlink(missing_ok=True)


def test_reserved_space_is_allocated_and_does_not_change_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "f", "wb") as f:
        reserve(f.fileno(), 1 << 20)
        f.write(b"x")
    state = (tmp_path / "f").stat()
    assert state.st_size == 1, "a killed run leaves no file of full size that is filled with zeros"
    if state.st_blocks < 2048:
        pytest.skip("this file system cannot reserve")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert available_bytes(tmp_path) == 1000 + state.st_blocks * 512


def test_reserving_without_support(tmp_path: Path) -> None:
    read, write = os.pipe()
    reserve(write, 1 << 20)
    os.close(read)
    os.close(write)


def test_messages_of_disk_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_free_space(tmp_path, 1 << 30)
    with pytest.raises(OSError) as full:
        check_free_space(tmp_path, 3 << 30)
    e = write_error(tmp_path, full.value, 3 << 30)
    assert str(e).splitlines() == [
        f"[E-ENV-04] 3,221,225,472 bytes (3.00 GiB) to write below {tmp_path}, 1,073,741,824 bytes available",
        "  needs  2,147,483,648 more bytes: space for the complete output, within the quota and the maximum"
        " file size",
        "  try    free disk space, or choose an output on another disk",
    ]
    quota = write_error(tmp_path, OSError(errno.EDQUOT, "Disk quota exceeded"), 10)
    assert quota.code == "E-ENV-04" and quota.got.endswith("(Disk quota exceeded)")
    assert quota.needs.startswith("space for the complete output, within the quota")
    other = write_error(tmp_path, OSError(errno.EROFS, "Read-only file system"))
    assert (other.code, other.got) == ("E-ENV-02", f"cannot write in {tmp_path}: Read-only file system")
