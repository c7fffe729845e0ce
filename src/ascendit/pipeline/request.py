"""GenerateRequest: one video, with every value explicit. Frozen, validated, JSON round trip.

`resolve` fills omitted fields from a model's `Defaults` and checks the request against the model.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields as fields_of
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator, model_validator

from ascendit.arguments import unknown_arguments
from ascendit.errors import RequestError, UsageError
from ascendit.family import PRESETS, ScheduleName, Solver, presets_of
from ascendit.geometry import RATE_RULE, FrameRate, frame_rate, nearest_frames, nearest_sizes
from ascendit.pipeline.defaults import Defaults
from ascendit.pipeline.fit import Fit, size_for
from ascendit.pipeline.options import load_args
from ascendit.pipeline.sigmas import Schedule, make_schedule
from ascendit.report import shell_line
from ascendit.validation import Checked, one_of

MAX_SEED = 2**63 - 1

# ---- the request --------------------------------------------------------------------------------


def _integer(low: int, high: int | None = None) -> Any:
    rule = f"{low} to {high}" if high else f"at least {low}"
    return Field(strict=True, ge=low, le=high or MAX_SEED, description=f"a whole number, {rule}")


def _number(rule: str, **limits: Any) -> Any:
    return Field(strict=True, allow_inf_nan=False, description=rule, **limits)


def _timesteps(value: Any) -> Any:
    """Convert a sequence of decreasing numbers to floats. Raises ValueError for other values."""
    if value is None:
        return None
    if isinstance(value, str):
        raise ValueError("text")
    try:
        numbers = tuple(float(t) for t in value)
    except TypeError as e:
        raise ValueError(str(e)) from e
    if not (numbers and 1000 >= numbers[0] and numbers[-1] > 0):
        raise ValueError("outside (0, 1000]")
    if not all(a > b for a, b in zip(numbers, numbers[1:], strict=False)):
        raise ValueError("not decreasing")
    return numbers


Text = Annotated[str, Field(strict=True, description="text")]
Guidance = _number("a number of at least 0", ge=0)


class GenerateRequest(Checked):
    """One video, fully specified: nothing is decided later."""

    title = "request"

    prompt: Text
    negative_prompt: Text = ""
    """Text of the unconditional pass; may be empty."""
    image: Annotated[str | None, Field(strict=True, description="the path of an image")] = None
    """Path of the first frame, or `sha256:<hex>` of its pixels, which are passed separately."""
    last_image: Annotated[str | None, Field(strict=True, description="the path of an image")] = None
    """The last frame, named as `image` is."""
    fit: Annotated[Fit, Field(description=one_of(Fit))] = "crop"
    """How images of another ratio than the video are fitted."""
    width: Annotated[int, _integer(1)]
    height: Annotated[int, _integer(1)]
    num_frames: Annotated[int, _integer(1)]
    """4n+1."""
    fps: Annotated[
        FrameRate,
        PlainValidator(frame_rate),
        PlainSerializer(lambda fps: fps if isinstance(fps, int) else str(fps)),
        Field(description=RATE_RULE),
    ]
    """In JSON, a rate that is not whole is a text, `24000/1001`."""
    num_inference_steps: Annotated[int, _integer(1, 1000)]
    timesteps: Annotated[
        tuple[float, ...] | None,
        BeforeValidator(_timesteps),
        Field(description="decreasing numbers above 0, at most 1000, for example 1000,750,500,250"),
    ] = None
    """Decreasing positions in the unshifted schedule, in (0, 1000]; `flow_shift` is applied to them.
    Four-step distilled Wan models use `1000,750,500,250` with shift 5."""
    guidance_scale: Annotated[float, Guidance]
    """Guidance of the only expert or the high-noise expert. At 1 or below, no unconditional pass runs, as in
    Diffusers."""
    guidance_scale_2: Annotated[float | None, Guidance] = None
    """Guidance of the low-noise expert; None: `guidance_scale`."""
    flow_shift: Annotated[float, _number("a number above 0", gt=0)]
    boundary_ratio: Annotated[float | None, _number("a number between 0 and 1", gt=0, lt=1)] = None
    solver: Annotated[Solver, Field(description=one_of(Solver))] = "unipc"
    schedule: Annotated[ScheduleName, Field(description=one_of(ScheduleName))] = "diffusers"
    """Whose timesteps for this number of steps; see docs/models.md."""
    seed: Annotated[int, _integer(0, MAX_SEED)]
    max_sequence_length: Annotated[int, _integer(1, 512)] = 512

    @model_validator(mode="after")
    def _as_many_steps_as_timesteps(self) -> Self:
        if self.timesteps is not None and len(self.timesteps) != self.num_inference_steps:
            got = f"{len(self.timesteps)} timesteps and {self.num_inference_steps} steps"
            raise RequestError(got, needs="as many steps as timesteps", fix="omit --steps, or --timesteps")
        return self

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether any expert needs the unconditional pass."""
        return self.guidance_for(high=True) > 1 or self.guidance_for(high=False) > 1

    @property
    def denoising_schedule(self) -> Schedule:
        """Timesteps and noise levels. Raises RequestError (E-REQ-03), see `make_schedule`."""
        rule, positions = self.schedule, self.timesteps
        return make_schedule(self.solver, self.num_inference_steps, self.flow_shift, positions, rule)

    def guidance_for(self, *, high: bool) -> float:
        """The guidance scale of one expert."""
        if high or self.guidance_scale_2 is None:
            return self.guidance_scale
        return self.guidance_scale_2

    def replay_line(
        self,
        model: str,
        output: str | None = None,
        load: Mapping[str, Any] | None = None,
        flags: Sequence[str] = (),
        seeds: Sequence[int] = (),
    ) -> str:
        """The command that reproduces this video.

        `load`: the model's options, from `LoadOptions.record`. `flags`: other flags of `generate`. `seeds`:
        several, instead of its own.
        """
        args = ["ascendit", "generate", *load_args(load or {}), *flags]
        positional = [self.prompt] if model == "demo" else [model, self.prompt]
        dashed = any(arg.startswith("-") for arg in positional)
        args += ["--demo"] if model == "demo" else []
        args += [] if dashed else positional
        guidance = [g for g in (self.guidance_scale, self.guidance_scale_2) if g is not None]
        values: list[tuple[str, object]] = [
            ("--seed", ",".join(map(str, seeds or [self.seed]))),
            ("--size", f"{self.width}x{self.height}"),
            ("--frames", self.num_frames),
            ("--fps", self.fps),
            ("--timesteps", ",".join(map(_text, self.timesteps or ()))),
            ("--steps", "" if self.timesteps else self.num_inference_steps),
            ("--guidance", ",".join(map(_text, guidance))),
            ("--shift", _text(self.flow_shift)),
            ("--negative", self.negative_prompt),
            ("--image", self.image or ""),
            ("--last-image", self.last_image or ""),
            ("--fit", "" if self.fit == "crop" or self.image is None else self.fit),
        ]
        boundary, length = self.boundary_ratio, self.max_sequence_length
        values += [] if boundary is None else [("--set", f"boundary_ratio={_text(boundary)}")]
        values += [("--set", f"solver={self.solver}")]
        values += [] if self.schedule == "diffusers" else [("--set", f"schedule={self.schedule}")]
        values += [] if length == 512 else [("--set", f"max_sequence_length={length}")]
        values += [("-o", output or "")]
        stated = [(f, v) for f, v in values if v != "" or f == "--negative"]  # the model may have a default
        args += [arg for flag, value in stated for arg in (flag, str(value))]
        args += ["--", *positional] if dashed else []
        return shell_line(args)


