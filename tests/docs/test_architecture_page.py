"""docs/architecture.md matches the source: names in it exist, and its picture is current."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import draw_architecture
import pytest
import test_architecture

REPO = Path(__file__).resolve().parents[2]
SRC = REPO / "src" / "ascendit"
PAGE = (REPO / "docs" / "architecture.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([\w./]+(?:\.py|\.toml|\.md|/))(?:: ([\w.]+))?`")
"""`file`, `folder/` or `file: name`; files of src/ascendit without that prefix."""
OUTSIDE = ("tests/", "tools/", "docs/", "src/")
NAMES = sorted(set(NAMED.findall(PAGE)) - {("cli/NAME.py", "")})


def path_of(name: str) -> Path:
    return (REPO if name.startswith(OUTSIDE) else SRC) / name


@cache
def definitions(path: Path) -> set[str]:
    """`function`, `Class`, `Class.method` and `CONSTANT` at the top of a file."""
    defined: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        if isinstance(node, ast.ClassDef):
            defined |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    return defined


@pytest.mark.parametrize(("file", "name"), NAMES, ids=lambda text: text or "-")
def test_names_in_the_page_exist(file: str, name: str) -> None:
    assert path_of(file).exists(), file
    assert not name or name in definitions(path_of(file)), f"{file} does not define {name}"


def test_absent_names_are_detected() -> None:
    assert len([name for _, name in NAMES if name]) > 60
    assert NAMED.findall("`mx/no.py: encode`, `tests/` and `quant.schemes`") == [
        ("mx/no.py", "encode"),
        ("tests/", ""),
    ]
    assert "nothing" not in definitions(SRC / "errors.py")
    assert {"AscenditError", "AscenditError.__init__"} <= definitions(SRC / "errors.py")


def test_the_tree_is_complete_and_in_import_order() -> None:
    table = PAGE.split("| folder |")[1].split("\n\n")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    rows = [
        name.rstrip("/").removesuffix(".py") for cell in first_cells for name in re.findall(r"`(.*?)`", cell)
    ]
    assert rows == sorted(rows, key=test_architecture.ORDER.index)
    folders = {path.name for path in SRC.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(rows)


# ---- the pictures -------------------------------------------------------------------------------


def test_pictures_are_current() -> None:
    assert draw_architecture.stale_pictures() == {}, "run `make docs`"


def test_the_picture_has_the_tested_import_order() -> None:
    rows = draw_architecture.FOLDERS
    assert rows[0] == "basics"
    assert rows[1:] == [name for name in test_architecture.ORDER if name in rows]
    edges = draw_architecture.import_rows()
    assert all(rows.index(target) < rows.index(row) for row, targets in edges.items() for target in targets)


def test_an_import_changes_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    before, edges = draw_architecture.draw_architecture(), draw_architecture.import_rows()
    assert "mx" in edges["quant"] and "ops" not in edges["twin"]
    monkeypatch.setattr(draw_architecture, "import_rows", lambda: edges | {"twin": edges["twin"] | {"ops"}})
    assert draw_architecture.draw_architecture() != before
