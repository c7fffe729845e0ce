"""Default request values of a model: from its row in `family.py`, else from the folder's own files.

A folder of a known model may have another solver, shift or boundary than the row: `Defaults.difference` says
so, and `source="folder"` uses the folder's. Reads only configs, and does not import torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ascendit import geometry
from ascendit.checkpoint.layout import Layout
from ascendit.errors import CheckpointError
from ascendit.family import LastFrame, Size, Solver, Task, VaeConfig, WanConfig, WanSpec, match_spec

log = logging.getLogger("ascendit")

Source = Literal["model", "folder"]
"""Origin of solver, shift and boundary of a known model: its row in `family.py`, or the folder."""

# Defaults of Diffusers' WanPipeline.__call__, for a model without a row in `family.py`.
GENERIC = {"width": 832, "height": 480, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}
SOLVERS: dict[str, Solver] = {
    "UniPCMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpm++",
    "FlowMatchEulerDiscreteScheduler": "euler",
}
# Scheduler settings that change the numbers, with the only values that these solvers implement.
_OFF = "use_dynamic_shifting use_karras_sigmas use_exponential_sigmas use_beta_sigmas".split()
_SUPPORTED = dict.fromkeys(_OFF, False) | {"shift_terminal": None, "num_train_timesteps": 1000}
_MULTISTEP: dict[str, Any] = {
    "solver_order": 2,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "final_sigmas_type": "zero",
    **_SUPPORTED,
    "thresholding": False,
}
SUPPORTED: dict[Solver, dict[str, Any]] = {
    "unipc": {
        **_MULTISTEP,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
    },
    "dpm++": {
        **_MULTISTEP,
        "solver_type": "midpoint",
        "algorithm_type": "dpmsolver++",
        "use_lu_lambdas": False,
        "variance_type": None,
    },
    "euler": _SUPPORTED | {"invert_sigmas": False},
}
FAMILY_FIELDS = (
    *("num_frames", "fps", "num_inference_steps", "flow_shift"),
    *("guidance_scale", "guidance_scale_2", "boundary_ratio", "negative_prompt"),
)
LABELS = {"solver": "solver", "flow_shift": "shift", "boundary_ratio": "boundary"}
"""Values of a folder that can differ from those of its row -> label."""
ROW_VALUES = "steps, guidance, negative prompt, size, frames, fps"
"""Values that only a row has, as text."""
MULTISTEP_DEFAULTS = {"prediction_type": "epsilon", "use_flow_sigmas": False}
"""Defaults of both multistep classes, for settings that the file omits."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Default request values of a model, and its limits."""

    model: str
    """Its name in messages and metadata."""
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
    negative_prompt: str = ""
    size_multiple: int
    frame_stride: int = 4
    max_sequence_length: int = 512
    solver: Solver = "unipc"
    sources: tuple[str, ...] = ()
    """Origin of the values, for the log: a row of `family.py`, or files of the folder."""
    spec: WanSpec | None = None
    flow_shift_by_size: Mapping[Size, float] = field(default_factory=dict)
    difference: str = ""
    """Where the folder's solver, shift or boundary differ from those of the row, and which are used."""
    differing: tuple[str, ...] = ()
    """The fields of `difference`."""
    last_frame: LastFrame = "refused"

    def shift_for(self, width: int, height: int) -> float:
        """`flow_shift` for this size; for some models it depends on the size."""
        return self.flow_shift_by_size.get((width, height), self.flow_shift)


