"""Prompts and seeds of many videos: files, ranges, combinations."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ascendit.cli.prompts import Row, combinations, parse_seeds, read_prompts
from ascendit.errors import UsageError
from ascendit.option_text import command_line


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa red circle\r\n\n  # a note\n  红色的圆 # not a note \na\u2028b\n".encode())
    rows = read_prompts(str(file))
    assert [row.prompt for row in rows] == ["a red circle", "红色的圆 # not a note", "a\u2028b"]
    assert rows[1].source == f"line 4 of {file}" and not rows[1].fields


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a\nb")))
    assert [(row.prompt, row.source) for row in read_prompts("-")] == [
        ("a", "line 1 of standard input"),
        ("b", "line 2 of standard input"),
    ]


def test_rows_with_fields(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": "#1", "seed": 3, "fps": "23.976"}, {"prompt": "b", "seconds": 2}]
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_prompts(str(file))
    assert (first.prompt, first.fields["seed"], round(float(first.fields["fps"]), 3)) == ("#1", 3, 23.976)
    assert second.fields == {"seconds": 2.0}


@pytest.mark.parametrize(
    ("name", "content", "code", "text"),
    [
        ("a.txt", b"\n# only notes\n", "E-USE-01", "no prompt in"),
        ("a.txt", b"\xff\xfe", "E-USE-01", "UTF-8"),
        ("missing.txt", None, "E-USE-02", "No such file"),
        (".", None, "E-USE-02", "directory"),
        ("a.json", b'["a"]', "E-USE-01", "a.json"),
        ("a.jsonl", b"{", "E-USE-01", "line 1 of"),
        ("a.jsonl", b'["a"]', "E-USE-01", "has no prompt"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}', "E-USE-01", "line 2 of"),
        ("a.jsonl", b'{"prompt": "a", "device": "cuda"}', "E-USE-01", "device"),
        ("a.jsonl", b'{"prompt": "a", "steps": 4}', "E-USE-01", "unknown key steps"),
        ("a.jsonl", b'{"prompt": "a", "seed": "x"}', "E-USE-01", "seed"),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, name: str, content: bytes | None, code: str, text: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=text) as e:
        read_prompts(str(tmp_path / name))
    assert e.value.code == code


def test_seeds() -> None:
    assert parse_seeds("7") == (7,) and parse_seeds("0-3") == (0, 1, 2, 3)
    assert parse_seeds("1, 2,9") == (1, 2, 9) and parse_seeds("5-5,0-1") == (5, 0, 1)
    assert parse_seeds(str(2**63 - 1)) == (2**63 - 1,)


@pytest.mark.parametrize(
    "text",
    ["", "-1", "3-1", "1,,2", "a", "1.5", "1,1", "0-3,2", "0-99999999999", str(2**63), "0-", "1;2"],
)
def test_seeds_that_are_refused(text: str) -> None:
    with command_line("generate"), pytest.raises(UsageError) as e:
        parse_seeds(text)
    assert e.value.code == "E-USE-01" and "--seed" in e.value.fix or "split" in e.value.fix
    if e.value.fix.startswith("--seed "):
        assert parse_seeds(e.value.fix.removeprefix("--seed "))


def seeds_of(rows: list[Row], fields: dict[str, int], seeds: tuple[int, ...], n: int | None) -> list[object]:
    return [(number, made.get("seed")) for number, _, made in combinations(rows, fields, seeds, n)]


def test_every_row_gets_every_seed() -> None:
    rows = [Row(prompt="a"), Row(prompt="b", fields={"seed": 40})]
    assert seeds_of(rows, {"seed": 5}, (1, 2), None) == [(1, 1), (1, 2), (2, 40)]
    assert seeds_of(rows, {"seed": 5}, (), 2) == [(1, 5), (1, 6), (2, 40), (2, 41)]
    assert seeds_of(rows, {"seed": 5}, (5,), None) == [(1, 5), (2, 40)]
    assert seeds_of(rows[:1], {}, (), None) == [(1, None)]  # the request draws one
    made = list(combinations([Row(prompt="a")], {}, (), 2))
    assert made[1][2]["seed"] == made[0][2]["seed"] + 1
    fields = [
        made
        for *_, made in combinations([Row(prompt="a", fields={"seconds": 1.0})], {"num_frames": 9}, (), 1)
    ]
    assert "num_frames" not in fields[0]


@pytest.mark.parametrize(("seeds", "n"), [((1, 2), 2), ((), 0), ((), -1), ((), 10_001)])
def test_numbers_of_videos_that_are_refused(seeds: tuple[int, ...], n: int) -> None:
    with pytest.raises(UsageError):
        list(combinations([Row(prompt="a")], {}, seeds, n))
