"""The options of one `generate` call, from arguments, flags, `--set`, environment and `--config`.

Each source gives a dict of known keys, with values of the types of LoadOptions and GenerateRequest.
Precedence: flags > --set > environment > --config (`merge`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_origin

from pydantic import TypeAdapter

from ascendit.device.device import parse_device
from ascendit.environment import read_environment
from ascendit.errors import AscenditError, UsageError
from ascendit.family import PRESETS
from ascendit.foreign import COMMAND_ADVICE, FLAG_FOR, KEYWORD_OF, ON, hint, normal, value_for
from ascendit.geometry import FrameRate, frame_rate
from ascendit.option_text import flag_of
from ascendit.pipeline.options import VARIABLES, LoadOptions
from ascendit.pipeline.request import REPLACES, GenerateRequest
from ascendit.report import shell_line
from ascendit.validation import bad_value, non_optional, read_settings

KEYS: dict[str, Any] = {
    **{name: field.annotation for name, field in GenerateRequest.model_fields.items()},
    **{name: field.annotation for name, field in LoadOptions.model_fields.items()},
    "seconds": float,
    "preset": str,
    "crf": int,
    "metadata": bool,
    "allow_flat": bool,
}
"""Every key of `--set` and `--config`, with its type. `none` resets a key whose type includes None."""

_NO_KEYS = "size guidance sheet num_videos prompts config latents"
FLAG_ONLY = {name: flag_of(name) for name in _NO_KEYS.split()} | {"seeds": "--seed", "output": "-o"}
"""Name of a flag that is no key of `--set` -> the flag."""
SWITCHES = {name: flag_of(name) for name in ("overwrite", "dry_run", "keep_latents", "demo", "json")}
"""Name of a flag without a value -> the flag."""

# A key removes these keys from sources of lower precedence.
_REPLACES = {
    "preset": tuple(next(iter(PRESETS.values())).fields) + ("guidance_scale_2",),
    "guidance_scale": ("guidance_scale_2",),
    **{name: (other,) for name, other in REPLACES.items()},
    "seconds": ("num_frames",),
    "num_frames": ("seconds",),
}
SHOWN_KEYS = 6
"""Keys in the error of an unknown one."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A parsed call, not yet checked against a model."""

    options: LoadOptions
    prompt: str
    fields: dict[str, Any]
    """The fields of GenerateRequest that were set, without the prompt; also `seconds` and `preset`."""
    metadata: bool = True
    crf: int | None = None
    allow_flat: bool = False
    latents: Path | None = None
    """The file that `--latents` names."""
    model_from: Path | None = None
    """The config file that names the model; None if the command line does."""
    notes: tuple[str, ...] = ()
    """Effects of environment variables."""

    def replay_flags(self, *, allow_flat: bool) -> list[str]:
        """Flags of the replay line that are not in the request. `allow_flat`: whether the video needs it."""
        flags = ["--allow-flat"] if allow_flat else []
        flags += [] if self.crf is None else ["--crf", str(self.crf)]
        return flags + ([] if self.metadata else ["--set", "metadata=false"])


def read_call(
    args: list[str],
    *,
    demo: bool,
    flags: Mapping[str, Any],
    settings: Iterable[str],
    config: Path | None,
    latents: Path | None = None,
    prompts: str | None = None,
) -> Call:
    """Combine all sources of a call. Raises UsageError (E-USE-01, E-USE-02).

    `latents`: kept latents, whose options replace a config. `prompts`: a file of prompts, which replace that
    of the call.
    `args`: MODEL PROMPT, PROMPT, or empty if a config has both. `flags`: the parameters of `generate`;
    those that are neither keys nor in `SPLIT` are ignored.
    """
    if config is not None and latents is not None:
        needs = "one of the two: the file of the latents has the options of its run"
        raise UsageError("--config and --latents", needs=needs, fix="omit --config")
    environment, notes = read_environment(VARIABLES)
    algo = environment.pop("attention", None)
    layers = [
        read_latents_config(latents) if latents else read_config(config) if config else {},
        environment,
        parse_settings(settings),
        _layer_of_flags(flags, "demo" if demo else args[0] if len(args) == 2 else None),
    ]
    values = {k: v for k, v in merge(*layers).items() if v is not None}
    model, prompt = values.pop("model", None), values.pop("prompt", None)
    if prompts is None:
        model, prompt = _model_and_prompt(args, demo, model, prompt)
    else:
        model, prompt = _model_of_prompts(args, demo, model, prompts), ""
    load = {name: values.pop(name) for name in LoadOptions.model_fields if name in values}
    if algo and parse_device(load.get("device", "cpu")).has_chip:
        load.setdefault("attention", algo)
    return Call(
        options=LoadOptions(model=model, **load),
        prompt=prompt,
        metadata=values.pop("metadata", True),
        crf=values.pop("crf", None),
        allow_flat=values.pop("allow_flat", False),
        fields=values,
        model_from=config if model == layers[0].get("model") and not demo else None,
        notes=notes,
        latents=latents,
    )


