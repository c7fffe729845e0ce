"""What the commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ascendit.errors import AscenditError, UsageError
from ascendit.version import __version__, installed


@dataclass(frozen=True, kw_only=True)
class Output:
    """How much is printed, and in which form."""

    quiet: bool = False
    verbose: bool = False
    json: bool = False

    @property
    def silent(self) -> bool:
        """Nothing but the result is shown."""
        return self.quiet or self.json

    def line(self, text: str = "") -> None:
        """One line of the result."""
        if not self.json:
            print(text)

    def detail(self, text: str) -> None:
        """A line of the result that `--quiet` leaves out."""
        if not self.quiet:
            self.line(text)

    def note(self, text: str) -> None:
        """One line about what is going on, on stderr."""
        if not self.silent:
            print(f"note: {text}", file=sys.stderr)

    def emit(self, data: dict[str, Any]) -> None:
        """The one JSON object of a `--json` run."""
        if self.json:
            print(to_json(data))

    def result(self, data: dict[str, Any], lines: Iterable[str], error: AscenditError | None = None) -> None:
        """What a command found: `data` with `--json`, else `lines`. With `error` the command ends here."""
        self.emit(data | ({"error": error.as_dict()} if error else {}))
        for line in lines:
            self.line(line)
        if error:
            if not self.json:
                print_error(error.as_dict())
            raise typer.Exit(error.exit_code)

    def fail(self, error: dict[str, str]) -> None:
        """An error in its parts, as the one JSON object or as text on stderr."""
        if self.json:
            self.emit({"error": error})
        else:
            print_error(error)

    def work(self) -> AbstractContextManager[object]:
        """Libraries at work: what they print goes to stderr, so that stdout holds the result alone."""
        return redirect_stdout(sys.stderr)


def quiet_libraries() -> None:
    """Turn off the bars that transformers draws while it loads: there is one of our own."""
    try:
        from transformers.utils import logging
    except ImportError:
        return  # loading will say it better
    logging.disable_progress_bar()


def to_json(data: dict[str, Any]) -> str:
    """Indented JSON; paths and other objects become text."""
    import json

    return json.dumps(data, indent=2, ensure_ascii=False, default=str)


def check_report(flag: str, file: Path) -> None:
    """Raise unless `file` is a free name that can be written: before the work, which may take long."""
    from ascendit.pipeline.video import check_writable

    if file.exists():
        raise UsageError(
            f"{flag} {file} exists already",
            needs="a name that is free: reports are not written over",
            fix="another name, or remove the file",
            code="E-USE-03",
        )
    check_writable(file)


def write_report(file: Path, data: dict[str, Any]) -> None:
    """`data` as JSON, in a folder that is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_json(data) + "\n", encoding="utf-8")


def print_error(error: dict[str, str]) -> None:
    """Got / needs / try on stderr. `error`: as from `AscenditError.as_dict`."""
    head, first = f"error[{error['code']}]", error["got"]
    rest = f"  needs  {error['needs']}\n  try    {error['try']}"
    if not sys.stderr.isatty():
        print(f"{head}: {first}\n{rest}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble((head, "bold red"), f": {first}\n{rest}")
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def report_fault(error: BaseException, output: Output) -> int:
    """An exception nobody expected: short on screen, the traceback in a log file. Returns exit code 1."""
    import tempfile
    import traceback

    trace = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile(
        "w", prefix="ascendit-error-", suffix=".log", delete=False, encoding="utf-8"
    ) as log:
        log.write(f"{versions()}\n{sys.argv}\n{trace}")
    if output.verbose:
        print(trace, file=sys.stderr, end="")
    told = {
        "code": "internal",
        "got": f"internal error, {type(error).__name__}: {str(error).strip() or 'no message'}",
        "needs": "nothing from you: this is a fault in ascendit or in a library",
        "try": f"report it with the log {log.name}; ascendit -v shows the traceback",
        "log": log.name,
    }
    output.fail(told)
    return 1


def versions() -> dict[str, str]:
    """Versions of what makes a video, without importing any of it."""
    import platform

    packages = ("torch", "diffusers", "transformers")
    known = dict.fromkeys(packages, "not installed") | installed(*packages)
    return {"python": platform.python_version(), "ascendit": __version__, **known}
