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
from ascendit.checkpoint.scheduler import scheduler_class, scheduler_of
from ascendit.family import (
    LastFrame,
    Size,
    Solver,
    Task,
    VaeConfig,
    WanConfig,
    WanSpec,
    has_position_embeddings,
    out_channels,
    spec_of,
)

log = logging.getLogger("ascendit")

Source = Literal["model", "folder"]
"""Origin of solver, shift and boundary of a known model: its row in `family.py`, or the folder."""

# Defaults of Diffusers' WanPipeline.__call__, for a model without a row in `family.py`.
GENERIC = {"width": 832, "height": 480, "num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}
FAMILY_FIELDS = (
    *("num_frames", "fps", "num_inference_steps", "flow_shift"),
    *("guidance_scale", "guidance_scale_2", "boundary_ratio", "negative_prompt"),
)
LABELS = {"solver": "solver", "flow_shift": "shift", "boundary_ratio": "boundary"}
"""Values of a folder that can differ from those of its row -> label."""
ROW_VALUES = "steps, guidance, negative prompt, size, frames, fps"
"""Values that only a row has, as text."""


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
    task: Task = "i2v" if channels != out_channels(config) else "t2v"
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


def folder_values(layout: Layout) -> tuple[dict[str, Any], list[str]]:
    """(`solver`, `flow_shift`, `boundary_ratio`, notes for the log), as far as the folder has them.

    Raises the errors of `scheduler_of`.
    """
    values: dict[str, Any] = {}
    notes: list[str] = []
    if "scheduler" in layout.parts:
        part = layout.parts["scheduler"]
        values["solver"], values["flow_shift"] = _, shift = scheduler_of(part)
        notes = [f"solver, shift: {scheduler_class(part)}, {shift:g} (the folder's scheduler_config.json)"]
    if len(layout.experts) == 2 and layout.index.get("boundary_ratio") is not None:
        values["boundary_ratio"] = layout.index["boundary_ratio"]
    return values, notes


def last_frame_of(layout: Layout, task: Task) -> LastFrame:
    """Whether this model takes a last image, from the config of the transformer."""
    config = layout.experts[0].config
    if task != "i2v":
        return "refused"
    if not has_position_embeddings(config):
        return "optional" if config.get("image_dim") is None else "refused"
    return "required"
