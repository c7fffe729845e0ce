"""The report of `inspect`: plain data, lines for a terminal, a dict for `--json`. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ascendit.checkpoint.gguf_file import Value
from ascendit.checkpoint.layout import KIND_LABELS, Layout
from ascendit.checkpoint.stored_kinds import kinds_text
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.transformer import Expert
from ascendit.errors import AscenditError
from ascendit.family import WanSpec, presets_of
from ascendit.inspect.engines import RunsOn
from ascendit.inspect.file_check import FileCheck
from ascendit.inspect.transformer_report import ExpertSummary, StoredRow, dtype_name, tensor_row
from ascendit.pipeline.defaults import Defaults
from ascendit.report import columns, counted, human_bytes, json_data, selected, titled, totals

TENSOR_CHECKS = ("missing", "unexpected", "misshapen", "mistyped")
MAX_METADATA = 60  # characters of an entry that is printed
EXPERT_TITLES = ("Excluded", "Smoothed", "Attention", "Origin")


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """Contents of a model on disk."""

    layout: Layout
    family: WanSpec | None
    """The row of `family.py` with these dimensions."""
    defaults: Defaults | None
    """None if the checkpoint is not a pipeline or its configs are damaged (see `problems`)."""
    parts: tuple[PartReport, ...]
    problems: tuple[AscenditError, ...]
    """All problems, including those of the parts."""
    runs_on: RunsOn | None = None
    """None if an expert could not be read as a Wan transformer, or there are problems."""
    record: dict[str, Any] | None = None
    """`ascendit.json`, if ascendit wrote the folder."""
    files: FileCheck | None = None
    """The comparison of the files with their record, with `check`."""

    @property
    def ok(self) -> bool:
        """Whether the weights can be used: no problem was detected."""
        return not self.problems

    @property
    def is_pipeline(self) -> bool:
        """Whether the checkpoint is a pipeline folder, not transformers only."""
        return self.layout.kind == "diffusers"

    @property
    def spec(self) -> str | None:
        """Name of the row of `family.py`."""
        return self.family.name if self.family else None

    @property
    def experts(self) -> tuple[PartReport, ...]:
        names = {part.name for part in self.layout.experts}
        return tuple(p for p in self.parts if p.name in names)

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per weight over all experts; None if no header could be read."""
        total = sum(p.values for p in self.experts)
        return 8 * sum(p.nbytes for p in self.experts) / total if total else None

    @property
    def limits(self) -> dict[str, Any]:
        """Limits and default values of requests."""
        if self.defaults is None:
            return {}
        d = self.defaults
        sizes = d.spec.sizes if d.spec else ((d.width, d.height),)
        return {
            **selected(d, "task", "frame_stride", "num_frames", "size_multiple", "fps"),
            **selected(d, "num_inference_steps", "flow_shift", "solver", "guidance_scale"),
            **selected(d, "guidance_scale_2", "boundary_ratio", "max_sequence_length"),
            **selected(d, "negative_prompt", "difference"),
            "presets": presets_of(d.spec),
            "sizes": [f"{w}x{h}" for w, h in sizes],
        }

    def as_dict(self, *, layers: bool = False) -> dict[str, Any]:
        """Plain data for `--json`. `layers`: include every layer and tensor."""
        data = {
            "name": self.layout.name,
            "ok": self.ok,
            "kind": self.layout.kind,
            "path": str(self.layout.root),
            "source": self.layout.source,
            "pipeline": self.layout.pipeline if self.is_pipeline else None,
            **selected(self, "spec", "bits_per_weight", "parts", "runs_on", "limits"),
            "ascendit": self.record,
            "check": json_data(self.files),
            "problems": json_data(self.problems),
        }
        if layers:
            data["layers"] = [{"part": p.name, **row.as_dict()} for p in self.parts for row in p.rows]
        return data

    def lines(self, width: int | None = None) -> list[str]:
        """Lines for a terminal: titled blocks in two columns. `width`: of the terminal."""
        contents = self.layout.pipeline if self.is_pipeline else KIND_LABELS[self.layout.kind]
        family = f"{self.spec} of the Wan family" if self.spec else "no known model of the Wan family"
        blocks = [
            ("Model", [f"{self.layout.name}   layout {self.layout.kind}   {contents}"]),
            ("Source", [self.layout.source or str(self.layout.root)]),
            ("Matches", [family]),
            ("Parts", _part_lines(self.parts)),
            ("Format", self._formats()),
            *((title, _per_expert(self.experts, title)) for title in EXPERT_TITLES),
            ("Metadata", _metadata_lines(self.parts)),
            ("Made by", self._made_by()),
            ("Runs on", self.runs_on.lines() if self.runs_on else []),
            ("Files", self.files.lines() if self.files else []),
        ]
        if self.defaults is not None:
            blocks += [("Limits", [_limits(self.defaults)]), ("Defaults", _defaults(self.defaults))]
        blocks.append(("Checks", self._checks()))
        for text, problem in zip(self.problem_texts(), self.problems, strict=True):
            blocks.append(("Problem", [text, f"try  {problem.fix}"]))
        return columns(titled(blocks), first_width=9, width=width)

    def problem_texts(self) -> list[str]:
        """Each problem as text: code, part and description."""
        owners = {id(p.problem): p.name for p in self.parts}
        texts = []
        for problem in self.problems:
            owner = owners.get(id(problem), "")
            prefix = f"{owner}: " if owner and owner not in problem.got else ""
            texts.append(f"{problem.code}  {prefix}{problem.got}")
        return texts

    def layer_lines(self, width: int | None = None) -> list[str]:
        """Lines for `--layers`: one per layer (with its scales) or other tensor, the experts first."""
        experts = {part.name for part in self.experts}
        rows = [
            (f"{p.name}.{row.name}", row.scheme, str(list(row.shape)), str(row.nbytes), row.stored())
            for p in sorted(self.parts, key=lambda part: part.name not in experts)
            for row in p.rows
        ]
        return columns([("layer or tensor", "scheme", "shape", "bytes", "stored"), *rows], width=width)

    def _made_by(self) -> list[str]:
        if self.record is None:
            return []
        recipe = self.record.get("recipe")
        name = recipe.get("name") if isinstance(recipe, dict) else None
        first = f"{self.record.get('made_by', 'ascendit')}{f', recipe {name}' if name else ''}"
        loras = self.record.get("loras")
        loras = [x for x in loras if isinstance(x, dict)] if isinstance(loras, list) else []
        return [first, *(f"LoRA {x.get('file')} at {x.get('weight')}, {x.get('expert')}" for x in loras)]

    def _formats(self) -> list[str]:
        if self.bits_per_weight is None:
            return []
        texts = _per_expert(self.experts, "Format")
        dtypes = "+".join(map(dtype_name, _most_first(p.dtypes for p in self.experts)))
        return [*texts, f"{dtypes}   {self.bits_per_weight:.2f} bits/weight{' in all' if texts else ''}"]

    def _checks(self) -> list[str]:
        counts = [_counts(self.parts)]
        counts += [f"{sum(len(getattr(p, check)) for p in self.parts)} {check}" for check in TENSOR_CHECKS]
        texts = [", ".join(counts) + ("   ok" if self.ok else "   NOT OK")]
        if self.ok and not self.is_pipeline:
            texts.append("not a complete pipeline: repack with --base MODEL to run it")
        return texts


