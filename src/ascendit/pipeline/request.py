"""GenerateRequest: one video, every value named. Frozen, validated, JSON round trip. No torch.

`resolve` fills what the user left out from a model's `Defaults` and checks it against the model. An image
given as pixels is named by its content, so that a request is complete JSON; the pixels travel beside it.
"""

from __future__ import annotations

import hashlib
import secrets
import shlex
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from ascendit.errors import RequestError, UsageError
from ascendit.geometry import nearest_frames, nearest_sizes
from ascendit.pipeline.defaults import Defaults, Solver
from ascendit.pipeline.options import load_words
from ascendit.validation import Checked

MAX_SEED = 2**63 - 1
PIXELS = "sha256:"
"""Begins the name of an image that is given as pixels."""

# ---- the request --------------------------------------------------------------------------------


def _whole(low: int, high: int | None = None) -> Any:
    rule = f"{low} to {high}" if high else f"at least {low}"
    return Field(strict=True, ge=low, le=high or MAX_SEED, description=f"a whole number, {rule}")


def _number(rule: str, **limits: Any) -> Any:
    return Field(strict=True, allow_inf_nan=False, description=rule, **limits)


def _timesteps(value: Any) -> Any:
    """A sequence of falling numbers as floats; ValueError for another value."""
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
        raise ValueError("not falling")
    return numbers


Text = Annotated[str, Field(strict=True, description="text")]
Guidance = _number("a number of at least 0", ge=0)


