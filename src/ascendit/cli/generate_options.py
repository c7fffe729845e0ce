"""What one `generate` call asks for: words, flags, `--set`, environment and `--config` in one place.

One layer is a dict of known keys, whose values are checked and brought onto the fields of GenerateRequest.
`merge` puts layers over each other: flags > --set > environment > --config. Every command imports this, so
nothing here is heavy: a bad call ends before torch is imported.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ascendit.errors import UsageError

if TYPE_CHECKING:
    from ascendit.checkpoint.layout import Layout
    from ascendit.pipeline.request import Defaults, GenerateRequest

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


# ---- the call, and what becomes of it with its model --------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call that was understood, before it met a model."""

    model: str
    """`demo`, a folder, or a hub name."""
    prompt: str
    fields: dict[str, Any]
    """Fields of GenerateRequest that were given, without the prompt."""
    seconds: float | None = None
    device: str = "cpu"
    text_on: str = "device"
    scheme: str | None = None
    recipe: str | None = None
    keep: str | None = None
    """Patterns with spaces or semicolons between them."""
    step_policy: str | None = None
    emulate: str | None = None
    activation_rule: str | None = None
    force: bool = False
    dtype: str | None = None
    vae_dtype: str | None = None
    ops: str | None = None
    attention: str | None = None
    nz: bool | None = None
    fast_layernorm: bool | None = None
    metadata: bool = True
    model_from: Path | None = None
    """The file that names the model, None where the command line does."""
    notes: tuple[str, ...] = ()
    """What the environment variables did."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A call that fits its model: everything is checked that can be checked without weights."""

    call: Call
    layout: Layout
    defaults: Defaults
    request: GenerateRequest
    output: Path

    @property
    def load_options(self) -> dict[str, Any]:
        """For `ascendit.load`, without what was left open."""
        from ascendit.pipeline.request import LOAD_FLAGS, LOAD_SETTINGS

        given = {name: getattr(self.call, name) for name in (*LOAD_FLAGS, *LOAD_SETTINGS)}
        given |= {"keep": patterns(self.call.keep), "force": self.call.force or None}
        return {k: v for k, v in given.items() if v not in (None, (), "auto")}

    @property
    def replay(self) -> str:
        """The command that makes this video again; the JSON beside the video has the same."""
        from ascendit.pipeline.request import load_record, replay_line

        return replay_line(self.request, self.call.model, load_record(self.load_options))

    @property
    def video_tokens(self) -> int:
        """Tokens of the video in one pass of a transformer."""
        from ascendit import geometry
        from ascendit.family import VaeConfig, WanConfig

        vae = VaeConfig.from_dict(self.layout.part("vae").config)
        patch_size = self.layout.experts[0].config.get("patch_size", WanConfig.patch_size)
        latents = geometry.latent_grid(
            self.request.num_frames,
            self.request.height,
            self.request.width,
            frame_stride=vae.scale_factor_temporal,
            stride=vae.scale_factor_spatial,
        )
        return geometry.num_tokens(geometry.patch_grid(latents, patch_size))

    def as_dict(self) -> dict[str, Any]:
        """What `--dry-run --json` prints."""
        return {
            "dry_run": True,
            "model": self.call.model,
            "folder": str(self.layout.root),
            "output": str(self.output),
            "request": dataclasses.asdict(self.request),
            "given": sorted(self.call.fields),
            "defaults_from": list(self.defaults.sources),
            "video_tokens": self.video_tokens,
            "text_tokens": self.request.max_sequence_length,
            "device": self.call.device,
            "text_on": self.call.text_on,
            "scheme": self.call.scheme,
            "recipe": self.call.recipe,
            "step_policy": self.call.step_policy,
            "emulate": self.call.emulate,
            "replay": self.replay,
        }


def read_call(
    words: list[str], *, demo: bool, flags: dict[str, Any], settings: list[str], config: Path | None
) -> Call:
    """Put all layers over each other. `flags`: known keys (see `known`), None where not given."""
    from ascendit.device.device import parse_device
    from ascendit.environment import read_environment

    environment = read_environment()
    told = {"text_on": environment.text_on, "fast_layernorm": environment.fast_layernorm}
    layers = [
        read_config(config) if config else {},
        {k: v for k, v in told.items() if v is not None},
        parse_settings(settings),
        typed_layer({k: v for k, v in flags.items() if v is not None}, where="flags"),
    ]
    values = {k: v for k, v in merge(*layers).items() if v is not None}
    model, prompt = _model_and_prompt(words, demo, values.pop("model", None), values.pop("prompt", None))
    extras: dict[str, Any] = {k: values.pop(k) for k in EXTRAS if k in values}
    named = config if model == layers[0].get("model") and not demo else None
    device = parse_device(extras.get("device", "cpu"))
    if environment.attention and device.has_attention_kernels:
        extras.setdefault("attention", environment.attention)
    extras |= {"model_from": named, "notes": environment.notes}
    return Call(model=model, prompt=prompt, fields=values, **extras)


