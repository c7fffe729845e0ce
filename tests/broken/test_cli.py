"""A few broken models passed to the program: an exit code, the error code on stderr, no traceback."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from broken import make
from broken.registry import CASES

ARGUMENTS = {"inspect": [], "repack": ["-o", "out"], "quantize": ["-o", "out", "--scheme", "mxfp8"]}
HANDFUL = (
    "raw_header_past_end",
    "index_parent",
    "config_deep",
    "weight_without_scale",
    "folder_empty",
    "nothing_there",
)


@pytest.fixture
def run(warm: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command on a source, in a process of its own."""

    def call(verb: str, source: Path, *more: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [str(warm / "ascendit"), verb, str(source), *more, *ARGUMENTS[verb]]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)

    return call


@pytest.mark.parametrize("verb", ARGUMENTS)
@pytest.mark.parametrize("name", HANDFUL)
def test_the_program(run: Callable[..., Any], tmp_path: Path, name: str, verb: str) -> None:
    assert make.MODULES
    case = CASES[name]
    source = case.build(tmp_path / "src")
    (tmp_path / "work").mkdir()
    done = run(verb, source, cwd=tmp_path / "work")
    assert done.returncode == (2 if case.code.startswith("E-USE") else 1), done.stderr
    assert case.expected(verb) in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "work").iterdir()) == []


def test_json_is_one_object(run: Callable[..., Any], tmp_path: Path) -> None:
    source = CASES["manifest_says_float"].build(tmp_path / "src")
    done = run("repack", source, "--json", cwd=tmp_path)
    error = json.loads(done.stdout or done.stderr)
    assert "E-CKP-07" in json.dumps(error)
