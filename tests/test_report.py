"""Helpers of all reports."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from ascendit.report import columns, counted, group_by, human_bytes, json_data, selected, titled, totals


def test_columns_have_the_width_of_their_widest_cell_and_no_trailing_blanks() -> None:
    rows = [("layer", "dB", ""), ("blocks.0.attn1", f"{7.5:6.2f}", "x"), ("", "-", "a longer end")]
    assert columns(rows, indent=" ") == [
        " layer           dB",
        " blocks.0.attn1    7.50  x",
        "                 -       a longer end",
    ]
    assert columns([("a", "b")], first_width=4) == ["a     b"]
    assert columns([]) == columns(iter([]), first_width=3) == []


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