def _layer_of_flags(flags: Mapping[str, Any], model: str | None) -> dict[str, Any]:
    """The keys that flags set. `model`: if it is known, the fix of an error has a value of it."""
    values = {name: value for name, value in flags.items() if value is not None}
    keys = KEYS.keys() - SPLIT.keys()
    layer = typed_layer({k: v for k, v in values.items() if k in keys}, source="flags")
    for name in [name for name in SPLIT if name in values]:
        try:
            layer |= SPLIT[name](values[name])
        except UsageError as e:
            e.fix = own_value(name, values[name], model) or e.fix
            raise
    return layer


def own_value(flag: str, text: str, model: str | None) -> str | None:
    """`--size` or `--guidance` with a value of the model itself, for a fix; None for an unknown model."""
    from ascendit.pipeline.job import prepare_model

    if model is None or flag not in ("size", "guidance"):
        return None
    try:
        defaults = prepare_model(LoadOptions(model=model)).defaults
    except AscenditError:
        return None  # reported once the flag is corrected
    if flag == "guidance":
        scales = (defaults.guidance_scale, defaults.guidance_scale_2)
        return f"--guidance {','.join(f'{scale:g}' for scale in scales if scale is not None)}"
    sizes = defaults.spec.sizes if defaults.spec else ()
    number = re.search(r"\d+", text)
    near = [size for size in sizes if number and int(number[0]) in size]
    return "--size {}x{}".format(*(near or [(defaults.width, defaults.height)])[0])


def _model_and_prompt(args: list[str], demo: bool, model: str | None, prompt: str | None) -> tuple[str, str]:
    """Model and prompt from the arguments and `--demo`, else `model` and `prompt` of the config."""
    default = "demo" if demo else model
    needed = [name for name, value in (("MODEL", default), ("PROMPT", prompt)) if value is None]
    if len(args) == len(needed):
        named = dict(zip(needed, args, strict=True))
    elif len(args) == 1 and not needed:  # a prompt on the command line overrides the config
        named = {"PROMPT": args[0]}
    elif len(args) == 2 and not demo:
        named = {"MODEL": args[0], "PROMPT": args[1]}
    else:
        number = f"{len(args)} argument{'s' * (len(args) > 1)}"
        got = f"{number}: {shell_line(args)}" if args else "no model and no prompt"
        needs = " and ".join(needed or ["at most PROMPT"]) + ", with the prompt in quotes"
        if args and re.fullmatch(r"[\d.]+", args[-1]):
            needs += "; numbers of one flag are one word, as --guidance 4,3"
        raise UsageError(got, needs=needs, fix=_with_quotes(args, default))
    return named.get("MODEL") or default or "", named.get("PROMPT", prompt) or ""


def _with_quotes(args: list[str], default: str | None) -> str:
    """The command with a model and one prompt, made of the arguments of a call that lacks or splits them."""
    texts = [arg for arg in args if not re.fullmatch(r"[\d.]+", arg)]
    has_model = default is None and texts and (_MODEL.match(texts[0]) or Path(texts[0]).exists())
    model, texts = (texts[0], texts[1:]) if has_model else (default or "demo", texts)
    prompt = " ".join(texts) or "a red circle moves right on a black background"
    return shell_line(["ascendit", "generate", "--demo" if model == "demo" else model, prompt])


_MODEL = re.compile(r"demo$|(?:hf|ms):|\S*/\S*$")
"""An argument that names a model, and is no word of a prompt."""


def _model_of_prompts(args: list[str], demo: bool, model: str | None, prompts: str) -> str:
    """The model of a call with `--prompts`, whose only argument is MODEL."""
    model = args[0] if args else "demo" if demo else model
    if model is None or len(args) > (0 if demo else 1):
        got = f"--prompts {prompts} and {shell_line(args) or 'no model'}"
        needs = "MODEL or --demo, and no PROMPT: the file has the prompts"
        first = "--demo" if demo or not args else shell_line(args[:1])
        fix = f"ascendit generate {first} --prompts {shell_line([prompts])}"
        raise UsageError(got, needs=needs, fix=fix)
    return model


