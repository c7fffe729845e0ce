"""GenerateRequest: one video, with every value explicit. Frozen, validated, JSON round trip.

`resolve` fills omitted fields from a model's `Defaults` and checks the request against the model. An image
passed as pixels is named by the hash of its content, so that a request is plain JSON.
"""

from __future__ import annotations

import hashlib
import secrets
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from ascendit.errors import RequestError, UsageError
from ascendit.geometry import nearest_frames, nearest_sizes
from ascendit.pipeline.defaults import Defaults, Solver
from ascendit.pipeline.options import load_args
from ascendit.validation import Checked

MAX_SEED = 2**63 - 1
PIXELS = "sha256:"
"""Prefix of the name of an image that is passed as pixels."""

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
    image: Annotated[str | None, Field(strict=True, description="the path of an image")] = None
    """Path of the first frame, or `sha256:<hex>` of its pixels, which are passed separately."""
    width: Annotated[int, _integer(1)]
    height: Annotated[int, _integer(1)]
    num_frames: Annotated[int, _integer(1)]
    """4n+1."""
    fps: Annotated[int, _integer(1, 240)]
    num_inference_steps: Annotated[int, _integer(1, 1000)]
    timesteps: Annotated[
        tuple[float, ...] | None,
        BeforeValidator(_timesteps),
        Field(description="decreasing numbers above 0, at most 1000, for example 1000,750,500,250"),
    ] = None
    """Decreasing positions in the unshifted schedule, in (0, 1000]; `flow_shift` is applied to them.
    Four-step distilled Wan models use `1000,750,500,250`."""
    guidance_scale: Annotated[float, Guidance]
    """Guidance of the only expert or the high-noise expert. At 1 or below, no unconditional pass runs, as in
    Diffusers."""
    guidance_scale_2: Annotated[float | None, Guidance] = None
    """Guidance of the low-noise expert; None: `guidance_scale`."""
    flow_shift: Annotated[float, _number("a number above 0", gt=0)]
    boundary_ratio: Annotated[float | None, _number("a number between 0 and 1", gt=0, lt=1)] = None
    solver: Annotated[Solver, Field(description="unipc or euler")] = "unipc"
    seed: Annotated[int, _integer(0, MAX_SEED)]
    max_sequence_length: Annotated[int, _integer(1, 512)] = 512

    @model_validator(mode="after")
    def _as_many_steps_as_timesteps(self) -> Self:
        if self.timesteps is not None and len(self.timesteps) != self.num_inference_steps:
            got = f"{len(self.timesteps)} timesteps and {self.num_inference_steps} steps"
            raise RequestError(got, needs="as many steps as timesteps", fix="pass only one of them")
        return self

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether any expert needs the unconditional pass."""
        return self.guidance_for(high=True) > 1 or self.guidance_for(high=False) > 1

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
    ) -> str:
        """The command that reproduces this video.

        `load`: the model's options, from `LoadOptions.record`. `flags`: other flags of `generate`.
        """
        args = ["ascendit", "generate", *load_args(load or {}), *flags]
        positional = [self.prompt] if model == "demo" else [model, self.prompt]
        dashed = any(arg.startswith("-") for arg in positional)
        args += ["--demo"] if model == "demo" else []
        args += [] if dashed else positional
        guidance = [g for g in (self.guidance_scale, self.guidance_scale_2) if g is not None]
        values: list[tuple[str, object]] = [
            ("--seed", self.seed),
            ("--size", f"{self.width}x{self.height}"),
            ("--frames", self.num_frames),
            ("--fps", self.fps),
            ("--timesteps", ",".join(map(_text, self.timesteps or ()))),
            ("--steps", "" if self.timesteps else self.num_inference_steps),
            ("--guidance", ",".join(map(_text, guidance))),
            ("--shift", _text(self.flow_shift)),
            ("--negative", self.negative_prompt),
            ("--image", self.image or ""),
        ]
        boundary, length = self.boundary_ratio, self.max_sequence_length
        values += [] if boundary is None else [("--set", f"boundary_ratio={_text(boundary)}")]
        values += [("--set", f"solver={self.solver}")]
        values += [] if length == 512 else [("--set", f"max_sequence_length={length}")]
        values += [("-o", output or "")]
        args += [arg for flag, value in values if value != "" for arg in (flag, str(value))]
        args += ["--", *positional] if dashed else []
        return shlex.join(args)


def _text(value: float) -> str:
    """The shortest text that parses to the same number: 4, 2.5, 0.875."""
    return repr(float(value)).removesuffix(".0")


# ---- filling and checking a request -------------------------------------------------------------


DEFAULTED = {field.name for field in fields_of(Defaults)} & set(GenerateRequest.model_fields) - {"flow_shift"}
"""Fields with a default from the model; the default of the shift depends on the size."""


def resolve(defaults: Defaults, prompt: str, **fields: Any) -> GenerateRequest:
    """Fill the fields of GenerateRequest that are omitted or None from `defaults`, and check the request.

    Raises UsageError (E-USE-01) for an unknown field, and the errors of `check`.
    """
    allowed = set(GenerateRequest.model_fields) - {"prompt"}
    if unknown := sorted(set(fields) - allowed):
        got, needs = f"unknown argument: {', '.join(unknown)}", f"one of {', '.join(sorted(allowed))}"
        raise UsageError(got, needs=needs, fix="correct the name")
    fields = {k: v.item() if getattr(v, "ndim", None) == 0 else v for k, v in fields.items() if v is not None}
    if isinstance(fields.get("timesteps"), Iterator):
        fields["timesteps"] = tuple(fields["timesteps"])
    if "timesteps" in fields:
        with suppress(TypeError):  # not a sequence: GenerateRequest refuses it
            fields.setdefault("num_inference_steps", len(fields["timesteps"]) or 1)
    if "guidance_scale" in fields:  # one number applies to both experts, as in Diffusers
        fields.setdefault("guidance_scale_2", fields["guidance_scale"] if defaults.num_experts == 2 else None)
    values = {name: getattr(defaults, name) for name in DEFAULTED} | fields
    values.setdefault("flow_shift", defaults.shift_for(values["width"], values["height"]))
    values.setdefault("seed", secrets.randbelow(2**31))
    request = GenerateRequest(prompt=prompt, **values)
    check(request, defaults)
    return request


def check(request: GenerateRequest, defaults: Defaults) -> None:
    """Check the request against the model; nothing is rounded.

    Raises RequestError: E-REQ-01 and E-REQ-02 with the nearest allowed frames and sizes, E-REQ-04 for a
    missing or unexpected image, E-REQ-03 for guidance or a boundary that does not fit the experts.
    """
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
    if defaults.task == "i2v" and request.image is None:
        fix = "--image FILE, or a text-to-video model"
        raise RequestError("no image", needs=f"{model} starts from an image", fix=fix, code="E-REQ-04")
    if defaults.task == "t2v" and request.image is not None:
        needs = f"{model} is text-to-video and takes no image"
        fix = "omit the image, or use an I2V or TI2V model"
        raise RequestError(f"image {request.image}", needs=needs, fix=fix, code="E-REQ-04")
    second = (request.guidance_scale_2, request.boundary_ratio)
    if defaults.num_experts == 1 and second != (None, None):
        fix = "pass one guidance scale and no boundary"
        raise RequestError("a second guidance scale or a boundary", needs=f"{model} has one expert", fix=fix)
    if defaults.num_experts == 2 and request.boundary_ratio is None:
        needs = "boundary_ratio between 0 and 1 (the folder's model_index.json has no value)"
        fix = "--set boundary_ratio=0.875"
        raise RequestError("no boundary between the two experts", needs=needs, fix=fix)


# ---- the first image ----------------------------------------------------------------------------


def name_image(image: Any) -> tuple[str | None, dict[str, Any]]:
    """(`image` field of a request, pixels by that name). A path is its own name; pixels are named by a hash.

    `image`: None, a path, or pixels of any type that `open_image` accepts. Raises the errors of `open_image`.
    """
    if image is None or isinstance(image, (str, Path)):
        return (None if image is None else str(image)), {}
    picture = open_image(image)
    header = f"uint8 {[picture.height, picture.width, 3]} ".encode()
    name = PIXELS + hashlib.sha256(header + picture.tobytes()).hexdigest()
    return name, {name: picture}


def image_of(request: GenerateRequest, pixels: Mapping[str, Any]) -> Any:
    """The first image of `request` as a PIL image in RGB, or None. `pixels`: images by name.

    Raises RequestError (E-REQ-04) if the pixels of this image are missing or different, and the errors of
    `open_image`.
    """
    name = request.image
    if name is None:
        return None
    picture = open_image(pixels[name]) if name in pixels else None
    if name.startswith(PIXELS) and (picture is None or name_image(picture)[0] != name):
        needs = "the pixels with the hash in the request"
        fix = "pass pixels={name: image} from name_image, or a file: --image FILE"
        got = f"{'no pixels' if picture is None else 'other pixels'} for image {name}"
        raise RequestError(got, needs=needs, fix=fix, code="E-REQ-04")
    return open_image(name) if picture is None else picture


def open_image(image: Any) -> Any:
    """A PIL image in RGB from a path, a PIL image, uint8 [H, W, 3] or a float tensor [3, H, W] in [0, 1].

    Raises UsageError: E-USE-02 for a missing file, E-USE-04 for an unreadable file or any other type.
    """
    import numpy as np
    from PIL import Image

    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            needs = "the path of an image"
            raise UsageError(f"no file {image}", needs=needs, fix="correct the path", code="E-USE-02")
        try:
            with warnings.catch_warnings():  # Pillow's warning about huge images becomes an error
                warnings.simplefilter("error")
                with Image.open(image) as file:
                    return file.convert("RGB")
        except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as e:
            raise _no_image(f"{image} is not a readable image: {e}") from e
    if hasattr(image, "is_floating_point"):  # a tensor
        if image.ndim == 4 and image.shape[0] == 1:
            image = image[0]
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise _no_image(f"a tensor {list(image.shape)} {image.dtype}")
        image = (image.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise _no_image(f"an array {list(image.shape)} {image.dtype}")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise _no_image(f"a {type(image).__name__}")
    return image.convert("RGB")


def _no_image(got: str) -> UsageError:
    needs = "a PNG, JPEG or WebP file, a PIL image, uint8 [H, W, 3], or a float tensor [3, H, W] in [0, 1]"
    return UsageError(got, needs=needs, fix="convert the first frame to one of these", code="E-USE-04")
