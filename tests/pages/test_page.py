"""The HTML reports: well-formed, self-contained, escaped; and the files they are written to."""

from __future__ import annotations

import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.pages import charts
from ascendit.pages.page import (
    Cell,
    Figure,
    Page,
    Part,
    Pictures,
    Section,
    Table,
    check_report_file,
    write_report,
)

EVIL = "<img src=x onerror=alert(1)>'\" \x1b[31m\u202e"


class Reader(HTMLParser):
    """Collects tags, and checks that they are nested and load nothing."""

    VOID = frozenset(("meta", "img"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(markup: str) -> Reader:
    """Parse a page, which must have no script, and no reference but data."""
    reader = Reader()
    reader.feed(markup)
    reader.close()
    assert reader.open == []
    for tag, attributes in reader.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:") and "href" not in attributes
        assert (attributes.get("xlink:href") or "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", markup)
    return reader


def example(name: str) -> Page:
    table = Table(head=(name, "dB"), rows=[(name, "1.50 dB"), (Cell(name, "bad"), "-")], title=name)
    parts: list[Part] = [
        table,
        Figure(svg=charts.bars({name: 1.0}, "share", {name: name}), caption=name),
        Pictures(images=[(name, b"\x89PNG")], title=name),
    ]
    folded = Table(head=(name,), rows=[], title=name, folded=True)
    return Page(title=name, about={name: name, "empty": ""}, sections=[Section(name, [*parts, folded], name)])


def test_every_text_is_escaped() -> None:
    markup = example(EVIL).markup()
    reader = read(markup)
    shown = "<img src=x onerror=alert(1)>'\" \\x1b[31m\\u202e"
    assert reader.text.count(shown) == 17 and "\x1b" not in markup and "\u202e" not in markup
    assert [tag for tag, _ in reader.tags].count("img") == 1
    assert "empty" not in reader.text


def test_the_page_is_readable_in_light_and_dark_and_loads_nothing() -> None:
    markup = example("x").markup()
    assert "prefers-color-scheme:dark" in markup and "color-scheme:light dark" in markup
    policy = [a["content"] for t, a in read(markup).tags if t == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_numbers_are_aligned_by_column() -> None:
    rows: list[tuple[str | Cell, ...]] = [
        ("a", "1.50 dB", Cell("equal", "good")),
        ("b", "-", Cell("3/4", "bad")),
        ("c", "2 dB", "1/2  50.0%"),
    ]
    tags = read(Table(head=("name", "dB", "count"), rows=rows).markup()).tags
    cells = [(tag, attributes.get("class")) for tag, attributes in tags if tag in ("td", "th")]
    assert cells[:6] == [("th", None), ("th", "n"), ("th", "n"), ("td", None), ("td", "n"), ("td", "n good")]


# ---- files --------------------------------------------------------------------------------------


def test_the_suffix_selects_page_or_json(tmp_path: Path) -> None:
    for name in ("new/a.html", "a.HTML"):
        write_report(tmp_path / name, {"a": 1}, lambda: example("x"))
        assert (tmp_path / name).read_text().startswith("<!doctype html>")
    for name in ("a.json", "a.txt"):
        write_report(tmp_path / name, {"a": Path("b")}, lambda: example("x"))
        assert json.loads((tmp_path / name).read_text()) == {"a": "b"}
    assert sorted(os.listdir(tmp_path)) == ["a.HTML", "a.json", "a.txt", "new"]


def test_a_failed_report_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path / "a.html", {}, lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert (tmp_path / "a.html").read_text() == "old" and os.listdir(tmp_path) == ["a.html"]


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(EnvironmentProblem, match="cannot write in") as e:
            write_report(folder / "a.json", {})
        assert e.value.code == "E-ENV-02"


def test_existing_reports_need_overwrite(tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    check_report_file(file)
    file.write_text("mine")
    with pytest.raises(UsageError, match="already exists") as e:
        check_report_file(file)
    assert e.value.code == "E-USE-03" and e.value.fix.endswith("a-2.html")
    check_report_file(file, overwrite=True)
    (tmp_path / "b.html").mkdir()
    with pytest.raises(UsageError, match="E-USE-03"):
        check_report_file(tmp_path / "b.html", overwrite=True)


def test_names_and_folders_are_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="E-USE-01"):
        check_report_file(tmp_path / "a.txt")
    check_report_file(tmp_path / "a.txt", any_name=True)
    with pytest.raises(EnvironmentProblem, match="E-ENV-02"):
        check_report_file(Path("/proc/none/a.html"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    check_report_file(tmp_path / "a.json")
    with pytest.raises(EnvironmentProblem, match="matplotlib") as e:
        check_report_file(tmp_path / "a.html")
    assert (e.value.code, e.value.fix) == ("E-ENV-01", "pip install matplotlib")
