"""The pages are correct: tables match the code, links resolve, and the examples run.

Every `bash` and `python` block runs once, in page order, in one folder per page. The line before a block may
be `<!-- no-test: reason -->`, or `<!-- exit: 2 E-REQ-01 -->` for one that must fail with this exit code and
error. `make` lines run with `make -n`, which checks that their targets exist. A `text` block after a command
shows its output.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import ascendit
from ascendit.family import PRESETS

REPO = Path(__file__).resolve().parents[2]
DEMO = REPO / "src" / "ascendit" / "demo" / "models" / "demo"
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
SHOWN = ("doctor.md", "inspect.md", "quantize.md", "repack.md")
"""The pages whose output blocks are compared."""
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SECONDS = 300


class Block(NamedTuple):
    page: str
    line: int
    language: str
    code: str
    no_test: str
    """Reason not to run it; empty: it runs."""
    exit_code: int = 0
    error: str = ""

    @property
    def needs_demo(self) -> bool:
        return bool(re.search(r"demo\b", self.code)) and not self.code.startswith("make")


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        mark = match["mark"] or ""
        no_test = mark.removeprefix("no-test: ") if mark.startswith("no-test: ") else ""
        code, _, error = (
            mark.removeprefix("exit: ").partition(" ") if mark.startswith("exit: ") else ("0", "", "")
        )
        line = text.count("\n", 0, match.start("code"))
        name = str(page.relative_to(REPO))
        yield Block(name, line, match["language"], match["code"], no_test, int(code), error)


Done = subprocess.CompletedProcess[str]
BLOCKS = [block for page in PAGES for block in blocks(page) if block.language in ("bash", "python")]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", REPO / "tools" / "docs_tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- tables and links ---------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tables_match_the_code(page: Path, tables: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(tables.TABLE.findall(text))
    assert tables.rewrite(text) == text, "stale: run `make docs`"


def test_every_flag_of_every_command_is_on_one_page(tables: ModuleType) -> None:
    text = (REPO / "docs" / "cli.md").read_text(encoding="utf-8")
    missing = []
    for name in ("", *tables.command("").commands):
        for param in tables.command(name).params:
            if param.param_type_name == "option" and "--help" not in param.opts:
                row = f"| {', '.join(f'`{flag}`' for flag in param.opts)}"
                missing += [] if row in text else [f"{name} {param.opts}"]
    assert missing == []


def test_python_names_in_the_pages_exist() -> None:
    names = {n for page in PAGES for n in re.findall(r"\bascendit\.(\w+)", page.read_text(encoding="utf-8"))}
    names -= {"json", "md", "partial", "readthedocs", "mp4"}
    assert names > {"load", "quantize", "repack", "inspect"}
    assert [
        name
        for name in sorted(names)
        if importlib.util.find_spec(f"ascendit.{name}") is None and not hasattr(ascendit, name)
    ] == []


def test_every_table_is_in_a_page_and_a_stale_one_is_detected(tables: ModuleType) -> None:
    shown = {name for page in PAGES for _, name, _ in tables.TABLE.findall(page.read_text(encoding="utf-8"))}
    assert shown == set(tables.TABLES)
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert "| Wan2.2-T2V-A14B | text | 1280x720 | 81 | 16 | 40 | 12 | 4 / 3 | 0.875 |" in readme
    assert tables.rewrite(readme.replace("| 12 | 4 / 3 |", "| 5 | 5 |")) == readme


def anchors(page: Path) -> set[str]:
    """Anchors of a page: headings as GitHub names them, and `<a id>`."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    named = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    return named | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not DEMO.exists() and "images/" in path:
            continue  # made from the demo model
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_errors_in_the_pages_exist() -> None:
    from ascendit.errors import ERROR_CODES

    for page in PAGES:
        named = set(re.findall(r"E-[A-Z]{3}-\d\d", page.read_text(encoding="utf-8")))
        assert named <= set(ERROR_CODES), page.name


