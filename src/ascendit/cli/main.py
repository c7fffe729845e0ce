"""`ascendit`: the commands, the flags that several of them share, and how each may end.

Exit codes: 0 done, 1 a check failed, 2 usage, 3 environment, 4 out of memory, 130 cancelled.
Nothing heavy is imported here: `ascendit --help` takes under 0.3 s.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ascendit.cli.output import Output, report_fault
from ascendit.environment import disable_device_plugins
from ascendit.errors import AscenditError, EnvironmentProblem, UsageError, is_out_of_memory, out_of_memory
from ascendit.version import __version__

COMMANDS = {
    "generate": "Make a video from a prompt.",
    "quantize": "Quantize the transformers of a model.",
    "repack": "Write a checkpoint in another layout.",
    "inspect": "Show what a checkpoint holds.",
    "verify": "Check that a model does what it is asked.",
    "doctor": "Check this machine and its libraries.",
}
"""Name of a command, which is that of its module and function -> the first sentence of its help."""
COMMON = {"-q": "quiet", "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose"}
ANY_MODEL = "Model folder or file in any layout, demo, hf:org/name or ms:org/name."


def flag(shown: str, help: str) -> Any:
    """A flag for `Annotated`. `shown`: its names and what it takes, as in the help: `-o, --output DST`."""
    words = shown.replace(",", "").split()
    metavar = None if words[-1].startswith("-") else words.pop()
    return typer.Option(*words, metavar=metavar, help=help)


Source = Annotated[str, typer.Argument(metavar="SRC", help=ANY_MODEL)]
Target = Annotated[Path, flag("-o, --output DST", "The new folder.")]
Engine = Annotated[str | None, flag("--for ENGINE", "Write what vllm-omni, sglang or mindie loads.")]
Copy = Annotated[bool, flag("--copy", "Copy the other components instead of linking them.")]
Resume = Annotated[bool, flag("--resume", "Go on where the same command was killed.")]
DryRun = Annotated[bool, flag("--dry-run", "Show the plan; write nothing.")]
Json = Annotated[bool, flag("--json", "Print one JSON object and nothing else.")]


def chosen(ctx: typer.Context, without: Collection[str] = ()) -> dict[str, Any]:
    """The values of this call, by the names of its parameters; neither those left out nor `--json`."""
    return {k: v for k, v in ctx.params.items() if v is not None and k not in ("as_json", *without)}


class Group(TyperGroup):
    """The commands by name."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        names: dict[str, Any] = dict.fromkeys(COMMANDS)
        self.commands = names  # a command is made, and its module imported, when it is asked for

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, or None."""
        if cmd_name not in COMMANDS:
            return None
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(cmd_name)(getattr(importlib.import_module(f"ascendit.cli.{cmd_name}"), cmd_name))
        return typer.main.get_command(alone)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list in the help, without an import of the commands."""
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
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the result only.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Print what is decided and why; tracebacks.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Wan video diffusion on Ascend NPUs, CUDA or a plain CPU. Start with: ascendit doctor"""
    if version:
        print(f"ascendit {__version__}")
        raise typer.Exit()
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(2)
    if ctx.invoked_subcommand != "doctor":  # it looks at what `import torch` does by itself
        disable_device_plugins()  # with torch_npu and no CANN, `import torch` would raise
    _set_up_log(ctx.obj)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: run `argv` (default: the command line) and return the exit code."""
    words, output = common_flags(list(sys.argv[1:] if argv is None else argv))
    command = typer.main.get_command(app)
    try:
        code = command.main(words, "ascendit", standalone_mode=False, obj=output)
    except (Exception, KeyboardInterrupt) as error:
        return end(error, output)
    if code == 130:  # typer's word for a Ctrl-C
        return end(KeyboardInterrupt(), output)
    return code or 0


def common_flags(words: list[str]) -> tuple[list[str], Output]:
    """`-q` and `-v` may stand anywhere before `--`; typer wants them first."""
    end_of_flags = words.index("--") if "--" in words else len(words)
    flags = [w for w in words[:end_of_flags] if w in COMMON]
    named = {COMMON[w] for w in flags}
    output = Output(quiet="quiet" in named, verbose="verbose" in named, json="--json" in words[:end_of_flags])
    rest = [w for w in words[:end_of_flags] if w not in COMMON] + words[end_of_flags:]
    return flags + rest, output


def end(error: BaseException, output: Output) -> int:
    """Tell what went wrong and return the exit code."""
    from ascendit.cli.interruptions import cancelled

    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        error = cancelled()
    elif hasattr(error, "format_message"):  # typer's usage errors; their class moved between versions
        error = _usage(error)
    elif is_out_of_memory(error):
        error = out_of_memory(error)
    elif isinstance(error, ImportError) and not (error.name or "").startswith("ascendit"):
        error = EnvironmentProblem(
            f"{error.name or 'a library'} cannot be imported: {error}",
            needs="the libraries that ascendit was installed with",
            fix="ascendit doctor",
            code="E-ENV-01",
        )
    if isinstance(error, AscenditError):
        if output.verbose:
            import traceback

            traceback.print_exception(error, file=sys.stderr)
        output.fail(error.as_dict())
        return error.exit_code
    return report_fault(error, output)


def _usage(error: Any) -> UsageError:
    ctx = getattr(error, "ctx", None)
    command = ctx.command_path if ctx else "ascendit"
    usage = ctx.get_usage().removeprefix("Usage: ") if ctx else "ascendit COMMAND"
    return UsageError(error.format_message(), needs=usage, fix=f"{command} --help")


def _set_up_log(output: Output) -> None:
    """Messages of ascendit on stderr: warnings, with -v decisions too, with -q errors only."""
    import logging

    level = logging.INFO if output.verbose else logging.ERROR if output.quiet else logging.WARNING
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("ascendit").setLevel(level)
