"""Output of the commands: results on stdout, everything else on stderr.

Only this module and the views of `progress` print, so every text of a file passes through `escaped`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import typer

from ascendit.errors import AscenditError, escaped
from ascendit.report import json_text
from ascendit.version import versions

COMMON = {"-q": "quiet", "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose"}
"""Flag of every command -> its field of Output. The parsers of the commands do not have them."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Prints results, notes and errors: how much, and as text or JSON, depends on the flags."""

    quiet: bool = False
    verbose: bool = False
    json: bool = False

    @property
    def silent(self) -> bool:
        """Whether only the result is printed."""
        return self.quiet or self.json

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None if the result goes to a file or another program."""
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else None

    def line(self, text: str = "") -> None:
        """Print one line of the result; line breaks in `text` are escaped."""
        if not self.json:
            print(escaped(text))

    def detail(self, text: str) -> None:
        """Print a line of the result, except with `--quiet`."""
        if not self.quiet:
            self.line(text)

    def note(self, text: str) -> None:
        """Print a note on stderr."""
        if not self.silent:
            print(f"note: {escaped(text)}", file=sys.stderr)

    def warn(self, text: str) -> None:
        """Print a warning on stderr, also with `--quiet`."""
        if not self.json:
            print(f"warning: {escaped(text)}", file=sys.stderr)

    def problem(self, error: dict[str, str]) -> None:
        """Print the error of one of many results, from `AscenditError.as_dict`; `--json` has it elsewhere."""
        if not self.json:
            print_error(error)

    def emit(self, data: dict[str, Any]) -> None:
        """Print the JSON object of a `--json` run."""
        if self.json:
            print(json_text(data))

    def result(
        self,
        data: dict[str, Any],
        lines: Iterable[str],
        error: AscenditError | None = None,
        *,
        colour: bool = False,
    ) -> None:
        """Print the result of a command: `data` with `--json`, else `lines`, with `colour` on a terminal.

        With `error`, a QualityError, print it too and raise typer.Exit with its exit code.
        """
        self.emit(data | ({"error": error.as_dict()} if error else {}))
        if colour and not self.json and sys.stdout.isatty():
            print_coloured(lines)
        else:
            for line in lines:
                self.line(line)
        if error:
            if not self.json:
                print_error(error.as_dict())
            raise typer.Exit(error.exit_code)

    def fail(self, error: dict[str, str], details: Mapping[str, Any] | None = None) -> None:
        """Print an error: as the JSON object, or as text on stderr. `error`: from `AscenditError.as_dict`.

        `details`: more keys of the object.
        """
        if self.json:
            self.emit({**(details or {}), "error": error})
        else:
            print_error(error)

    def work(self) -> AbstractContextManager[object]:
        """Redirect output of libraries to stderr, so that stdout has only the result."""
        return redirect_stdout(sys.stderr)


@contextmanager
def log_warnings() -> Iterator[list[str]]:
    """Collect the warnings that ascendit logs, for `--json`; the log prints them on stderr as before."""
    import logging

    texts: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    logger, collect = logging.getLogger("ascendit"), Collect(logging.WARNING)
    logger.addHandler(collect)
    try:
        yield texts
    finally:
        logger.removeHandler(collect)


def quiet_libraries() -> None:
    """Turn off the loading bars of transformers; ascendit shows its own."""
    try:
        from transformers.utils import logging
    except ImportError:
        return  # reported when the model loads
    logging.disable_progress_bar()


STATUSES = {
    "green": "ok|works|PASS|passed|exact|close|same size|unchanged",
    "bold red": "NOT OK|DAMAGED|FAIL|failed|missing|too old|too little|broken|probe failed|differs",
    "yellow": "absent|unlisted|not checked|not recorded",
}
"""Style -> statuses that have it, if they are a cell of a table."""


def print_coloured(lines: Iterable[str]) -> None:
    """Print lines on a terminal: titles bold, statuses coloured. Without colour if NO_COLOR is set."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        text = Text(escaped(line))
        text.highlight_regex(r"^\S.*?(?=  )", "bold")
        for style, statuses in STATUSES.items():
            text.highlight_regex(rf"(?:(?<=  )|^)(?:{statuses})(?=  |$)", style)
        text.highlight_regex(r"(?<=  )E-[A-Z]{3}-\d\d|^Problem(?=  )", "bold red")
        console.print(text)


def print_error(error: dict[str, str]) -> None:
    """Print got / needs / try on stderr. `error`: from `AscenditError.as_dict`."""
    head, first = f"error[{error['code']}]", escaped(error["got"])
    details = f"  needs  {escaped(error['needs'])}\n  try    {escaped(error['try'])}"
    if not sys.stderr.isatty():
        print(f"{head}: {first}\n{details}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble((head, "bold red"), f": {first}\n{details}")
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def traceback_text(error: BaseException) -> str:
    """The traceback of `error`, with its lines escaped."""
    import traceback

    lines = "".join(traceback.format_exception(error)).split("\n")
    return "\n".join(map(escaped, lines))


def report_internal_error(error: BaseException, output: Output) -> int:
    """Print an unexpected exception briefly and write its traceback to a log file. Returns exit code 1."""
    output.fail(internal_error(error, output))
    return 1


def internal_error(error: BaseException, output: Output) -> dict[str, str]:
    """The record of an unexpected exception, whose traceback is written to a log file."""
    import tempfile

    trace = traceback_text(error)
    with tempfile.NamedTemporaryFile(
        "w", prefix="ascendit-error-", suffix=".log", delete=False, encoding="utf-8"
    ) as log:
        log.write(f"{versions()}\n{sys.argv}\n{trace}")
    if output.verbose:
        print(trace, file=sys.stderr, end="")
    return {
        "code": "internal",
        "got": f"internal error, {type(error).__name__}: {str(error).strip() or 'no message'}",
        "needs": "a fix in ascendit or in a library: this is a bug",
        "try": f"report it with the log {log.name}; ascendit -v shows the traceback",
        "log": log.name,
    }