def _text(value: float) -> str:
    """The shortest text that parses to the same number: 4, 2.5, 0.875."""
    return repr(float(value)).removesuffix(".0")


# ---- filling and checking a request -------------------------------------------------------------


DEFAULTED = {field.name for field in fields_of(Defaults)} & set(GenerateRequest.model_fields) - {"flow_shift"}
"""Fields with a default from the model; the default of the shift depends on the size."""


def resolve(
    defaults: Defaults, prompt: str, *, preset: str | None = None, picture: Any = None, **fields: Any
) -> GenerateRequest:
    """Fill the fields of GenerateRequest that are omitted or None from `defaults`, and check the request.

    `preset`: name of a row of `family.PRESETS`, whose values replace defaults; `fields` override them.
    `picture`: (width, height) of the first frame, whose ratio the video gets if both are omitted. Raises
    UsageError (E-USE-01) for an unknown field or a `fit` without an image, and the errors of
    `preset_fields`, `check` and `fit.size_for`.
    """
    check_names(fields)
    fields = {k: v.item() if getattr(v, "ndim", None) == 0 else v for k, v in fields.items() if v is not None}
    images = {"image", "last_image"} & set(fields)
    if (fit := fields.get("fit")) in ("pad", "stretch") and not images:
        needs = "an image: fit says how one of another ratio becomes a frame"
        raise UsageError(f"fit {fit} without an image", needs=needs, fix="omit --fit, or add --image FILE")
    if isinstance(fields.get("timesteps"), Iterator):
        fields["timesteps"] = tuple(fields["timesteps"])
    if preset is not None:
        fields = override(preset_fields(defaults, preset), fields)
    if "timesteps" in fields:
        with suppress(TypeError):  # not a sequence: GenerateRequest refuses it
            fields.setdefault("num_inference_steps", len(fields["timesteps"]) or 1)
    if "guidance_scale" in fields:  # one number applies to both experts, as in Diffusers
        fields.setdefault("guidance_scale_2", fields["guidance_scale"] if defaults.num_experts == 2 else None)
    values = {name: getattr(defaults, name) for name in DEFAULTED} | fields
    if picture is not None and not {"width", "height"} & set(fields):
        values["width"], values["height"] = size_for(defaults, picture)
    values.setdefault("flow_shift", defaults.shift_for(values["width"], values["height"]))
    values.setdefault("seed", secrets.randbelow(2**31))
    request = GenerateRequest(prompt=prompt, **values)
    check(request, defaults)
    return request


