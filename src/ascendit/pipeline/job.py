"""One video from options and a request: `prepare` checks everything except weights, `run` generates.

    prepared = prepare(LoadOptions(model="demo"), "a red circle moves right", seed=7)
    video = run(prepared)

Headers are read once, by `prepare`; `run`, and `load` for a pipeline that makes many videos, reuse them. For
many videos, `prepare_model` and `load_model` run once, `prepare_request` and `run` for each.
torch is imported only when a pipeline is built.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from ascendit import geometry
from ascendit.arguments import checked_call, unknown_arguments
from ascendit.checkpoint.component import EXPERTS
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.part_check import image_tokens, library_config
from ascendit.checkpoint.part_files import read_part_files, with_part_files
from ascendit.checkpoint.tensor_info import common_dtype
from ascendit.device.device import Device, parse_device
from ascendit.device.limits import check_layers, check_rules, parse_rules
from ascendit.errors import RequestError, UsageError, is_out_of_memory, out_of_memory
from ascendit.family import VaeConfig, WanConfig
from ascendit.model.quantize_on_load import Online, policy_for, quantized_layers, schemes_in
from ascendit.pipeline.attention_check import attention_rows, check_policy, policy_of
from ascendit.pipeline.fit import describe_fit
from ascendit.pipeline.images import FIELDS, Pictures, pictures_of, size_source
from ascendit.pipeline.model_check import require_model
from ascendit.pipeline.options import OPTIONS, LoadOptions, PreparedModel, load_signature
from ascendit.pipeline.request import GenerateRequest, check, check_names, resolve
from ascendit.progress import OnProgress, Progress
from ascendit.schedule import StepSchedule
from ascendit.weights.lora.fold import lora_report, lora_sources

log = logging.getLogger("ascendit")

if TYPE_CHECKING:
    from ascendit.attention.choice import AttentionPolicy
    from ascendit.attention.steps import AttentionRow
    from ascendit.checkpoint.transformer import Expert
    from ascendit.exclusive import Stop
    from ascendit.pipeline.generate import Pipeline
    from ascendit.pipeline.latents import KeptLatents
    from ascendit.pipeline.video import Video
    from ascendit.weights.applied_recipe import AppliedRecipe


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that has been checked against its model."""

    model: PreparedModel
    request: GenerateRequest
    pixels: Mapping[str, Any] = field(default_factory=dict)
    """Name in the request -> first or last image, opened."""
    latents: KeptLatents | None = None
    """Latents of an earlier run of the request, which only have to be decoded."""
    attention: Sequence[AttentionRow] = ()
    """The attention kernels of the run."""

    @property
    def replay(self) -> str:
        """The command that reproduces this video; also in the JSON beside the video."""
        return self.replay_line()

    def replay_line(
        self, flags: Sequence[str] = (), output: str | None = None, seeds: Sequence[int] = ()
    ) -> str:
        """`replay` with other flags of `generate`, an output, or several seeds instead of its own."""
        options, kept = self.model.options, self.latents
        load = options.record if kept is None else kept.loaded
        return self.request.replay_line(options.model, output, load, flags, seeds)

    @property
    def loras(self) -> list[dict[str, Any]]:
        """Each LoRA file with its weight and, by expert, its keys and scale; empty for kept latents."""
        experts = self.model.experts if self.latents is None else ()
        folds = {expert.name: applied.folds for expert, applied in experts if applied and applied.folds}
        return lora_report(lora_sources(self.model.options.loras), folds) if folds else []

    @property
    def images(self) -> dict[str, str]:
        """Field -> how this image becomes a frame of the video."""
        request = self.request
        names = {name: getattr(request, name) for name in FIELDS}
        sizes = {field: self.pixels[name].size for field, name in names.items() if name is not None}
        size = (request.width, request.height)
        return {field: describe_fit(picture, size, request.fit)[0] for field, picture in sizes.items()}

    @property
    def latent_grid(self) -> geometry.Grid:
        """Frames, rows and columns of the latents."""
        request, vae = self.request, VaeConfig.from_dict(self.model.layout.part("vae").config)
        strides = {"frame_stride": vae.scale_factor_temporal, "stride": vae.scale_factor_spatial}
        return geometry.latent_grid(request.num_frames, request.height, request.width, **strides)

    @property
    def video_tokens(self) -> int:
        """Tokens of the video in one pass of a transformer."""
        patch_size = self.model.layout.experts[0].config.get("patch_size", WanConfig.patch_size)
        return geometry.num_tokens(geometry.patch_grid(self.latent_grid, patch_size))

    @property
    def image_tokens(self) -> int:
        """Tokens of CLIP's image encoder for the images of the request."""
        images = (self.request.image is not None) + (self.request.last_image is not None)
        model = self.model
        return images * image_tokens(model.layout.part("image_encoder")) if model.needs_image_encoder else 0


