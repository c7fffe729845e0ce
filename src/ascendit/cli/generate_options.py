"""What one `generate` call asks for: words, flags, `--set`, environment and `--config` in one place.

One layer is a dict of known keys, whose values are brought into the types of LoadOptions and GenerateRequest.
`merge` puts layers over each other: flags > --set > environment > --config.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import TypeAdapter, ValidationError

from ascendit.device.device import parse_device
from ascendit.environment import read_environment
from ascendit.errors import UsageError
from ascendit.pipeline.options import VARIABLES, LoadOptions
from ascendit.pipeline.request import GenerateRequest
from ascendit.validation import bad_value, non_optional

KNOWN: dict[str, Any] = {
    **{name: field.annotation for name, field in GenerateRequest.model_fields.items()},
    **{name: field.annotation for name, field in LoadOptions.model_fields.items()},
    "seconds": float,
    "metadata": bool,
}
"""Every key that `--set` and `--config` take, with its type. `none` takes a value of a config away, where
None is among the types."""

# A value higher up makes these lower ones meaningless.
_REPLACES = {
    "guidance_scale": ("guidance_scale_2",),
    "timesteps": ("num_inference_steps",),
    "num_inference_steps": ("timesteps",),
    "seconds": ("num_frames",),
    "num_frames": ("seconds",),
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call that was understood, before it met a model."""

    options: LoadOptions
    prompt: str
    fields: dict[str, Any]
    """Fields of GenerateRequest that were given, without the prompt; `seconds` too."""
    metadata: bool = True
    model_from: Path | None = None
    """The file that names the model, None where the command line does."""
    notes: tuple[str, ...] = ()
    """What the environment variables did."""


def read_call(
    words: list[str], *, demo: bool, flags: Mapping[str, Any], settings: Iterable[str], config: Path | None
) -> Call:
    """Put words and layers of one call together. Raises UsageError.

    `words`: MODEL PROMPT, PROMPT, or nothing where a config has both. `flags`: the parameters of
    `generate`; those that are no keys, `SPLIT` aside, have no effect here.
    """
    environment, notes = read_environment(VARIABLES)
    algo = environment.pop("attention", None)
    given = {key: value for key, value in flags.items() if key in KNOWN and value is not None}
    for flag, split in SPLIT.items():
        if flags.get(flag) is not None:
            given |= split(flags[flag])
    layers = [
        read_config(config) if config else {},
        environment,
        parse_settings(settings),
        typed_layer(given, where="flags"),
    ]
    values = {k: v for k, v in merge(*layers).items() if v is not None}
    model, prompt = _model_and_prompt(words, demo, values.pop("model", None), values.pop("prompt", None))
    load = {name: values.pop(name) for name in LoadOptions.model_fields if name in values}
    if algo and parse_device(load.get("device", "cpu")).has_attention_kernels:
        load.setdefault("attention", algo)
    return Call(
        options=LoadOptions(model=model, **load),
        prompt=prompt,
        metadata=values.pop("metadata", True),
        fields=values,
        model_from=config if model == layers[0].get("model") and not demo else None,
        notes=notes,
    )


