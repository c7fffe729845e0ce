"""GenerateRequest: one video, every value named. Frozen, validated, JSON round trip. No torch.

`Defaults` says what a model offers; `resolve` fills what the user left out and checks it against the model.
`replay_line` is the command that makes a video again: the request, and `load_record`, what `load` keeps of
its arguments. It is printed by `generate` and stored beside a video; `--config` reads the record itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ascendit.errors import RequestError, UsageError
from ascendit.family import Task, WanSpec
from ascendit.geometry import nearest_frames, nearest_sizes

Solver = Literal["unipc", "euler"]
MAX_SEED = 2**63 - 1
_FALLING = "falling numbers above 0, at most 1000, for example 1000,750,500,250"


# ---- the request --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a loaded model runs with when the request does not say, and what it can run at all."""

    model: str
    """Name for messages and metadata."""
    task: Task
    num_experts: int
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    flow_shift: float
    guidance_scale: float
    guidance_scale_2: float | None
    boundary_ratio: float | None
    size_multiple: int
    frame_stride: int = 4
    max_sequence_length: int = 512
    solver: Solver = "unipc"
    sources: tuple[str, ...] = ()
    """Where the values came from, for the log: a row of `family.py`, the folder's own files."""
    spec: WanSpec | None = None

    def shift_for(self, width: int, height: int) -> float:
        """`flow_shift` for this size; some models have one for each size."""
        return self.spec.shift_for(width, height) if self.spec else self.flow_shift


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One video. Nothing is left to be decided later: what runs is what is written here."""

    prompt: str
    negative_prompt: str = ""
    image: str | None = None
    """Path of the first frame, or `<array>` when it was given as pixels."""
    width: int
    height: int
    num_frames: int
    """4n+1."""
    fps: int
    num_inference_steps: int
    timesteps: tuple[float, ...] | None = None
    """Positions in the unshifted schedule, in (0, 1000], falling; `flow_shift` is applied to them.
    `1000,750,500,250` is what four-step distilled Wan models use."""
    guidance_scale: float
    """For the only expert, or the high-noise one. Up to 1 there is no unconditional pass, as in Diffusers."""
    guidance_scale_2: float | None = None
    """For the low-noise expert; None = `guidance_scale`."""
    flow_shift: float
    boundary_ratio: float | None = None
    solver: Solver = "unipc"
    seed: int
    max_sequence_length: int = 512

    def __post_init__(self) -> None:
        checks = {
            "prompt": (isinstance(self.prompt, str), "text"),
            "negative_prompt": (isinstance(self.negative_prompt, str), "text"),
            "image": (self.image is None or isinstance(self.image, str), "the path of an image"),
            "timesteps": (self.timesteps is None or _falling(self.timesteps), _FALLING),
            "num_inference_steps": (_whole(self.num_inference_steps, 1, 1000), "a whole number, 1 to 1000"),
            "flow_shift": (_real(self.flow_shift) and self.flow_shift > 0, "a number above 0"),
            "guidance_scale": (_guidance(self.guidance_scale), "a number of at least 0"),
            "guidance_scale_2": (
                self.guidance_scale_2 is None or _guidance(self.guidance_scale_2),
                "a number of at least 0",
            ),
            "boundary_ratio": (
                self.boundary_ratio is None or (_real(self.boundary_ratio) and 0 < self.boundary_ratio < 1),
                "a number between 0 and 1",
            ),
            "solver": (self.solver in get_args(Solver), " or ".join(get_args(Solver))),
            "seed": (_whole(self.seed, 0), f"a whole number, 0 to {MAX_SEED}"),
            "fps": (_whole(self.fps, 1, 240), "a whole number, 1 to 240"),
            "width": (_whole(self.width, 1), "a whole number, at least 1"),
            "height": (_whole(self.height, 1), "a whole number, at least 1"),
            "num_frames": (_whole(self.num_frames, 1), "a whole number, at least 1"),
            "max_sequence_length": (_whole(self.max_sequence_length, 1, 512), "a whole number, 1 to 512"),
        }
        for name, (good, needs) in checks.items():
            if not good:
                raise RequestError(
                    f"{name} is {getattr(self, name)!r}",
                    needs=f"{name}: {needs}",
                    fix=f"give {name} a legal value, or leave it out for the model's own",
                    code="E-REQ-03",
                )
        if self.timesteps is not None and len(self.timesteps) != self.num_inference_steps:
            raise RequestError(
                f"{len(self.timesteps)} timesteps and {self.num_inference_steps} steps",
                needs="as many steps as timesteps",
                fix="give only one of the two",
                code="E-REQ-03",
            )

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether any expert needs the unconditional pass."""
        return self.guidance_for(high=True) > 1 or self.guidance_for(high=False) > 1

    def guidance_for(self, *, high: bool) -> float:
        """The guidance scale of one expert."""
        if high or self.guidance_scale_2 is None:
            return self.guidance_scale
        return self.guidance_scale_2

    def to_json(self) -> str:
        """One JSON object with every field."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> GenerateRequest:
        """The inverse of `to_json`. Unknown fields are refused with the list of known ones."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as e:
            raise UsageError(
                f"request is no JSON: {e}",
                needs="one JSON object",
                fix="pass what to_json wrote",
                code="E-USE-01",
            ) from e
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) - known:
            unknown = sorted(set(data) - known) if isinstance(data, dict) else type(data).__name__
            raise UsageError(
                f"request has unknown fields: {unknown}",
                needs=f"fields among {', '.join(sorted(known))}",
                fix="remove or correct them",
                code="E-USE-01",
            )
        if isinstance(data.get("timesteps"), list):
            data["timesteps"] = _timesteps(data["timesteps"])
        try:
            return cls(**data)
        except TypeError as e:
            raise UsageError(
                f"request is incomplete or of a wrong type: {e}",
                needs="every field without a default",
                fix="pass what to_json wrote",
                code="E-USE-01",
            ) from e

    def replay_line(self, model: str, output: str | None = None) -> str:
        """The command that makes this video again."""
        words = ["ascendit", "generate"]
        what = [self.prompt] if model == "demo" else [model, self.prompt]
        dashed = any(w.startswith("-") for w in what)
        words += ["--demo"] if model == "demo" else []
        words += [] if dashed else what
        words += ["--seed", str(self.seed), "--size", f"{self.width}x{self.height}"]
        words += ["--frames", str(self.num_frames), "--fps", str(self.fps)]
        if self.timesteps:
            words += ["--timesteps", ",".join(map(_text, self.timesteps))]
        else:
            words += ["--steps", str(self.num_inference_steps)]
        guidance = _text(self.guidance_scale)
        if self.guidance_scale_2 is not None:
            guidance += f",{_text(self.guidance_scale_2)}"
        words += ["--guidance", guidance, "--shift", _text(self.flow_shift)]
        if self.negative_prompt:
            words += ["--negative", self.negative_prompt]
        if self.image:
            words += ["--image", self.image]
        if self.boundary_ratio is not None:
            words += ["--set", f"boundary_ratio={_text(self.boundary_ratio)}"]
        words += ["--set", f"solver={self.solver}"]
        if self.max_sequence_length != 512:
            words += ["--set", f"max_sequence_length={self.max_sequence_length}"]
        if output:
            words += ["-o", output]
        words += ["--", *what] if dashed else []
        return shlex.join(words)