def prepare_model(options: LoadOptions, chosen: Collection[str] = ()) -> PreparedModel:
    """Read configs and headers, and check that the model can be loaded with `options` on this machine.

    `chosen`: fields of the request that do not get the model's default, so no warning is about them.
    torch is imported only to look for a CUDA device or an NPU. Raises UsageError for options that do not fit
    the model or each other, CheckpointError for a damaged folder, EnvironmentProblem: E-CAP-01 for a scheme
    without a matmul on the chip, E-ENV-03 for a device that this machine does not have.
    """
    device = parse_device(options.device)
    layout = recognise(model_folder(options.model))
    if options.parts:
        layout = with_part_files(layout, read_part_files(options.parts, len(layout.experts)))
    checked, defaults = require_model(layout, options.defaults)
    online = Online.from_options(
        options.scheme,
        options.recipe,
        options.keep,
        force=options.force,
        loras=lora_sources(options.loras),
        lora_skip=options.lora_skip,
    )
    experts = online.apply_all(checked.experts) if online else tuple((x, None) for x in checked.experts)
    schedule = policy_for(options.step_policy, online, layout, experts)
    if set(defaults.differing) - set(chosen):
        log.warning("%s: %s", layout.name, defaults.difference)
    shards = {x.part.name: x.shards for x in checked.parts if x.shards is not None}
    dtype = device.dtype_name(options.dtype)
    vae_dtype = device.dtype_name(options.vae_dtype or "float32", "vae_dtype")
    device, attention = _checked_device(device, options, dtype, experts, schedule)
    return PreparedModel(
        options=options,
        layout=layout,
        defaults=defaults,
        device=device,
        dtype=dtype,
        part_dtypes={
            name: str(vae_dtype)
            if name == "vae"
            else common_dtype((info.dtype, info.read_nbytes) for info in x.tensors.values())
            for name, x in shards.items()
            if name not in EXPERTS
        },
        shards=shards,
        experts=experts,
        schedule=schedule,
        attention=attention,
    )


def _checked_device(
    device: Device,
    options: LoadOptions,
    dtype: str | None,
    experts: Sequence[tuple[Expert, AppliedRecipe | None]],
    schedule: StepSchedule,
) -> tuple[Device, AttentionPolicy]:
    """The device, open if it is an accelerator, and its attention policy, after the checks of operators."""
    schemes = schemes_in(experts) | ({"w4a8"} & schedule.precisions)
    rules = parse_rules(options.activation_rule)
    attention = policy_of(options, device, schedule)
    check_rules(rules, schemes)
    if device.is_accelerator:
        from ascendit.pipeline.load import open_accelerator

        device, attention = open_accelerator(attention, options)
    if options.ops is None:
        if options.emulate is None:
            device.check_schemes(schemes)
        layers = (layer for expert, applied in experts for layer in quantized_layers(expert, applied))
        check_layers(device, layers, dtype=dtype, rules=rules, w4a8="w4a8" in schedule.precisions)
    return device, attention


def prepare(
    options: LoadOptions,
    prompt: str,
    *,
    pixels: Mapping[str, Any] | None = None,
    seconds: float | None = None,
    **fields: Any,
) -> Prepared:
    """Check one video as far as possible without weights. For the arguments, see `prepare_request`.

    Raises the errors of `prepare_model` and `prepare_request`.
    """
    check_names(fields)
    model = prepare_model(options, [name for name, value in fields.items() if value is not None])
    return prepare_request(model, prompt, pixels=pixels, seconds=seconds, **fields)


def prepare_request(
    model: PreparedModel,
    prompt: str,
    *,
    pixels: Mapping[str, Any] | None = None,
    seconds: float | None = None,
    **fields: Any,
) -> Prepared:
    """Check one video against its model.

    `fields`: fields of GenerateRequest, and `preset`; omitted ones get the model's defaults. `seconds`:
    replaces `num_frames`. `pixels`: image name -> image, if passed as pixels. Raises the errors of
    `request.resolve` and `images.pictures_of`.
    """
    check_names(fields)
    defaults = model.defaults
    if seconds is not None:
        fps: geometry.FrameRate = defaults.fps
        with suppress(ValueError):  # GenerateRequest refuses it
            fps = geometry.frame_rate(fields.get("fps") or defaults.fps)
        fields["num_frames"] = geometry.frames_for(seconds, fps, defaults.frame_stride)
    pictures = Pictures.of(pixels or {})
    picture = size_source(defaults, fields, pictures)
    request = resolve(defaults, prompt, picture=picture, **fields)
    model.schedule.check_steps(request.num_inference_steps)
    pictures_of(request, pictures)
    prepared = Prepared(model=model, request=request, pixels=pictures)
    rows = attention_rows(model, request, prepared.video_tokens, prepared.image_tokens)
    return replace(prepared, attention=rows)


