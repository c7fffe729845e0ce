"""The screens that the pages show are those that come: each `text` block after a command is compared.

Spaces are folded, as columns may be wider than a page. `...` stands for anything, on a line of its own for
any number of lines.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
PAGES = ("doctor.md", "inspect.md", "quantize.md", "repack.md")


def folded(text: str) -> str:
    return "".join(" ".join(line.split()) + "\n" for line in text.strip().splitlines())


def pattern(shown: str) -> str:
    lines = []
    for line in folded(shown).splitlines():
        exact = re.escape(line).replace(re.escape("..."), ".*")
        lines.append(r"(?:.*\n)*" if line == "..." else f"{exact}\n")
    return "".join(lines)


@pytest.mark.parametrize("page", PAGES)
def test_what_the_page_shows_is_what_comes(page: str, tmp_path: Path) -> None:
    if not (REPO / "src" / "ascendit" / "demo" / "models").is_dir():
        pytest.skip("the demo model is not in src/ascendit/demo/models")
    ascendit = tmp_path / "bin" / "ascendit"
    ascendit.parent.mkdir()
    ascendit.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ascendit "$@"\n')
    ascendit.chmod(0o755)
    (folder := tmp_path / "page").mkdir()
    path = f"{ascendit.parent}{os.pathsep}{os.environ['PATH']}"
    source = os.pathsep.join(filter(None, [str(REPO / "src"), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PATH": path, "NO_COLOR": "1", "PYTHONPATH": source}
    compared = 0
    text = (REPO / "docs" / page).read_text(encoding="utf-8")
    found = [(m[1], m[2], text[: m.start()].splitlines()[-1]) for m in BLOCK.finditer(text)]
    for (language, code, mark), after in zip(found, [*found[1:], None], strict=True):
        if language != "bash" or mark.startswith("<!-- no-test"):
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if after is None or after[0] != "text":
            continue
        came = done.stderr if "exit: 2" in mark else done.stdout
        assert re.fullmatch(pattern(after[1]), folded(came)), done.stdout + done.stderr
        compared += 1
    assert compared > 0
