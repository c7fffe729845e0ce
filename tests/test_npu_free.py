"""Only the folders of `NPU_FOLDERS` may refer to NPUs: no other folder has a branch on them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ascendit

SRC = Path(ascendit.__file__).parent
NPU_FOLDERS = ("device", "twin", "ops", "doctor")
NPU = re.compile(r"(^|[^a-z])(npu|twin|mindiesd|cann)([^a-z]|$)|torch_npu", re.I)
MODULES = re.compile(r"torch_npu|mindiesd|ascendit\.(twin|ops\.npu|device\.npu\w*)")
DEVICE = re.compile(r"(^|\.)device\.(kind|chip|operators|backend)$")


def sources() -> list[Path]:
    return [p for p in sorted(SRC.rglob("*.py")) if p.relative_to(SRC).parts[0] not in NPU_FOLDERS]


def conditions(node: ast.AST) -> Iterator[ast.AST]:
    """The conditions of this node: tests of if, while, assert and comprehensions, and cases."""
    if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
        yield node.test
    elif isinstance(node, ast.comprehension):
        yield from node.ifs
    elif isinstance(node, ast.Match):
        yield node.subject
        yield from (case.pattern for case in node.cases)
    elif isinstance(node, ast.Compare | ast.BoolOp):
        yield node


def about_npus(tree: ast.AST) -> set[str]:
    """`line: code` of every branch on NPUs, import of NPU modules and use of torch.npu."""
    uses = set()
    for node in ast.walk(tree):
        for condition in conditions(node):
            if NPU.search(ast.unparse(condition)):
                uses.add(f"{condition.lineno}: if {ast.unparse(condition)}")  # type: ignore[attr-defined]
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [f"{base}{alias.name}" for alias in node.names]
            uses |= {f"{node.lineno}: import {n}" for n in names if MODULES.match(n)}
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if re.fullmatch(r"torch\.npu|torch\.ops\.(npu|mindiesd)", text) or DEVICE.search(text):
                uses.add(f"{node.lineno}: {text}")
    return uses


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(SRC)))
def test_no_branch_on_npus(path: Path) -> None:
    uses = about_npus(ast.parse(path.read_text(encoding="utf-8")))
    assert not uses, f"{path}: use the Device or Ops argument: {sorted(uses)}"


def test_the_check_detects_npu_code() -> None:
    code = (
        'if device.startswith("npu"):\n    pass\n'
        "import torch_npu\n"
        "from ascendit.ops.npu.linear import list_kernels\n"
        "from ascendit.device import npu_runtime\n"
        "torch.npu.synchronize()\n"
        "x = torch.ops.mindiesd.adaln(x)\n"
        'y = 1 if kind == "twin" else 2\n'
        "z = [d for d in all if is_npu(d)]\n"
        "self.device.chip\n"
        'print("an NPU", input, "twins are fine in text")\n'
        "if not inputs and winter:\n    pass\n"
    )
    lines = sorted({int(x.partition(":")[0]) for x in about_npus(ast.parse(code))})
    assert lines == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert all((SRC / folder).is_dir() for folder in NPU_FOLDERS) and len(sources()) > 50
