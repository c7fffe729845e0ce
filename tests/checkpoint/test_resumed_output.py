"""The output of a killed run is resumed with its complete files alone, not with those of another program."""

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

import kill
import pytest

from ascendit.checkpoint.output_folder import Staging, link_or_copy


def resume(folder: Path) -> Staging:
    return Staging(folder / "out", sources=(), fingerprint="f", resume=True)


def killed_run(folder: Path) -> Path:
    """The partial output of a killed run with one complete file."""
    with pytest.raises(KeyboardInterrupt), resume(folder) as staging:
        (staging.path / "f").write_text("x")
        staging.journal.add(staging.path / "f", 1)
        raise KeyboardInterrupt
    return folder / ".out.partial"


def plant(path: Path, kind: str, target: Path) -> None:
    """Replace a path by another kind of file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "nested":
        path.write_text("[" * 100_000)
    else:
        path.symlink_to(target)


@pytest.mark.parametrize(
    "kind", ["file", "link", "pipe", "folder link", "complete file", "complete pipe", "root"]
)
def test_resume_removes_everything_that_is_not_complete(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    output, other = killed_run(tmp_path) / "out", tmp_path / "other"
    other.mkdir()
    (other / "f").write_text("x")
    if kind == "file":
        (output / "deep").mkdir()
        (output / "deep" / "evil.txt").write_text("evil")
    elif kind == "root":
        plant(output, "link", other)
    else:
        name = "f" if kind.startswith("complete") else "deep"
        target = other / "f" if kind in ("link", "complete file") else other
        plant(output / name, "pipe" if "pipe" in kind else "link", target)
    with caplog.at_level(logging.INFO, "ascendit"), resume(tmp_path) as staging:
        left = kill.contents(staging.path)
        assert left == ({} if kind.startswith("complete") or kind == "root" else {"f": b"x"})
        if left:
            staging.publish()
            assert os.listdir(tmp_path / "out") == ["f"]
    assert ("not complete" in caplog.text) == (kind != "root")
    assert kill.contents(other) == {"f": b"x"}


@pytest.mark.parametrize("name", ["journal.json", "journal.json.new"])
@pytest.mark.parametrize("kind", ["pipe", "nested", "link"])
def test_a_journal_of_another_kind_of_file_starts_over(tmp_path: Path, name: str, kind: str) -> None:
    other = tmp_path / "other"
    other.write_text("x")
    plant(killed_run(tmp_path) / name, kind, other)
    with resume(tmp_path) as staging:
        assert staging.journal.count == (name == "journal.json.new")
        staging.journal.write()
        staging.publish()
    assert other.read_text() == "x" and sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_large_copies_of_a_killed_run_are_kept(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "large").write_bytes(bytes(1 << 20))
    (tmp_path / "vae" / "small").write_text("x")
    times = []
    for i in range(2):
        with suppress(KeyboardInterrupt), resume(tmp_path) as staging:
            link_or_copy(tmp_path / "vae", staging.path / "vae", copy=True, journal=staging.journal)
            times.append((staging.path / "vae" / "large").stat().st_mtime_ns)
            if i == 0:
                raise KeyboardInterrupt
            staging.publish()
    assert times[0] == times[1]
    assert kill.contents(tmp_path / "out" / "vae") == {"large": bytes(1 << 20), "small": b"x"}