def defaults_for(layout: Layout, source: Source = "model") -> Defaults:
    """Defaults of a recognised folder; logs their origin. Raises the errors of `scheduler_of`.

    `source`: "folder" uses solver, shift and boundary of the folder where a known model has others.
    """
    config = layout.experts[0].config
    experts, vae = len(layout.experts), VaeConfig.from_dict(layout.part("vae").config)
    channels = config.get("in_channels", WanConfig.in_channels)
    task: Task = "i2v" if channels != (config.get("out_channels") or WanConfig.out_channels) else "t2v"
    if layout.index.get("expand_timesteps"):  # with or without a first image
        task = "ti2v"
    spec = spec_of(config, experts, layout.name)
    if spec is not None and spec.task != task:
        spec = None
    folder, notes = folder_values(layout)
    patch_size = config.get("patch_size", WanConfig.patch_size)
    multiple = geometry.size_multiple(vae.scale_factor_spatial, patch_size)
    if spec is not None:
        values, notes = _of_row(spec, folder, source)
    else:
        notes.append("size, frames, steps, guidance: generic, no published Wan model has these dimensions")
        if "solver" not in folder:
            notes.append("solver, shift: UniPC, 5 (the folder has no scheduler)")
        second = GENERIC["guidance_scale"] if experts == 2 else None
        values = {**GENERIC, "fps": 16, "flow_shift": 5.0, "guidance_scale_2": second, "boundary_ratio": None}
        values |= folder
        for side in ("width", "height"):  # rounded down to this model's multiple
            values[side] = max(1, int(GENERIC[side]) // multiple) * multiple
    for note in notes:
        log.info("defaults of %s: %s", layout.name, note)
    return Defaults(
        model=spec.name if spec else layout.name,
        task=task,
        num_experts=experts,
        size_multiple=multiple,
        frame_stride=vae.scale_factor_temporal,
        sources=tuple(notes),
        spec=spec,
        last_frame=last_frame_of(layout, task),
        **values,
    )


def _of_row(spec: WanSpec, folder: Mapping[str, Any], source: Source) -> tuple[dict[str, Any], list[str]]:
    """(values, notes for the log) of a model with a row."""
    values: dict[str, Any] = {name: getattr(spec, name) for name in FAMILY_FIELDS}
    values |= {"solver": "unipc", "flow_shift_by_size": spec.flow_shift_by_size}
    values["width"], values["height"] = spec.sizes[0]
    unlike = [name for name in LABELS if name in folder and folder[name] != values[name]]
    authors = ", ".join(f"{LABELS[name]} {_text(values[name])}" for name in unlike)
    if source == "folder":
        values |= folder
        if "flow_shift" in folder:
            values["flow_shift_by_size"] = {}
        used = ", ".join(LABELS[name] for name in LABELS if name in folder) or "no value"
        note = f"{used}: the folder (--defaults folder)" + (f"; its authors: {authors}" if unlike else "")
        return values, [note, f"everything else: {spec.name} (family.py)"]
    own = [label for name, label in LABELS.items() if values[name] is not None]
    notes = [f"{', '.join(own)}, {ROW_VALUES}: {spec.name} (family.py)"]
    if unlike:
        theirs = ", ".join(_text(folder[name]) for name in unlike)
        use = f"--defaults folder uses {'these' if len(unlike) > 1 else 'this'}"
        values["difference"] = f"{authors} (authors of {spec.name}); the folder has {theirs}: {use}"
        values["differing"] = tuple(unlike)
        notes.append(values["difference"])
    return values, notes


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def spec_of(config: dict[str, Any], num_experts: int, folder_name: str) -> WanSpec | None:
    """The row of `family.py` with the dimensions and channels of this config, for any task."""
    return match_spec(
        dim=config.get("num_attention_heads", WanConfig.num_attention_heads)
        * config.get("attention_head_dim", WanConfig.attention_head_dim),
        num_layers=config.get("num_layers", WanConfig.num_layers),
        in_channels=config.get("in_channels", WanConfig.in_channels),
        out_channels=config.get("out_channels") or config.get("in_channels", WanConfig.in_channels),
        num_experts=num_experts,
        image_cross_attention=config.get("image_dim") is not None,
        first_last_frame=has_position_embeddings(config),
        folder_name=folder_name,
    )


def folder_values(layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """(`solver`, `flow_shift`, `boundary_ratio`, notes for the log), as far as the folder has them.

    Raises the errors of `scheduler_of`.
    """
    values: dict[str, Any] = {}
    notes: list[str] = []
    if "scheduler" in layout.parts:
        values["solver"], values["flow_shift"], notes = scheduler_of(layout)
    if len(layout.experts) == 2 and layout.index.get("boundary_ratio") is not None:
        values["boundary_ratio"] = layout.index["boundary_ratio"]
    return values, notes


def has_position_embeddings(config: dict[str, Any]) -> bool:
    """Whether this config is of an FLF2V model: position embeddings for the tokens of two images."""
    return config.get("image_dim") is not None and config.get("pos_embed_seq_len") is not None


def last_frame_of(layout: Layout, task: Task) -> LastFrame:
    """Whether this model takes a last image, from the configs of transformer and image encoder.

    Raises CheckpointError (E-CKP-06) if the transformer's position embeddings are not those of two images.
    """
    config = layout.experts[0].config
    if task != "i2v":
        return "refused"
    if not has_position_embeddings(config):
        return "optional" if config.get("image_dim") is None else "refused"
    clip = layout.part("image_encoder").config
    sizes = [clip.get("vision_config", clip).get(key) for key in ("image_size", "patch_size")]
    length = config["pos_embed_seq_len"]
    if all(type(size) is int and size > 0 for size in sizes):
        tokens = (sizes[0] // sizes[1]) ** 2 + 1
        if length != 2 * tokens:
            raise CheckpointError(
                f"pos_embed_seq_len = {length} in the transformer, and {tokens} tokens per image",
                needs=f"{2 * tokens}: the image encoder's tokens of the first and the last image",
                fix="use the image encoder and the config.json of the model's authors",
                code="E-CKP-06",
            )
    return "required"


def scheduler_of(layout: Layout) -> tuple[Solver, float, list[str]]:
    """(solver, shift, notes for the log) from the folder's scheduler.

    Raises CheckpointError: E-CKP-05 for an unsupported scheduler class, E-CKP-06 for an unsupported setting.
    """
    part = layout.parts["scheduler"]
    name = str(part.config.get("_class_name", part.class_name))
    if name not in SOLVERS:
        raise CheckpointError(
            f"{part.path} is a {name}",
            needs=f"{' or '.join(SOLVERS)}",
            fix="restore the scheduler_config.json of the model's authors",
            code="E-CKP-05",
        )
    solver = SOLVERS[name]
    supported = SUPPORTED[solver]
    config = {**({} if solver == "euler" else MULTISTEP_DEFAULTS), **part.config}
    wrong = [k for k, v in supported.items() if k in config and (config[k] or None) != (v or None)]
    if wrong:
        raise CheckpointError(
            f"{part.path} sets {', '.join(f'{k}={config[k]!r}' for k in wrong)}",
            needs="the flow-matching settings of Wan models: "
            + ", ".join(f"{k}={supported[k]!r}" for k in wrong),
            fix="restore the scheduler_config.json of the model's authors",
            code="E-CKP-06",
        )
    if solver == "euler" and config.get("stochastic_sampling"):
        solver = "renoise"
    shift = float(config.get("flow_shift", config.get("shift", 1.0)) or 1.0)
    return solver, shift, [f"solver, shift: {name}, {shift:g} (the folder's scheduler_config.json)"]