def prepare_latents(options: LoadOptions, kept: KeptLatents, *, fps: Any = None) -> Prepared:
    """Check that kept latents can be decoded. `fps`: replaces that of the request.

    Raises the errors of `prepare_model` and `request.check`, and UsageError (E-USE-01) for latents of another
    shape than this model makes, or of another model whose requests this one refuses.
    """
    model = prepare_model(options, chosen=GenerateRequest.model_fields)
    request = kept.request if fps is None else GenerateRequest(**vars(kept.request) | {"fps": fps})
    try:
        check(request, model.defaults)
    except RequestError as e:
        if kept.source == options.model:
            raise
        raise _of_another_model(f"latents of {kept.source} with {options.model}: {e.got}", kept) from e
    prepared = Prepared(model=model, request=request, latents=replace(kept, request=request))
    vae = library_config(model.layout.part("vae")).model_dump()
    shape = [1, vae["z_dim"], *prepared.latent_grid]
    if list(kept.latents.shape) != shape:
        size = f"{request.width}x{request.height}x{request.num_frames}"
        got = f"latents {list(kept.latents.shape)} for {size}, which {options.model} makes as {shape}"
        raise _of_another_model(got, kept)
    return prepared


def _of_another_model(got: str, kept: KeptLatents) -> UsageError:
    model = "--demo" if kept.source == "demo" else kept.source
    return UsageError(got, needs="the model of the run", fix=f"omit MODEL and --demo, or pass {model}")


@checked_call
def load(model: Any, *, on_progress: OnProgress | None = None, **options: Any) -> Pipeline:
    """Load a model: a folder, "demo", "hf:org/name" or "ms:org/name" (with "@revision").

    A quantized folder needs no option. `scheme`, or `recipe` by name or TOML file, quantizes a float model
    while it loads, as `ascendit.quantize` does; `loras` are added to the float weights first. `on_progress`
    is called with each Progress event. Raises UsageError (E-USE-01) for an unknown keyword, the errors of
    `prepare_model` before any weight is read, and those of `load.build`.
    """
    if unknown := {name: options[name] for name in options if name not in LoadOptions.model_fields}:
        allowed = {*LoadOptions.model_fields, "on_progress"} - {"model"}
        raise unknown_arguments("load", unknown, allowed)
    prepared = prepare_model(LoadOptions.model_validate({"model": model, **options}))
    check_policy(prepared)
    from ascendit.pipeline.load import build

    return build(prepared, on_progress)


load.__dict__["__signature__"] = load_signature(
    Parameter("on_progress", Parameter.KEYWORD_ONLY, default=None, annotation=OnProgress | None)
)
load.__doc__ = f"{load.__doc__}\n" + "\n".join(f"    `{name}`: {row.help}" for name, row in OPTIONS.items())


def load_model(model: PreparedModel, events: OnProgress | None = None) -> Pipeline:
    """Load a prepared model for several calls of `run`.

    Raises the errors of `load.build`, and OutOfMemory (E-MEM-01), which names the stage.
    """
    from ascendit.pipeline.load import build

    with _stage_in_errors(model, events) as on_progress:
        return build(model, on_progress)


def run(
    prepared: Prepared,
    events: OnProgress | None = None,
    cancel: Stop | None = None,
    *,
    allow_flat: bool = False,
    pipe: Pipeline | None = None,
) -> Video:
    """Generate the video, or decode its latents.

    `events` gets each Progress event; `cancel` stops between steps and frames; `allow_flat` accepts a black,
    single-coloured or noise video. `pipe`: the model, loaded by `load_model`; None: it is loaded first.
    Raises the errors of `load_model` and `Pipeline.run`, and OutOfMemory (E-MEM-01), which names the stage.
    """
    from ascendit.pipeline.load import build, decode_kept

    model, kept = prepared.model, prepared.latents
    with _stage_in_errors(model, events) as on_progress:
        if kept is not None:
            return decode_kept(model, kept, on_progress, cancel, allow_flat=allow_flat)
        return (pipe or build(model, on_progress)).run(
            prepared.request,
            pixels=prepared.pixels,
            on_progress=on_progress,
            cancel=cancel,
            allow_flat=allow_flat,
        )


@contextmanager
def _stage_in_errors(model: PreparedModel, events: OnProgress | None) -> Iterator[OnProgress]:
    """A function that passes on events; a lack of memory becomes OutOfMemory with the stage of the last."""
    stage = ""

    def on_progress(event: Progress) -> None:
        nonlocal stage
        stage = event.stage
        if events is not None:
            events(event)

    try:
        yield on_progress
    except Exception as error:
        if is_out_of_memory(error):
            shortage = out_of_memory(error, stage, model.options.device)
            shortage.latents = getattr(error, "latents", None)
            raise shortage from error
        raise