def merge(*layers: dict[str, Any]) -> dict[str, Any]:
    """Combine dicts of options; later ones override earlier ones."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name in [k for k, v in layer.items() if v is not None]:
            for lower in _REPLACES.get(name, ()):
                merged.pop(lower, None)
        merged |= layer
    return merged


def parse_size(text: str) -> dict[str, int]:
    """Parse width and height: `832x480` or `832*480`. Raises UsageError (E-USE-01)."""
    match = re.fullmatch(r"\s*(\d+)\s*[xX*×]\s*(\d+)\s*", text)
    if not match:
        raise UsageError(
            f"--size {text}", needs="width x height in pixels", fix="omit --size for the model's own size"
        )
    return {"width": int(match[1]), "height": int(match[2])}


def parse_guidance(text: str) -> dict[str, float]:
    """Parse guidance scales: `4`, or `4,3` for high and low noise. Raises UsageError (E-USE-01)."""
    parts = text.split(",")
    try:
        numbers = [float(p) for p in parts]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2:
        needs = "one number, or two: high-noise,low-noise"
        raise UsageError(f"--guidance {text}", needs=needs, fix="omit --guidance for the model's own scale")
    return dict(zip(("guidance_scale", "guidance_scale_2"), numbers, strict=False))


def parse_timesteps(text: str) -> dict[str, tuple[float, ...]]:
    """Parse timesteps such as `1000,750,500,250`. Raises UsageError (E-USE-01)."""
    try:
        return {"timesteps": tuple(float(t) for t in text.split(","))}
    except ValueError:
        needs = "decreasing numbers, separated by commas"
        raise UsageError(f"--timesteps {text}", needs=needs, fix="--timesteps 1000,750,500,250") from None


SPLIT: dict[str, Callable[[str], dict[str, Any]]] = {
    "size": parse_size,
    "guidance": parse_guidance,
    "timesteps": parse_timesteps,
}
"""Name of a flag with several numbers -> the parser that returns its keys."""


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` settings. Raises UsageError (E-USE-01) for bad syntax, keys or values."""
    layer: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(
                f"--set {setting}", needs="KEY=VALUE", fix=f"--set solver=euler instead of {setting}"
            )
        layer[key.strip()] = value
    return typed_layer(layer, source="--set")


def read_config(path: Path) -> dict[str, Any]:
    """Read the options in a TOML file, or in the JSON beside a video.

    JSON files of older versions have `model` only, without `source` and `load`.
    Raises UsageError: E-USE-02 for a missing or unreadable file, E-USE-01 for bad syntax, keys or values.
    """
    try:
        data = read_settings(path, "json" if path.suffix.lower() == ".json" else "toml")
    except OSError as e:
        got, needs = f"--config {path}: {e.strerror}", "a TOML file, or the .json beside a video"
        raise UsageError(got, needs=needs, fix="correct the path", code="E-USE-02") from e
    except ValueError as e:  # TOML, JSON and UTF-8 errors alike
        needs = "a TOML file, or JSON with one object"
        raise UsageError(f"--config {path}: {e}", needs=needs, fix="correct the file") from e
    if not isinstance(data, dict):
        needs = "one table of keys and values"
        raise UsageError(f"--config {path}", needs=needs, fix="correct the file")
    return _config_layer(data, path)


def read_latents_config(path: Path) -> dict[str, Any]:
    """Read the options of the run that kept its latents. Raises the errors of `latents.read_latents`."""
    from ascendit.pipeline.latents import read_latents

    return _config_layer(read_latents(path).record, path)


def _config_layer(data: dict[str, Any], path: Path) -> dict[str, Any]:
    if isinstance(data.get("request"), dict):  # the JSON beside a video; other keys are ignored
        model, load = data.get("source") or data.get("model"), data.get("load")
        named = {"model": model} if isinstance(model, str) and model else {}
        flat = {"allow_flat": True} if data.get("allow_flat") is True else {}
        data = {**named, **(load if isinstance(load, dict) else {}), **flat, **data["request"]}
    return typed_layer(data, source=f"--config {path}")


def typed_layer(layer: dict[str, Any], *, source: str) -> dict[str, Any]:
    """Convert the values of `layer` to the types of their keys.

    Raises UsageError (E-USE-01) for bad keys or values.
    """
    if unknown := sorted(set(layer) - set(KEYS)):
        raise _unknown_key(unknown, layer, source)
    return {key: _typed(key, value, source) for key, value in layer.items()}


