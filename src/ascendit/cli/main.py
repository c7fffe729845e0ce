"""`ascendit`: the table of commands, their shared flags, and the mapping of errors to exit codes.

Exit codes: 0 done, 1 a check failed, 2 usage, 3 environment, 4 out of memory, 130 cancelled.
Commands are imported when they run: `ascendit --help` takes under 0.3 s.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ascendit.cli.output import Output, report_internal_error, traceback_text
from ascendit.environment import disable_device_plugins
from ascendit.errors import (
    AscenditError,
    EnvironmentProblem,
    UsageError,
    escaped,
    is_out_of_memory,
    out_of_memory,
)
from ascendit.version import __version__

COMMANDS = {
    "generate": "Make a video from a prompt.",
    "quantize": "Quantize the transformers of a model.",
    "repack": "Convert a checkpoint to another layout.",
    "inspect": "Show the contents of a checkpoint.",
    "verify": "Check the quality of a model's videos.",
    "doctor": "Check this machine and its libraries.",
}
"""Command (also the name of its module and function) -> the first sentence of its help."""
COMMON = {"-q": "quiet", "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose"}
ANY_MODEL = "Model folder or file in any layout, demo, hf:org/name or ms:org/name."


def flag(shown: str, help: str) -> Any:
    """Make a flag for `Annotated`.

    `shown`: names and metavar as in the help, for example `-o, --output DST`.
    """
    names = shown.replace(",", "").split()
    metavar = None if names[-1].startswith("-") else names.pop()
    return typer.Option(*names, metavar=metavar, help=help)


Source = Annotated[str, typer.Argument(metavar="SRC", help=ANY_MODEL)]
Target = Annotated[Path, flag("-o, --output DST", "Folder to create.")]
Engine = Annotated[str | None, flag("--for ENGINE", "Write the files for vllm-omni, sglang or mindie.")]
Copy = Annotated[bool, flag("--copy", "Copy the other components instead of linking them.")]
Resume = Annotated[
    bool, flag("--resume", "Continue an interrupted run of the same command; a shard is checked by its size.")
]
DryRun = Annotated[bool, flag("--dry-run", "Show the plan; write nothing.")]
Json = Annotated[bool, flag("--json", "Print one JSON object and nothing else.")]


def chosen(ctx: typer.Context, without: Collection[str] = ()) -> dict[str, Any]:
    """Parameter name -> value for the parameters that were set, except `--json` and those in `without`."""
    return {k: v for k, v in ctx.params.items() if v is not None and k not in ("as_json", *without)}


class Group(TyperGroup):
    """The commands by name."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        names: dict[str, Any] = dict.fromkeys(COMMANDS)
        self.commands = names  # get_command imports a command's module on demand

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, or None."""
        if cmd_name not in COMMANDS:
            return None
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(getattr(importlib.import_module(f"ascendit.cli.{cmd_name}"), cmd_name))
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands in the help, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    cls=Group,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def common(
    ctx: typer.Context,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the result.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Print decisions with their reasons, and tracebacks.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Wan video diffusion on Ascend NPUs, CUDA or a plain CPU. Start with: ascendit doctor"""
    if version:
        print(f"ascendit {__version__}")
        ctx.exit()
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        ctx.exit(2)
    if ctx.invoked_subcommand != "doctor":  # doctor examines the unmodified `import torch`
        disable_device_plugins()  # with torch_npu but without CANN, `import torch` would raise
    _set_up_log(ctx.obj)


CLOSED_PIPE = 141
"""Exit code if the reader of the output ends first, as `head` does: 128 + SIGPIPE, as of other programs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script: run `argv` (default: the command line) and return the exit code."""
    try:
        code = _run(argv)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as e:
        # after a BrokenPipeError, typer's main wraps stdout and ends the process
        if isinstance(e, SystemExit) and type(sys.stdout).__name__ != "PacifyFlushWrapper":
            raise
        if argv is None:  # the interpreter flushes both again
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
                os.dup2(null.fileno(), 2)
        return CLOSED_PIPE
    return code


def _run(argv: Sequence[str] | None) -> int:
    args, output = common_flags(list(sys.argv[1:] if argv is None else argv))
    command = typer.main.get_command(app)
    try:
        code = command.main(args, "ascendit", standalone_mode=False, obj=output)
        error: BaseException | None = KeyboardInterrupt() if code == 130 else None  # typer's, after Ctrl-C
    except (Exception, KeyboardInterrupt) as e:
        error = e
    if error is None:
        return code or 0
    if argv is None:  # the process ends
        from ascendit.cli.interruptions import ignore_ctrl_c

        ignore_ctrl_c()
    return report_error(error, output, args)


def common_flags(args: list[str]) -> tuple[list[str], Output]:
    """Move `-q` and `-v`, which are allowed anywhere before `--`, to the front, as typer expects."""
    end = args.index("--") if "--" in args else len(args)
    flags = [arg for arg in args[:end] if arg in COMMON]
    names = {COMMON[flag] for flag in flags}
    output = Output(quiet="quiet" in names, verbose="verbose" in names, json="--json" in args[:end])
    remaining = [arg for arg in args[:end] if arg not in COMMON] + args[end:]
    return flags + remaining, output


def report_error(error: BaseException, output: Output, args: Sequence[str] = ()) -> int:
    """Print the error and return its exit code. `args`: the command line."""
    from ascendit.cli.interruptions import cancelled

    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        error = cancelled()
    elif hasattr(error, "format_message"):  # a usage error of typer; its class differs between versions
        error = _usage(error, args)
    elif is_out_of_memory(error):
        error = out_of_memory(error)
    elif isinstance(error, ImportError) and not (error.name or "").startswith("ascendit"):
        error = EnvironmentProblem(
            f"{error.name or 'a library'} cannot be imported: {error}",
            needs="the libraries that ascendit depends on",
            fix="ascendit doctor",
            code="E-ENV-01",
        )
    if isinstance(error, AscenditError):
        if output.verbose:
            print(traceback_text(error), file=sys.stderr, end="")
        output.fail(error.as_dict(), error.details)
        return error.exit_code
    return report_internal_error(error, output)


def _usage(error: Any, args: Sequence[str]) -> UsageError:
    ctx = getattr(error, "ctx", None)  # None for a flag without its value
    name = next((arg for arg in args if arg in COMMANDS), None)
    command = ctx.command_path if ctx else f"ascendit {name}" if name else "ascendit"
    usage = f"{command} [OPTIONS]" if name else "ascendit COMMAND"
    if ctx:
        usage = " ".join(ctx.get_usage().removeprefix("Usage: ").split())
    return UsageError(error.format_message(), needs=usage, fix=f"{command} --help")


def _set_up_log(output: Output) -> None:
    """Log to stderr: warnings and errors; with -v also decisions, with -q errors only."""
    import logging

    class Escaping(logging.Formatter):
        """Escapes the messages of ascendit and of the libraries, and the lines of tracebacks."""

        def formatMessage(self, record: logging.LogRecord) -> str:
            return escaped(super().formatMessage(record))

        def formatException(self, ei: Any) -> str:
            return "\n".join(map(escaped, super().formatException(ei).split("\n")))

    level = logging.INFO if output.verbose else logging.ERROR if output.quiet else logging.WARNING
    handler = logging.StreamHandler()
    handler.setFormatter(Escaping("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.captureWarnings(True)
    logging.getLogger("ascendit").setLevel(level)
