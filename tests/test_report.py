"""Helpers of all reports."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from ascendit.report import (
    beginning,
    columns,
    counted,
    group_by,
    human_bytes,
    json_data,
    json_text,
    selected,
    shell_line,
    short_path,
    titled,
    totals,
)


def test_columns_have_the_width_of_their_widest_cell_and_no_trailing_blanks() -> None:
    rows = [("layer", "dB", ""), ("blocks.0.attn1", f"{7.5:6.2f}", "x"), ("", "-", "a longer end")]
    assert columns(rows, indent=" ") == [
        " layer           dB",
        " blocks.0.attn1    7.50  x",
        "                 -       a longer end",
    ]
    assert columns([("a", "b")], first_width=4) == ["a     b"]
    assert columns([]) == columns(iter([]), first_width=3) == []


def test_a_table_fits_a_terminal() -> None:
    rows = [("Model", "demo   layout diffusers"), ("", "a second line of words"), ("Size", "4 KiB")]
    assert columns(rows, width=80) == columns(rows)
    assert columns(rows, width=32) == columns(rows) and columns(rows, width=31) == [
        "Model  demo   layout diffusers",
        "       a second line of words",
        "Size   4 KiB",
    ]
    wide = [("Model", "words " * 12), ("Path", "/a/path/without/any/blank/" * 2)]
    assert columns(wide, width=40) == [
        "Model  words words words words words",
        "         words words words words words",
        "         words words",
        "Path   " + "/a/path/without/any/blank/" * 2,
    ]


def test_a_table_that_is_much_too_wide_has_its_first_cells_above() -> None:
    rows = [("layer or tensor", "scheme", "stored"), ("transformer.blocks.0.attn1", "mxfp8", "e4m3, uint8")]
    assert columns([*rows, ("", "", "bias")], indent=" ", width=30) == [
        " layer or tensor",
        "   scheme  stored",
        " transformer.blocks.0.attn1",
        "   mxfp8  e4m3, uint8",
        "   bias",
    ]


def test_a_path_is_relative_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert short_path(Path("a/b")) == short_path(tmp_path / "a" / "b") == "a/b"
    assert short_path(Path("-rf")) == "./-rf" and short_path(Path("/x/y")) == "/x/y"
    assert [short_path(Path(x)) for x in ("demo", "hf:x", "ms:a/b")] == ["./demo", "./hf:x", "./ms:a/b"]
    assert short_path(Path("demo/x")) == "demo/x" and short_path(Path("demo-2")) == "demo-2"
    assert short_path(tmp_path.parent) == str(tmp_path.parent)


def test_rows_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError):
        columns([("a", "b"), ("c",)])


def test_a_title_appears_once() -> None:
    rows = list(titled([("Kept", ["one", "two"]), ("Nothing", []), ("Size", iter(["three"]))]))
    assert rows == [("Kept", "one"), ("", "two"), ("Size", "three")]


def test_human_bytes() -> None:
    sizes = [human_bytes(n) for n in (0, 1023, 1024, 3 << 19, 5 << 30)]
    assert sizes == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "5.0 GiB"]


def test_counts_and_groups_preserve_order() -> None:
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    groups = group_by(["to_q", "ffn", "to_k"], lambda name: name[:2])
    assert list(groups.items()) == [("to", ["to_q", "to_k"]), ("ff", ["ffn"])]
    total = totals([{"int8": 2, "bf16": 1}, {"fp8": 3, "int8": 4}])
    assert list(total.items()) == [("int8", 6), ("bf16", 1), ("fp8", 3)]


class Verdict(Enum):
    RUNS = "runs"


@dataclass(frozen=True)
class Inner:
    path: Path
    sizes: tuple[int, ...] = (1, 2)
    more: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Outer:
    inner: Inner
    verdict: Verdict = Verdict.RUNS

    @property
    def bits(self) -> float:
        return 4.25


class Own:
    def as_dict(self) -> dict[str, int]:
        return {"own": 1}


def test_json_data() -> None:
    record = Outer(Inner(Path("a/b"), more={"x": (Own(), None)}))
    expected = {"path": "a/b", "sizes": [1, 2], "more": {"x": [{"own": 1}, None]}}
    assert json_data(record) == {"inner": expected, "verdict": "runs"}
    assert selected(record, "bits", "inner") == {"bits": 4.25, "inner": expected}
    assert json.dumps(json_data([record, True, 1.5, "text"]))


def test_json_is_valid_and_has_no_control_characters() -> None:
    data = {"a\x1b\n": ["\x9b\u202e\x7f", "\ud800", "é 猫", {"b": Path("c\udce9")}], "n": 1.5}
    text = json_text(data)
    assert text.replace("\n", "").isprintable() and "é 猫" in text and text.count("\n") == 10
    assert json.loads(text) == {**data, "a\x1b\n": [*data["a\x1b\n"][:3], {"b": "c\udce9"}]}  # type: ignore[index]
    plain = {"a": [1, "x\n", None], "b": {}}
    assert json_text(plain) == json.dumps(plain, indent=2, ensure_ascii=False)


def test_a_shell_reads_the_arguments_of_a_printed_line(tmp_path: Path) -> None:
    arguments = [
        "a b",
        "it's",
        "two\nlines\t\x1b[2J",
        "back\\slash\n'q'",
        "\x7f0",
        "\x9b1",
        "\u202ex",
        "a\udce9f\n",
    ]
    line = shell_line(["printf", "%s\\0", *arguments])
    assert line.isprintable()
    out = subprocess.run(["bash", "-c", line], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert out.stdout.decode(errors="surrogateescape").split("\0")[:-1] == arguments
    assert shell_line(["a b", "it's"]) == shlex.join(["a b", "it's"])


def test_the_beginning_of_a_text() -> None:
    assert beginning("a" * 60) == "a" * 60
    assert beginning("a" * 61) == "a" * 57 + " .."
    assert beginning("one two three", 8) == "one t .."
