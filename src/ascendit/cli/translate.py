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

from ascendit.cli.accepted import complete, own_size, refusal
from ascendit.cli.generate_options import FLAG_ONLY
from ascendit.cli.output import COMMON
from ascendit.foreign import (
    ADVICE_FOR,
    BITS,
    COMMAND_ADVICE,
    COMMAND_OF,
    FLAG_FOR,
    KEYWORD_OF,
    NO_VALUE,
    ON,
    PATTERN_OF,
    SETTINGS,
    normal,
    translated,
    value_for,
)
from ascendit.option_text import FLAGS, SET_ONLY, SETTABLE, SWITCH_OF
from ascendit.report import shell_line

Values = Callable[[str], Sequence[str]]
BOOLEANS = ("true", "false", "0", "1", "yes", "no", "on", "off")
SPECIAL = FLAG_ONLY | {"dst": "-o", "seconds": "--seconds", "guidance_scale": "--guidance"}
POSITIONAL = ("model", "prompt")
SHARED = dict.fromkeys((*COMMON, "-h", "--help"), False)
"""Flags of every command; none has a value."""
_NUMBER = r"\d+(?:\.\d+)?"
_FILE = r"\S+\.(?:safetensors|pt|pth|bin|ckpt)(?::\S+)?"
LISTS = {
    "guidance_scale": (_NUMBER, ","),
    "timesteps": (_NUMBER, ","),
    "seed": (r"\d+", ","),
    "seeds": (r"\d+", ","),
    "size": (r"\d+", "x"),
    "loras": (_FILE, None),
    "keep": (r"\S*[.*]\S*", None),
}
"""Keyword with several values in other tools, one after another -> their pattern, and the text between them.

None: the flag is repeated.
"""


