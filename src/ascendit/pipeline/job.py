"""One video from options and a request: `prepare` checks everything except weights, `run` generates.

    prepared = prepare(LoadOptions(model="demo"), "a red circle moves right", seed=7)
    video = run(prepared)

Headers are read once, by `prepare`; `run`, and `load` for a pipeline that makes many videos, reuse them.
torch is imported only when a pipeline is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import Parameter
from typing import TYPE_CHECKING, Any

from ascendit import geometry
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.device.device import parse_device
from ascendit.errors import is_out_of_memory, out_of_memory
from ascendit.family import VaeConfig, WanConfig
from ascendit.model.quantize_on_load import Online, policy_for, schemes_in
from ascendit.pipeline.defaults import defaults_for
from ascendit.pipeline.options import OPTIONS, LoadOptions, PreparedModel, load_signature
from ascendit.pipeline.request import GenerateRequest, check, image_of, resolve
from ascendit.progress import OnProgress, Progress

if TYPE_CHECKING:
    from ascendit.exclusive import Stop
    from ascendit.pipeline.generate import Pipeline
    from ascendit.pipeline.latents import KeptLatents
    from ascendit.pipeline.video import Video


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request that has been checked against its model."""

    model: PreparedModel
    request: GenerateRequest
    pixels: Mapping[str, Any] = field(default_factory=dict)
    """Name in the request -> first image, if passed as pixels."""
    latents: KeptLatents | None = None
    """Latents of an earlier run of the request, which only have to be decoded."""

    @property
    def replay(self) -> str:
        """The command that reproduces this video; also in the JSON beside the video."""
        options = self.model.options
        return self.request.replay_line(options.model, load=options.record)

    @property
    def video_tokens(self) -> int:
        """Tokens of the video in one pass of a transformer."""
        request, vae = self.request, VaeConfig.from_dict(self.model.layout.part("vae").config)
        strides = {"frame_stride": vae.scale_factor_temporal, "stride": vae.scale_factor_spatial}
        latents = geometry.latent_grid(request.num_frames, request.height, request.width, **strides)
        patch_size = self.model.layout.experts[0].config.get("patch_size", WanConfig.patch_size)
        return geometry.num_tokens(geometry.patch_grid(latents, patch_size))


def prepare_model(options: LoadOptions) -> PreparedModel:
    """Read configs and headers, and check that the model can be loaded with `options`.

    Raises UsageError for options that do not fit the model or each other, CheckpointError for a damaged
    folder, EnvironmentProblem (E-CAP-01) for a scheme without a matmul on the chip.
    """
    device = parse_device(options.device)
    layout = recognise(model_folder(options.model))
    layout.require_pipeline()
    online = Online.from_options(options.scheme, options.recipe, options.keep, force=options.force)
    headers = [read_expert(part) for part in layout.experts]
    experts = tuple((expert, online.apply(expert) if online else None) for expert in headers)
    schedule = policy_for(options.step_policy, online, layout, experts)
    if options.emulate is None and options.ops is None:
        device.check_schemes(schemes_in(experts))
    return PreparedModel(
        options=options,
        layout=layout,
        defaults=defaults_for(layout),
        device=device,
        dtype=device.dtype_name(options.dtype),
        vae_dtype=device.dtype_name(options.vae_dtype or "float32") or "",
        experts=experts,
        schedule=schedule,
    )


def prepare(
    options: LoadOptions,
    prompt: str,
    *,
    pixels: Mapping[str, Any] | None = None,
    seconds: float | None = None,
    **fields: Any,
) -> Prepared:
    """Check one video as far as possible without weights.

    `fields`: fields of GenerateRequest; omitted ones get the model's defaults. `seconds`: replaces
    `num_frames`. `pixels`: image name -> image, if passed as pixels. Raises the errors of `prepare_model` and
    `request.resolve`.
    """
    model = prepare_model(options)
    defaults = model.defaults
    if seconds is not None:
        fps = fields.get("fps") or defaults.fps
        fields["num_frames"] = geometry.frames_for(seconds, fps, defaults.frame_stride)
    request = resolve(defaults, prompt, **fields)
    model.schedule.check_steps(request.num_inference_steps)
    picture = image_of(request, pixels or {})
    return Prepared(model=model, request=request, pixels={request.image: picture} if request.image else {})


def prepare_latents(options: LoadOptions, kept: KeptLatents, *, fps: int | None = None) -> Prepared:
    """Check that kept latents can be decoded. `fps`: replaces that of the request.

    Raises the errors of `prepare_model` and `request.check`.
    """
    model = prepare_model(options)
    request = kept.request if fps is None else GenerateRequest(**vars(kept.request) | {"fps": fps})
    check(request, model.defaults)
    return Prepared(model=model, request=request, latents=replace(kept, request=request))


def load(model: Any, *, on_progress: OnProgress | None = None, **options: Any) -> Pipeline:
    """Load a model: a folder, "demo", "hf:org/name" or "ms:org/name" (with "@revision").

    A quantized folder needs no option. `scheme`, or `recipe` by name or TOML file, quantizes a float model
    while it loads, as `ascendit.quantize` does. `on_progress` is called with each Progress event. Raises the
    errors of `prepare_model` before any weight is read, and those of `load.build`.
    """
    prepared = prepare_model(LoadOptions.model_validate({"model": model, **options}))
    from ascendit.pipeline.load import build

    return build(prepared, on_progress)


load.__dict__["__signature__"] = load_signature(
    Parameter("on_progress", Parameter.KEYWORD_ONLY, default=None, annotation=OnProgress | None)
)
load.__doc__ = f"{load.__doc__}\n" + "\n".join(f"    `{name}`: {row.help}" for name, row in OPTIONS.items())


def run(
    prepared: Prepared,
    events: OnProgress | None = None,
    cancel: Stop | None = None,
    *,
    allow_flat: bool = False,
) -> Video:
    """Load the model and generate the video, or decode its latents.

    `events` gets each Progress event; `cancel` stops between steps and frames; `allow_flat` accepts a black,
    single-coloured or noise video.
    Raises the errors of `load.build` and `Pipeline.run`, and OutOfMemory (E-MEM-01), which names the stage.
    """
    from ascendit.pipeline.load import build, decode_kept

    stage = ""

    def on_progress(event: Progress) -> None:
        nonlocal stage
        stage = event.stage
        if events is not None:
            events(event)

    try:
        model, kept = prepared.model, prepared.latents
        if kept is not None:
            return decode_kept(model, kept, on_progress, cancel, allow_flat=allow_flat)
        pipe = build(model, on_progress)
        return pipe.run(
            prepared.request,
            pixels=prepared.pixels,
            on_progress=on_progress,
            cancel=cancel,
            allow_flat=allow_flat,
        )
    except Exception as error:
        if is_out_of_memory(error):
            shortage = out_of_memory(error, stage, prepared.model.options.device)
            shortage.latents = getattr(error, "latents", None)
            raise shortage from error
        raise