def test_the_changelog_has_this_version() -> None:
    import ascendit

    versions = re.findall(r"^## \[([\d.]+)\]", (REPO / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert versions[0] == ascendit.__version__


# ---- examples -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Page -> the folder in which its blocks run."""
    return {page: tmp_path_factory.mktemp("page") for page in {block.page for block in BLOCKS}}


def run(block: Block, folder: Path, warm: Path) -> Done:
    environment = {**os.environ, "PATH": f"{warm}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"}
    python, bash = [str(warm / "python"), "-c"], ["bash", "-euo", "pipefail", "-c"]
    interpreter = python if block.language == "python" else bash
    code = block.code
    if code.startswith("make "):
        folder, code = REPO, re.sub(r"^make ", "make -n ", code, flags=re.M)
    return subprocess.run(
        [*interpreter, code],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@pytest.fixture(scope="module")
def ran(folders: dict[str, Path], warm: Path) -> Callable[[Block], Done]:
    """Runs a block in the folder of its page, once."""
    return cache(lambda block: run(block, folders[block.page], warm))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{b.page}:{b.line}")
def test_the_example_runs(block: Block, ran: Callable[[Block], Done]) -> None:
    if block.no_test:
        pytest.skip(f"marked: {block.no_test}")
    if block.needs_demo and not DEMO.exists():
        pytest.skip("the demo model is not in src/ascendit/demo/models")
    done = ran(block)
    assert done.returncode == block.exit_code, done.stdout + done.stderr
    if block.error:
        assert block.error in done.stderr


def shown_errors() -> list[tuple[Block, str]]:
    """Each block that must fail with an error and is followed by a `text` block, with that text."""
    shown = []
    for page in PAGES:
        page_blocks = list(blocks(page))
        pairs = zip(page_blocks, page_blocks[1:], strict=False)
        shown += [(a, b.code) for a, b in pairs if a.error and b.language == "text"]
    return shown


@pytest.mark.parametrize(("block", "text"), shown_errors(), ids=lambda x: getattr(x, "page", ""))
def test_the_error_shown_is_the_one_raised(block: Block, text: str, ran: Callable[[Block], Done]) -> None:
    if not DEMO.exists():
        pytest.skip("the demo model is not in src/ascendit/demo/models")
    assert ran(block).stderr.strip() == text.strip()


def folded(text: str) -> str:
    """The text with single spaces: columns may be wider than a page."""
    return "".join(" ".join(line.split()) + "\n" for line in text.strip().splitlines())


def pattern(shown: str) -> str:
    """A regular expression for an output block: `...` matches anything, a line of it any number of lines."""
    lines = []
    for line in folded(shown).splitlines():
        exact = re.escape(line).replace(re.escape("..."), ".*")
        lines.append(r"(?:.*\n)*" if line == "..." else f"{exact}\n")
    return "".join(lines)


@pytest.mark.parametrize("page", SHOWN)
def test_shown_output_is_current(page: str, ran: Callable[[Block], Done]) -> None:
    if not DEMO.exists():
        pytest.skip("the demo model is not in src/ascendit/demo/models")
    compared = 0
    page_blocks = list(blocks(REPO / "docs" / page))
    for block, after in zip(page_blocks, [*page_blocks[1:], None], strict=True):
        if block.language != "bash" or block.no_test:
            continue
        done = ran(block)
        if after is None or after.language != "text":
            continue
        output = done.stderr if block.exit_code == 2 else done.stdout
        assert re.fullmatch(pattern(after.code), folded(output)), done.stdout + done.stderr
        compared += 1
    assert compared > 0


def test_the_report_on_a_new_model_is_current(ran: Callable[[Block], Done]) -> None:
    page_blocks = list(blocks(REPO / "docs" / "new-models.md"))
    code, shown = (next(b for b in page_blocks if b.language == kind) for kind in ("python", "text"))
    done = ran(code)
    assert done.stdout == shown.code, done.stderr


EXAMPLE_OUTPUTS = {"01_generate.py": "out.mp4", "02_quantize.py": "out"}
"""Example -> its argument, the file or folder that it writes."""


@pytest.mark.parametrize("path", sorted((REPO / "examples").glob("*.py")), ids=lambda p: p.name)
def test_example_files_are_short_and_run(path: Path, tmp_path: Path, warm: Path) -> None:
    code = path.read_text(encoding="utf-8")
    assert len(code.splitlines()) <= 40
    if not DEMO.exists():
        pytest.skip("the demo model is not in src/ascendit/demo/models")
    output = EXAMPLE_OUTPUTS[path.name]
    block = Block(path.name, 1, "bash", f'python "{path}" {output}', "")
    done = run(block, tmp_path, warm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / output).stat().st_size > 0


def test_the_line_for_distilled_models_has_the_timesteps_of_their_training(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ascendit.cli.main import main

    [line] = [t for t in (REPO / "docs/quickstart.md").read_text().splitlines() if "Distilled models" in t]
    preset, flags = re.findall(r"`(--[^`]*)`", line)
    assert main(["generate", "--demo", "x", *shlex.split(flags), "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schedule"]["timesteps"] == pytest.approx([1000, 937.5, 833.3333, 625])
    name = preset.removeprefix("--preset ")
    same = {k: v for k, v in PRESETS[name].fields.items() if k != "schedule"}
    assert {
        k: tuple(v) if isinstance(v, list) else v for k, v in data["request"].items()
    }.items() >= same.items()