def check_names(fields: Mapping[str, Any]) -> None:
    """Raise UsageError (E-USE-01) for a name that is neither a field of GenerateRequest nor `preset`."""
    allowed = set(GenerateRequest.model_fields) - {"prompt"}
    if unknown := {name: fields[name] for name in sorted(set(fields) - allowed - {"preset"})}:
        raise unknown_arguments("generate", unknown, {*allowed, "preset", "on_progress"})


def preset_fields(defaults: Defaults, name: str) -> dict[str, Any]:
    """The fields of GenerateRequest that a preset sets.

    Raises UsageError (E-USE-01) for an unknown name, RequestError (E-REQ-03) for one of another model.
    """
    allowed = presets_of(defaults.spec)
    if not isinstance(name, str) or name not in PRESETS:
        names = ", ".join(PRESETS)
        fix = f"--preset {allowed[0]}" if allowed else "omit --preset"
        raise UsageError(f"preset {name!r}", needs=f"one of {names}", fix=fix)
    preset = PRESETS[name]
    if name not in allowed:
        flags = f"--timesteps {','.join(map(_text, preset.timesteps))} --shift {_text(preset.flow_shift)}"
        raise RequestError(
            f"preset {name} with {defaults.model}",
            needs=f"one of {', '.join(preset.models)}: {preset.weights}",
            fix=f"{flags} --guidance 1 --set solver={preset.solver} instead of --preset {name}, "
            "for weights of your own",
        )
    return preset.fields


