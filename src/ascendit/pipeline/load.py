"""Build a pipeline from the result of `job.prepare_model`: the part of loading that needs torch."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Any

import torch

from ascendit.attention.choice import AttentionPolicy
from ascendit.attention.plan import with_kernels
from ascendit.device.device import Device
from ascendit.exclusive import Stop
from ascendit.model.library_component import LOADING, library_class
from ascendit.model.loader import load_expert
from ascendit.model.quantize_on_load import schemes_in
from ascendit.ops.open_device import hold_chip, open_device
from ascendit.ops.operators import Ops, bind
from ascendit.pipeline.frame_checks import check_visible
from ascendit.pipeline.generate import Pipeline, decode, error_keeps
from ascendit.pipeline.latents import KeptLatents
from ascendit.pipeline.options import LoadOptions, PreparedModel
from ascendit.pipeline.video import Video, installed_versions
from ascendit.progress import Advance, Meter, OnProgress, Progress
from ascendit.text.encoders import ImageEncoder, TextEncoder
from ascendit.vae.autoencoder import VideoCoder


def build(model: PreparedModel, on_progress: OnProgress | None = None) -> Pipeline:
    """Load the weights of a prepared model onto its device.

    Raises EnvironmentProblem: E-ENV-03 if the device is missing, E-CAP-01 for a scheme without a matmul on
    it; UsageError (E-USE-01) for an operator or scale rule that it lacks; CheckpointError for damaged
    weights.
    """
    with hold_chip(model.device):
        return _build(model, on_progress)


def _build(model: PreparedModel, on_progress: OnProgress | None) -> Pipeline:
    options, layout, experts, schedule = model.options, model.layout, model.experts, model.schedule
    device = open_device(model.device)
    ops = bind_options(device, options)
    ops.quantized.check(schemes_in(experts) | ({"w4a8"} & schedule.precisions))
    loaded = _LoadMeter(model, ["text_encoder"] if options.text_on == "drop" else [], on_progress)
    torch_name = device.torch_name
    dtypes = {name: getattr(torch, dtype) for name, dtype in model.part_dtypes.items()}
    with loaded.part("text_encoder"):
        text = TextEncoder(
            layout,
            model.shards["text_encoder"],
            device=torch_name,
            text_on=options.text_on,
            dtype=dtypes["text_encoder"],
            few_words=model.defaults.spec is not None and model.defaults.spec.few_words,
        )
    with loaded.part("vae"):
        vae = VideoCoder(layout, model.shards["vae"], device=torch_name, dtype=dtypes["vae"])
    clip = None
    if model.needs_image_encoder:
        gelu = None if device.exact_gelu else ops.gelu
        shards, dtype = model.shards["image_encoder"], dtypes["image_encoder"]
        with loaded.part("image_encoder"):
            clip = ImageEncoder(layout, shards, device=torch_name, gelu=gelu, dtype=dtype)
    dtype = None if model.dtype is None else getattr(torch, model.dtype)
    floats = "bf16" in schedule.precisions
    models = []
    for expert, applied in experts:
        with LOADING.hold(), loaded.part(expert.name) as advance:
            models.append(
                load_expert(
                    expert, applied, ops, device=torch_name, dtype=dtype, floats=floats, advance=advance
                )
            )
    for shards in model.shards.values():  # weights may be mapped, or read before another file changed
        shards.check_unchanged()
    return Pipeline(
        layout=layout,
        defaults=model.defaults,
        ops=ops,
        device=device,
        text=text,
        vae=vae,
        transformer=models[0],
        transformer_2=models[1] if len(models) == 2 else None,
        clip=clip,
        source=options.model,
        policy=schedule,
        attention=model.attention,
        loaded=options.record,
    )


class _LoadMeter:
    """Reports the bytes of the weights that are loaded. `unread`: parts that are not loaded."""

    def __init__(self, model: PreparedModel, unread: Collection[str], on_progress: OnProgress | None) -> None:
        self._sizes = {
            name: 0 if name in unread else sum(info.nbytes for info in shards.tensors.values())
            for name, shards in model.shards.items()
        }
        total = sum(self._sizes.values())
        if on_progress is not None:
            on_progress(Progress(stage="load", total=total, unit="byte"))
        for name in ("text_encoder", "vae"):  # imports their libraries, which is no part of the speed
            library_class(model.layout.part(name))
        self._meter = Meter(total, on_progress)

    def part(self, name: str) -> AbstractContextManager[Advance]:
        """A context that loads one part, with a function that counts its bytes."""
        return self._meter.part("load", name, self._sizes.get(name, 0))


def bind_options(device: Device, options: LoadOptions) -> Ops:
    """The operators that `options` choose on an open device. Raises the errors of `bind`."""
    return bind(
        device,
        options.ops,
        fast_layernorm=options.fast_layernorm,
        emulate=options.emulate,
        activation_rule=options.activation_rule,
        nz=options.nz,
    )


def open_accelerator(policy: AttentionPolicy, options: LoadOptions) -> tuple[Device, AttentionPolicy]:
    """Open a CUDA device or an NPU; the policy gets its attention kernels. Raises those of both calls."""
    device = open_device(policy.device)
    return device, with_kernels(policy, bind_options(device, options))


def decode_kept(
    model: PreparedModel,
    kept: KeptLatents,
    on_progress: OnProgress | None = None,
    cancel: Stop | None = None,
    *,
    allow_flat: bool = False,
) -> Video:
    """Decode the latents of an earlier run; loads the VAE only.

    Raises the errors of `build` and of the decoding part of `Pipeline.run`. `job.prepare_latents` has checked
    the shape of the latents.
    """
    report, start, request = on_progress or (lambda event: None), time.perf_counter(), kept.request
    with hold_chip(model.device):
        device = open_device(model.device)
        with _LoadMeter(model, set(model.shards) - {"vae"}, on_progress).part("vae"):
            vae = VideoCoder(
                model.layout,
                model.shards["vae"],
                device=device.torch_name,
                dtype=getattr(torch, model.part_dtypes["vae"]),
            )
    latents = torch.from_numpy(kept.latents)
    with error_keeps(latents):
        frames = decode(vae, device, latents.to(device.torch_name), report, cancel)
        warnings = check_visible(frames, latents.cpu().numpy(), allow=allow_flat)
    decoded: dict[str, Any] = {"load": model.options.record, "versions": installed_versions()}
    return Video(
        frames=frames,
        fps=request.fps,
        request=request,
        model=model.defaults.model,
        seconds=time.perf_counter() - start,
        source=model.options.model,
        loaded=kept.loaded,
        versions=dict(kept.versions) or decoded["versions"],
        decoded=decoded,
        latents=kept.latents,
        warnings=warnings,
    )
