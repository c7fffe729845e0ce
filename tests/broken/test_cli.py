"""A few broken models passed to the program: an exit code, the error code on stderr, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from broken import make
from broken.registry import CASES

SRC = Path(__file__).parents[2] / "src"
ARGUMENTS = {"inspect": [], "repack": ["-o", "out"], "quantize": ["-o", "out", "--scheme", "mxfp8"]}
HANDFUL = (
    "raw_header_past_end",
    "index_parent",
    "config_deep",
    "weight_without_scale",
    "folder_empty",
    "nothing_there",
)


def run(verb: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ascendit", verb, *arguments, *ARGUMENTS[verb]]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("verb", ARGUMENTS)
@pytest.mark.parametrize("name", HANDFUL)
def test_the_program(tmp_path: Path, name: str, verb: str) -> None:
    assert make.MODULES
    case = CASES[name]
    source = case.build(tmp_path / "src")
    (tmp_path / "work").mkdir()
    done = run(verb, str(source), cwd=tmp_path / "work")
    assert done.returncode == (2 if case.code.startswith("E-USE") else 1), done.stderr
    assert case.expected(verb) in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "work").iterdir()) == []


def test_json_is_one_object(tmp_path: Path) -> None:
    source = CASES["manifest_says_float"].build(tmp_path / "src")
    done = run("repack", str(source), "--json", cwd=tmp_path)
    error = json.loads(done.stdout or done.stderr)
    assert "E-CKP-07" in json.dumps(error)
