"""`ascendit`: the table of commands, their shared flags, and the mapping of errors to exit codes.

Exit codes: 0 done, 1 a check failed, 2 usage, 3 environment, 4 out of memory, 130 cancelled.
Commands are imported when they run: `ascendit --help` takes under 0.3 s.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperGroup

from ascendit.cli.completing import COMPLETERS, Command, joined_pieces, with_files
from ascendit.cli.output import COMMON, Output, report_internal_error, traceback_text
from ascendit.environment import accept_click_completion, disable_device_plugins
from ascendit.errors import (
    AscenditError,
    EnvironmentProblem,
    UsageError,
    escaped,
    is_out_of_memory,
    out_of_memory,
)
from ascendit.option_text import command_line
from ascendit.report import REPORT_SUFFIXES
from ascendit.version import __version__

COMMANDS = {
    "generate": "Make a video from a prompt.",
    "quantize": "Quantize the transformers of a model.",
    "repack": "Convert a checkpoint to another layout.",
    "inspect": "Show the contents of a checkpoint.",
    "verify": "Check the quality of a model's videos.",
    "bench": "Measure the attention kernels of a device.",
    "models": "List the models with their defaults.",
    "doctor": "Check this machine and its libraries.",
}
"""Command (also the name of its module and function) -> the first sentence of its help."""
ANY_MODEL = "Model folder or file in any layout, demo, hf:org/name or ms:org/name."


HELP = {"help_option_names": ["-h", "--help"]}
ALIASES = {"help": "--help", "version": "--version"}
"""Words that are accepted for a flag, as in `ascendit help generate`."""


def _of(module: str) -> Any:
    """A module of ascendit, imported when a value is completed."""
    return importlib.import_module(f"ascendit.{module}")


def _option_values(name: str) -> Iterable[str]:
    """The values of a field of LoadOptions whose type is a Literal."""
    return get_args(
        _of("validation").non_optional(_of("pipeline.options").LoadOptions.model_fields[name].annotation)
    )


COMPLETED: dict[str, Callable[[], Iterable[str]]] = {
    "MODEL": lambda: ["demo", *(spec.hub for spec in _of("family").SPECS.values() if spec.hub != "demo")],
    "--scheme": lambda: _of("quant.schemes").QUANTIZED,
    "--recipe": lambda: _of("quant.recipe").recipe_names(),
    "--for": lambda: _of("quant.engines").ENGINES,
    "--to": lambda: get_args(_of("names").Naming),
    "--preset": lambda: _of("family").PRESETS,
    "--shape": lambda: _of("cli.bench").NAMED_SIZES,
    "--solver": lambda: get_args(_of("family").Solver),
    "--fit": lambda: get_args(_of("pipeline.fit").Fit),
    "--device": lambda: _of("device.device").WITHOUT_INDEX,
    "--emulate": lambda: _option_values("emulate"),
    "--text-on": lambda: _option_values("text_on"),
    "--defaults": lambda: _option_values("defaults"),
}
"""Flag, or MODEL, with values that a shell completes -> these values."""


def values_of(flag: str) -> list[str]:
    """The values of a flag, or of MODEL, that a shell completes; empty for any other."""
    return list(COMPLETED[flag]()) if flag in COMPLETED else []


def completion(name: str) -> Callable[..., list[str]] | None:
    """The function that completes the value of a flag or of MODEL; None: a file, or any text."""
    if name in COMPLETERS or name not in COMPLETED:
        return COMPLETERS.get(name)

    def complete(incomplete: str) -> list[str]:
        values = [value for value in values_of(name) if value.startswith(incomplete)]
        return with_files(values, incomplete) if name == "MODEL" else values

    return complete


def value_of_flag(ctx: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """The value of a flag. Raises UsageError (E-USE-01) if it is another flag of the command."""
    flags = {name for other in ctx.command.params for name in other.opts}
    for text in map(str, value if isinstance(value, list | tuple) else [value]):
        if text in flags:
            name, example = max(param.opts, key=len), getattr(param, "metavar", None) or "VALUE"
            fix = f"{name} {example} {text}, or omit {name}"
            raise UsageError(f"{name} without a value before {text}", needs=f"{name} {example}", fix=fix)
    return value


def flag(shown: str, help: str, *, hidden: bool = False) -> Any:
    """Make a flag for `Annotated`.

    `shown`: names and metavar as in the help, for example `-o, --output DST`.
    """
    names = shown.replace(", ", " ").split()
    metavar = None if names[-1].startswith("-") else names.pop()
    settings: dict[str, Any] = {"autocompletion": completion(names[-1]), "callback": value_of_flag}
    return typer.Option(*names, metavar=metavar, help=help, hidden=hidden, **settings)


Source = Annotated[str, typer.Argument(metavar="SRC", help=ANY_MODEL, autocompletion=completion("MODEL"))]
Target = Annotated[Path, flag("-o, --output DST", "Folder to create.")]
Engine = Annotated[str | None, flag("--for ENGINE", "Write the files for vllm-omni, sglang or mindie.")]
Copy = Annotated[bool, flag("--copy", "Copy the other components instead of linking them.")]
Resume = Annotated[
    bool, flag("--resume", "Continue an interrupted run of the same command; a shard is checked by its size.")
]
Overwrite = Annotated[
    bool, flag("--overwrite", "Replace an output of ascendit when the new one is complete.")
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
        single = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=HELP)
        single.command(cmd_name, cls=Command)(
            getattr(importlib.import_module(f"ascendit.cli.{cmd_name}"), cmd_name)
        )
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands in the help, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    cls=Group,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100, **HELP},
)


@app.callback(invoke_without_command=True)
def common(
    ctx: typer.Context,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only the result.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Print decisions with their reasons, and tracebacks.")
    ] = False,
    version: Annotated[bool, typer.Option("-V", "--version", help="Print the version.")] = False,
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
    accept_click_completion()
    try:
        with joined_pieces():
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
    args = with_report_value(args)
    command = typer.main.get_command(app)
    with command_line(next((arg for arg in args if arg in COMMANDS), "")):
        try:
            code = command.main(args, "ascendit", standalone_mode=False, obj=output)
            error: BaseException | None = (
                KeyboardInterrupt() if code == 130 else None
            )  # typer's, after Ctrl-C
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
    first = next((n for n, arg in enumerate(args[:end]) if not arg.startswith("-")), end)
    if first < end and args[first] in ALIASES:
        args = [*args[:first], *args[first + 1 : end], ALIASES[args[first]], *args[end:]]
    flags = [arg for arg in args[:end] if arg in COMMON]
    names = {COMMON[flag] for flag in flags}
    output = Output(quiet="quiet" in names, verbose="verbose" in names, json="--json" in args[:end])
    remaining = [arg for arg in args[:end] if arg not in COMMON] + args[end:]
    return flags + remaining, output


def with_report_value(args: list[str]) -> list[str]:
    """Give `--report` of quantize a value: the next word if it is the name of a report, else none."""
    if next((arg for arg in args if not arg.startswith("-")), None) != "quantize":
        return args
    end = args.index("--") if "--" in args else len(args)
    joined: list[str] = []
    for arg in args[:end]:
        if joined and joined[-1] == "--report=" and arg.lower().endswith(REPORT_SUFFIXES):
            joined[-1] += arg
        else:
            joined.append("--report=" if arg == "--report" else arg)
    return joined + args[end:]


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
    from ascendit.cli.usage import usage_error

    group = typer.main.get_command(app)
    return usage_error(error, args, COMMANDS, lambda name: group.get_command(None, name), values_of)  # type: ignore[attr-defined]


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