# ---- from what a user gives ---------------------------------------------------------------------


def resolve(defaults: Defaults, prompt: str, **given: Any) -> GenerateRequest:
    """Fill what `given` leaves out (or gives as None) from `defaults`, and check it against the model.

    `given` takes the fields of `GenerateRequest`. Raises RequestError with the two nearest legal
    values for frames and sizes; nothing is rounded in silence.
    """
    known = {f.name for f in dataclasses.fields(GenerateRequest)} - {"prompt"}
    if unknown := sorted(set(given) - known):
        raise UsageError(
            f"unknown argument: {', '.join(unknown)}",
            needs=f"arguments among {', '.join(sorted(known))}",
            fix="correct the name",
            code="E-USE-01",
        )
    values = {k: _plain_number(v) for k, v in given.items() if v is not None}
    width, height = values.get("width", defaults.width), values.get("height", defaults.height)
    if values.get("timesteps") is not None:
        values["timesteps"] = _timesteps(values["timesteps"])
        values.setdefault("num_inference_steps", len(values["timesteps"]))
    if "guidance_scale" in values:  # one number is for both experts, as in Diffusers
        values.setdefault("guidance_scale_2", values["guidance_scale"] if defaults.num_experts == 2 else None)
    filled = {
        "width": width,
        "height": height,
        "num_frames": defaults.num_frames,
        "fps": defaults.fps,
        "num_inference_steps": defaults.num_inference_steps,
        "guidance_scale": defaults.guidance_scale,
        "guidance_scale_2": defaults.guidance_scale_2,
        "flow_shift": defaults.shift_for(width, height),
        "boundary_ratio": defaults.boundary_ratio,
        "solver": defaults.solver,
        "max_sequence_length": defaults.max_sequence_length,
    }
    if "seed" not in values:
        values["seed"] = secrets.randbelow(2**31)
    request = GenerateRequest(prompt=prompt, **(filled | values))
    check(request, defaults)
    return request


