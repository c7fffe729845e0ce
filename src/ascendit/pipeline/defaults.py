"""What a folder runs with when the request does not say: a row of `family.py`, then the folder's own files.

Configs only: no weights are opened, and torch is not imported.
"""

from __future__ import annotations

import logging
from typing import Any

from ascendit import geometry
from ascendit.checkpoint.layout import Layout
from ascendit.errors import CheckpointError
from ascendit.family import Task, VaeConfig, WanConfig, WanSpec, match_spec
from ascendit.pipeline.request import Defaults, Solver

log = logging.getLogger("ascendit")

# Values of Diffusers' WanPipeline.__call__, for a Wan-class model that matches no row.
GENERIC = {"width": 832, "height": 480, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}
SOLVERS: dict[str, Solver] = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}
# Settings that would change the numbers, and the only values the solvers here have.
PLAIN_UNIPC = {
    "solver_order": 2,
    "solver_type": "bh2",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "thresholding": False,
    "shift_terminal": None,
    "disable_corrector": [],
    "solver_p": None,
    "num_train_timesteps": 1000,
}
PLAIN_EULER = {
    "use_dynamic_shifting": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "shift_terminal": None,
    "num_train_timesteps": 1000,
}
UNIPC_DEFAULTS = {
    "prediction_type": "epsilon",
    "use_flow_sigmas": False,
}  # of the class, where not in the file


def defaults_for(layout: Layout) -> Defaults:
    """Defaults of a recognised folder. Which row or file each came from is in `sources`, and logged."""
    config = layout.experts[0].config
    task, experts = task_of(layout), len(layout.experts)
    spec = spec_for(layout, task)
    boundary = layout.index.get("boundary_ratio")
    solver, folder_shift, notes = scheduler_of(layout)
    if spec is not None:
        width, height = spec.sizes[0]
        notes = [f"steps, shift, guidance, size, frames, fps: {spec.name} (family.py)"]
        values: dict[str, Any] = {
            "width": width,
            "height": height,
            "num_frames": spec.num_frames,
            "fps": spec.fps,
            "num_inference_steps": spec.num_inference_steps,
            "flow_shift": spec.flow_shift,
            "guidance_scale": spec.guidance_scale,
            "guidance_scale_2": spec.guidance_scale_2,
            "boundary_ratio": spec.boundary_ratio,
        }
        solver = "unipc"
    else:
        notes.append("size, frames, steps, guidance: generic, this shape is no published Wan model")
        second = GENERIC["guidance_scale"] if experts == 2 else None
        values = {**GENERIC, "fps": 16, "flow_shift": folder_shift, "guidance_scale_2": second}
        values["boundary_ratio"] = boundary if experts == 2 else None
    stride = vae_config(layout).scale_factor_spatial
    multiple = geometry.size_multiple(stride, config.get("patch_size", WanConfig.patch_size))
    if spec is None:  # the generic size, moved onto this model's grid
        values["width"], values["height"] = (
            max(1, int(GENERIC[side]) // multiple) * multiple for side in ("width", "height")
        )
    for note in notes:
        log.info("defaults of %s: %s", layout.name, note)
    return Defaults(
        model=spec.name if spec else layout.name,
        task=task,
        num_experts=experts,
        size_multiple=multiple,
        frame_stride=vae_config(layout).scale_factor_temporal,
        solver=solver,
        sources=tuple(notes),
        spec=spec,
        **values,
    )


def task_of(layout: Layout) -> Task:
    """Text-to-video, image-to-video, or both, from the pipeline and the channels."""
    if layout.index.get("expand_timesteps"):
        return "ti2v"
    config = layout.experts[0].config
    channels = config.get("in_channels", WanConfig.in_channels)
    return "i2v" if channels != (config.get("out_channels") or WanConfig.out_channels) else "t2v"


def spec_for(layout: Layout, task: Task) -> WanSpec | None:
    """The row of `family.py` with this folder's dimensions, channels and number of experts."""
    spec = spec_of(layout.experts[0].config, len(layout.experts), layout.name)
    return spec if spec and spec.task == task else None


def spec_of(config: dict[str, Any], num_experts: int, folder_name: str) -> WanSpec | None:
    """The same from the config of a transformer, whatever its task."""
    return match_spec(
        dim=config.get("num_attention_heads", WanConfig.num_attention_heads)
        * config.get("attention_head_dim", WanConfig.attention_head_dim),
        num_layers=config.get("num_layers", WanConfig.num_layers),
        in_channels=config.get("in_channels", WanConfig.in_channels),
        out_channels=config.get("out_channels") or config.get("in_channels", WanConfig.in_channels),
        num_experts=num_experts,
        image_cross_attention=config.get("image_dim") is not None,
        folder_name=folder_name,
    )


def vae_config(layout: Layout) -> VaeConfig:
    """The strides of the VAE."""
    return VaeConfig.from_dict(layout.part("vae").config)


def scheduler_of(layout: Layout) -> tuple[Solver, float, list[str]]:
    """(solver, shift, notes) that the folder's own scheduler asks for."""
    if "scheduler" not in layout.parts:
        return "unipc", 5.0, ["solver, shift: UniPC, 5 (the folder has no scheduler)"]
    part = layout.parts["scheduler"]
    name = str(part.config.get("_class_name", part.class_name))
    if name not in SOLVERS:
        raise CheckpointError(
            f"{part.path} is a {name}",
            needs=f"{' or '.join(SOLVERS)}",
            fix="put the scheduler_config.json of the model's authors there",
            code="E-CKP-05",
        )
    solver = SOLVERS[name]
    plain = PLAIN_UNIPC if solver == "unipc" else PLAIN_EULER
    given = {**(UNIPC_DEFAULTS if solver == "unipc" else {}), **part.config}
    other = [
        f"{k}={given[k]!r}" for k, v in plain.items() if k in given and (given[k] or None) != (v or None)
    ]
    if other:
        raise CheckpointError(
            f"{part.path} asks for {', '.join(other)}",
            needs="the plain flow-matching solvers that Wan models use: "
            + ", ".join(f"{k}={plain[k.split('=')[0]]!r}" for k in (o.split("=")[0] for o in other)),
            fix="put the scheduler_config.json of the model's authors there",
            code="E-CKP-06",
        )
    shift = float(given.get("flow_shift", given.get("shift", 1.0)) or 1.0)
    return solver, shift, [f"solver, shift: {name}, {shift:g} (the folder's scheduler_config.json)"]
