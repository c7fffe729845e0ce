"""`ascendit`: the commands, and how each of them may end.

Exit codes: 0 done, 1 a check failed, 2 usage, 3 environment, 4 out of memory, 130 cancelled.
Nothing heavy is imported here: `ascendit --help` takes under 0.3 s.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ascendit.cli.doctor import doctor
from ascendit.cli.generate import generate
from ascendit.cli.inspect import inspect
from ascendit.cli.output import Output, report_error, report_fault
from ascendit.cli.quantize import quantize
from ascendit.cli.repack import repack
from ascendit.cli.verify import verify
from ascendit.environment import disable_device_plugins
from ascendit.errors import AscenditError, EnvironmentProblem, UsageError
from ascendit.version import __version__

COMMON = {"-q": "quiet", "--quiet": "quiet", "-v": "verbose", "--verbose": "verbose"}


class Group(TyperGroup):
    """The commands. Whatever goes wrong in one ends here: one message, one exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run `args` (default: the command line) and exit with the code."""
        words, output = common_flags(list(sys.argv[1:] if args is None else args))
        try:
            code = super().main(words, prog_name or "ascendit", standalone_mode=False, obj=output, **extra)
        except (Exception, KeyboardInterrupt) as error:
            code = end(error, output)
        else:
            if code == 130:  # typer's word for a Ctrl-C
                code = end(KeyboardInterrupt(), output)
        sys.exit(code or 0)


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


app.command()(generate)
app.command()(quantize)
app.command()(repack)
app.command()(inspect)
app.command()(verify)
app.command()(doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    try:
        app(list(argv) if argv is not None else None)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    return 0


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
    from ascendit.pipeline.job import is_out_of_memory, out_of_memory

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
        return report_error(error, output)
    return report_fault(error, output)


def _usage(error: Any) -> UsageError:
    ctx = getattr(error, "ctx", None)
    command = ctx.command_path if ctx else "ascendit"
    usage = ctx.get_usage().removeprefix("Usage: ") if ctx else "ascendit COMMAND"
    return UsageError(error.format_message(), needs=usage, fix=f"{command} --help", code="E-USE-01")


def _set_up_log(output: Output) -> None:
    """Messages of ascendit on stderr: warnings, with -v decisions too, with -q errors only."""
    import logging

    level = logging.INFO if output.verbose else logging.ERROR if output.quiet else logging.WARNING
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("ascendit").setLevel(level)
