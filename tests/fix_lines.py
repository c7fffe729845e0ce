"""The `try` lines of errors: their commands and options must exist. Used by `conftest.py` for every error."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from typing import Any

import shell

from ascendit.option_text import KEYWORDS, PROSE, SEVERAL, SWITCHES, python_text

_VALUE = r"\"[^\"]*\"|'[^']*'|\$'[^']*'|(?:[^\s,;`()\"']|,(?=[^\s,;]))+"
SHELL = re.compile(
    rf"(?:^|(?<=[\s:`(]))(?:ascendit|pip|python|hf|docker|curl|mv|magick) (?:{_VALUE})(?: (?:{_VALUE}))*"
)
END = re.compile(r", (?!\d)|: | or (?=[a-z-])| \(|\)| and (?=[a-z])")
"""Where a command ends, and the sentence goes on."""
FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)(?:[ =](\"[^\"]*\"|'[^']*'|[^\s;,()]+))?")
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*(?:\[.*|x[A-Z0-9]+|:.*|,.*|=.*|\.\w+)?")
OTHER_TOOLS = {"--help"}
COMMAND_LINE_ONLY = frozenset(
    "--adherence --calibrate --case --config --diff --jobs --json --keep-latents --latents --layers"
    " --limit --num-videos --out --prompts --quality --quiet --report --seconds --seeds --self-check"
    " --cross --repeats --shape --sheet --verbose --version".split()
)
"""Flags that Python has no keyword for."""


@functools.cache
def command(name: str) -> Any:
    import typer.main

    from ascendit.cli import main as cli

    group: Any = typer.main.get_command(cli.app)
    return group.get_command(None, name)


@functools.cache
def flags() -> dict[str, list[Any]]:
    """Flag -> its parameters in all commands."""
    from ascendit.cli import main as cli

    every: dict[str, list[Any]] = {}
    for name in cli.COMMANDS:
        for param in command(name).params:
            for flag in param.opts if param.param_type_name == "option" else ():
                every.setdefault(flag, []).append(param)
    return every


def shell_commands(text: str) -> list[str]:
    lines = (match[0] for match in SHELL.finditer(text))
    return [line if "$'" in line else END.split(line)[0].strip(" .,") for line in lines]


def problems(fix: str) -> Iterator[str]:
    """What is wrong with a fix: a command that does not parse, or an option or value that does not exist."""
    if not re.search(r"--|ascendit |pip |python ", fix):
        return
    rest = fix
    for line in shell_commands(fix):
        rest = rest.replace(line, "")
        yield from command_problems(line)
    for flag, value in FLAG.findall(rest):
        if flag in OTHER_TOOLS:
            continue
        if flag not in flags():
            if flag not in ("--quiet", "--verbose", "--version"):
                yield f"no command has the flag {flag}"
            continue
        if value.rstrip(".:") in PROSE.split() or not value or PLACEHOLDER.fullmatch(value.rstrip(".:")):
            continue
        yield from value_problems(flag, value.rstrip(".:").strip("\"'"))
    for flag, _ in FLAG.findall(python_text(rest)):
        if flag not in COMMAND_LINE_ONLY and flag not in OTHER_TOOLS and flag != "--set":
            yield f"no Python keyword for {flag}"


def command_problems(line: str) -> Iterator[str]:
    if not line.startswith("ascendit"):
        return
    words = shell.split(line) if "$'" in line else shlex.split(line)
    if words[-1:] == ["X1"] and words[0] == "ascendit":
        return  # variable arguments
    from ascendit.cli import main as cli
    from ascendit.cli.output import COMMON

    args, _ = cli.common_flags(words[1:])
    args = cli.with_report_value(args)
    args = [arg for arg in args if arg not in COMMON]
    args = ["1" if re.fullmatch(r"N|S|X", word) else word for word in args]
    name = next((word for word in args if not word.startswith("-")), "")
    if name not in cli.COMMANDS:
        if args not in (["--help"], ["--version"]) and args:
            yield f"{line}: no such command"
        return
    args.remove(name)
    if args == ["--help"]:
        return
    if name in ("generate", "quantize", "repack") and not args:
        return  # the name of the command alone
    try:
        command(name).make_context(name, [*args], resilient_parsing=False)
    except Exception as error:
        yield f"{line}: {getattr(error, 'message', error)}"


def value_problems(flag: str, value: str) -> Iterator[str]:
    """A value that the flag does not take."""
    if all(param.is_flag for param in flags()[flag]):
        return
    if flag == "--set":
        key, equals, value = value.partition("=")
        if not equals:  # as in "omit --set KEY"
            value = "X1"
    elif flag in SEVERAL or flag not in KEYWORDS:
        return
    else:
        key = KEYWORDS[flag]
    if flag == "--seed" and re.fullmatch(r"\d+-\d+", value):
        return
    from ascendit.cli.generate_options import KEYS, typed_layer
    from ascendit.errors import AscenditError
    from ascendit.pipeline.options import LoadOptions

    if key not in KEYS:
        if flag == "--set" and not PLACEHOLDER.fullmatch(key):
            yield f"no key {key}"
        return
    if PLACEHOLDER.fullmatch(value):
        return
    try:
        layer = typed_layer({key: value}, source="--set")
        if key in LoadOptions.model_fields and key != "model":
            LoadOptions(model="demo", **layer)
    except AscenditError as error:
        yield f"{flag} {value}: {error.got}"


KNOWN = {*KEYWORDS.values(), *SWITCHES.values(), *(name for names in SEVERAL.values() for name in names)}