@dataclass
class Line:
    """The parts of a translated command line."""

    flags: list[str] = field(default_factory=list)
    positional: dict[str, str] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    size: dict[str, str] = field(default_factory=dict)
    bits: dict[str, str] = field(default_factory=dict)
    """Bits of weights (w) and activations (a)."""
    device: str = "cpu"
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Flags without a translation."""

    def args(self) -> list[str]:
        """Positional arguments first, then the flags."""
        names = POSITIONAL[:1] if "--prompts" in self.flags else POSITIONAL
        named = [self.positional[name] for name in names if name in self.positional]
        arguments = self._arguments()
        if dropped := self.arguments[len(arguments) :]:
            self.notes.append(f"the argument {shell_line(dropped)} is replaced")
        first = [*named, *arguments] if "model" in self.positional else [*arguments, *named]
        flags = [flag for flag in self.flags if flag != "--demo" or "model" not in self.positional]
        return [*first, *_with_weights(flags), *self._size(first), *self._scheme()]

    def _arguments(self) -> list[str]:
        """The other arguments, without a prompt that a flag replaces."""
        if "prompt" not in self.positional and "--prompts" not in self.flags:
            return self.arguments
        return [] if {"--demo", "model"} & {*self.flags, *self.positional} else self.arguments[:1]

    def _size(self, arguments: Sequence[str]) -> list[str]:
        if not self.size:
            return []
        model = "demo" if "--demo" in self.flags else arguments[0] if arguments else None
        if size := own_size(self.size, model):
            return ["--size", size]
        self.notes.append("--size needs both, as --size 832x480")
        return []

    def _scheme(self) -> list[str]:
        """The scheme of the bits, unless a flag names it."""
        if not self.bits or {"--scheme", "--recipe"} & {*self.flags}:
            return []
        w, a = self.bits.get("w", self.bits.get("a")), self.bits.get("a", self.bits.get("w"))
        scheme = value_for("scheme", f"w{w}a{a}")
        return [] if scheme is None else ["--scheme", scheme]


def translate(
    args: Sequence[str], name: str, options: Mapping[str, bool], values: Values = lambda _: ()
) -> Line:
    """Translate the arguments of the command `name`. `options`: its flags, and whether they have a value.

    `values`: flag -> its values, if they are a list.
    """
    line, pairs = Line(), [*_pairs(args, options)]
    for flag, value in pairs:
        if flag and value and translated(flag)[0] == "device":
            line.device = value_for("device", value) or value
    for flag, value in pairs:
        if not flag:
            line.arguments.append(value or "")
        elif flag in options:
            value = value.replace("*", "x") if value and flag == "--size" else value
            line.flags += [flag, *([] if value is None else [value])]
        else:
            _replace(line, flag, value, name, options, values)
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
            value, more = remaining.pop(0), [] if flag in options else _more(flag, remaining)
            joint = LISTS[KEYWORD_OF.get(normal(flag), normal(flag))][1] if more else None
            yield from (
                (flag, x) for x in ([value, *more] if joint is None else [joint.join([value, *more])])
            )
        else:
            yield flag, None


def _more(flag: str, remaining: list[str]) -> list[str]:
    """The second and later values of a flag with several, which are removed from `remaining`."""
    pattern, _ = LISTS.get(KEYWORD_OF.get(normal(flag), normal(flag)), ("", None))
    more: list[str] = []
    while pattern and remaining and re.fullmatch(pattern, remaining[0]):
        more.append(remaining.pop(0))
    return more


def _takes(flag: str, following: str, options: Mapping[str, bool]) -> bool:
    if flag in options:
        return options[flag]
    if normal(flag) in NO_VALUE:
        return following.lower() in BOOLEANS
    return not re.match(r"--?[A-Za-z]", following)


def _replace(
    line: Line, flag: str, value: str | None, name: str, options: Mapping[str, bool], values: Values
) -> None:
    """Add the translation of one flag that the command does not have, with a note."""
    other, written = normal(flag), " ".join(filter(None, (flag, value)))
    keyword, _ = translated(other, value)
    if keyword in POSITIONAL and value is not None:
        line.positional[keyword] = value
        line.notes.append(f"{flag} is the argument {keyword.upper()}")
    elif keyword in ("width", "height") and "--size" in options and value is not None:
        line.size[keyword] = value
        line.notes.append(f"{flag} is a part of --size WxH")
    elif other in BITS and value is not None and name == "quantize":
        line.bits[BITS[other]] = value
        line.notes.append(f"{flag}: the scheme sets bits and blocks")
    elif keyword == "seed" and (value or "").startswith("-"):
        line.notes.append(f"{written}: a random seed is the default")
    elif other in SETTINGS and "--set" in options and (value or "").lower() not in ON:
        line.notes.append(f"{flag} is not needed")
    else:
        refusals = []
        for new in _candidates(other, value, name, options):
            reason = refusal(name, new, values(new[0]), line.device)
            if reason is None:
                (line.flags if new[0].startswith("-") else line.arguments).extend(new)
                is_argument = "" if new[0].startswith("-") else "the argument "
                line.notes.append(f"{written} is {is_argument}{shell_line(new)} here")
                return
            key = new[1].partition("=")[0] if new[0] == "--set" else ""
            shown, reason = f"{new[0]} {key}".strip(), re.sub(r"^\w+: ", "", reason)
            refusals.append(f"{written}: {shown} needs {reason}")
        if advice := COMMAND_ADVICE.get(other) or ADVICE_FOR.get(other):
            line.notes.append(f"{flag}: {advice.removeprefix('omit it: ')}")
        elif refusals:
            line.notes.append(refusals[0])
        else:
            line.unknown.append(flag)
            line.notes.append(_unknown(flag, name))


def _unknown(flag: str, name: str) -> str:
    return f"{flag} is not a flag of ascendit {name}"


def _candidates(other: str, value: str | None, name: str, options: Mapping[str, bool]) -> Iterator[list[str]]:
    """The arguments that may replace a flag, the likely ones first; their values are not checked."""
    same = f"--{other.replace('_', '-')}"
    keyword, text = translated(other, value)
    if same in options and options[same] is (value is not None):
        yield [same, *([] if value is None else [value])]
    if other in SETTINGS and "--set" in options:
        yield _setting(SETTINGS[other], options)
    if (flag := FLAG_FOR.get(other)) in options and options[str(flag)] is (value is not None):
        yield [str(flag), *([] if value is None else [value])]
    if other in PATTERN_OF and value:
        if new := _file_or_weight(keyword, str(text), name, options):
            yield new
    elif new := _option(keyword, value, name, options):
        yield [new[0], *(_folder(other, text) for text in new[1:])] if new[0] == "-o" else new
        if new[0] == "-o" and "." not in new[1]:
            yield ["-o", f"{new[1].rstrip('/')}.mp4"]
    if keyword == "dtype" and value and "--scheme" in options:
        yield ["--scheme", value_for("scheme", value) or value]
    if keyword == "scheme" and value and "--to" in options:
        yield ["--to", value_for("to", value) or value]
    if len(other) < 3 or {other} & {*ADVICE_FOR, *COMMAND_ADVICE}:
        return
    alike = [flag for flag, has_value in options.items() if has_value is (value is not None)]
    for flag in get_close_matches(same, alike, n=1, cutoff=0.75):
        yield [flag, *([] if value is None else [value])]


def _folder(other: str, value: str) -> str:
    """An output of another tool; the name of a folder ends in /."""
    is_folder = re.search(r"dir(?:ectory)?$|folder$", other) and not value.endswith("/")
    return f"{value}/" if is_folder else value


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


def _setting(setting: str, options: Mapping[str, bool]) -> list[str]:
    keyword, _, text = setting.partition("=")
    flag = FLAGS.get(keyword)
    return [flag, text] if flag is not None and flag in options else ["--set", setting]


def _option(keyword: str, value: str | None, name: str, options: Mapping[str, bool]) -> list[str]:
    """The flag of a keyword with its value; empty if this command has none for it."""
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
    args: Sequence[str], commands: Collection[str], parser: Callable[[str], Any], error: Any, values: Values
) -> tuple[str, str] | None:
    """(notes, the corrected command line) for an unknown flag or command of another tool, else None.

    `error`: the usage error of typer. `parser`: name -> command. `values`: flag -> its values.
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
    command = parser(name)
    line = translate(remaining, name, options_of(command) | SHARED, values)
    for flag in [flag for flag in line.unknown if flag not in SHARED]:
        if owners := [other for other in commands if flag in options_of(parser(other))]:
            line.unknown.remove(flag)
            line.notes.remove(_unknown(flag, name))
            line.notes.append(f"{flag} is a flag of ascendit {' and '.join(owners)}")
    translated_args = line.args()
    if not (notes + line.notes) or (line.unknown and len(line.notes) == len(line.unknown)):
        return None
    fixed = complete(name, translated_args, command, has_model="model" in line.positional)
    return (
        None if fixed is None else ("; ".join([*notes, *line.notes]), shell_line(["ascendit", name, *fixed]))
    )


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
