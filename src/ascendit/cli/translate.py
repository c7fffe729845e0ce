"""A command line with the words of another tool, in ascendit's: the fix of an unknown flag or command.

    translate(["generate", "--ckpt_dir", "wan", "--sample_steps", "8", "--prompt", "a cat"], parser)

gives `ascendit generate wan "a cat" --steps 8` and one note for each word that is replaced. It is only shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ascendit.foreign import (
    ADVICE_FOR,
    COMMAND_OF,
    MANY,
    NO_VALUE,
    PATTERN_OF,
    SETTINGS,
    normal,
    translated,
    value_for,
)
from ascendit.option_text import FLAGS, SET_ONLY, SETTABLE, SWITCHES
from ascendit.report import shell_line

BOOLEANS = ("true", "false", "0", "1", "yes", "no", "on", "off")
ON = ("", "true", "1", "yes", "on")
SPECIAL = {"output": "-o", "dst": "-o", "config": "--config", "size": "--size", "seconds": "--seconds"}
SPECIAL |= {"timesteps": "--timesteps", "guidance_scale": "--guidance"}
SWITCH_OF = {keyword: flag for flag, keyword in SWITCHES.items()}
POSITIONAL = ("model", "prompt")
COMMON = {"-q": False, "--quiet": False, "-v": False, "--verbose": False, "-h": False, "--help": False}


@dataclass
class Line:
    """The parts of a translated command line."""

    flags: list[str] = field(default_factory=list)
    positional: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    size: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Flags without a translation."""

    def args(self) -> list[str]:
        """Positional arguments first, then the flags."""
        size = [str(x) for x in (self.size.get("width", "W"), self.size.get("height", "H"))]
        named = [self.positional[name] for name in POSITIONAL if name in self.positional]
        arguments = [*named, *self.arguments] if "model" in self.positional else [*self.arguments, *named]
        return [*arguments, *_with_weights(self.flags), *(["--size", "x".join(size)] if self.size else [])]


def translate(args: Sequence[str], name: str, options: Mapping[str, bool]) -> Line:
    """Translate the arguments of the command `name`. `options`: its flags, and whether they have a value."""
    line = Line()
    for flag, value in _pairs(args, options):
        if not flag:
            line.arguments.append(value or "")
        elif flag in options:
            value = value.replace("*", "x") if value and flag == "--size" else value
            line.flags += [flag, *([] if value is None else [value])]
        else:
            _replace(line, flag, value, name, options)
    return line


def _pairs(args: Sequence[str], options: Mapping[str, bool]) -> Iterator[tuple[str, str | None]]:
    """(flag, its value or None); ("", argument) for other arguments."""
    remaining = list(args)
    while remaining:
        flag, equals, value = remaining.pop(0).partition("=")
        if flag == "--":
            yield from (("", text) for text in remaining)
            return
        if not re.match(r"--?[A-Za-z]", flag):
            yield "", f"{flag}{equals}{value}"
        elif equals:
            yield flag, value
        elif remaining and _takes(flag, remaining[0], options):
            yield flag, remaining.pop(0)
        else:
            yield flag, None


def _takes(flag: str, following: str, options: Mapping[str, bool]) -> bool:
    if flag in options:
        return options[flag]
    if normal(flag) in NO_VALUE:
        return following.lower() in BOOLEANS
    return not re.match(r"--?[A-Za-z]", following)


def _replace(line: Line, flag: str, value: str | None, name: str, options: Mapping[str, bool]) -> None:
    """Add the translation of one flag that the command does not have, with a note."""
    other, written = normal(flag), " ".join(filter(None, (flag, value)))
    same = f"--{other.replace('_', '-')}"
    keyword, text = translated(other, value)
    if same in options and (options[same] or value is None):
        new = [same, *([] if value is None else [value])]
    elif keyword in POSITIONAL and value is not None:
        line.positional[keyword] = value
        line.notes.append(f"{flag} is the argument {keyword.upper()}")
        return
    elif keyword in ("width", "height") and "--size" in options and value is not None:
        line.size[keyword] = value
        line.notes.append(f"{flag} is a part of --size WxH")
        return
    elif other in SETTINGS and "--set" in options:
        new = _setting(SETTINGS[other], value, options)
    elif (many := MANY.get(other)) in options and value is not None:
        new = [str(many), value]
    elif other in PATTERN_OF and value and (new := _file_or_weight(keyword, str(text), name, options)):
        if name == "repack":
            line.arguments += new
            line.notes.append(f"{flag} is the argument {shell_line(new)}")
            return
    elif advice := ADVICE_FOR.get(other):
        line.notes.append(f"{flag}: {advice.removeprefix('omit it: ')}")
        return
    else:
        new = _option(keyword, value, name, options)
        if not new and (close := get_close_matches(same, options, n=1, cutoff=0.75)):
            new = [close[0], *([value] if value and options[close[0]] else [])]
            new = [] if options[close[0]] and not value else new
        if not new:
            line.unknown.append(flag)
            line.notes.append(f"{flag} is not a flag of ascendit {name}")
            return
    line.flags += new
    line.notes.append(f"{written} is {shell_line(new)} here" if new else f"{flag} is not needed")


