"""What a folder runs with when the request does not say: a row of `family.py`, then the folder's own files.

Configs only: no weights are opened, and torch is not imported.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from ascendit import geometry
from ascendit.checkpoint.layout import Layout
from ascendit.errors import CheckpointError
from ascendit.family import Task, VaeConfig, WanConfig, WanSpec, match_spec

log = logging.getLogger("ascendit")

Solver = Literal["unipc", "euler"]

# Values of Diffusers' WanPipeline.__call__, for a Wan-class model that matches no row.
GENERIC = {"width": 832, "height": 480, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}
SOLVERS: dict[str, Solver] = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}
# Settings that would change the numbers, and the only values the solvers here have.
_OFF = "use_dynamic_shifting use_karras_sigmas use_exponential_sigmas use_beta_sigmas".split()
_PLAIN = dict.fromkeys(_OFF, False) | {"shift_terminal": None, "num_train_timesteps": 1000}
PLAIN_EULER = _PLAIN | {"invert_sigmas": False, "stochastic_sampling": False}
PLAIN_UNIPC: dict[str, Any] = {
    "solver_order": 2,
    "solver_type": "bh2",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    **_PLAIN,
    "thresholding": False,
    "disable_corrector": [],
    "solver_p": None,
}
OF_THE_FAMILY = (
    *("num_frames", "fps", "num_inference_steps", "flow_shift"),
    *("guidance_scale", "guidance_scale_2", "boundary_ratio"),
)
UNIPC_DEFAULTS = {"prediction_type": "epsilon", "use_flow_sigmas": False}
"""Of the class, where not in the file."""


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


def defaults_for(layout: Layout) -> Defaults:
    """Defaults of a recognised folder. Which row or file each came from is in `sources`, and logged."""
    config = layout.experts[0].config
    experts, vae = len(layout.experts), VaeConfig.from_dict(layout.part("vae").config)
    channels = config.get("in_channels", WanConfig.in_channels)
    task: Task = "i2v" if channels != (config.get("out_channels") or WanConfig.out_channels) else "t2v"
    if layout.index.get("expand_timesteps"):  # starts from text alone, or from an image
        task = "ti2v"
    spec = spec_of(config, experts, layout.name)
    if spec is not None and spec.task != task:
        spec = None
    solver, folder_shift, notes = scheduler_of(layout)
    patch_size = config.get("patch_size", WanConfig.patch_size)
    multiple = geometry.size_multiple(vae.scale_factor_spatial, patch_size)
    if spec is not None:
        notes = [f"steps, shift, guidance, size, frames, fps: {spec.name} (family.py)"]
        values: dict[str, Any] = {name: getattr(spec, name) for name in OF_THE_FAMILY}
        values["width"], values["height"] = spec.sizes[0]
        solver = "unipc"
    else:
        notes.append("size, frames, steps, guidance: generic, this shape is no published Wan model")
        second = GENERIC["guidance_scale"] if experts == 2 else None
        values = {**GENERIC, "fps": 16, "flow_shift": folder_shift, "guidance_scale_2": second}
        values["boundary_ratio"] = layout.index.get("boundary_ratio") if experts == 2 else None
        for side in ("width", "height"):  # moved onto this model's grid
            values[side] = max(1, int(GENERIC[side]) // multiple) * multiple
    for note in notes:
        log.info("defaults of %s: %s", layout.name, note)
    return Defaults(
        model=spec.name if spec else layout.name,
        task=task,
        num_experts=experts,
        size_multiple=multiple,
        frame_stride=vae.scale_factor_temporal,
        solver=solver,
        sources=tuple(notes),
        spec=spec,
        **values,
    )


def spec_of(config: dict[str, Any], num_experts: int, folder_name: str) -> WanSpec | None:
    """The row of `family.py` with the dimensions and channels of this config, whatever its task."""
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