def check(request: GenerateRequest, defaults: Defaults) -> None:
    """Raise RequestError where the model cannot run the request."""
    stride, multiple = defaults.frame_stride, defaults.size_multiple
    if (request.num_frames - 1) % stride:
        low, high = nearest_frames(request.num_frames, stride)
        raise RequestError(
            f"{request.num_frames} frames",
            needs=f"a number of frames of the form {stride}n+1 ({defaults.model})",
            fix=f"--frames {low} or --frames {high}",
            code="E-REQ-01",
        )
    if request.width % multiple or request.height % multiple:
        choices = [
            (p,) if p % multiple == 0 else nearest_sizes(p, multiple) for p in (request.width, request.height)
        ]
        low_size, high_size = (f"{w}x{h}" for w, h in ((choices[0][i], choices[1][i]) for i in (0, -1)))
        raise RequestError(
            f"size {request.width}x{request.height}",
            needs=f"width and height that are multiples of {multiple} ({defaults.model})",
            fix=f"--size {low_size} or --size {high_size}",
            code="E-REQ-02",
        )
    if defaults.task == "i2v" and request.image is None:
        raise RequestError(
            "no image",
            needs=f"{defaults.model} starts from an image",
            fix="--image FILE, or a text-to-video model",
            code="E-REQ-04",
        )
    if defaults.task == "t2v" and request.image is not None:
        raise RequestError(
            f"image {request.image}",
            needs=f"{defaults.model} is text-to-video and takes no image",
            fix="leave the image out, or use an I2V or TI2V model",
            code="E-REQ-04",
        )
    if defaults.num_experts == 1 and (
        request.guidance_scale_2 is not None or request.boundary_ratio is not None
    ):
        raise RequestError(
            "a second guidance scale or a boundary",
            needs=f"{defaults.model} has one expert",
            fix="give one guidance scale and no boundary",
            code="E-REQ-03",
        )
    if defaults.num_experts == 2 and request.boundary_ratio is None:
        raise RequestError(
            "no boundary between the two experts",
            needs="boundary_ratio between 0 and 1 (model_index.json of the folder has none)",
            fix="--set boundary_ratio=0.875",
            code="E-REQ-03",
        )


def _text(value: float) -> str:
    """A number as short as it can be and still read back as itself: 4, 2.5, 0.875."""
    return repr(float(value)).removesuffix(".0")


def _whole(value: object, low: int, high: int = MAX_SEED) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _guidance(value: float) -> bool:
    return _real(value) and value >= 0


def _plain_number(value: Any) -> Any:
    """A numpy or torch scalar as a Python number, anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _timesteps(given: Any) -> tuple[float, ...]:
    """`given` as floats; RequestError where it is no row of numbers."""
    try:
        return tuple(float(t) for t in given)
    except (TypeError, ValueError) as e:
        raise RequestError(
            f"timesteps is {given!r}",
            needs=f"timesteps: {_FALLING}",
            fix="give numbers, or leave timesteps out",
            code="E-REQ-03",
        ) from e


def _falling(timesteps: tuple[float, ...]) -> bool:
    if not isinstance(timesteps, tuple) or not timesteps:
        return False
    inside = all(_real(t) and 0 < t <= 1000 for t in timesteps)
    return inside and all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))


# ---- how the model was loaded, and the command that makes the video again -----------------------

LOAD_DEFAULTS: Mapping[str, str] = {"device": "cpu", "text_on": "device"}
"""What `load` does where nothing is said; a replay line leaves these out."""
LOAD_FLAGS = ("device", "text_on", "scheme", "recipe", "step_policy", "emulate")
LOAD_SETTINGS = (
    "keep",
    "activation_rule",
    "dtype",
    "vae_dtype",
    "ops",
    "attention",
    "nz",
    "fast_layernorm",
    "force",
)
"""These have no flag of their own: `--set KEY=VALUE`."""


def load_record(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `load` that shape a video, ready for JSON: what was left open is left out.

    `given`: by name, other names too. Words where `load` takes an object, `keep` as a list.
    """
    found = {name: _plain_option(name, given.get(name)) for name in (*LOAD_FLAGS, *LOAD_SETTINGS)}
    return {name: value for name, value in found.items() if value not in (None, False, "", [])}


def replay_line(request: GenerateRequest, model: str, loaded: Mapping[str, Any]) -> str:
    """The command that makes this video again. `model`: as it was given to `load`. `loaded`: a record."""
    words = []
    for name in LOAD_FLAGS:
        if (value := loaded.get(name)) and value != LOAD_DEFAULTS.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name in LOAD_SETTINGS:
        if value := loaded.get(name):
            words += ["--set", f"{name}={setting_text(value)}"]
    start = "ascendit generate"
    return request.replay_line(model).replace(start, shlex.join([*start.split(), *words]), 1)


def setting_text(value: Any) -> str:
    """A value of a record as `--set` takes it."""
    if isinstance(value, (list, tuple)):
        return ";".join(value)
    return "true" if value is True else str(value)


def _plain_option(name: str, value: Any) -> Any:
    if name == "keep":
        return [str(pattern) for pattern in value or ()]
    if name == "emulate" and value is True:
        return "decode-on-use"
    if value is None or isinstance(value, bool) or (name == "ops" and value == "auto"):
        return value if isinstance(value, bool) else None
    text = str(value)  # of a StepSchedule, a path, a torch.dtype
    return text.removeprefix("torch.") if name.endswith("dtype") else text
