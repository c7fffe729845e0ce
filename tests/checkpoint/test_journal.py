"""The list of complete files, which is always valid on disk."""

import json
import os
from pathlib import Path

import pytest

from ascendit.checkpoint.journal import CompleteFile, Journal


def journal_in(tmp_path: Path) -> Journal:
    (tmp_path / "out" / "transformer").mkdir(parents=True)
    (tmp_path / "out" / "transformer" / "a").write_bytes(bytes(5))
    return Journal(tmp_path / "journal.json", tmp_path / "out", "do this")


def test_added_files_are_read_again(tmp_path: Path) -> None:
    journal, file = journal_in(tmp_path), tmp_path / "out" / "transformer" / "a"
    assert (journal.count, journal.complete(file)) == (0, None)
    journal.add(file, 5, "ab" * 32)
    again = Journal.read(tmp_path / "journal.json", tmp_path / "out")
    assert again is not None
    assert (again.count, again.fingerprint) == (1, "do this")
    assert again.complete(file) == CompleteFile(5, "ab" * 32)
    assert again.complete(tmp_path / "out" / "transformer" / "b") is None


@pytest.mark.parametrize("size", [0, 4, 6, None])
def test_a_file_of_another_size_is_not_complete(tmp_path: Path, size: int | None) -> None:
    journal, file = journal_in(tmp_path), tmp_path / "out" / "transformer" / "a"
    journal.add(file, 5)
    file.unlink()
    if size is not None:
        file.write_bytes(bytes(size))
    assert journal.complete(file) is None


def test_a_failed_write_leaves_the_old_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = journal_in(tmp_path)
    journal.add(tmp_path / "out" / "x", 1)
    before = journal.path.read_bytes()

    def fail(*names: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        journal.add(tmp_path / "out" / "y", 1)
    assert journal.path.read_bytes() == before


def test_a_journal_is_invalid_after_a_restart_of_the_machine(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.write()
    data = json.loads(journal.path.read_text())
    journal.path.write_text(json.dumps(data | {"boot": "long ago"}))
    assert Journal.read(journal.path, journal.root) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"fingerprint": ""}', '{"fingerprint": "", "boot": "", "files": 3}'],
)
def test_an_invalid_journal_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "journal.json").write_text(text)
    assert Journal.read(tmp_path / "journal.json", tmp_path) is None
    assert Journal.read(tmp_path / "nothing.json", tmp_path) is None