def _per_expert(parts: Iterable[PartReport], title: str) -> list[str]:
    """Lines about each expert; printed once if all are equal."""
    by_expert = {p.name: p.summary.texts()[title] if p.summary else [] for p in parts}
    texts = list(by_expert.values())
    if all(t == texts[0] for t in texts):
        return list(texts[0]) if texts else []
    return [f"{name}: {line}" for name, lines in by_expert.items() for line in lines or ["-"]]


def _part_lines(parts: Iterable[PartReport]) -> list[str]:
    lines = []
    formats = {p.name: p.format for p in parts}
    width = max(12, *map(len, formats.values())) if formats else 0
    for p in parts:
        text = f"{p.name:<15} {p.class_name:<26}"
        if p.tensors:
            text += f" {formats[p.name]:<{width}} {human_bytes(p.nbytes):>10}  {_counts([p])}"
            text += f"  ({kinds_text(p.kinds)})" if p.kinds else ""
        lines.append(text + ("  DAMAGED" if p.problem else ""))
    return lines


def _metadata_lines(parts: Iterable[PartReport]) -> list[str]:
    """One line per GGUF file: its short entries."""
    lines = []
    for p in parts:
        entries = [(key, str(value)) for key, value in p.metadata.items()]
        if texts := [f"{key} {value}" for key, value in entries if len(value) <= MAX_METADATA]:
            lines.append(f"{p.name} (GGUF): {', '.join(texts)}")
    return lines


