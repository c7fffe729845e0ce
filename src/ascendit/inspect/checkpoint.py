"""Inspect a checkpoint of any layout: contents, formats, completeness, from its headers and JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ascendit.checkpoint.component import EXPERTS, Part, read_json
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import RECORD_FILE, Layout, recognise
from ascendit.checkpoint.reader import Shards
from ascendit.checkpoint.transformer import TensorMismatch, read_expert
from ascendit.errors import AscenditError, CheckpointError
from ascendit.family import WanSpec
from ascendit.inspect.engines import runs_on
from ascendit.inspect.file_check import check_files
from ascendit.inspect.report import ModelReport, PartReport
from ascendit.inspect.transformer_report import ExpertSummary
from ascendit.pipeline.defaults import Defaults, defaults_for, spec_of
from ascendit.progress import OnProgress

NEEDED = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
NEEDED_FOR_IMAGE_TOKENS = ("image_encoder", "image_processor")


def inspect(path: Path | str, *, check: bool = False, on_progress: OnProgress | None = None) -> ModelReport:
    """Read the configs and headers of a checkpoint: a folder, a file, "demo", hf:org/name or ms:org/name.

    `check`: also read all files and compare them with their recorded sizes and sha256, see `file_check`.
    Problems of a recognised model are listed in the report; other problems raise the errors of `recognise`
    and `check_files`. A layout with only transformers counts as complete without the other parts of a
    pipeline.
    """
    layout = recognise(model_folder(path))
    files = check_files(layout, on_progress) if check else None
    problems = _missing_parts(layout) if layout.kind == "diffusers" else []
    parts = tuple(_inspect_part(part) for part in layout.parts.values())
    problems += [p.problem for p in parts if p.problem is not None]
    defaults: Defaults | None = None
    try:
        defaults = defaults_for(layout) if layout.kind == "diffusers" and "vae" in layout.parts else None
    except (AscenditError, TypeError, ValueError, LookupError, AttributeError) as e:
        problems.append(e if isinstance(e, AscenditError) else _bad_config(layout, e))
    problems += [files.problem] if files and files.problem else []
    experts = [p.summary for p in parts if p.summary is not None]
    readable = len(experts) == len(layout.experts)
    return ModelReport(
        layout=layout,
        family=defaults.spec if defaults else _family(layout, experts) if readable else None,
        defaults=defaults,
        parts=parts,
        problems=tuple(problems),
        runs_on=runs_on(layout, experts) if readable and not problems else None,
        record=_record(layout),
        files=files,
    )


def _missing_parts(layout: Layout) -> list[AscenditError]:
    image_tokens = layout.experts[0].config.get("image_dim") is not None
    problems: list[AscenditError] = []
    for name in NEEDED + (NEEDED_FOR_IMAGE_TOKENS if image_tokens else ()):
        try:
            layout.part(name)
        except CheckpointError as e:
            problems.append(e)
    return problems


def _inspect_part(part: Part) -> PartReport:
    fields: dict[str, Any] = {"name": part.name, "library": part.library, "class_name": part.class_name}
    if not part.has_weights:
        return PartReport(**fields)
    try:
        shards = Shards.from_part(part)
        fields["tensors"] = tuple(shards.tensors.values())
        fields["files"] = len(shards.files)
        if part.name in EXPERTS:
            fields["expert"] = read_expert(part, shards)
    except AscenditError as e:
        fields["problem"] = e
        if isinstance(e, TensorMismatch):
            fields |= e.checks
    return PartReport(**fields)


def _family(layout: Layout, experts: list[ExpertSummary]) -> WanSpec | None:
    """The row of `family.py` with these dimensions, for a checkpoint without a pipeline."""
    config = experts[0].expert.config
    if config.get("num_attention_heads") is None or config.get("attention_head_dim") is None:
        return None
    return spec_of(config, len(experts), layout.name)


def _record(layout: Layout) -> dict[str, Any] | None:
    """`ascendit.json` in the model folder; None if absent or damaged."""
    folder = layout.root if layout.root.is_dir() else layout.root.parent
    if layout.kind == "file" or not (folder / RECORD_FILE).is_file():
        return None
    try:
        return read_json(folder / RECORD_FILE)
    except CheckpointError:
        return None


def _bad_config(layout: Layout, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"a config of {layout.root} has a value of the wrong type: {error}",
        needs="the original configs of the model's authors",
        fix="download the JSON files again",
        code="E-CKP-06",
    )
