"""`ascendit models`: the models that have defaults, and the names to load them by."""

from __future__ import annotations

from typing import Any

import typer

from ascendit.cli.main import Json
from ascendit.cli.output import Output
from ascendit.family import SPECS, WanSpec, presets_of
from ascendit.report import columns

INPUTS = {"t2v": "text", "i2v": "image + text", "ti2v": "text, image optional"}
"""Task -> the inputs of a request."""
HEAD = ("model", "input", "sizes", "frames", "fps", "steps", "guidance", "presets", "MODEL")


def models(ctx: typer.Context, as_json: Json = False) -> None:
    """List the models with their defaults. Other Wan models run with the values of their own folder.

    The first size is the default. MODEL is the argument of the other commands; a folder or a file works too.
    """
    out: Output = ctx.obj
    rows = [HEAD, *map(_row, SPECS.values())]
    out.result({"models": [_data(spec) for spec in SPECS.values()]}, columns(rows))


def _guidance(spec: WanSpec) -> list[float]:
    scales = (spec.guidance_scale, spec.guidance_scale_2)
    return [scale for scale in scales if scale is not None]


def _sizes(spec: WanSpec) -> list[str]:
    return [f"{width}x{height}" for width, height in spec.sizes]


def _row(spec: WanSpec) -> tuple[str, ...]:
    numbers = (spec.num_frames, spec.fps, spec.num_inference_steps)
    guidance = ",".join(f"{scale:g}" for scale in _guidance(spec))
    presets = " ".join(presets_of(spec)) or "-"
    sizes = " ".join(_sizes(spec))
    return spec.name, INPUTS[spec.task], sizes, *map(str, numbers), guidance, presets, spec.hub


def _data(spec: WanSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "model": spec.hub,
        "task": spec.task,
        "last_image": spec.last_frame,
        "experts": spec.num_experts,
        "sizes": _sizes(spec),
        "size_multiple": spec.size_multiple,
        "num_frames": spec.num_frames,
        "fps": spec.fps,
        "num_inference_steps": spec.num_inference_steps,
        "guidance": _guidance(spec),
        "flow_shift": spec.flow_shift,
        "flow_shift_by_size": {f"{w}x{h}": shift for (w, h), shift in spec.flow_shift_by_size.items()},
        "boundary_ratio": spec.boundary_ratio,
        "negative_prompt": spec.negative_prompt,
        "presets": list(presets_of(spec)),
    }
