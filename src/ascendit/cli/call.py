"""What one `generate` call asks for: words, flags, `--set`, environment and `--config` in one place.

Nothing here is heavy: a bad call ends before torch is imported.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendit.cli import options
from ascendit.errors import UsageError
from ascendit.spec import VaeConfig, WanConfig

if TYPE_CHECKING:
    from ascendit.checkpoint.layout import Layout
    from ascendit.pipeline.request import Defaults, GenerateRequest


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
class Plan:
    """A call that fits its model: everything is checked that can be checked without weights."""

    call: Call
    layout: Layout
    defaults: Defaults
    request: GenerateRequest
    output: Path

    @property
    def load_options(self) -> dict[str, Any]:
        """For `ascendit.load`, without what was left open."""
        from ascendit.pipeline.replay import FLAGS, SETTINGS

        given = {name: getattr(self.call, name) for name in (*FLAGS, *SETTINGS)}
        given |= {"keep": patterns(self.call.keep), "force": self.call.force or None}
        return {k: v for k, v in given.items() if v not in (None, (), "auto")}

    @property
    def replay(self) -> str:
        """The command that makes this video again; the JSON beside the video has the same."""
        from ascendit.pipeline.replay import load_record, replay_line

        return replay_line(self.request, self.call.model, load_record(self.load_options))

    @property
    def video_tokens(self) -> int:
        """Tokens of the video in one pass of a transformer."""
        vae = VaeConfig.from_dict(self.layout.part("vae").config)
        patch = self.layout.experts[0].config.get("patch_size", WanConfig.patch_size)
        spatial, temporal = vae.scale_factor_spatial, vae.scale_factor_temporal
        r = self.request
        frames = (r.num_frames - 1) // temporal + 1
        pixels = (r.height // spatial // patch[1]) * (r.width // spatial // patch[2])
        return int(frames // patch[0] * pixels)

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
    """Put all layers over each other. `flags`: known keys (see `options.known`), None where not given."""
    from ascendit.device.backends import parse_device
    from ascendit.device.environment import read_environment

    environment = read_environment()
    told = {"text_on": environment.text_on, "fast_layernorm": environment.fast_layernorm}
    layers = [
        options.read_config(config) if config else {},
        {k: v for k, v in told.items() if v is not None},
        options.parse_settings(settings),
        options.typed_layer({k: v for k, v in flags.items() if v is not None}, where="flags"),
    ]
    values = {k: v for k, v in options.merge(*layers).items() if v is not None}
    model, prompt = _model_and_prompt(words, demo, values.pop("model", None), values.pop("prompt", None))
    extras: dict[str, Any] = {k: values.pop(k) for k in options.EXTRAS if k in values}
    named = config if model == layers[0].get("model") and not demo else None
    device = parse_device(extras.get("device", "cpu"))
    if environment.attention and device.has_attention_kernels:
        extras.setdefault("attention", environment.attention)
    extras |= {"model_from": named, "notes": environment.notes}
    return Call(model=model, prompt=prompt, fields=values, **extras)


def make_plan(call: Call, output: Path | None, *, overwrite: bool) -> Plan:
    """Meet the model: its folder, its defaults, the request, the name of the output; no weights."""
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
        fields["num_frames"] = frames_for(
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
    return Plan(call=call, layout=layout, defaults=defaults, request=request, output=output)


def find_model(call: Call) -> Path:
    """The folder of the model. UsageError E-USE-02 says which file named one that is not there."""
    from ascendit.checkpoint.folder import model_folder

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
    from ascendit.convert.step_policy import StepPolicy
    from ascendit.device.backends import parse_device
    from ascendit.model.online import Online, policy_for, read_experts, schemes_in

    online = Online.of(call.scheme, call.recipe, patterns(call.keep), force=call.force)
    device = parse_device(call.device)
    gated = device.names_its_chip and call.emulate is None and call.ops != "reference"
    if online is None and call.step_policy is None and not gated:
        return
    if call.step_policy is not None:
        StepPolicy.parse(call.step_policy).check_steps(request.num_inference_steps)
    found = read_experts(layout, online)
    policy = policy_for(call.step_policy, online, layout, found)
    policy.check_steps(request.num_inference_steps)
    if gated:
        device.check_schemes(schemes_in(found))


def frames_for(seconds: float, fps: int, stride: int = 4) -> int:
    """The legal number of frames (stride x n + 1) nearest to `seconds` of video."""
    if not 0 < seconds < 3600:
        raise UsageError(
            f"--seconds {seconds:g}",
            needs="a length above 0 and below 3600 seconds",
            fix="--seconds 5",
            code="E-USE-01",
        )
    return stride * round(seconds * fps / stride) + 1


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
