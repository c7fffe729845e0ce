"""Generate the frames of a request. `denoise` is the algorithm.

pipe = ascendit.load("demo")
video = pipe.generate("a red circle moves right on a black background", seed=7)
video.save("circle.mp4")
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ascendit.arguments import EXAMPLES, attribute_error, checked_call, literal
from ascendit.attention.choice import AttentionPolicy
from ascendit.attention.plan import AttentionPlan
from ascendit.checkpoint.layout import Layout
from ascendit.device.attention_kernels import Kind, attention_probabilities
from ascendit.device.attention_limits import KIND_NAMES
from ascendit.device.device import Device
from ascendit.errors import QualityError, UsageError
from ascendit.exclusive import Exclusive, Stop, stop_if
from ascendit.kernels.reference import Spans
from ascendit.model.state import DenoiseState, Shared, Timesteps
from ascendit.model.wan import WanTransformer
from ascendit.ops.open_device import activate, hold_chip, memory_bytes
from ascendit.ops.operators import Ops
from ascendit.pipeline.condition import Condition, make_condition
from ascendit.pipeline.defaults import Defaults
from ascendit.pipeline.frame_checks import Frames, check_visible, to_uint8
from ascendit.pipeline.images import Pictures, fitted_pictures, name_image, open_image, size_source
from ascendit.pipeline.request import GenerateRequest, check, check_names, resolve
from ascendit.pipeline.sigmas import expert_of
from ascendit.pipeline.solver import make_solver
from ascendit.pipeline.video import Video
from ascendit.progress import OnProgress, Progress
from ascendit.schedule import Step, StepSchedule
from ascendit.text.encoders import ImageEncoder, TextEncoder
from ascendit.vae.autoencoder import VideoCoder

log = logging.getLogger("ascendit")
OnPlan = Callable[[Sequence[AttentionPlan]], None]
"""Called before the first step with the attention of each expert."""
OnStep = Callable[[int, Tensor], None]
"""Called after each step with its number and the latents after it, [1, z, F, h, w] float32."""


@dataclass(repr=False)
class Pipeline:
    """A loaded Wan model on one device: one or two experts, encoders and VAE.

    Generates one video at a time: a call waits for those of other threads. Two pipelines run in two threads
    at once, except twins of different chips: a process emulates one chip at a time, so one of them waits.
    """

    layout: Layout
    defaults: Defaults
    ops: Ops
    device: Device
    text: TextEncoder
    vae: VideoCoder
    transformer: WanTransformer
    transformer_2: WanTransformer | None = None
    clip: ImageEncoder | None = None
    source: str = ""
    """The model as passed to `load`, for the replay line of a video."""
    policy: StepSchedule = field(default_factory=StepSchedule)
    """The precision and attention of each step."""
    attention: AttentionPolicy | None = None
    """The requests for attention kernels; None: the default ones."""
    loaded: Mapping[str, Any] = field(default_factory=dict)
    """The options of `load`, from `LoadOptions.record`; stored with each video."""
    make_state: Callable[..., DenoiseState] = DenoiseState
    """Makes the state that the model calls; caches and attention policies are subclasses."""
    predict: Callable[..., Tensor] = field(default_factory=lambda: predict)
    logged: set[str] = field(default_factory=set, repr=False, compare=False)
    """Choices of attention kernels that have been logged."""
    turn: Exclusive = field(default_factory=lambda: Exclusive("the pipeline"), repr=False, compare=False)
    """Held by each run; shared by the copies that `dataclasses.replace` makes, which have the same parts."""

    def __repr__(self) -> str:
        experts = "two experts" if self.transformer_2 is not None else "one expert"
        text = f"{self.defaults.model}, {self.defaults.task}, {experts}, {self.device}"
        options = "".join(f", {name}={value!r}" for name, value in self.loaded.items() if name != "device")
        return f"Pipeline({self.source!r}: {text}{options})"

    if not TYPE_CHECKING:  # a type checker reports these itself

        def __getattr__(self, name: str) -> NoReturn:
            raise attribute_error("'Pipeline' object", name, dir(self))

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in self.__dataclass_fields__:  # as pipe.scheduler of Diffusers, which nothing reads
                raise attribute_error("'Pipeline' object", name, dir(self))
            super().__setattr__(name, value)

        def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
            prompt = literal(args[0] if args else kwargs.get("prompt"))
            call = EXAMPLES["generate"] if prompt in (None, "None") else f"pipe.generate({prompt})"
            raise UsageError("a call of the pipeline", needs="a method", fix=call)

    @property
    def experts(self) -> dict[str, WanTransformer]:
        """The experts by name, high noise first."""
        experts = {"transformer": self.transformer, "transformer_2": self.transformer_2}
        return {name: expert for name, expert in experts.items() if expert is not None}

    def request(self, prompt: str, *, pixels: Any = None, **fields: Any) -> GenerateRequest:
        """Make a complete request; omitted fields get the values of `preset`, else the model's defaults.

        Without a size the video has the ratio of the image.

        `pixels`: image name -> image, if passed as pixels. Raises the errors of `request.resolve` and
        `images.pictures_of`.
        """
        check_names(fields)
        picture = size_source(self.defaults, fields, pixels or {})
        return resolve(self.defaults, prompt, picture=picture, **fields)

    @checked_call
    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        image: Any = None,
        last_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        flow_shift: float | None = None,
        seed: int | None = None,
        on_progress: OnProgress | None = None,
        cancel: Stop | None = None,
        allow_flat: bool = False,
        **more: Any,
    ) -> Video:
        """Generate one video. None means the model's default; names follow Diffusers.

        `image`, `last_image`: path, bytes, PIL image, array [H, W, 3] or tensor [3, H, W]; see
        `images.open_image`. Without `height` and `width` the video has the ratio of `image`. `more`: other
        fields of GenerateRequest, and `preset`. Raises the errors of `request` and `run`.
        """
        check_names(more)
        name, first = name_image(image)
        last_name, last = name_image(last_image)
        pixels = Pictures()
        pixels |= {**first, **last}
        request = self.request(
            prompt,
            pixels=pixels,
            negative_prompt=negative_prompt,
            image=name,
            last_image=last_name,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            flow_shift=flow_shift,
            seed=seed,
            **more,
        )
        return self.run(request, pixels=pixels, on_progress=on_progress, cancel=cancel, allow_flat=allow_flat)

    def run(
        self,
        request: GenerateRequest,
        *,
        pixels: Mapping[str, Any] | None = None,
        on_progress: OnProgress | None = None,
        cancel: Stop | None = None,
        allow_flat: bool = False,
    ) -> Video:
        """Generate the video of a complete request. `pixels`: image name -> image, if passed as pixels.

        `allow_flat`: accept a black, single-coloured or noise video with a warning. Waits while another
        thread uses this pipeline; inside a run of its own thread it raises UsageError (E-USE-01), as for an
        `on_progress` that is not a function, and a `cancel` without `is_set`. Raises
        RequestError (E-REQ-04) if the pixels of an image are missing, Cancelled between two steps or frames,
        QualityError: E-OUT-01 if frames have NaN or infinite values, E-OUT-02 if they are black or a single
        colour, E-OUT-04 if they are noise. An error after the last step has the latents as `error.latents`.
        """
        _check_callbacks(on_progress, cancel)
        check(request, self.defaults)
        self.policy.check_steps(request.num_inference_steps)
        report = on_progress or (lambda event: None)
        pictures = fitted_pictures(request, pixels or {})
        first, last = pictures.get("image"), pictures.get("last_image")
        with self.exclusive(cancel):
            start = time.perf_counter()
            plans: list[AttentionPlan] = []
            latents = denoise(self, request, first, report, cancel, last_image=last, on_plan=plans.extend)
            with error_keeps(latents):
                frames = decode(self.vae, self.device, latents, report, cancel)
                warnings = check_visible(frames, latents.cpu().numpy(), allow=allow_flat)
        return Video(
            frames=frames,
            fps=request.fps,
            request=request,
            model=self.defaults.model,
            seconds=time.perf_counter() - start,
            source=self.source,
            loaded=dict(self.loaded),
            latents=latents.cpu().numpy(),
            warnings=warnings,
            attention=tuple(row.as_dict() for plan in plans for row in plan.rows),
        )

    @contextmanager
    def exclusive(self, cancel: Stop | None = None) -> Iterator[None]:
        """Hold the pipeline for one run, with its device and settings; waits for the runs of other threads.

        Raises Cancelled (E-CAN-01) while waiting, UsageError (E-USE-01) inside a run of this thread.
        """
        numbers = self.attention.probabilities if self.attention else None
        with self.turn.hold(cancel), hold_chip(self.device, cancel), attention_probabilities(numbers):
            activate(self.device)
            yield

    def warm_up(self, request: GenerateRequest | None = None) -> float:
        """Run one step at the request's size, so that the first video is not slowed by initialization.

        Returns seconds.
        """
        if request is None:
            image = "black" if self.defaults.task == "i2v" else None
            last_image = "black" if self.defaults.last_frame == "required" else None
            request = resolve(self.defaults, "", image=image, last_image=last_image)
        one = GenerateRequest(**{**vars(request), "num_inference_steps": 1, "timesteps": None})
        start = time.perf_counter()
        black = open_image(torch.zeros(3, one.height, one.width))
        first, last = (None if name is None else black for name in (one.image, one.last_image))
        with self.exclusive():
            self.vae.decode(denoise(self, one, first, lambda event: None, None, last_image=last))
        return time.perf_counter() - start


def _check_callbacks(on_progress: Any, cancel: Any) -> None:
    """Raise UsageError (E-USE-01) for a callback or a signal of another type."""
    if on_progress is not None and not callable(on_progress):
        needs = "a function of one argument, a Progress event"
        raise UsageError(f"on_progress={on_progress!r}", needs=needs, fix="on_progress=print")
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise UsageError(
            f"cancel={cancel!r}", needs="an object with is_set()", fix="cancel=threading.Event()"
        )


def predict(
    experts: Mapping[str, WanTransformer],
    x: Tensor,
    timesteps: Timesteps,
    spans: Spans,
    states: Sequence[DenoiseState],
    guidance: float,
    agree: Callable[[float], float] | None = None,
) -> Tensor:
    """Velocity of one step, float32 [1, z, F, h, w], from the model input `x` [1, C, F, h, w].

    Two states mean classifier-free guidance. CFG parallelism replaces this function: one branch per rank.
    `agree` maps a float of this rank to the one of rank 0, for the decision of a cache once per step.
    """
    velocities: list[Tensor] = []
    for state in states:
        if agree is not None:
            state.agree = agree
        velocities.append(experts[state.expert](x, timesteps, state, spans).float())
    velocity, *unconditional = velocities
    if not unconditional:
        return velocity
    return unconditional[0] + guidance * (velocity - unconditional[0])


@torch.inference_mode()
def denoise(
    pipe: Pipeline,
    request: GenerateRequest,
    image: Any,
    report: OnProgress,
    cancel: Stop | None,
    on_step: OnStep = lambda i, latents: None,
    *,
    last_image: Any = None,
    on_plan: OnPlan = lambda plans: None,
) -> Tensor:
    """Compute clean latents [1, z, F, h, w], float32, from noise: encode, then one solver step per timestep.

    `image`, `last_image`: PIL images in RGB, or None; another ratio than the video's is stretched.
    Steps, noise levels, coefficients and the switch of experts are Python numbers, computed before the loop,
    so that the loop never synchronizes with the device. Raises Cancelled, and QualityError (E-OUT-01).
    """
    report(Progress(stage="encode", total=1, memory_bytes=memory_bytes(pipe.device)))
    prompts = [request.prompt] + [request.negative_prompt] * request.do_classifier_free_guidance
    stop = partial(stop_if, cancel)
    texts = pipe.text.encode(prompts, request.max_sequence_length, stop)
    with pipe.vae.between_frames(stop):
        condition = make_condition(pipe.defaults.task, image, request, pipe.vae, pipe.clip, last_image)
    report(Progress(stage="encode", step=1, total=1, memory_bytes=memory_bytes(pipe.device)))

    latents = noise(pipe, request)
    solver = make_solver(request)
    timesteps = solver.schedule.timesteps
    steps = pipe.policy.resolve(len(timesteps))
    # for both experts before the loop, so that the switch costs nothing
    shared = share(pipe.experts, latents, condition, timesteps)
    names = [expert_of(t, request.boundary_ratio) for t in timesteps]
    plans = plan_attention(pipe, shared, texts[0], condition, [*zip(names, steps, strict=True)])
    on_plan([*plans.values()])

    states: list[DenoiseState] = []
    for i, (t, name) in enumerate(zip(timesteps, names, strict=True)):
        stop_if(cancel)
        start = time.perf_counter()

        guidance = request.guidance_for(high=name == "transformer")
        if not states or states[0].expert != name:
            make = partial(pipe.make_state, steps=steps, step=i, expert=name, plan=plans[name])
            states = [
                pipe.experts[name].prepare(shared[name], text, condition.tokens, make=make, branch=branch)
                for branch, text in enumerate(texts if guidance > 1 else texts[:1])
            ]
        for state in states:
            state.step = i

        x = condition.model_input(latents)
        rows, spans = condition.timesteps(t, shared[name].grid)
        velocity = pipe.predict(pipe.experts, x, rows, spans, states, guidance)
        latents = solver.step(i, velocity, latents)
        on_step(i, latents)

        seconds, memory = time.perf_counter() - start, memory_bytes(pipe.device)
        event = Progress(stage="denoise", step=i + 1, total=len(timesteps), expert=name, timestep=t)
        report(replace(event, seconds=seconds, memory_bytes=memory))
    return check_finite(condition.finish(latents))


def noise(pipe: Pipeline, request: GenerateRequest) -> Tensor:
    """Initial latents [1, z, F, h, w], float32. Drawn on the CPU, so equal on every device."""
    shape = pipe.vae.latent_shape(request.num_frames, request.height, request.width)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(pipe.device.torch_name)


def share(
    experts: Mapping[str, WanTransformer], latents: Tensor, condition: Condition, timesteps: Timesteps
) -> dict[str, Shared]:
    """Inputs that the CFG branches of each expert share in all steps; `latents` float32 [1, z, F, h, w]."""
    shared: dict[str, Shared] = {}
    for name, expert in experts.items():
        grid = expert.grid_of(latents)
        rows = dict.fromkeys(row for t in timesteps for row in condition.timesteps(t, grid)[0])
        shared[name] = expert.share(grid, tuple(rows), other=shared.get("transformer"))
    return shared


def plan_attention(
    pipe: Pipeline,
    shared: Mapping[str, Shared],
    text: Tensor,
    condition: Condition,
    steps: Sequence[tuple[str, Step]],
) -> dict[str, AttentionPlan]:
    """The attention of each expert. `text` [1, L, text_dim], any dtype; `steps`: expert and settings of each.

    Raises the errors of `make_plan`.
    """
    plans: dict[str, AttentionPlan] = {}
    for name, expert in pipe.experts.items():
        contexts: dict[Kind, int] = {"text": text.shape[1]}
        if condition.tokens is not None:
            contexts["image"] = expert.image_keys(condition.tokens)
        own = {i: step for i, (of, step) in enumerate(steps) if of == name}
        tokens = len(shared[name].part)
        plans[name] = expert.plan_attention(tokens, contexts, own, policy=pipe.attention, expert=name)
    for row in (row for plan in plans.values() for row in plan.rows):
        choice = f"{KIND_NAMES[row.kind]} -> {row.choice}"
        if choice not in pipe.logged:
            pipe.logged.add(choice)
            log.info("%s; --attention %s=NAME for another", choice, row.kind)
    return plans


def check_finite(latents: Tensor) -> Tensor:
    """The latents [1, z, F, h, w], float32. Raises QualityError (E-OUT-01) if one is NaN or infinite."""
    bad = int((~latents.isfinite()).sum())
    if bad:
        raise QualityError(
            f"{bad} of {latents.numel()} latents are not finite",
            needs="finite values; a NaN usually means a damaged or badly quantized weight",
            fix="--set dtype=float32 or --set ops=reference; check the model with: ascendit inspect MODEL",
            code="E-OUT-01",
        )
    return latents


def decode(
    vae: VideoCoder, device: Device, latents: Tensor, report: OnProgress, cancel: Stop | None
) -> Frames:
    """Decode latents [1, z, F, h, w] into frames, uint8 [F, H, W, 3]; reports each latent frame.

    Raises Cancelled (E-CAN-01) between two latent frames, QualityError (E-OUT-01).
    """
    total, started = latents.shape[2], [time.perf_counter()]

    def progress(step: int, seconds: float = 0.0) -> None:
        memory = memory_bytes(device)
        report(Progress(stage="decode", step=step, total=total, seconds=seconds, memory_bytes=memory))

    def next_frame() -> None:
        stop_if(cancel)
        started.append(time.perf_counter())
        progress(min(len(started) - 2, total - 1), started[-1] - started[-2])

    with vae.between_frames(next_frame):
        decoded = vae.decode(latents)[0]
    stop_if(cancel)
    frames = to_uint8(decoded)
    progress(total, time.perf_counter() - started[-1])
    return frames


@contextmanager
def error_keeps(latents: Tensor) -> Iterator[None]:
    """Attach the latents, float32 [1, z, F, h, w], to any exception, as an array on the host."""
    try:
        yield
    except BaseException as error:
        error.latents = latents.cpu().numpy()  # type: ignore[attr-defined]
        raise