def _unknown_key(unknown: list[str], layer: Mapping[str, Any], source: str) -> UsageError:
    fixes = dict.fromkeys(filter(None, (_key_fix(name, layer[name], source) for name in unknown)))
    near = get_close_matches(_key_of(unknown[0]) or unknown[0], KEYS, n=SHOWN_KEYS, cutoff=0 if fixes else 1)
    needs = f"a key of --set, as {', '.join((near or [*KEYS])[:SHOWN_KEYS])}, .."
    needs += "" if fixes else "; docs/cli.md lists all"
    fix = ", ".join(fixes) or "ascendit generate --help"
    return UsageError(f"{source}: unknown key {', '.join(unknown)}", needs=needs, fix=fix)


def _key_fix(name: str, value: Any, source: str) -> str | None:
    """The fix for an unknown key: its own key or flag, or advice; None without one."""
    if isinstance(value, Mapping):
        return f"write the keys of {name} without a table around them"
    other, value = normal(name), value if isinstance(value, str | int | float) else None
    key = KEYWORD_OF.get(other, other)
    flag = SWITCHES.get(key) or FLAG_ONLY.get(key) or FLAG_FOR.get(other)
    if flag in SWITCHES.values():
        return (
            f"omit {name}"
            if value is not None and str(value).lower() not in ON
            else f"{flag} instead of {name}"
        )
    if flag is not None:
        return f"{flag}{'' if value is None else f' {shell_line([str(value)])}'} instead of {name}"
    own = _key_of(name)
    if own is None or own not in KEYS:
        return hint(name, value, [*KEYS]) or (
            f"omit {name}: {COMMAND_ADVICE[other]}" if other in COMMAND_ADVICE else None
        )
    if own == "guidance_scale" and "," in str(value):
        return f"--guidance {value} instead of {name}"
    text = value if value is None else value_for(own, value) or value
    try:
        check_values(typed_layer({} if text is None else {own: text}, source=source))
    except UsageError:
        text = None
    return f"{own if text is None else _setting(own, text, source)} instead of {name}"


def check_values(layer: Mapping[str, Any]) -> None:
    """Raise UsageError (E-USE-01) for a typed value that LoadOptions refuses."""
    load = {name: value for name, value in layer.items() if name in LoadOptions.model_fields}
    if load.keys() - {"model"}:
        LoadOptions(**{"model": "demo", **load})


def _key_of(name: str) -> str | None:
    """The key that another tool calls `name`, or that is spelled like it; None without one."""
    other = normal(name)
    if other in KEYWORD_OF:
        return KEYWORD_OF[other]
    is_advised = hint(name, None, [*KEYS]) is not None or other in COMMAND_ADVICE
    return None if is_advised else next(iter(get_close_matches(other, KEYS, n=1, cutoff=0.75)), None)


def _setting(key: str, value: str | int | float, source: str) -> str:
    """A key with its value, as its source writes it: `--set`, TOML or a JSON row."""
    if source == "--set":
        setting = f"{key}={value}"
        needs_quotes = re.search(r"[^\w@%+=:,./*-]", setting)
        return f"--set {shell_line([setting]) if needs_quotes else setting}"
    text = json.dumps(value, ensure_ascii=False)
    return f"{key} = {text}" if source.startswith("--config") else f'"{key}": {text}'


def _typed(key: str, value: Any, source: str) -> Any:
    hint, kind = KEYS[key], non_optional(KEYS[key])
    is_tuple = get_origin(kind) is tuple
    if (value is None or value == "none") and (is_tuple or kind != hint):
        return None
    if key == "seed" and (seeds := re.fullmatch(r"\[?(\d+(?:[,-] ?\d+)+)]?", str(value))):
        needs = "one number: --seed makes a video of each of several"
        fix = f"--seed {seeds[1].replace(' ', '')}"
        raise UsageError(f"{source}: seed={value}", needs=needs, fix=fix)
    is_name = isinstance(value, str) and (kind is bool or get_origin(kind) is Literal)
    if key in LoadOptions.model_fields and not is_name:
        return value  # LoadOptions validates it
    try:
        if kind == FrameRate:
            return frame_rate(value)
        if not is_tuple:
            adapter = TypeAdapter(kind)
            is_text = isinstance(value, str)
            return adapter.validate_strings(value) if is_text else adapter.validate_python(value, strict=True)
        items = value.split(",") if isinstance(value, str) else value
        return tuple(TypeAdapter(kind).validate_python(items, strict=False))
    except ValueError:  # also pydantic's
        raise bad_value(key, value, hint, "" if source == "flags" else source) from None
