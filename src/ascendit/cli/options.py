"""The values of flags, `--set` and `--config`, checked and brought onto the fields of GenerateRequest.

One layer is a dict of known keys. `merge` puts layers over each other:
flags > --set > environment > --config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ascendit.errors import UsageError

EXTRAS: dict[str, Any] = {
    "model": str,
    "seconds": float,
    "device": str,
    "text_on": Literal["cpu", "device", "drop"],
    "dtype": Literal["float32", "bfloat16", "float16"] | None,
    "vae_dtype": Literal["float32", "bfloat16"] | None,
    "scheme": Literal["bf16", "int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale"] | None,
    "recipe": str | None,
    "keep": str | None,
    "step_policy": str | None,
    "emulate": Literal["decode-on-use", "decode-once"] | None,
    "activation_rule": str | None,
    "force": bool,
    "ops": Literal["auto", "reference"],
    "attention": Literal["fusion", "fused_infer"] | None,
    "nz": bool,
    "fast_layernorm": bool,
    "metadata": bool,
}
"""Keys that are no fields of the request: what to load, where, and how to save. `none` takes a value of a
config away, where None is among the types."""

# A value higher up makes these lower ones meaningless.
_REPLACES = {
    "guidance_scale": ("guidance_scale_2",),
    "timesteps": ("num_inference_steps",),
    "num_inference_steps": ("timesteps",),
    "seconds": ("num_frames",),
    "num_frames": ("seconds",),
}


@cache
def known() -> dict[str, Any]:
    """Every key that `--set` and `--config` take, with its type."""
    from ascendit.pipeline.request import GenerateRequest

    return get_type_hints(GenerateRequest) | EXTRAS


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
        raise _bad("--size", text, needs="width x height in pixels", fix="--size 832x480")
    return {"width": int(found[1]), "height": int(found[2])}


def parse_guidance(text: str) -> dict[str, float]:
    """`4` for every expert, or `4,3` for the high-noise and the low-noise one."""
    parts = text.split(",")
    try:
        numbers = [float(p) for p in parts]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2:
        raise _bad("--guidance", text, needs="one number, or two: high-noise,low-noise", fix="--guidance 4,3")
    return dict(zip(("guidance_scale", "guidance_scale_2"), numbers, strict=False))


def parse_timesteps(text: str) -> dict[str, tuple[float, ...]]:
    """`1000,750,500,250`."""
    try:
        return {"timesteps": _numbers(text)}
    except ValueError:
        needs = "falling numbers with commas between them"
        raise _bad("--timesteps", text, needs=needs, fix="--timesteps 1000,750,500,250") from None


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE` words onto a layer. Raises UsageError E-USE-01, with the known keys for an unknown one."""
    layer: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise _bad("--set", setting, needs="KEY=VALUE", fix="--set solver=euler")
        layer[key.strip()] = value
    return typed_layer(layer, where="--set")


def read_config(path: Path) -> dict[str, Any]:
    """The layer in a TOML file, or in the JSON that is written beside a video.

    Raises UsageError: E-USE-02 when it is absent, E-USE-01 when it cannot be read or has unknown keys.
    """
    import json
    import tomllib

    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except OSError as e:
        raise UsageError(
            f"--config {path}: {e.strerror}",
            needs="a TOML file, or the .json beside a video",
            fix="correct the path",
            code="E-USE-02",
        ) from e
    except ValueError as e:  # TOML, JSON and UTF-8 errors alike
        raise _bad(
            "--config", f"{path}: {e}", needs="TOML, or JSON with one object", fix="correct the file"
        ) from e
    if not isinstance(data, dict):
        raise _bad("--config", str(path), needs="one table of keys and values", fix="correct the file")
    return typed_layer(_of_video(data), where=f"--config {path}")


def _of_video(data: dict[str, Any]) -> dict[str, Any]:
    """Model, load options and request of what stands beside a video; the rest of it steers nothing.

    Files of before `source` and `load` have the name of the model alone. Any other table stays as it is.
    """
    from ascendit.pipeline.replay import setting_text

    if not isinstance(data.get("request"), dict):
        return data
    named, load = data.get("source") or data.get("model"), data.get("load")
    model = {"model": named} if isinstance(named, str) and named else {}
    options = dict(load) if isinstance(load, dict) else {}
    if isinstance(options.get("keep"), list):
        options["keep"] = setting_text([str(pattern) for pattern in options["keep"]])
    return {**model, **options, **data["request"]}


def typed_layer(layer: dict[str, Any], *, where: str) -> dict[str, Any]:
    """`layer` with every value in its type. Raises UsageError E-USE-01."""
    if unknown := sorted(set(layer) - set(known())):
        raise UsageError(
            f"{where}: unknown key {', '.join(unknown)}",
            needs=f"keys among {', '.join(sorted(known()))}",
            fix=_suggest(unknown[0]),
            code="E-USE-01",
        )
    return {key: _typed(key, value, where) for key, value in layer.items()}


def _typed(key: str, value: object, where: str) -> Any:
    hint = known()[key]
    kinds = get_args(hint) if NoneType in get_args(hint) else (hint,)
    kind = kinds[0]
    if NoneType in kinds and (value is None or value == "none"):
        return None
    try:
        if get_origin(kind) is Literal:
            return _choice(value, get_args(kind))
        return _READERS[get_origin(kind) or kind](value)
    except (ValueError, TypeError, OverflowError):
        raise _bad(
            where, f"{key}={value}", needs=f"{key}: {_in_words(kind)}", fix=_example(key, kind)
        ) from None


def _choice(value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(value)
    return str(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _integer(value: object) -> int:
    if isinstance(value, str):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(value)
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(value)
    return float(value)


def _truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if (word := _text(value).lower()) not in words:
        raise ValueError(value)
    return words[word]


def _numbers(value: object) -> tuple[float, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not items:
        raise TypeError(value)
    return tuple(_number(item) for item in items)


_READERS: dict[Any, Any] = {str: _text, int: _integer, float: _number, bool: _truth, tuple: _numbers}


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", tuple: "numbers"}
    return words[get_origin(kind) or kind]


def _example(key: str, kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"{key}={get_args(kind)[0]}"
    examples = {str: "some text", int: "16", float: "2.5", bool: "false", tuple: "1000,750,500,250"}
    return f"{key}={examples[get_origin(kind) or kind]}"


def _suggest(key: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(key, known(), n=1)
    return f"did you mean {close[0]}?" if close else "ascendit generate --help tells which flags there are"


def _bad(where: str, got: str, *, needs: str, fix: str) -> UsageError:
    return UsageError(f"{where} {got}", needs=needs, fix=fix, code="E-USE-01")
