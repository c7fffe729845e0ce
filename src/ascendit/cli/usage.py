"""The usage errors of typer as E-USE-01: the value that it got, the rule, and a command that works.

ascendit quantize demo q8         # try    ascendit quantize demo -o q8 --scheme mxfp8
ascendit generate --steps four    # needs  --steps: a whole number
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from ascendit.cli.accepted import complete
from ascendit.cli.translate import SHARED, Values, options_of, repaired, translate
from ascendit.errors import UsageError
from ascendit.report import shell_line

SECOND = {"quantize": "-o", "inspect": "--diff"}
"""Command with one argument -> the flag that a second one is for."""


def usage_error(
    error: Any, args: Sequence[str], commands: Collection[str], parser: Callable[[str], Any], values: Values
) -> UsageError:
    """The UsageError for a usage error of typer. `args`: the command line; `parser`: name -> command.

    `values`: flag -> its values.
    """
    message, ctx = error.format_message(), getattr(error, "ctx", None)  # None for a flag without its value
    name = next((arg for arg in args if arg in commands), None)
    line = ctx.command_path if ctx else f"ascendit {name}" if name else "ascendit"
    usage = f"{line} [OPTIONS]" if name else "ascendit COMMAND"
    if ctx:
        usage = " ".join(ctx.get_usage().removeprefix("Usage: ").split())
    if hint := repaired(args, commands, parser, error, values):
        needs, fix = hint
        return UsageError(message, needs=needs, fix=fix)
    if "No such command" in message:
        return UsageError(message, needs=f"one of {', '.join(commands)}", fix="ascendit --help")
    if name is None:
        return UsageError(message, needs=usage, fix=f"{line} --help")
    return _of_command(error, message, usage, name, args, parser(name), values)


def _of_command(
    error: Any, message: str, usage: str, name: str, args: Sequence[str], command: Any, values: Values
) -> UsageError:
    without_name = [arg for n, arg in enumerate(args) if n != args.index(name)]
    if fixed := _with_second(name, without_name, command):
        return UsageError(message, needs=usage, fix=fixed)
    param = getattr(error, "param", None) or _param(command, getattr(error, "option_name", None))
    if param is None or param.param_type_name != "option":
        call = f"ascendit {name}"
        return UsageError(message, needs=usage, fix=f"{call} --help")
    flag = f"{param.opts[0]} {param.metavar or ''}".strip()
    if "requires an argument" in message:
        choices = values(param.opts[0])
        fix = f"{param.opts[0]} {choices[0]}" if choices else f"write {flag}"
        return UsageError(f"{param.opts[0]} without a value", needs=flag, fix=fix)
    if param.required:
        return UsageError(message, needs=usage, fix=f"add {flag}")
    kind = next((kind for word, kind in NUMBERS.items() if word in message), None)
    value = _value(args, param.opts)
    if kind and value is not None:
        rule = f"{param.opts[0]}: {kind}"
        return UsageError(f"{param.opts[0]} {value}", needs=rule, fix=f"omit {param.opts[0]}")
    return UsageError(message, needs=usage, fix=f"omit {param.opts[0]}, or {flag} as its help says")


NUMBERS = {"integer": "a whole number", "number": "a number", "float": "a number"}
"""Word of a message about a bad value, the first that occurs -> the type of the option."""


def _with_second(name: str, args: Sequence[str], command: Any) -> str | None:
    """The command with one argument, for a call with more; the second one is the value of a flag. None if it
    has no more, or its other arguments do not parse.
    """
    takes = [param for param in command.params if param.param_type_name == "argument"]
    line = translate(args, name, options_of(command) | SHARED)
    if any(param.nargs != 1 for param in takes) or len(line.arguments) <= len(takes):
        return None
    first, second = line.arguments[: len(takes)], line.arguments[len(takes)]
    param = _param(command, SECOND.get(name))
    more = [] if param is None or {*param.opts} & {*line.flags} else [SECOND[name], second]
    fixed = complete(name, [*first, *more, *line.flags], command)
    return None if fixed is None else shell_line(["ascendit", name, *fixed])


def _param(command: Any, flag: str | None) -> Any:
    return next((param for param in command.params if flag in param.opts), None)


def _value(args: Sequence[str], flags: Collection[str]) -> str | None:
    """The last value of an option on a command line, as `--steps 4` or `--steps=4`."""
    last = None
    for arg, following in zip(args, [*args[1:], None], strict=True):
        flag, equals, value = arg.partition("=")
        if flag in flags:
            last = value if equals else following
    return last