def _model_and_prompt(words: list[str], demo: bool, model: str | None, prompt: str | None) -> tuple[str, str]:
    """Read the positional words: MODEL PROMPT, less what `--demo` or a config names already."""
    given = "demo" if demo else model
    wanted = [name for name, value in (("MODEL", given), ("PROMPT", prompt)) if value is None]
    if len(words) == len(wanted):
        named = dict(zip(wanted, words, strict=True))
    elif len(words) == 1 and not wanted:  # a prompt on the command line wins over the one in the config
        named = {"PROMPT": words[0]}
    elif len(words) == 2 and not demo:
        named = {"MODEL": words[0], "PROMPT": words[1]}
    else:
        got = f"{len(words)} words: {shlex.join(words)}" if words else "no model and no prompt"
        needs = " and ".join(wanted or ["at most PROMPT"]) + ", the prompt in quotes"
        fix = 'ascendit generate --demo "a red circle moves right on a black background"'
        raise UsageError(got, needs=needs, fix=fix)
    return named.get("MODEL") or given or "", named.get("PROMPT", prompt) or ""


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """One dict of all layers; later ones win."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name in [k for k, v in layer.items() if v is not None]:
            for lower in _REPLACES.get(name, ()):
                merged.pop(lower, None)
        merged |= layer
    return merged


def parse_size(text: str) -> dict[str, int]:
    """`832x480` or `832*480`: width and height."""
    found = re.fullmatch(r"\s*(\d+)\s*[xX*×]\s*(\d+)\s*", text)
    if not found:
        raise UsageError(f"--size {text}", needs="width x height in pixels", fix="--size 832x480")
    return {"width": int(found[1]), "height": int(found[2])}


def parse_guidance(text: str) -> dict[str, float]:
    """`4` for every expert, or `4,3` for the high-noise and the low-noise one."""
    parts = text.split(",")
    try:
        numbers = [float(p) for p in parts]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2:
        needs = "one number, or two: high-noise,low-noise"
        raise UsageError(f"--guidance {text}", needs=needs, fix="--guidance 4,3")
    return dict(zip(("guidance_scale", "guidance_scale_2"), numbers, strict=False))


def parse_timesteps(text: str) -> dict[str, tuple[float, ...]]:
    """`1000,750,500,250`."""
    try:
        return {"timesteps": tuple(float(t) for t in text.split(","))}
    except ValueError:
        needs = "falling numbers with commas between them"
        raise UsageError(f"--timesteps {text}", needs=needs, fix="--timesteps 1000,750,500,250") from None


SPLIT: dict[str, Callable[[str], dict[str, Any]]] = {
    "size": parse_size,
    "guidance": parse_guidance,
    "own_timesteps": parse_timesteps,
}
"""Flags that are no keys by themselves -> their keys."""


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE` words onto a layer. Raises UsageError E-USE-01, with the known keys for an unknown one."""
    layer: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}", needs="KEY=VALUE", fix="--set solver=euler")
        layer[key.strip()] = value
    return typed_layer(layer, where="--set")


def read_config(path: Path) -> dict[str, Any]:
    """The layer in a TOML file, or in the JSON that is written beside a video.

    Older ones of a video have no `source` and `load`, and name the model alone.
    Raises UsageError: E-USE-02 when it is absent, E-USE-01 when it cannot be read or has unknown keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except OSError as e:
        got, needs = f"--config {path}: {e.strerror}", "a TOML file, or the .json beside a video"
        raise UsageError(got, needs=needs, fix="correct the path", code="E-USE-02") from e
    except ValueError as e:  # TOML, JSON and UTF-8 errors alike
        needs = "TOML, or JSON with one object"
        raise UsageError(f"--config {path}: {e}", needs=needs, fix="correct the file") from e
    if not isinstance(data, dict):
        needs = "one table of keys and values"
        raise UsageError(f"--config {path}", needs=needs, fix="correct the file")
    if isinstance(data.get("request"), dict):  # of a video; the rest of its facts has no effect
        model, load = data.get("source") or data.get("model"), data.get("load")
        named = {"model": model} if isinstance(model, str) and model else {}
        data = {**named, **(load if isinstance(load, dict) else {}), **data["request"]}
    return typed_layer(data, where=f"--config {path}")


def typed_layer(layer: dict[str, Any], *, where: str) -> dict[str, Any]:
    """`layer` with every value in its type. Raises UsageError E-USE-01."""
    if unknown := sorted(set(layer) - set(KNOWN)):
        close = get_close_matches(unknown[0], KNOWN, n=1)
        fix = f"did you mean {close[0]}?" if close else "ascendit generate --help tells which flags there are"
        needs = f"keys among {', '.join(sorted(KNOWN))}"
        raise UsageError(f"{where}: unknown key {', '.join(unknown)}", needs=needs, fix=fix)
    return {key: _typed(key, value, where) for key, value in layer.items()}


def _typed(key: str, value: Any, where: str) -> Any:
    hint, kind = KNOWN[key], non_optional(KNOWN[key])
    row = get_origin(kind) is tuple
    if (value is None or value == "none") and (row or kind != hint):
        return None
    words = isinstance(value, str) and (kind is bool or get_origin(kind) is Literal)
    if key in LoadOptions.model_fields and not words:
        return value  # LoadOptions reads it
    try:
        if not row:
            read = TypeAdapter(kind)
            text = isinstance(value, str)
            return read.validate_strings(value) if text else read.validate_python(value, strict=True)
        items = value.split(",") if isinstance(value, str) else value
        return tuple(TypeAdapter(kind).validate_python(items, strict=False))
    except ValidationError:
        raise bad_value(key, value, hint, where) from None