REPLACES = {"num_inference_steps": "timesteps", "timesteps": "num_inference_steps"}
"""Field -> the one that it replaces: both are the steps of a run."""


def override(base: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `fields`, and without its values that those make invalid."""
    dropped = {REPLACES.get(name) for name in fields}
    return {name: value for name, value in base.items() if name not in dropped} | dict(fields)


def check(request: GenerateRequest, defaults: Defaults) -> None:
    """Check the request against the model; nothing is rounded.

    Raises RequestError: E-REQ-01 and E-REQ-02 with the nearest allowed frames and sizes, E-REQ-04 for a
    missing or unexpected image, E-REQ-03 for guidance or a boundary that does not fit the experts, a
    schedule with equal noise levels, or one frame with a last image.
    """
    _ = request.denoising_schedule
    model, multiple, stride = defaults.model, defaults.size_multiple, defaults.frame_stride
    size = (request.width, request.height)
    if (request.num_frames - 1) % stride:
        low, high = nearest_frames(request.num_frames, stride)
        needs = f"{stride}n+1 frames ({model})"
        fix = f"--frames {low} or --frames {high}"
        raise RequestError(f"{request.num_frames} frames", needs=needs, fix=fix, code="E-REQ-01")
    if any(pixels % multiple for pixels in size):
        near = [nearest_sizes(p, multiple) if p % multiple else (p, p) for p in size]
        (w, w2), (h, h2) = ((pair[0], pair[-1]) for pair in near)
        needs = f"width and height in multiples of {multiple} ({model})"
        fix = f"--size {w}x{h} or --size {w2}x{h2}"
        raise RequestError(f"size {size[0]}x{size[1]}", needs=needs, fix=fix, code="E-REQ-02")
    _check_images(request, defaults)
    second = (request.guidance_scale_2, request.boundary_ratio)
    if defaults.num_experts == 1 and second != (None, None):
        fix = f"--guidance {request.guidance_scale:g}, without --set boundary_ratio"
        raise RequestError("a second guidance scale or a boundary", needs=f"{model} has one expert", fix=fix)
    if defaults.num_experts == 2 and request.boundary_ratio is None:
        needs = "boundary_ratio between 0 and 1 (the folder's model_index.json has no value)"
        fix = "--set boundary_ratio=0.875"
        raise RequestError("no boundary between the two experts", needs=needs, fix=fix)


def _check_images(request: GenerateRequest, defaults: Defaults) -> None:
    """Raise RequestError (E-REQ-04) for a missing or unexpected image, and E-REQ-03 for too few frames."""
    model, last = defaults.model, request.last_image
    if defaults.task == "i2v" and request.image is None:
        fix = "--image FILE, or a text-to-video model"
        raise RequestError("no image", needs=f"{model} starts from an image", fix=fix, code="E-REQ-04")
    if defaults.task == "t2v" and request.image is not None:
        needs = f"{model} is text-to-video and takes no image"
        fix = "omit --image, or use an I2V or TI2V model"
        raise RequestError(f"image {request.image}", needs=needs, fix=fix, code="E-REQ-04")
    if defaults.last_frame == "refused" and last is not None:
        fix = "omit --last-image, or use Wan2.2-I2V-A14B or Wan2.1-FLF2V-14B-720P"
        needs = f"{model} takes no last image"
        raise RequestError(f"last image {last}", needs=needs, fix=fix, code="E-REQ-04")
    if defaults.last_frame == "required" and last is None:
        needs = f"{model} makes a video between a first and a last image"
        fix = "--last-image FILE, or an I2V model"
        raise RequestError("no last image", needs=needs, fix=fix, code="E-REQ-04")
    if last is not None and request.num_frames == 1:
        least = defaults.frame_stride + 1
        needs = f"at least {least} frames between a first and a last image"
        raise RequestError("1 frame and a last image", needs=needs, fix=f"--frames {least}")
