"""Printed text: no control character of a file, a flag or a library reaches the terminal."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import ascendit
from ascendit import cli
from ascendit.cli.main import _set_up_log, main, report_error
from ascendit.cli.output import Output, traceback_text
from ascendit.cli.progress import LineView
from ascendit.errors import CheckpointError, escaped
from ascendit.progress import Progress

EVIL = "x\x1b]0;title\x07\x1b[8m\x9b31m\u202egnp\x7f\r\nerror[E-USE-01]: fake"
PRINTING = ("print", "sys.stdout.write", "sys.stderr.write")
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e-\u200f\u2028-\u202e\u2066-\u2069]")


def clean(text: str) -> bool:
    return not RAW.search(text) and not re.search(r"^error\[E-USE-01\]: fake", text, re.MULTILINE)


def test_every_way_to_print_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    error = CheckpointError(EVIL, needs=EVIL, fix=EVIL, code="E-CKP-04")
    for output in (Output(), Output(json=True), Output(verbose=True)):
        output.line(EVIL)
        output.detail(EVIL)
        output.note(EVIL)
        output.emit({EVIL: [EVIL]})
        output.fail(error.as_dict())
        report_error(error, output)
        report_error(ValueError(EVIL.replace("\n", "")), output)  # a traceback keeps its line breaks
        report_error(ImportError(EVIL, name=EVIL), output)
    view = LineView()
    view(Progress(stage=EVIL, step=1, total=1, memory_bytes=0))
    text = "".join(capsys.readouterr())
    assert clean(text), RAW.findall(text)
    assert text.count("x1b]0;title") > 20


def test_json_output_keeps_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).emit({"a": EVIL})
    assert json.loads(capsys.readouterr().out) == {"a": EVIL}


def test_tracebacks_keep_their_lines_and_escape_them() -> None:
    try:
        try:
            raise ValueError(EVIL)
        except ValueError as e:
            raise CheckpointError(EVIL, needs="", fix="", code="E-CKP-04") from e
    except CheckpointError as e:
        text = traceback_text(e)
    assert not RAW.search(text) and text.count("\n") > 8


def test_log_messages_of_libraries_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    root, stream = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(sys, "stderr", stream)
    level = logging.getLogger("ascendit").level
    try:
        logging.captureWarnings(False)  # an earlier test may have run the command line
        warnings.simplefilter("always")  # pytest restores the filters
        _set_up_log(Output())
        logging.getLogger("ascendit").warning("tensor %s", EVIL)
        logging.getLogger("some.library").error(EVIL)
        warnings.warn(EVIL, stacklevel=1)
        try:
            raise ValueError(EVIL)
        except ValueError:
            logging.getLogger("some.library").exception("failed")
    finally:
        logging.captureWarnings(False)
        logging.getLogger("ascendit").setLevel(level)
    assert not RAW.search(stream.getvalue()) and stream.getvalue().count("\\x1b]0;title") >= 4


def test_only_the_escaping_functions_print() -> None:
    """A new `print` in a command belongs into `Output`."""
    prints: dict[str, int] = {}
    for path in sorted(Path(cli.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "sys.stdout.write",
                "sys.stderr.write",
            ):
                if not re.search(
                    r"escaped\(|json_text\(|traceback_text\(|__version__|get_help", ast.unparse(node)
                ):
                    prints[path.name] = prints.get(path.name, 0) + 1
    assert prints == {"output.py": 2}, "print_error and report_internal_error print texts escaped before"


@pytest.mark.parametrize(
    "args",
    [
        ["inspect", EVIL],
        ["inspect", EVIL, "--json"],
        ["generate", "demo", EVIL, "--scheme", EVIL],
        ["generate", "demo", EVIL, "--dry-run"],
        ["generate", "demo", "a", "--set", EVIL],
        ["quantize", "demo", "-o", EVIL, "--scheme", "int8", "--dry-run"],
        [EVIL],
        ["inspect", f"--{EVIL}"],
    ],
)
def test_arguments_are_escaped(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(args)
    assert clean("".join(capsys.readouterr()))


def test_names_in_a_checkpoint_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = json.dumps({EVIL: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    index = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
    }
    (tmp_path / "transformer").mkdir()
    config = {"_class_name": "WanTransformer3DModel", EVIL: EVIL}
    for name, data in (("model_index.json", index), ("transformer/config.json", config)):
        (tmp_path / name).write_text(json.dumps(data))
    weights = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "transformer/diffusion_pytorch_model.safetensors").write_bytes(weights)
    for flags in ([], ["--json"], ["--layers"]):
        main(["inspect", str(tmp_path), *flags])
    main(["quantize", str(tmp_path), "-o", str(tmp_path / "q"), "--scheme", "int8"])
    text = "".join(capsys.readouterr())
    assert clean(text) and "\\x1b" in text


def test_the_working_directory_is_not_on_the_import_path(tmp_path: Path) -> None:
    """`python -m` puts it there, and a checkpoint may have a typer.py."""
    for name in ("typer", "pydantic", "torch", "rich"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('ran')")
    command = [sys.executable, "-m", "ascendit", "--version"]
    source = str(Path(ascendit.__file__).parents[1])
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": source}, check=True
    )
    assert result.stdout.startswith("ascendit ")


# ---- a terminal ---------------------------------------------------------------------------------

LINES = ["Model      demo   layout", "torch      2.13   ok", "Checks     0 missing   NOT OK", EVIL]


def use_terminal(monkeypatch: pytest.MonkeyPatch, no_color: str = "") -> None:
    """stdout is a terminal of 60 columns with colours. Not a fixture: the test's stdout is another object."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for name, value in {"COLUMNS": "60", "TERM": "xterm-256color", "NO_COLOR": no_color}.items():
        monkeypatch.setenv(name, value)


def test_statuses_have_colour_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_terminal(monkeypatch)
    assert Output().width == 60
    Output().result({}, LINES, colour=True)
    text = capsys.readouterr().out
    assert "\x1b[1mModel\x1b[0m" in text and "\x1b[32mok\x1b[0m" in text and "\x1b[1;31mNOT OK" in text
    assert "0 missing  " in text, "only a complete cell is a status"
    plain = re.sub("\x1b\\[[0-9;]*m", "", text)
    assert plain == "".join(f"{escaped(line)}\n" for line in LINES) and clean(plain)


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_terminal(monkeypatch, no_color="1")
    Output().result({}, ["torch  ok"], colour=True)
    text = capsys.readouterr().out
    assert "ok" in text and "\x1b[3" not in text


def test_a_pipe_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert Output().width is None
    Output().result({}, LINES, colour=True)
    assert capsys.readouterr().out == "".join(f"{escaped(line)}\n" for line in LINES)
