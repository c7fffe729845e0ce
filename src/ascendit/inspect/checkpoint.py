"""Inspect a checkpoint of any layout: contents, formats, completeness, from its headers and JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ascendit.checkpoint.component import Part, read_json
from ascendit.checkpoint.gguf_file import Value, general_metadata
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import RECORD_FILE, Layout, recognise
from ascendit.checkpoint.layout_check import CheckedPart
from ascendit.checkpoint.part_names import VISION_PREFIX
from ascendit.checkpoint.part_tensors import EMBEDDINGS
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.transformer import TensorMismatch
from ascendit.checkpoint.weight_files import Shards
from ascendit.errors import CheckpointError
from ascendit.family import WanSpec, spec_of
from ascendit.foreign import checked_keywords
from ascendit.inspect.engines import runs_on
from ascendit.inspect.file_check import check_files
from ascendit.inspect.report import ModelReport, PartReport
from ascendit.inspect.transformer_report import ExpertSummary
from ascendit.pipeline.model_check import check_model
from ascendit.progress import OnProgress


@checked_keywords
def inspect(path: Path | str, *, check: bool = False, on_progress: OnProgress | None = None) -> ModelReport:
    """Read the configs and headers of a checkpoint: a folder, a file, "demo", hf:org/name or ms:org/name.

    `check`: also read all files and compare them with their recorded sizes and sha256, see `file_check`.
    Problems of a recognised model are listed in the report; other problems raise the errors of `recognise`
    and `check_files`. A layout with only transformers counts as complete without the other parts of a
    pipeline.
    """
    layout = recognise(model_folder(path))
    model = check_model(layout)
    parts = tuple(_part_report(checked) for checked in model.checked.parts)
    files = check_files(layout, on_progress) if check else None
    problems = model.problems + ((files.problem,) if files and files.problem else ())
    experts = [p.summary for p in parts if p.summary is not None]
    readable = len(experts) == len(layout.experts)
    family = _family(layout, experts) if readable else None
    return ModelReport(
        layout=layout,
        family=model.defaults.spec if model.defaults else family,
        defaults=model.defaults,
        parts=parts,
        problems=problems,
        runs_on=runs_on(layout, experts) if readable and not problems else None,
        record=_record(layout),
        files=files,
    )


def _part_report(checked: CheckedPart) -> PartReport:
    part, shards, problem = checked.part, checked.shards, checked.problem
    return PartReport(
        name=part.name,
        library=part.library,
        class_name=part.class_name,
        named=_named(part, shards) if shards else {},
        files=len(shards.files) if shards else 0,
        metadata=_metadata(shards),
        kinds=shards.kinds if shards else (),
        expert=checked.expert,
        problem=problem,
        **(problem.checks if isinstance(problem, TensorMismatch) else {}),
    )


def _named(part: Part, shards: Shards) -> dict[str, TensorInfo]:
    """The tensors of a part by the names of one version of its library."""
    tied = shards.tensors.keys() & EMBEDDINGS
    renamed = {name: EMBEDDINGS[0] for name in tied} if part.name == "text_encoder" and len(tied) == 1 else {}
    prefix = VISION_PREFIX if part.name == "image_encoder" else ""
    return {renamed.get(n, n.removeprefix(prefix)): info for n, info in shards.tensors.items()}


def _metadata(shards: Shards | None) -> dict[str, Value]:
    """The metadata of a GGUF file; empty for other files."""
    info = next(iter(shards.tensors.values()), None) if shards else None
    return general_metadata(info.file) if info is not None and info.container == "gguf" else {}


def _family(layout: Layout, experts: list[ExpertSummary]) -> WanSpec | None:
    """The row of `family.py` with these dimensions, for a checkpoint without a pipeline."""
    if not experts:
        return None
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
