"""What `inspect` found: plain data, as lines for a terminal and as a dict for `--json`. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ascendit.checkpoint.layout import WORDS, Layout
from ascendit.checkpoint.reader import TensorInfo
from ascendit.checkpoint.transformer import Expert
from ascendit.errors import AscenditError
from ascendit.family import WanSpec
from ascendit.inspect.engines import RunsOn
from ascendit.inspect.transformer_report import ExpertSummary, StoredRow, dtype_name, tensor_row
from ascendit.pipeline.defaults import Defaults
from ascendit.report import columns, counted, human_bytes, json_data, selected, titled, totals

TENSOR_CHECKS = ("missing", "unexpected", "misshapen", "mistyped")
EXPERT_TITLES = ("Kept", "Smoothed", "Attention", "Origin")


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """A model on disk. `ok` says that nothing was found that would stop its weights from being used."""

    layout: Layout
    family: WanSpec | None
    """The row of the Wan family that has this shape."""
    defaults: Defaults | None
    """None where there is no pipeline, or its configs are so damaged that there are none (see `problems`)."""
    parts: tuple[PartReport, ...]
    problems: tuple[AscenditError, ...]
    """All of them, those of the parts too."""
    runs_on: RunsOn | None = None
    """None when an expert could not be understood."""
    record: dict[str, Any] | None = None
    """`ascendit.json`, where ascendit wrote the folder."""

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def is_pipeline(self) -> bool:
        """Whether text encoder, VAE and the other parts are here too, not the transformers alone."""
        return self.layout.kind == "diffusers"

    @property
    def spec(self) -> str | None:
        """Name of the row of the Wan family."""
        return self.family.name if self.family else None

    @property
    def experts(self) -> tuple[PartReport, ...]:
        names = {part.name for part in self.layout.experts}
        return tuple(p for p in self.parts if p.name in names)

    @property
    def bits_per_weight(self) -> float | None:
        """Over the experts; None when no header of theirs could be read."""
        total = sum(p.values for p in self.experts)
        return 8 * sum(p.nbytes for p in self.experts) / total if total else None

    @property
    def limits(self) -> dict[str, Any]:
        """What can be asked of the model, and what it runs with when nothing is asked."""
        if self.defaults is None:
            return {}
        d = self.defaults
        sizes = d.spec.sizes if d.spec else ((d.width, d.height),)
        return {
            **selected(d, "task", "frame_stride", "num_frames", "size_multiple", "fps"),
            **selected(d, "num_inference_steps", "flow_shift", "solver", "guidance_scale"),
            **selected(d, "guidance_scale_2", "boundary_ratio", "max_sequence_length"),
            "sizes": [f"{w}x{h}" for w, h in sizes],
        }

    def as_dict(self, *, layers: bool = False) -> dict[str, Any]:
        """For `--json`: plain data. `layers`: every layer and tensor too."""
        data = {
            "name": self.layout.name,
            "ok": self.ok,
            "kind": self.layout.kind,
            "path": str(self.layout.root),
            "source": self.layout.source,
            "pipeline": self.layout.pipeline if self.is_pipeline else None,
            **selected(self, "spec", "bits_per_weight", "parts", "runs_on", "limits"),
            "ascendit": self.record,
            "problems": json_data(self.problems),
        }
        if layers:
            data["layers"] = [{"part": p.name, **row.as_dict()} for p in self.parts for row in p.rows]
        return data

    def lines(self) -> list[str]:
        """For a terminal: titled blocks in two columns."""
        end = self.layout.pipeline if self.is_pipeline else WORDS[self.layout.kind]
        shape = f"{self.spec} of the Wan family" if self.spec else "no row of the Wan family has this shape"
        blocks = [
            ("Model", [f"{self.layout.name}   layout {self.layout.kind}   {end}"]),
            ("Source", [self.layout.source or str(self.layout.root)]),
            ("Matches", [shape]),
            ("Parts", _part_lines(self.parts)),
            ("Format", self._formats()),
            *((title, _per_expert(self.experts, title)) for title in EXPERT_TITLES),
            ("Made by", self._made_by()),
            ("Runs on", self.runs_on.lines() if self.runs_on else []),
        ]
        if self.defaults is not None:
            blocks += [("Limits", [_limits(self.defaults)]), ("Defaults", [_defaults(self.defaults)])]
        blocks += [("Checks", self._checks()), *(("Problem", [text]) for text in self.problem_texts())]
        return columns(titled(blocks), first_width=9)

    def problem_texts(self) -> list[str]:
        """Code, part and what was found."""
        owners = {id(p.problem): p.name for p in self.parts}
        texts = []
        for problem in self.problems:
            owner = owners.get(id(problem), "")
            said = f"{owner}: " if owner and owner not in problem.got else ""
            texts.append(f"{problem.code}  {said}{problem.got}")
        return texts

    def layer_lines(self) -> list[str]:
        """For `--layers`: part and name, scheme, shape, bytes and what is stored; a layer with its scales."""
        rows = [
            (f"{p.name}.{row.name}", row.scheme, str(list(row.shape)), str(row.nbytes), row.stored())
            for p in self.parts
            for row in p.rows
        ]
        return columns([("layer or tensor", "scheme", "shape", "bytes", "stored"), *rows])

    def _made_by(self) -> list[str]:
        if self.record is None:
            return []
        recipe = self.record.get("recipe")
        name = recipe.get("name") if isinstance(recipe, dict) else None
        return [f"{self.record.get('made_by', 'ascendit')}{f', recipe {name}' if name else ''}"]

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
    """Lines about each expert; said once when all are alike."""
    found = {p.name: p.summary.texts()[title] if p.summary else [] for p in parts}
    texts = list(found.values())
    if all(t == texts[0] for t in texts):
        return list(texts[0]) if texts else []
    return [f"{name}: {line}" for name, lines in found.items() for line in lines or ["-"]]


def _part_lines(parts: Iterable[PartReport]) -> list[str]:
    lines = []
    formats = {p.name: p.format for p in parts}
    width = max(12, *map(len, formats.values())) if formats else 0
    for p in parts:
        text = f"{p.name:<15} {p.class_name:<26}"
        if p.tensors:
            text += f" {formats[p.name]:<{width}} {human_bytes(p.nbytes):>10}  {_counts([p])}"
        lines.append(text + ("  DAMAGED" if p.problem else ""))
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


def _defaults(d: Defaults) -> str:
    guidance = f"guidance {d.guidance_scale:g}"
    if d.guidance_scale_2 is not None:
        guidance += f" (high noise) / {d.guidance_scale_2:g} (low noise)"
    words = [f"{d.width}x{d.height}", f"{d.num_frames} frames", f"{d.fps} fps"]
    words.append(f"{d.num_inference_steps} steps")
    words += [guidance, f"shift {d.shift_for(d.width, d.height):g}", d.solver]
    words += [f"boundary {d.boundary_ratio:g}"] if d.boundary_ratio is not None else []
    return ", ".join(words)


def _most_first(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums by key, the largest first."""
    return dict(sorted(totals(counts).items(), key=lambda item: -item[1]))


