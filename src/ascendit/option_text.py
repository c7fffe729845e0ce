"""The two ways to write an option: `--scheme mxfp8` on the command line, `scheme="mxfp8"` in Python.

Texts of errors are written for the command line; `for_reader` rewrites them unless a command runs:

    for_reader("omit --steps, or --size 64x64")      # "omit num_inference_steps, or width=64, height=64"

A line that begins with `ascendit` is a command for a shell and stays one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_SAME = (
    "alpha attention base crf defaults device emulate fit fps image keep last_image lora_skip max_memory"
    " preset recipe scale_rule scheme seed solver step_policy sub_head text_on timesteps to"
)
_RENAMED = {
    "engine": "--for",
    "flow_shift": "--shift",
    "loras": "--lora",
    "negative_prompt": "--negative",
    "num_frames": "--frames",
    "num_inference_steps": "--steps",
    "parts": "--part",
}


def flag_of(name: str) -> str:
    """The flag of a keyword: `--text-on` for `text_on`, `--lora` for `loras`."""
    return _RENAMED.get(name) or f"--{name.replace('_', '-')}"


FLAGS = {name: flag_of(name) for name in (*_SAME.split(), *_RENAMED)}
"""Keyword in Python -> its flag with a value, if it has one; others are set with `--set keyword=value`."""
KEYWORDS = {flag: keyword for keyword, flag in FLAGS.items()}
"""Flag with a value -> its keyword."""
SWITCH_OF = {
    name: flag_of(name)
    for name in ("allow_flat check copy dry_run force hash overwrite resume swap_experts values".split())
}
"""Keyword in Python -> its flag without a value, which sets it to True."""
SWITCHES = {flag: keyword for keyword, flag in SWITCH_OF.items()}
"""Flag without a value -> its keyword."""
SEVERAL = {
    "--size": ("width", "height"),
    "--guidance": ("guidance_scale", "guidance_scale_2"),
}
"""Flag with several numbers -> their keywords."""
SETTABLE = frozenset(
    "activation_rule attention_probabilities boundary_ratio dtype fast_layernorm guidance_scale"
    " guidance_scale_2 height max_sequence_length metadata model nz ops prompt schedule seconds vae_dtype"
    " width".split()
)
"""Keywords without a flag of the same value; `--set keyword=value` sets them."""
LISTS = ("keep", "lora_skip", "loras", "parts")
"""Keywords whose values are lists."""
PROSE = "a and are excludes for frees from has in instead is of on or so takes that to which with"
"""Words that follow a flag in a sentence, and are not its value."""
_FREE = frozenset("--base --image --keep --last-image --lora --negative".split())
"""Flags whose values are texts, files or patterns: a plain word after one is a part of the sentence."""
_VIDEO = re.compile(r"(?:/|\.(?:mp4|webm|gif|png|mov|mkv|webp))$")

_VALUE = r"\"[^\"]*\"|'[^']*'|(?:[^\s,;()\"']|,(?=[^\s,;]))+"
_COMMAND = rf"(?<![\w`/.-])`?ascendit [a-z]+(?: (?:{_VALUE}))*`?"
_NO_VALUE = rf"(?!-|`|(?:{'|'.join(PROSE.split())})(?=[\s,;)]|$))"
_FLAG = rf"(?<![\w-])(?P<flag>--[a-z][a-z-]*|-o)(?![\w-])(?:[ =](?P<value>{_NO_VALUE}(?:{_VALUE})))?"
_TEXT = re.compile(rf"(?P<command>{_COMMAND})|{_FLAG}")
_REPEATED = re.compile(r"\b(\w+)=\[([^]]*)\], \1=\[")
"""A flag that was repeated: its values become one list."""
_OMIT = re.compile(r"\b(?:[Oo]mit|without|only with|needs)(?: --[a-z-]+(?:,| and| or))* $")

SET_ONLY = {
    "generate": ["--keep"],
    "quantize": "--fps --frames --negative --seed --shift --solver --steps --timesteps".split(),
}
"""Command -> flags of other commands that it has as a key of `--set` only."""

_commands: list[str] = []
"""The commands that are running, one inside another."""


@contextmanager
def command_line(command: str = "") -> Iterator[None]:
    """Inside, errors name flags, those of this command."""
    _commands.append(command)
    try:
        yield
    finally:
        _commands.pop()


def option(keyword: str, value: object) -> str:
    """An option with its value, as the command line writes it: `--steps 8`, `--set dtype=float32`."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if flag := FLAGS.get(keyword):
        return f"{flag} {_quoted(text)}"
    if keyword in SETTABLE:
        return f"--set {_quoted(f'{keyword}={text}')}"
    return SWITCH_OF.get(keyword) or f"{keyword}={text}"