class GenerateRequest(Checked):
    """One video. Nothing is left to be decided later: what runs is what is written here."""

    title = "request"

    prompt: Text
    negative_prompt: Text = ""
    image: Annotated[str | None, Field(strict=True, description="the path of an image")] = None
    """Path of the first frame, or `sha256:<hex>` of its pixels, which are given beside the request."""
    width: Annotated[int, _whole(1)]
    height: Annotated[int, _whole(1)]
    num_frames: Annotated[int, _whole(1)]
    """4n+1."""
    fps: Annotated[int, _whole(1, 240)]
    num_inference_steps: Annotated[int, _whole(1, 1000)]
    timesteps: Annotated[
        tuple[float, ...] | None,
        BeforeValidator(_timesteps),
        Field(description="falling numbers above 0, at most 1000, for example 1000,750,500,250"),
    ] = None
    """Positions in the unshifted schedule, in (0, 1000], falling; `flow_shift` is applied to them.
    `1000,750,500,250` is what four-step distilled Wan models use."""
    guidance_scale: Annotated[float, Guidance]
    """For the only expert, or the high-noise one. Up to 1 there is no unconditional pass, as in Diffusers."""
    guidance_scale_2: Annotated[float | None, Guidance] = None
    """For the low-noise expert; None = `guidance_scale`."""
    flow_shift: Annotated[float, _number("a number above 0", gt=0)]
    boundary_ratio: Annotated[float | None, _number("a number between 0 and 1", gt=0, lt=1)] = None
    solver: Annotated[Solver, Field(description="unipc or euler")] = "unipc"
    seed: Annotated[int, _whole(0, MAX_SEED)]
    max_sequence_length: Annotated[int, _whole(1, 512)] = 512

    @model_validator(mode="after")
    def _as_many_steps_as_timesteps(self) -> Self:
        if self.timesteps is not None and len(self.timesteps) != self.num_inference_steps:
            got = f"{len(self.timesteps)} timesteps and {self.num_inference_steps} steps"
            raise RequestError(got, needs="as many steps as timesteps", fix="give only one of the two")
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
        self, model: str, output: str | None = None, load: Mapping[str, Any] | None = None
    ) -> str:
        """The command that makes this video again. `load`: of `model`, as `LoadOptions.record` has it."""
        words = ["ascendit", "generate", *load_words(load or {})]
        named = [self.prompt] if model == "demo" else [model, self.prompt]
        dashed = any(w.startswith("-") for w in named)
        words += ["--demo"] if model == "demo" else []
        words += [] if dashed else named
        guidance = [g for g in (self.guidance_scale, self.guidance_scale_2) if g is not None]
        flags: list[tuple[str, object]] = [
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
        flags += [] if boundary is None else [("--set", f"boundary_ratio={_text(boundary)}")]
        flags += [("--set", f"solver={self.solver}")]
        flags += [] if length == 512 else [("--set", f"max_sequence_length={length}")]
        flags += [("-o", output or "")]
        words += [word for flag, value in flags if value != "" for word in (flag, str(value))]
        words += ["--", *named] if dashed else []
        return shlex.join(words)


def _text(value: float) -> str:
    """A number as short as it can be and still read back as itself: 4, 2.5, 0.875."""
    return repr(float(value)).removesuffix(".0")


# ---- from what a user gives ---------------------------------------------------------------------


OF_THE_MODEL = {field.name for field in fields(Defaults)} & set(GenerateRequest.model_fields) - {"flow_shift"}
"""Fields that the model's defaults fill; the shift depends on the size."""


def resolve(defaults: Defaults, prompt: str, **given: Any) -> GenerateRequest:
    """Fill what `given` leaves out (or gives as None) from `defaults`, and check it against the model.

    `given` takes the fields of `GenerateRequest`. Raises RequestError with the two nearest legal
    values for frames and sizes; nothing is rounded in silence.
    """
    known = set(GenerateRequest.model_fields) - {"prompt"}
    if unknown := sorted(set(given) - known):
        got, needs = f"unknown argument: {', '.join(unknown)}", f"arguments among {', '.join(sorted(known))}"
        raise UsageError(got, needs=needs, fix="correct the name")
    given = {k: v.item() if getattr(v, "ndim", None) == 0 else v for k, v in given.items() if v is not None}
    if isinstance(given.get("timesteps"), Iterator):
        given["timesteps"] = tuple(given["timesteps"])
    if "timesteps" in given:
        with suppress(TypeError):  # no sequence: refused below
            given.setdefault("num_inference_steps", len(given["timesteps"]) or 1)
    if "guidance_scale" in given:  # one number is for both experts, as in Diffusers
        given.setdefault("guidance_scale_2", given["guidance_scale"] if defaults.num_experts == 2 else None)
    values = {name: getattr(defaults, name) for name in OF_THE_MODEL} | given
    values.setdefault("flow_shift", defaults.shift_for(values["width"], values["height"]))
    values.setdefault("seed", secrets.randbelow(2**31))
    request = GenerateRequest(prompt=prompt, **values)
    check(request, defaults)
    return request


def check(request: GenerateRequest, defaults: Defaults) -> None:
    """Raise RequestError where the model cannot run the request."""
    model, multiple, stride = defaults.model, defaults.size_multiple, defaults.frame_stride
    size = (request.width, request.height)
    if (request.num_frames - 1) % stride:
        low, high = nearest_frames(request.num_frames, stride)
        needs = f"a number of frames of the form {stride}n+1 ({model})"
        fix = f"--frames {low} or --frames {high}"
        raise RequestError(f"{request.num_frames} frames", needs=needs, fix=fix, code="E-REQ-01")
    if any(pixels % multiple for pixels in size):
        near = [nearest_sizes(p, multiple) if p % multiple else (p, p) for p in size]
        (w, w2), (h, h2) = ((pair[0], pair[-1]) for pair in near)
        needs = f"width and height that are multiples of {multiple} ({model})"
        fix = f"--size {w}x{h} or --size {w2}x{h2}"
        raise RequestError(f"size {size[0]}x{size[1]}", needs=needs, fix=fix, code="E-REQ-02")
    if defaults.task == "i2v" and request.image is None:
        fix = "--image FILE, or a text-to-video model"
        raise RequestError("no image", needs=f"{model} starts from an image", fix=fix, code="E-REQ-04")
    if defaults.task == "t2v" and request.image is not None:
        needs = f"{model} is text-to-video and takes no image"
        fix = "leave the image out, or use an I2V or TI2V model"
        raise RequestError(f"image {request.image}", needs=needs, fix=fix, code="E-REQ-04")
    second = (request.guidance_scale_2, request.boundary_ratio)
    if defaults.num_experts == 1 and second != (None, None):
        fix = "give one guidance scale and no boundary"
        raise RequestError("a second guidance scale or a boundary", needs=f"{model} has one expert", fix=fix)
    if defaults.num_experts == 2 and request.boundary_ratio is None:
        needs = "boundary_ratio between 0 and 1 (model_index.json of the folder has none)"
        fix = "--set boundary_ratio=0.875"
        raise RequestError("no boundary between the two experts", needs=needs, fix=fix)


# ---- the image ----------------------------------------------------------------------------------


def name_image(image: Any) -> tuple[str | None, dict[str, Any]]:
    """(`image` of a request, its pixels by that name): a path as it is, pixels by a hash of their content.

    `image`: None, a path, or pixels in any form that `open_image` takes.
    """
    if image is None or isinstance(image, (str, Path)):
        return (None if image is None else str(image)), {}
    picture = open_image(image)
    facts = f"uint8 {[picture.height, picture.width, 3]} ".encode()
    name = PIXELS + hashlib.sha256(facts + picture.tobytes()).hexdigest()
    return name, {name: picture}


def picture_of(request: GenerateRequest, pixels: Mapping[str, Any]) -> Any:
    """The first image of `request` as RGB, None without one. `pixels`: those at hand, by the image's name.

    Raises RequestError E-REQ-04 if it needs other pixels, and as `open_image`.
    """
    name = request.image
    if name is None:
        return None
    picture = open_image(pixels[name]) if name in pixels else None
    if name.startswith(PIXELS) and (picture is None or name_image(picture)[0] != name):
        needs = "the pixels that the request names by their content"
        fix = "pass pixels={name: image}, as name_image returns them, or name a file: --image FILE"
        got = f"image {name}, and {'no' if picture is None else 'other'} pixels of this name"
        raise RequestError(got, needs=needs, fix=fix, code="E-REQ-04")
    return open_image(name) if picture is None else picture


def open_image(image: Any) -> Any:
    """A PIL image, RGB, from a path, a PIL image, uint8 [H, W, 3] or a float tensor [3, H, W] in [0, 1]."""
    import numpy as np
    from PIL import Image

    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            needs = "the path of an image"
            raise UsageError(f"no file {image}", needs=needs, fix="correct the path", code="E-USE-02")
        try:
            with warnings.catch_warnings():  # a warning of Pillow about a huge image is an error here too
                warnings.simplefilter("error")
                with Image.open(image) as file:
                    return file.convert("RGB")
        except (OSError, ValueError, SyntaxError, Warning, Image.DecompressionBombError) as e:
            raise _no_image(f"{image} is no image that can be read: {e}") from e
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
    return UsageError(got, needs=needs, fix="give the first frame in one of these forms", code="E-USE-04")