def _file_or_weight(keyword: str, text: str, name: str, options: Collection[str]) -> list[str]:
    """The argument for a component's file or a LoRA's weight; empty if the command `name` has none for it."""
    if FLAGS[keyword] in options:
        return [FLAGS[keyword], text]
    return [text] if keyword == "parts" and name == "repack" else []


def _with_weights(flags: list[str]) -> list[str]:
    """`flags` with the weight of `--lora FILE:0.5` at the other `--lora`, if there are others."""
    loras = [n for n, flag in enumerate(flags) if flag == "--lora"]
    weights = [n for n in loras if flags[n + 1].startswith("FILE:")]
    if not weights or len(weights) == len(loras):
        return flags
    weight = flags[weights[-1] + 1].removeprefix("FILE")
    texts = [f"{text}{weight}" if n and flags[n - 1] == "--lora" else text for n, text in enumerate(flags)]
    return [text for n, text in enumerate(texts) if not {n, n - 1} & {*weights}]


def _setting(setting: str, value: str | None, options: Mapping[str, bool]) -> list[str]:
    if (value or "").lower() not in ON:
        return []
    keyword, _, text = setting.partition("=")
    flag = FLAGS.get(keyword)
    return [flag, text] if flag is not None and flag in options else ["--set", setting]


def _option(keyword: str, value: str | None, name: str, options: Mapping[str, bool]) -> list[str]:
    """The flag of a keyword with its value; empty if this command has none for it."""
    if keyword == "seed" and (value or "").startswith("-"):
        return []
    if (switch := SWITCH_OF.get(keyword)) in options and (value or "").lower() in ON:
        return [str(switch)]
    if value is None:
        return []
    text = value_for(keyword, value) or value.removeprefix("torch.")
    flag = FLAGS.get(keyword, SPECIAL.get(keyword))
    if flag in options:
        return [str(flag), text]
    settable = name == "generate" and (keyword in SETTABLE or flag in SET_ONLY[name])
    return ["--set", f"{keyword}={text}"] if settable else []


def options_of(command: Any) -> dict[str, bool]:
    """Flag -> whether it has a value, for a command of typer."""
    return {
        flag: not (p.is_flag or getattr(p, "count", False))
        for p in command.params
        if p.param_type_name == "option"
        for flag in p.opts
    }


def repaired(
    args: Sequence[str], commands: Collection[str], parser: Callable[[str], Any], error: Any
) -> tuple[str, str] | None:
    """(notes, the corrected command line) for an unknown flag or command of another tool, else None.

    `error`: the usage error of typer. `parser`: name -> command.
    """
    first = next((n for n, arg in enumerate(args) if not arg.startswith("-")), None)
    if first is None:
        return None
    name, notes = args[first], []
    remaining = [*args[:first], *args[first + 1 :]]
    if name not in commands:
        if (other := COMMAND_OF.get(name.lower())) is None or "No such command" not in error.format_message():
            return None
        notes.append(f"`ascendit {name}` is `ascendit {other}` here")
        name, *more = other.split()
        remaining = [*remaining, *more]
    elif not hasattr(error, "option_name"):
        return None
    if prompt := _dashed_prompt(remaining):
        return f"-- before a prompt that begins with -: {prompt}", _line(
            name, _after_dashes(remaining, prompt)
        )
    line = translate(remaining, name, options_of(parser(name)) | COMMON)
    if not (notes + line.notes) or (line.unknown and len(line.notes) == len(line.unknown)):
        return None
    return "; ".join([*notes, *line.notes]), _line(name, line.args())


def _line(name: str, args: list[str]) -> str:
    count = sum(not re.match(r"-", arg) for arg in args[:2])
    has_model = name != "generate" or count != 1 or {"--demo", "--config", "--latents"} & {*args}
    return shell_line(["ascendit", name, *([] if has_model else ["MODEL"]), *args])


def _dashed_prompt(args: Sequence[str]) -> str | None:
    """An argument that looks like a flag, but is a sentence."""
    before = args[: args.index("--")] if "--" in args else args
    return next((arg for arg in before if re.match(r"-[^=]*\s", arg)), None)


def _after_dashes(args: Sequence[str], prompt: str) -> list[str]:
    n = args.index(prompt)
    return [*args[:n], *args[n + 1 :], "--", prompt]