def _counts(parts: Iterable[PartReport]) -> str:
    parts = tuple(parts)
    tensors, files = sum(len(p.tensors) for p in parts), sum(p.files for p in parts)
    return f"{tensors} tensors in {counted(files, 'file')}"


def _limits(d: Defaults) -> str:
    text = (
        f"frames {d.frame_stride}n+1, size multiple of {d.size_multiple}, {d.max_sequence_length} text tokens"
    )
    return text + (f", sizes {' '.join(f'{w}x{h}' for w, h in d.spec.sizes)}" if d.spec else "")


def _defaults(d: Defaults) -> list[str]:
    """Default values, then lines about the negative prompt, presets and the folder's own values, if any."""
    guidance = f"guidance {d.guidance_scale:g}"
    if d.guidance_scale_2 is not None:
        guidance += f" (high noise) / {d.guidance_scale_2:g} (low noise)"
    values = [f"{d.width}x{d.height}", f"{d.num_frames} frames", f"{d.fps} fps"]
    values.append(f"{d.num_inference_steps} steps")
    values += [guidance, f"shift {d.shift_for(d.width, d.height):g}", d.solver]
    values += [f"boundary {d.boundary_ratio:g}"] if d.boundary_ratio is not None else []
    if d.num_experts == 2 and d.boundary_ratio is None:
        values.append("no boundary: --set boundary_ratio=0.875")
    lines = [", ".join(values)]
    lines += [f"negative prompt {d.negative_prompt}"] if d.negative_prompt else []
    presets = presets_of(d.spec)
    lines += [f"presets for distilled weights: {', '.join(presets)}"] if presets else []
    return lines + ([d.difference] if d.difference else [])


def _most_first(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums by key, largest first."""
    return dict(sorted(totals(counts).items(), key=lambda item: -item[1]))


# ---- parts --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """Contents of one part of a model: transformer, VAE, text encoder, ..."""

    name: str
    library: str
    class_name: str
    named: Mapping[str, TensorInfo] = field(default_factory=dict)
    """Name in the library -> tensor; stored names for a transformer, whose other names are in `expert`."""
    files: int = 0
    missing: tuple[str, ...] = ()
    """Tensors that the class needs and the files lack. This field and the next three: experts only."""
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    """`name [actual], not [expected]`; shapes of quantized weights are decoded shapes."""
    mistyped: tuple[str, ...] = ()
    """`name dtype`, for tensors of unquantized layers whose dtype is not a float."""
    problem: AscenditError | None = None
    """The error that makes the part unusable."""
    metadata: Mapping[str, Value] = field(default_factory=dict)
    """The general metadata of its GGUF file."""
    kinds: tuple[str, ...] = ()
    """The kinds of its files, keys of `kind_table.KINDS`; of an expert, in `expert`."""
    expert: Expert | None = None
    """The transformer by Diffusers names; None for other parts, and if it could not be read."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """All tensors; a stored one that is several in the library is there several times."""
        return tuple(self.named.values())

    @cached_property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def summary(self) -> ExpertSummary | None:
        return ExpertSummary(self.expert) if self.expert is not None else None

    @property
    def values(self) -> int:
        """Number of decoded values."""
        if self.summary is not None:
            return self.summary.values
        return sum(math.prod(t.shape) for t in self.tensors)

    @cached_property
    def dtypes(self) -> dict[str, int]:
        """safetensors' dtype name -> bytes, most first."""
        return _most_first({t.stored_dtype: t.nbytes} for t in self.tensors)

    @property
    def rows(self) -> tuple[StoredRow, ...]:
        """One row per linear layer with a scheme and per other tensor."""
        if self.summary is not None:
            return self.summary.rows
        return tuple(tensor_row(name, t) for name, t in self.named.items())

    @cached_property
    def format(self) -> str:
        """`mxfp8+bf16`, `bf16+fp32`: schemes and float dtypes, most bytes first."""
        return "+".join(_most_first({row.format: row.nbytes} for row in self.rows))

    def as_dict(self) -> dict[str, Any]:
        return {
            **selected(self, "name", "library", "class_name", "files", "nbytes", "dtypes", "format"),
            "tensors": len(self.tensors),
            "metadata": dict(self.metadata),
            "stored_as": list(self.expert.kinds if self.expert else self.kinds),
            **selected(self, *TENSOR_CHECKS),
            "problem": json_data(self.problem),
            "expert": json_data(self.summary),
        }
