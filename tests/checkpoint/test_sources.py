"""Sources that change during a run, and the bounded number of open files."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from changes import replace, write_in_place
from safetensors.torch import save_file

from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.sources import (
    MAX_OPEN,
    FileState,
    OpenFiles,
    check_sources,
    files_below,
    record_folder,
    record_source,
    recording,
)
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.errors import CheckpointError


def weights(path: Path, value: float = 0.0) -> TensorInfo:
    save_file({"x": torch.full((4,), value)}, path)
    return read_header(path)["x"]


CHANGES: dict[str, Callable[[Path], Any]] = {
    "replaced": replace,
    "in place": write_in_place,
    "touched": os.utime,
    "removed": Path.unlink,
    "truncated": lambda path: os.truncate(path, 3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_recorded_file_that_changes(change: Callable[[Path], Any], tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for path in (a, b):
        path.write_text("text")
    with recording():
        record_source(a)
        record_source(b)
        check_sources()
        change(b)
        with pytest.raises(CheckpointError, match="1 source file changed during the run: .*/b") as e:
            check_sources()
        assert e.value.code == "E-CKP-02"
    check_sources()
    record_source(tmp_path / "none")  # outside, nothing is recorded


def test_a_file_that_changes_between_two_reads(tmp_path: Path) -> None:
    weights(tmp_path / "a")
    with recording():
        read_header(tmp_path / "a")
        replace(tmp_path / "a")
        with pytest.raises(CheckpointError, match="changed during the run"):
            read_header(tmp_path / "a")


@pytest.mark.parametrize("change", ["write", "add", "remove", "link"])
def test_a_recorded_folder(change: str, tmp_path: Path) -> None:
    folder = tmp_path / "part"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_text("a")
    (tmp_path / "target").write_text("t")
    (folder / "link").symlink_to(tmp_path / "target")
    with recording():
        record_folder(folder)
        check_sources()
        if change == "add":
            (folder / "deep" / "b").write_text("b")
        elif change == "remove":
            (folder / "deep" / "a").unlink()
        else:
            (folder / "deep" / "a" if change == "write" else tmp_path / "target").write_text("other")
        with pytest.raises(CheckpointError, match="1 source file changed"):
            check_sources()


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "up").symlink_to(tmp_path)
    assert list(files_below(tmp_path / "part")) == [tmp_path / "part" / "up"]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_between_header_and_read(change: Callable[[Path], Any], tmp_path: Path) -> None:
    info = weights(tmp_path / "a")
    change(tmp_path / "a")
    with (
        RowReader() as reader,
        pytest.raises(CheckpointError, match="changed since|truncated since|No such file") as e,
    ):
        reader.read_tensor(info)
    assert e.value.code == "E-CKP-02"


def test_a_file_that_changes_while_it_is_open(tmp_path: Path) -> None:
    info = weights(tmp_path / "a")
    with pytest.raises(CheckpointError, match="changed since its header was read"), RowReader() as reader:
        reader.read_tensor(info)
        write_in_place(tmp_path / "a")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_reader_has_few_files_open(tmp_path: Path) -> None:
    infos = [weights(tmp_path / str(n), n) for n in range(MAX_OPEN + 20)]
    before, limits = open_files(), resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit, most in ((limits[0], MAX_OPEN), (before + 40, max(2, (before + 40) // 16))):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
        try:
            with RowReader() as reader:
                for _ in range(2):
                    for n, info in enumerate(infos):
                        assert reader.read_tensor(info).tolist() == [n] * 4
                        assert open_files() <= before + most
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert open_files() == before


def test_a_file_that_is_closed_and_opened_again_is_the_same(tmp_path: Path) -> None:
    infos = [weights(tmp_path / str(n)) for n in range(MAX_OPEN + 1)]
    with RowReader() as reader:
        for info in infos:
            reader.read_tensor(info)
        replace(infos[0].file)
        with pytest.raises(CheckpointError, match="changed since its header was read"):
            reader.read_tensor(infos[0])


def test_without_a_header_the_first_state_counts(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    files = OpenFiles()
    files.open(tmp_path / "a")
    files.close()
    files.open(tmp_path / "a", FileState.of((tmp_path / "a").stat()))
    files.close()
    replace(tmp_path / "a")
    with pytest.raises(CheckpointError):
        files.open(tmp_path / "a")
    files.close()
