"""Check translated lines: whether a flag accepts its value, and which arguments are missing.

refusal("generate", ["--solver", "normal"])       # "solver: unipc or dpm++ or euler or renoise"
complete("repack", ["demo"], command)             # ["demo", "-o", "DST"]
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ascendit.attention.choice import AttentionPolicy
from ascendit.cli.generate_options import KEYS, SPLIT, check_values, own_value, parse_settings, typed_layer
from ascendit.cli.output import COMMON
from ascendit.cli.prompts import parse_seeds
from ascendit.device.attention_kernels import parse_attention
from ascendit.device.device import parse_device
from ascendit.errors import AscenditError
from ascendit.option_text import KEYWORDS
from ascendit.pipeline.video import locate

ONE_OF = {
    "quantize": (("--scheme", "--recipe"), ("--scheme", "mxfp8")),
    "verify": (("--adherence", "--quality"), ("--quality",)),
}
"""Command -> flags of which it needs one, and the one to add."""
OPEN = ("--recipe", "--device")
"""Flags with more values than a shell completes."""


def refusal(command: str, new: Sequence[str], choices: Sequence[str] = (), device: str = "cpu") -> str | None:
    """The rule that a flag with its value breaks; None if `command` accepts it.

    `new`: a flag, and its value if it has one. `choices`: the values that a shell completes.
    `device`: that of the line.
    """
    if len(new) < 2:
        return None
    flag, text = new
    if flag == "--lora" and re.fullmatch(r"[\d.]+", text):
        return "FILE[:WEIGHT]"
    if choices and flag not in OPEN and text not in choices:
        return " or ".join(choices)
    try:
        if flag in ("-o", "--output") and command == "generate" and not os.path.isdir(text):
            locate(text, 1)
        elif flag == "--seed":
            parse_seeds(text)
        elif flag == "--device":
            parse_device(text)
        elif (name := flag.removeprefix("--")) in SPLIT:
            SPLIT[name](text)
        elif flag == "--set":
            _check(parse_settings([text]), device)
        elif (keyword := KEYWORDS.get(flag)) in KEYS:
            _check(
                typed_layer({keyword: [text] if keyword in ("keep", "loras") else text}, source="flags"),
                device,
            )
    except AscenditError as error:
        return error.needs
    return None


def _check(layer: Mapping[str, Any], device: str) -> None:
    check_values(layer)
    if (request := layer.get("attention")) is not None:
        AttentionPolicy(device=parse_device(device), request=parse_attention(request)).check_names()


def own_size(size: Mapping[str, str], model: str | None) -> str | None:
    """`WxH` of a width or a height, or both, with the other side of the model; None for an unknown model."""
    if len(size) == 2:
        return f"{size['width']}x{size['height']}"
    side, number = next(iter(size.items()))
    if model is None or not (model == "demo" or os.path.exists(model)):
        return None
    own = (own_value("size", number, model) or "").removeprefix("--size ")
    width, _, height = own.partition("x")
    if not height:
        return None
    sides = {"width": width, "height": height}
    if sides[side] != number and number in sides.values():
        sides = {"width": height, "height": width}
    return "{width}x{height}".format(**sides | {side: number})


def complete(name: str, args: Sequence[str], command: Any, *, has_model: bool = False) -> list[str] | None:
    """`args` of the command `name`, with required ones that are missing; None if its parser refuses them.

    `has_model`: whether the first argument is a model.
    """
    if {"-h", "--help"} & {*args}:
        return [*args]
    end = next((n for n, arg in enumerate(args) if arg.startswith("-")), len(args))
    arguments, flags = [*args[:end]], [*args[end:]]
    if name == "generate":
        needed = _needed(flags)
        if len(arguments) < len(needed):
            arguments = (
                [*arguments, *needed[len(arguments) :]]
                if has_model
                else [*needed[: len(needed) - len(arguments)], *arguments]
            )
        if len(arguments) > (2 if "--config" in flags or "--latents" in flags else len(needed)):
            return None
    for param in command.params:
        if not param.required or {*param.opts} & {*flags}:
            continue
        if param.param_type_name == "option":
            flags += [param.opts[0], param.metavar or "VALUE"]
        elif not arguments:
            arguments = [(param.metavar or "MODEL").strip(".")]
    alternatives, default = ONE_OF.get(name, ((), ()))
    flags += [] if {*alternatives} & {*flags} else default
    fixed = [*arguments, *flags]
    if not _parses(name, fixed, command):
        return None
    return [arg for n, arg in enumerate(fixed) if arg or fixed[n - 1] != "--report"]  # it needs no value


def _needed(flags: Sequence[str]) -> list[str]:
    """The arguments of `generate` that these flags do not replace."""
    replaced_by = {
        "MODEL": {"--demo", "--config", "--latents"},
        "PROMPT": {"--prompts", "--config", "--latents"},
    }
    return [argument for argument, others in replaced_by.items() if not others & {*flags}]


def _parses(name: str, args: Sequence[str], command: Any) -> bool:
    try:
        command.make_context(name, [arg for arg in args if arg not in COMMON])
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer
            return False
        raise
    return True
