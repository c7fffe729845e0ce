"""Size of a run before it starts: FLOPs of the denoiser, and memory of the weights.

    estimate = estimate_run(prepared)
    estimate.work.flops, estimate.memory.weights_bytes, estimate.warnings

Text encoder and VAE are not counted in the FLOPs. Does not import torch for a device on the host.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ascendit import geometry
from ascendit.checkpoint.transformer import model_config
from ascendit.pipeline.job import Prepared
from ascendit.pipeline.memory import Memory, memory_of
from ascendit.pipeline.request import GenerateRequest
from ascendit.pipeline.sigmas import is_high_noise
from ascendit.report import human_bytes

MAX_RATIO = 1.5
"""A warning from this many times the pixels of the largest published video."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The denoiser's work for one video."""

    tokens: int
    """Tokens of the video in one forward pass."""
    passes: int
    """Forward passes in all steps: two per step with a guidance above 1, else one."""
    flops_per_step: int
    """Of the largest step."""
    flops: int
    """Of all steps, and of text and image in the first step of each expert."""
    attention_flops: int
    """The part of `flops` that is attention of the video's tokens."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Work and memory of a run."""

    work: Work
    memory: Memory
    video_bytes: int
    """Bytes of the decoded frames, float32, on the device of the VAE."""
    size_warning: str = ""
    """Set if the video is far larger than those that the model was made for."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """Texts about too little memory and about the size."""
        memory, texts = self.memory, []
        for device, free in memory.available.items():
            video = self.video_bytes if device == memory.main else 0
            weights = memory.bytes_on(device)
            if free is None or weights + video <= free:
                continue
            parts = f"{human_bytes(weights)} of weights"
            if weights <= free:
                parts += f" and {human_bytes(video)} of decoded frames"
            texts.append(f"{parts} do not fit into the {human_bytes(free)} of memory that {device} has free")
        return (*texts, *filter(None, [self.size_warning]))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        memory = self.memory
        devices = {
            device: {"weights_bytes": memory.bytes_on(device), "available_bytes": free}
            for device, free in memory.available.items()
        }
        return {
            "work": asdict(self.work),
            "memory": {
                "weights_bytes": memory.weights_bytes,
                "parts": {name: asdict(part) for name, part in memory.parts.items()},
                "video_bytes": self.video_bytes,
                "available_bytes": memory.available[memory.main],
                "devices": devices,
                "fits": not memory.too_small,
            },
            "warnings": list(self.warnings),
        }


def estimate_run(prepared: Prepared) -> Estimate:
    """Work and memory of one checked request; of kept latents, those of the VAE alone."""
    request, memory = prepared.request, memory_of(prepared.model)
    if prepared.latents is None:
        work = work_of(prepared)
    else:
        work = Work(tokens=prepared.video_tokens, passes=0, flops_per_step=0, flops=0, attention_flops=0)
        memory = replace(memory, parts={"vae": memory.parts["vae"]})
    return Estimate(
        work=work,
        memory=memory,
        video_bytes=12 * request.num_frames * request.height * request.width,
        size_warning="" if prepared.latents else size_warning(prepared, work),
    )


def work_of(prepared: Prepared) -> Work:
    """FLOPs of the denoiser, as `torch.utils.flop_counter` counts those of plain PyTorch."""
    model, request, tokens = prepared.model, prepared.request, prepared.video_tokens
    config = model_config(model.experts[0][0])
    text_tokens = request.max_sequence_length
    flops = geometry.transformer_flops(config, tokens, text_tokens, prepared.image_tokens)
    # TI2V: the frame of the image has a timestep of its own.
    rows = 2 if model.defaults.task == "ti2v" and request.image and prepared.latent_grid[0] > 1 else 1
    branches = [(high, 2 if request.guidance_for(high=high) > 1 else 1) for high in _high_noise(request)]
    passes = sum(count for _, count in branches)
    return Work(
        tokens=tokens,
        passes=passes,
        flops_per_step=max(count for _, count in branches) * flops.forward + rows * flops.modulation,
        flops=passes * flops.forward
        + len(branches) * rows * flops.modulation
        + sum(count for _, count in set(branches)) * flops.context,
        attention_flops=passes * flops.attention,
    )


def _high_noise(request: GenerateRequest) -> list[bool]:
    """Whether each step runs the first expert."""
    return [is_high_noise(t, request.boundary_ratio) for t in request.denoising_schedule.timesteps]


def size_warning(prepared: Prepared, work: Work) -> str:
    """A text if the video has far more pixels than the largest published one, else ""."""
    defaults, request = prepared.model.defaults, prepared.request
    sizes = defaults.spec.sizes if defaults.spec else ((defaults.width, defaults.height),)
    width, height = max(sizes, key=math.prod)
    ratio = request.width * request.height * request.num_frames / (width * height * defaults.num_frames)
    if ratio < MAX_RATIO:
        return ""
    size = "published" if defaults.spec else "default"
    return (
        f"{request.width}x{request.height} with {request.num_frames} frames has "
        f"{ratio:,.{0 if ratio >= 100 else 1}f} times the pixels of the largest {size} size of "
        f"{defaults.model}, {width}x{height} with {defaults.num_frames} frames; attention alone is "
        f"{human_flops(work.attention_flops)}"
    )


def human_flops(flops: int) -> str:
    """FLOPs as text: `3.21 PFLOP`, `854 TFLOP`, `12.0 GFLOP`."""
    units = ((10**18, "E"), (10**15, "P"), (10**12, "T"), (10**9, "G"))
    unit, prefix = next((unit for unit in units if flops >= unit[0]), (10**6, "M"))
    value = flops / unit
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {prefix}FLOP"