def _model_and_prompt(words: list[str], demo: bool, model: str | None, prompt: str | None) -> tuple[str, str]:
    """Read the positional words: MODEL PROMPT, less what `--demo` or a config names already."""
    wanted = [
        name
        for name, known in (("MODEL", demo or model is not None), ("PROMPT", prompt is not None))
        if not known
    ]
    given = "demo" if demo else model
    if len(words) == len(wanted):
        named = dict(zip(wanted, words, strict=True))
    elif len(words) == 1 and not wanted:  # a prompt on the command line wins over the one in the config
        named = {"PROMPT": words[0]}
    elif len(words) == 2 and not demo:
        named = {"MODEL": words[0], "PROMPT": words[1]}
    else:
        raise UsageError(
            f"{len(words)} words: {shlex.join(words)}" if words else "no model and no prompt",
            needs=" and ".join(wanted or ["at most PROMPT"]) + ", the prompt in quotes",
            fix='ascendit generate --demo "a red circle moves right on a black background"',
            code="E-USE-01",
        )
    return named.get("MODEL") or given or "", named.get("PROMPT", prompt) or ""


def prepare(call: Call, output: Path | None, *, overwrite: bool) -> Prepared:
    """Meet the model: its folder, its defaults, the request, the name of the output; no weights."""
    from ascendit import geometry
    from ascendit.checkpoint.layout import recognise
    from ascendit.pipeline import video
    from ascendit.pipeline.defaults import defaults_for
    from ascendit.pipeline.request import resolve

    if output is not None:
        video.check_writable(output)
    layout = recognise(find_model(call))
    layout.require_pipeline()
    defaults = defaults_for(layout)
    fields = dict(call.fields)
    if call.seconds is not None:
        fields["num_frames"] = geometry.frames_for(
            call.seconds, fields.get("fps") or defaults.fps, defaults.frame_stride
        )
    request = resolve(defaults, call.prompt, **fields)
    check_numbers(call, layout, request)
    if request.image is not None:
        from ascendit.pipeline.condition import open_image

        open_image(request.image)
    if output is None:
        output = video.default_name(request.prompt, request.seed, datetime.now())
    shape = (request.num_frames, request.height, request.width)
    sidecar = b"" if call.metadata else None
    video.check_output(output, shape, request.fps, sidecar=sidecar, overwrite=overwrite)
    return Prepared(call=call, layout=layout, defaults=defaults, request=request, output=output)


def find_model(call: Call) -> Path:
    """The folder of the model. UsageError E-USE-02 says which file named one that is not there."""
    from ascendit.checkpoint.hub import model_folder

    try:
        return model_folder(call.model)
    except UsageError as e:
        if call.model_from is None or e.code != "E-USE-02":
            raise
        again = shlex.join([call.prompt, "--config", str(call.model_from)])
        raise UsageError(
            f"{e.got}, which {call.model_from} names",
            needs=e.needs,
            fix=f"name MODEL on the command line: ascendit generate MODEL {again}; or add --demo",
            code=e.code,
        ) from e


def patterns(text: str | None) -> tuple[str, ...]:
    """The patterns in one setting."""
    return tuple(re.split(r"[\s;,]+", text.strip())) if text and text.strip() else ()


def check_numbers(call: Call, layout: Layout, request: GenerateRequest) -> None:
    """Everything about schemes, recipes and step policies that headers tell, before weights are loaded."""
    from ascendit.device.device import parse_device
    from ascendit.model.quantize_on_load import Online, policy_for, read_experts, schemes_in
    from ascendit.schedule import StepSchedule

    online = Online.of(call.scheme, call.recipe, patterns(call.keep), force=call.force)
    device = parse_device(call.device)
    gated = device.names_its_chip and call.emulate is None and call.ops != "reference"
    if online is None and call.step_policy is None and not gated:
        return
    if call.step_policy is not None:
        StepSchedule.parse(call.step_policy).check_steps(request.num_inference_steps)
    found = read_experts(layout, online)
    policy = policy_for(call.step_policy, online, layout, found)
    policy.check_steps(request.num_inference_steps)
    if gated:
        device.check_schemes(schemes_in(found))


# ---- layers -------------------------------------------------------------------------------------


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
    """Model, load options and request of the JSON beside a video; the rest of it has no effect.

    Older files, without `source` and `load`, name the model alone. Any other table stays as it is.
    """
    from ascendit.pipeline.request import setting_text

    if not isinstance(data.get("request"), dict):
        return data
    named, load = data.get("source") or data.get("model"), data.get("load")
    model = {"model": named} if isinstance(named, str) and named else {}
    options = dict(load) if isinstance(load, dict) else {}
    if isinstance(options.get("keep"), list):
        options["keep"] = setting_text([str(pattern) for pattern in options["keep"]])
    return {**model, **options, **data["request"]}


# ---- values in their types ----------------------------------------------------------------------


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
