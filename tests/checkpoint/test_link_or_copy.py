"""Components of a model linked to their real path, or copied completely."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from ascendit.checkpoint import output_folder
from ascendit.checkpoint.output_folder import link_or_copy
from ascendit.errors import CheckpointError


def hub(tmp_path: Path) -> Path:
    """A folder as in a hub cache: each file is a relative link to a blob outside of it."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "1" / "vae"
    blobs.mkdir()
    (folder / "deep").mkdir(parents=True)
    for name, content in (("config.json", "{}"), ("deep/w.safetensors", "weights")):
        (blobs / content.strip("{}")).with_suffix(".blob").write_text(content)
        up = os.path.relpath((blobs / content.strip("{}")).with_suffix(".blob"), (folder / name).parent)
        (folder / name).symlink_to(up)
    return folder


def test_a_link_has_the_absolute_real_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub(tmp_path)
    (tmp_path / "alias").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    link_or_copy(Path("alias"), tmp_path / "vae", copy=False)
    assert os.readlink(tmp_path / "vae") == str(folder.resolve())
    assert (tmp_path / "vae" / "deep" / "w.safetensors").read_text() == "weights"
    link_or_copy(Path("alias/config.json"), tmp_path / "c.json", copy=False)
    assert os.readlink(tmp_path / "c.json") == str((folder / "config.json").resolve())


def test_a_copy_does_not_need_the_source(tmp_path: Path) -> None:
    folder = hub(tmp_path)
    link_or_copy(folder, tmp_path / "vae", copy=True)
    shutil.rmtree(tmp_path / "blobs")
    for name, content in (("config.json", "{}"), ("deep/w.safetensors", "weights")):
        file = tmp_path / "vae" / name
        assert file.read_text() == content and not file.is_symlink()
        assert file.stat().st_nlink == 1
    (tmp_path / "f").write_text("x")
    link_or_copy(tmp_path / "f", tmp_path / "g", copy=True)
    assert (tmp_path / "g").read_text() == "x"


def test_a_resumed_run_links_and_copies_again(tmp_path: Path) -> None:
    folder = hub(tmp_path)
    for copy in (False, False, True, True, False):
        link_or_copy(folder, tmp_path / "vae", copy=copy)
        link_or_copy(folder / "config.json", tmp_path / "config.json", copy=copy)
        assert (tmp_path / "vae").is_symlink() == (tmp_path / "config.json").is_symlink() == (not copy)
        assert (tmp_path / "vae" / "deep" / "w.safetensors").read_text() == "weights"
    link_or_copy(folder, tmp_path / "vae", copy=True)
    file = tmp_path / "vae" / "deep" / "w.safetensors"
    file.write_text("wei")  # as left by a killed run
    before = (tmp_path / "vae" / "config.json").stat().st_mtime_ns
    link_or_copy(folder, tmp_path / "vae", copy=True)
    assert file.read_text() == "weights"
    assert (tmp_path / "vae" / "config.json").stat().st_mtime_ns == before
    assert (folder / "deep" / "w.safetensors").read_text() == "weights", "never written through a link"


def error_text(src: Path, dst: Path, copy: bool) -> str:
    with pytest.raises(CheckpointError) as e:
        link_or_copy(src, dst, copy=copy)
    assert e.value.code == "E-CKP-03"
    return e.value.got


@pytest.mark.parametrize("copy", [False, True])
def test_link_loops_and_dangling_links(tmp_path: Path, copy: bool) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "c").symlink_to("nothing")
    assert error_text(tmp_path / "a", tmp_path / "out", copy).endswith("a: Too many levels of symbolic links")
    assert error_text(tmp_path / "c", tmp_path / "out", copy).endswith("c: No such file or directory")
    assert not os.path.lexists(tmp_path / "out")


@pytest.mark.parametrize("target", [".", "..", "../../vae", "../../../model"])
def test_a_copy_of_a_folder_with_a_loop(tmp_path: Path, target: str) -> None:
    folder = tmp_path / "model" / "vae"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "f").write_text("x")
    (folder / "a" / "again").symlink_to(target)
    assert "leads back to a folder" in error_text(folder, tmp_path / "out", True)


def test_one_folder_under_two_names_is_not_a_loop(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "f").write_text("x")
    (folder / "b").symlink_to("a")
    link_or_copy(folder, tmp_path / "out", copy=True)
    assert (tmp_path / "out" / "b" / "f").read_text() == "x"
    assert not (tmp_path / "out" / "b").is_symlink()


def test_the_number_of_copied_files_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_folder, "MAX_FILES", 50)
    for i in range(12):
        (tmp_path / f"d{i}").mkdir()
        for name in ("x", "y"):
            (tmp_path / f"d{i}" / name).symlink_to(f"../d{i + 1}")
    (tmp_path / "d12").mkdir()
    assert "more than 50 files" in error_text(tmp_path / "d0", tmp_path / "out", True)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_only_files_and_folders_are_copied(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    if kind == "pipe":
        os.mkfifo(folder / "odd")
    elif kind == "device":
        (folder / "odd").symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as s:
            previous = os.getcwd()
            os.chdir(folder)  # the name of a socket must be short
            try:
                s.bind("odd")
            finally:
                os.chdir(previous)
    assert error_text(folder, tmp_path / "out", True).endswith(": neither a file nor a folder")