def option_name(keyword: str) -> str:
    """An option without a value, as the command line writes it: `--steps`, `--size`, `--set dtype`."""
    several = next((flag for flag, keywords in SEVERAL.items() if keyword in keywords), None)
    other = f"--set {keyword}" if keyword in SETTABLE else keyword
    return FLAGS.get(keyword) or SWITCH_OF.get(keyword) or several or other


def for_reader(text: str) -> str:
    """`text` as its reader writes options: unchanged while a command runs, else with Python's keywords."""
    if "-" not in text:
        return text
    if not _commands:
        return python_text(text)
    for flag in SET_ONLY.get(_commands[-1], ()):
        text = re.sub(rf"(?<![\w-]){flag} (?={_NO_VALUE})(?=\S)", f"--set {KEYWORDS[flag]}=", text)
        text = re.sub(rf"(?<![\w-]){flag}(?![\w-])", f"--set {KEYWORDS[flag]}", text)
    return text


def python_text(text: str) -> str:
    """`text`, written for the command line, with Python's keywords; shell commands are unchanged."""
    pieces, end, after_flag = [], 0, False
    for match in _TEXT.finditer(text):
        between = text[end : match.start()]
        adjacent = after_flag and between == " " and match["flag"]
        pieces += [", " if adjacent else between, _in_python(match) if match["flag"] else match[0]]
        end, after_flag = match.end(), match["flag"] is not None
    text = "".join([*pieces, text[end:]])
    while (joined := _REPEATED.sub(r"\1=[\2, ", text)) != text:
        text = joined
    return text


def _in_python(match: re.Match[str]) -> str:
    flag, value = match["flag"], match["value"]
    end = ""
    if value is not None:
        end = value[len(value.rstrip(".:")) :] if value[0] not in "\"'" else ""
        value = value[: len(value) - len(end)]
    if flag in SWITCHES:
        omitted = _OMIT.search(match.string[: match.start()])
        return (SWITCHES[flag] if omitted else f"{SWITCHES[flag]}=True") + match[0].removeprefix(flag)
    if value is None or (flag in _FREE and value.isalpha() and value.islower()):
        return _keyword(flag) + ("" if value is None else f" {value}{end}")
    return _assigned(flag, _unquoted(value)) + end


def _keyword(flag: str) -> str:
    if flag in SEVERAL:
        return " and ".join(SEVERAL[flag])
    return {"-o": "the output path", "--output": "the output path", "--demo": '"demo"'}.get(
        flag, KEYWORDS.get(flag, flag)
    )


def _assigned(flag: str, value: str) -> str:
    if flag == "--set":
        name, equals, text = value.partition("=")
        return f"{name}={_literal(text)}" if equals else name
    if flag in ("-o", "--output"):
        return f'save("{value}")' if _VIDEO.search(value) else f'dst="{value}"'
    if flag == "--timesteps":
        return f"timesteps=[{value.replace(',', ', ')}]"
    if flag in SEVERAL:
        parts = re.split(r"[x*,]", value)
        return ", ".join(f"{name}={part}" for name, part in zip(SEVERAL[flag], parts, strict=False))
    if flag not in KEYWORDS:
        return f"{_keyword(flag)} {value}"
    keyword = KEYWORDS[flag]
    return f"{keyword}=[{_literal(value)}]" if keyword in LISTS else f"{keyword}={_literal(value)}"


def _literal(text: str) -> str:
    """The Python literal of a value: 8, 2.5, True, None, "mxfp8"."""
    if text in ("true", "false", "none"):
        return text.capitalize()
    if re.fullmatch(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _quoted(text: str) -> str:
    """The text as one argument of a shell."""
    if re.fullmatch(r"[\w@%+=:,./*-]+", text):
        return text
    return '"' + re.sub(r'[\\"$`]', r"\\\g<0>", text) + '"'


def _unquoted(text: str) -> str:
    return text[1:-1] if text[0] in "\"'" else text