# ---- one part of a model ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """One part of the model."""

    name: str
    library: str
    class_name: str
    tensors: tuple[TensorInfo, ...] = ()
    files: int = 0
    missing: tuple[str, ...] = ()
    """Names the class needs and the files lack. Checked for the experts, as are the next three."""
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    """`name [found], not [needed]`; the shape of a quantized weight is that of its numbers."""
    mistyped: tuple[str, ...] = ()
    """`name dtype`, where the dtype is no float and the layer is not quantized."""
    problem: AscenditError | None = None
    """Why the part cannot be used."""
    expert: Expert | None = None
    """The transformer under Diffusers names; None for other parts, and where it cannot be understood."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @cached_property
    def summary(self) -> ExpertSummary | None:
        return ExpertSummary(self.expert) if self.expert is not None else None

    @property
    def values(self) -> int:
        """Number of weights."""
        if self.summary is not None:
            return self.summary.values
        return sum(math.prod(t.shape) for t in self.tensors)

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes in each dtype (safetensors spelling), most first."""
        return _most_first({t.dtype: t.nbytes} for t in self.tensors)

    @property
    def rows(self) -> tuple[StoredRow, ...]:
        """One for each layer of codes and each other tensor."""
        if self.summary is not None:
            return self.summary.rows
        return tuple(tensor_row(t.name, t) for t in self.tensors)

    @cached_property
    def format(self) -> str:
        """`mxfp8+bf16`, `bf16+fp32`: schemes and float dtypes, those with most bytes first."""
        return "+".join(_most_first({row.format: row.nbytes} for row in self.rows))

    def as_dict(self) -> dict[str, Any]:
        return {
            **selected(self, "name", "library", "class_name", "files", "nbytes", "dtypes", "format"),
            "tensors": len(self.tensors),
            **selected(self, *TENSOR_CHECKS),
            "problem": json_data(self.problem),
            "expert": json_data(self.summary),
        }
