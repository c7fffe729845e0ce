"""Files on disk against `ascendit.json`, and against the names of blobs in the cache of a hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipeline.headers import WEIGHTS, floats, write_expert

from ascendit.errors import CheckpointError
from ascendit.inspect.checkpoint import inspect
from ascendit.inspect.diff import diff
from ascendit.inspect.file_check import FileCheck
from ascendit.progress import Progress

FILE = f"transformer/{WEIGHTS}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path) -> None:
    with open(path, "r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\1")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / "ascendit.json").read_text())
    change(data)
    (folder / "ascendit.json").write_text(json.dumps(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A transformer with the record of its two files."""
    root = tmp_path / "model"
    write_expert(root / "transformer", floats())
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    names = {p.relative_to(root).as_posix(): p for p in files}
    record = {
        "files": {name: sha256(p) for name, p in names.items()},
        "sizes": {name: p.stat().st_size for name, p in names.items()},
    }
    (root / "ascendit.json").write_text(json.dumps(record))
    return root


def check(path: Path) -> FileCheck:
    files = inspect(path, check=True).files
    assert files is not None
    return files


def statuses(path: Path) -> dict[str, str]:
    return {f.name: f.status for f in check(path).files}


def code(path: Path) -> str:
    problem = check(path).problem
    return problem.code if problem else ""


def test_equal_files(folder: Path) -> None:
    events: list[Progress] = []
    report = inspect(folder, check=True, on_progress=events.append)
    assert report.ok and statuses(folder) == {FILE: "ok", "transformer/config.json": "ok"}
    size = sum(p.stat().st_size for p in (folder / "transformer").iterdir())
    assert (events[-1].step, events[-1].total) == (size, size)
    assert any(line.endswith("2 files: 2 ok") for line in report.lines())
    assert inspect(folder).files is None and inspect(folder).as_dict()["check"] is None


def test_a_flipped_bit(folder: Path) -> None:
    flip(folder / FILE)
    assert inspect(folder).ok, "headers do not show it"
    report = inspect(folder, check=True)
    assert not report.ok and [p.code for p in report.problems] == ["E-CKP-10"]
    assert statuses(folder)[FILE] == "differs" and FILE in report.problems[0].got
    assert report.as_dict()["check"]["files"][1]["detail"].startswith("sha256 ")


@pytest.mark.parametrize(
    ("damage", "status"),
    [
        (Path.unlink, "missing"),
        (lambda p: p.write_text("{}"), "differs"),
        (pipe, "differs"),
        (lambda p: (p.unlink(), p.mkdir()), "differs"),
        (lambda p: (p.unlink(), p.symlink_to(p.name)), "differs"),
    ],
    ids=["missing", "size", "pipe", "folder", "circle"],
)
def test_other_damage(folder: Path, damage: Callable[[Path], Any], status: str) -> None:
    extra = folder / "notes.json"
    extra.write_text('{"a": 1}')
    edit(
        folder,
        lambda data: (
            data["files"].update({"notes.json": sha256(extra)}),
            data["sizes"].update({"notes.json": 8}),
        ),
    )
    damage(extra)
    assert statuses(folder)["notes.json"] == status and code(folder) == "E-CKP-10"


def test_files_that_are_not_recorded_are_named(folder: Path) -> None:
    (folder / "transformer" / "extra.txt").write_text("x")
    (folder / "README.md").write_text("a card may be edited")
    (folder / ".hidden").write_text("x")
    assert statuses(folder)["transformer/extra.txt"] == "not recorded" and len(statuses(folder)) == 3
    assert code(folder) == ""


def test_a_record_without_hashes_and_no_record(folder: Path) -> None:
    edit(folder, lambda data: data.pop("files"))
    assert set(statuses(folder).values()) == {"same size"}
    report = inspect(folder, check=True)
    assert report.problems[0].code == "E-CKP-11" and "only sizes are recorded" in report.problems[0].got
    edit(folder, lambda data: data["sizes"].update({FILE: 3}))
    assert statuses(folder)[FILE] == "differs" and code(folder) == "E-CKP-10"
    (folder / "ascendit.json").unlink()
    assert code(folder) == "E-CKP-11" and "nothing is recorded" in inspect(folder, check=True).problems[0].got


def test_a_folder_or_file_below_the_record(folder: Path) -> None:
    assert statuses(folder / "transformer") == {FILE: "ok", "transformer/config.json": "ok"}
    flip(folder / FILE)
    assert code(folder / "transformer") == code(folder / FILE) == "E-CKP-10"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda data: data["files"].update({"../x": "a" * 64}), "E-CKP-03"),
        (lambda data: data["sizes"].update({"/etc/passwd": 3}), "E-CKP-03"),
        (lambda data: data.update(files=["x"]), "E-CKP-06"),
        (lambda data: data["files"].update({FILE: "A" * 64}), "E-CKP-06"),
        (lambda data: data["files"].update({FILE: 3}), "E-CKP-06"),
        (lambda data: data["sizes"].update({FILE: True}), "E-CKP-06"),
        (lambda data: data["sizes"].update({FILE: -1}), "E-CKP-06"),
    ],
)
def test_a_damaged_record(folder: Path, change: Callable[[dict[str, Any]], Any], expected: str) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError) as e:
        inspect(folder, check=True)
    assert e.value.code == expected


def test_blobs_of_a_hub(folder: Path, tmp_path: Path) -> None:
    """Large files are named by their sha256, small ones by git's sha1 of their content."""
    home = tmp_path / "models--org--name"
    snapshot, blobs = home / "snapshots" / ("c" * 40), home / "blobs"
    blobs.mkdir(parents=True)
    for path in (folder / "transformer").iterdir():
        data = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = blobs / (sha256(path) if path.name == WEIGHTS else git)
        blob.write_bytes(data)
        link = snapshot / "transformer" / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert statuses(snapshot) == {FILE: "ok", "transformer/config.json": "ok"}
    (snapshot / "transformer" / "config.json").write_text(
        (snapshot / "transformer" / "config.json").read_text() + " "
    )
    assert statuses(snapshot) == {FILE: "ok", "transformer/config.json": "differs"}
    flip(snapshot / FILE)
    assert statuses(snapshot)[FILE] == "differs"


def test_a_diff_says_whether_files_were_read(folder: Path) -> None:
    assert (
        "Values     recorded hashes are equal; files not read (see --check and --values)"
        in diff(folder, folder).lines()
    )
    checked = diff(folder, folder, check=True)
    assert checked.checked and checked.as_dict()["checked"] and checked.a.ok
    assert "Values     recorded hashes are equal; files read, they agree with them" in checked.lines()
    flip(folder / FILE)
    damaged = diff(folder, folder, check=True)
    assert not damaged.checked and not damaged.a.ok and damaged.lines()[-2].endswith("files not as recorded")
