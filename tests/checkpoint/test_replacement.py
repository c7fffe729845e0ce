"""A folder is replaced only if ascendit wrote all of it, and always by a complete one: after kills too."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import kill
import pytest

from ascendit.checkpoint import replacement
from ascendit.checkpoint.output_folder import Staging
from ascendit.checkpoint.replacement import ASIDE, check_replaceable
from ascendit.checkpoint.sources import record_folder, recording
from ascendit.errors import UsageError


def write_output(folder: Path, text: str) -> Path:
    """A folder as `quantize` writes it: recorded files, a card, a link to a component."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "w.safetensors").write_text(text)
    (folder / "README.md").write_text("card")
    vae = folder.parent / "vae"
    vae.mkdir(exist_ok=True)
    (folder / "vae").symlink_to(vae)
    record = {"made_by": "ascendit 1 quantize", "sizes": {"transformer/w.safetensors": len(text)}}
    (folder / "ascendit.json").write_text(json.dumps(record))
    return folder


def replace(dst: Path, text: str) -> None:
    with Staging(dst, sources=[], fingerprint=text, overwrite=True) as staging:
        new = write_output(dst.parent / "new", text)
        shutil.copytree(new, staging.path, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(new)
        staging.publish()


def weights(folder: Path) -> str:
    return (folder / "transformer" / "w.safetensors").read_text()


@pytest.mark.parametrize("at_once", [True, False])
def test_the_old_folder_is_complete_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:  # as on a file system without the exchange of two names
        monkeypatch.setattr(replacement, "_renameat2", lambda: None)
    dst = write_output(tmp_path / "out", "old")
    with (
        pytest.raises(KeyboardInterrupt),
        Staging(dst, sources=[], fingerprint="f", overwrite=True) as staging,
    ):
        (staging.path / "f").write_text("x")
        assert weights(dst) == "old"
        raise KeyboardInterrupt
    assert weights(dst) == "old" and sorted(os.listdir(tmp_path)) == ["out", "vae"]
    replace(dst, "new")
    assert weights(dst) == "new" and sorted(os.listdir(tmp_path)) == ["out", "vae"]
    assert os.listdir(tmp_path / "vae") == [], "a linked component is not part of the output"


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    replace(tmp_path / "out", "new")
    assert weights(tmp_path / "out") == "new"


def edit(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("notes.txt", "x", "notes.txt"),
        ("outputs/cat.mp4", "x", "outputs/cat.mp4"),
        (".git/config", "x", ".git/config"),
        ("transformer/mine.safetensors", "x", "transformer/mine.safetensors"),
        ("transformer/w.safetensors", "trained further", "transformer/w.safetensors"),
        ("ascendit.json", "{}", "was not written by"),
        ("ascendit.json", "[]", "was not written by"),
        ("ascendit.json", "{", "was not written by"),
        ("ascendit.json", "[" * 100_000, "was not written by"),
        ("ascendit.json", '{"made_by": "me", "sizes": {}}', "was not written by"),
        ("ascendit.json", '{"made_by": "ascendit 1", "sizes": []}', "was not written by"),
    ],
)
def test_other_files_are_never_removed(tmp_path: Path, name: str, text: str, reason: str) -> None:
    dst = write_output(tmp_path / "out", "old")
    edit(dst, name, text)
    before = kill.contents(dst)
    with pytest.raises(UsageError, match="E-USE-03") as e:
        replace(dst, "new")
    assert reason in e.value.got and kill.contents(dst) == before
    assert not (tmp_path / ".out.partial").exists()


def test_links_files_and_other_folders_are_refused(tmp_path: Path) -> None:
    write_output(tmp_path / "out", "old")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "file").write_text("x")
    shutil.copytree(tmp_path / "out", tmp_path / "linked", symlinks=True)
    (tmp_path / "linked" / "transformer" / "more").symlink_to(tmp_path / "file")
    for name in ("link", "file", "linked"):
        with pytest.raises(UsageError, match="E-USE-03"):
            check_replaceable(tmp_path / name)


def test_a_folder_with_a_source_of_the_run_is_refused(tmp_path: Path) -> None:
    """The model that is read may be elsewhere, with a component that is a link into the output."""
    dst = write_output(tmp_path / "out", "old")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "transformer").symlink_to(dst / "transformer")
    with recording():
        check_replaceable(dst)
        record_folder(tmp_path / "model" / "transformer")
        with pytest.raises(UsageError, match="E-USE-06"):
            check_replaceable(dst)
    with pytest.raises(UsageError, match="E-USE-06"):
        Staging(dst, sources=[dst / "transformer"], fingerprint="f", overwrite=True)


def test_files_that_appear_during_the_run_stop_it(tmp_path: Path) -> None:
    dst = write_output(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="changed by another program") as e:
        with Staging(dst, sources=[], fingerprint="f", overwrite=True) as staging:
            edit(dst, "notes.txt", "x")
            staging.publish()
    assert e.value.code == "E-USE-03" and (dst / "notes.txt").exists() and staging.path.exists()


def test_a_kill_between_two_renames_is_repaired(tmp_path: Path) -> None:
    """Before the second rename the old folder gets its name again; after it, the rest is removed."""
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    edit(partial, "journal.json", "{}")
    shutil.move(write_output(tmp_path / "before", "old"), partial / ASIDE)
    with Staging(tmp_path / "out", sources=[], fingerprint="f", overwrite=True):
        assert weights(tmp_path / "out") == "old"
    assert weights(tmp_path / "out") == "old" and not partial.exists()
    partial.mkdir()
    edit(partial, "journal.json", "{}")
    shutil.move(write_output(tmp_path / "before", "older"), partial / ASIDE)
    replace(tmp_path / "out", "new")
    assert weights(tmp_path / "out") == "new" and not partial.exists()


def test_a_resumed_run_uses_no_file_of_the_old_folder(tmp_path: Path) -> None:
    """A kill after the exchange leaves the old folder, with files of the same sizes, as partial output."""

    def killed(self: Staging) -> None:
        raise SystemExit

    dst = write_output(tmp_path / "out", "old")
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "_clear", killed)
        with Staging(dst, sources=[], fingerprint="f", overwrite=True) as staging:
            shutil.copytree(dst, staging.path, symlinks=True, dirs_exist_ok=True)
            edit(staging.path, "transformer/w.safetensors", "new")
            staging.journal.add(staging.path / "transformer" / "w.safetensors", 3)
            staging.publish()
    assert weights(dst) == "new" and weights(staging.path) == "old"
    os.close(staging._lock)
    with Staging(dst, sources=[], fingerprint="f", resume=True, overwrite=True) as again:
        assert os.listdir(again.path) == [] and again.journal.count == 0


JOB = """
import time
from pathlib import Path
from checkpoint.test_replacement import replace
dst = Path(sys.argv[1])
print("begun", flush=True)
for i in range(1000):
    replace(dst, str(i))
"""


def test_killed_at_any_moment_the_output_is_complete(tmp_path: Path) -> None:
    dst = write_output(tmp_path / "out", "0")
    code = f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n{JOB}"
    for delay in kill.moments(seed=3, count=4, longest=0.2):
        assert kill.run_and_kill(kill.python(code, dst), delay, ready="begun")
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        check_replaceable(dst)
        assert weights(dst).isdigit() and (dst / "vae").is_dir()
    replace(dst, "new")
    assert sorted(os.listdir(tmp_path)) == ["out", "vae"]
