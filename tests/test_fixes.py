"""Every `try` line of the sources names commands, flags and values that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import fix_lines
import pytest

import ascendit

SRC = Path(ascendit.__file__).parent


def texts(node: ast.expr) -> Iterator[str]:
    """The texts that an expression can have, with X1 for its variable parts."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "X1" for part in node.values]
        yield "".join(map(str, parts))
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.BinOp):
        for left in [*texts(node.left)] or ["X1"]:
            for right in [*texts(node.right)] or ["X1"]:
                yield left + right


def fixes() -> list[tuple[str, str]]:
    every = []
    for path in sorted(SRC.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if re.search(r"\bfix ?=", text) else ():
            value = None
            if isinstance(node, ast.keyword) and node.arg == "fix":
                value = node.value
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).split(".")[-1] == "fix":
                value = node.value
            if value is not None:
                where = f"{path.relative_to(SRC)}:{value.lineno}"
                every += [(where, text) for text in texts(value)]
    return every


def test_every_fix_names_commands_flags_and_values_that_exist() -> None:
    every = fixes()
    assert len(every) > 250
    bad = [
        f"{where}: {problem}   in: {text}" for where, text in every for problem in fix_lines.problems(text)
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "text",
    [
        "add --no-such-flag",
        "--scheme w8a8",
        "--set step=3",
        "ascendit inspekt x",
        "run ascendit inspect MODEL with care",
        "--set dtype=bf16",
    ],
)
def test_the_check_sees_bad_fixes(text: str) -> None:
    assert list(fix_lines.problems(text))
