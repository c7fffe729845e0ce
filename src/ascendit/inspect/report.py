"""What `inspect` found: plain data, as lines for a terminal and as a dict for `--json`. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ascendit.checkpoint.layout import WORDS, Layout
from ascendit.checkpoint.reader import TensorInfo
from ascendit.checkpoint.transformer import Expert
from ascendit.convert.report import human_bytes
from ascendit.errors import AscenditError
from ascendit.family import WanSpec
from ascendit.inspect.engines import RunsOn
from ascendit.inspect.transformer_report import ExpertSummary, StoredRow, dtype_name, tensor_row
from ascendit.pipeline.defaults import Defaults

TENSOR_CHECKS = ("missing", "unexpected", "misshapen", "mistyped")
ORIGINS = {
    "msmodelslim": "msModelSlim",
    "vllm-omni": "the merge tool of vLLM-Omni",
    "sglang": "the repack tool of SGLang",
    "ascendit": "ascendit",
    "fp8-block": "FP8 in 128 x 128 tiles",
    "float": "",
}


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
        names = "task frame_stride num_frames size_multiple fps num_inference_steps flow_shift solver".split()
        names += ["guidance_scale", "guidance_scale_2", "boundary_ratio", "max_sequence_length"]
        sizes = d.spec.sizes if d.spec else ((d.width, d.height),)
        return {**{name: getattr(d, name) for name in names}, "sizes": [f"{w}x{h}" for w, h in sizes]}

    def as_dict(self, *, layers: bool = False) -> dict[str, Any]:
        """For `--json`: plain data. `layers`: every layer and tensor too."""
        data = {
            "name": self.layout.name,
            "ok": self.ok,
            "kind": self.layout.kind,
            "path": str(self.layout.root),
            "source": self.layout.source,
            "pipeline": self.layout.pipeline if self.is_pipeline else None,
            "spec": self.spec,
            "bits_per_weight": self.bits_per_weight,
            "parts": [p.as_dict() for p in self.parts],
            "runs_on": self.runs_on.as_dict() if self.runs_on else None,
            "limits": self.limits,
            "ascendit": self.record,
            "problems": [p.as_dict() for p in self.problems],
        }
        if layers:
            data["layers"] = [{"part": p.name, **row.as_dict()} for p in self.parts for row in p.rows]
        return data

    def lines(self) -> list[str]:
        """For a terminal: titled blocks in two columns."""
        blocks = [("Model", [self._model()]), ("Source", [self.layout.source or str(self.layout.root)])]
        shape = f"{self.spec} of the Wan family" if self.spec else "no row of the Wan family has this shape"
        blocks += [("Matches", [shape]), ("Parts", _part_lines(self.parts))]
        blocks += [("Format", self._formats())]
        blocks += [(title, _per_expert(self.experts, words)) for title, words in EXPERT_ROWS]
        blocks += [("Made by", self._made_by())]
        blocks += [("Runs on", self.runs_on.lines() if self.runs_on else [])]
        if self.defaults is not None:
            blocks += [("Limits", [_limits(self.defaults)]), ("Defaults", [_defaults(self.defaults)])]
        blocks += [("Checks", self._checks())]
        blocks += [("Problem", [text]) for text in self.problem_texts()]
        return [
            f"{title if first else '':<9}  {text}".rstrip()
            for title, texts in blocks
            for first, text in zip([True] + [False] * len(texts), texts, strict=False)
        ]

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
        cells = [
            (f"{p.name}.{row.name}", row.scheme, str(list(row.shape)), str(row.nbytes), row.stored())
            for p in self.parts
            for row in p.rows
        ]
        cells.insert(0, ("layer or tensor", "scheme", "shape", "bytes", "stored"))
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        return [
            "  ".join([*(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)), row[4]]) for row in cells
        ]

    def _model(self) -> str:
        end = self.layout.pipeline if self.is_pipeline else WORDS[self.layout.kind]
        return f"{self.layout.name}   layout {self.layout.kind}   {end}"

    def _made_by(self) -> list[str]:
        if self.record is None:
            return []
        recipe = self.record.get("recipe")
        name = recipe.get("name") if isinstance(recipe, dict) else None
        return [f"{self.record.get('made_by', 'ascendit')}{f', recipe {name}' if name else ''}"]

    def _formats(self) -> list[str]:
        if self.bits_per_weight is None:
            return []
        texts = _per_expert(self.experts, scheme_texts)
        bits = f"{self.bits_per_weight:.2f} bits/weight"
        return [*texts, f"{_dtypes(self.experts)}   {bits}{' in all' if texts else ''}"]

    def _checks(self) -> list[str]:
        counts = [_counts(self.parts)]
        counts += [f"{sum(len(getattr(p, check)) for p in self.parts)} {check}" for check in TENSOR_CHECKS]
        texts = [", ".join(counts) + ("   ok" if self.ok else "   NOT OK")]
        if self.ok and not self.is_pipeline:
            texts.append("not a complete pipeline: repack with --base MODEL to run it")
        return texts


def _per_expert(parts: Iterable[PartReport], words: Callable[[PartReport], list[str]]) -> list[str]:
    """Lines about each expert; said once when all are alike."""
    found = {p.name: words(p) for p in parts}
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
    return f"{tensors} tensors in {files} file{'' if files == 1 else 's'}"


def _limits(d: Defaults) -> str:
    text = (
        f"frames {d.frame_stride}n+1, size multiple of {d.size_multiple}, {d.max_sequence_length} text tokens"
    )
    return text + (f", sizes {' '.join(f'{w}x{h}' for w, h in d.spec.sizes)}" if d.spec else "")


def _defaults(d: Defaults) -> str:
    guidance = f"guidance {d.guidance_scale:g}"
    if d.guidance_scale_2 is not None:
        guidance += f" (high noise) / {d.guidance_scale_2:g} (low noise)"
    words = [
        f"{d.width}x{d.height}",
        f"{d.num_frames} frames",
        f"{d.fps} fps",
        f"{d.num_inference_steps} steps",
    ]
    words += [guidance, f"shift {d.shift_for(d.width, d.height):g}", d.solver]
    words += [f"boundary {d.boundary_ratio:g}"] if d.boundary_ratio is not None else []
    return ", ".join(words)


def _dtypes(parts: Iterable[PartReport]) -> str:
    totals: dict[str, int] = {}
    for part in parts:
        for dtype, nbytes in part.dtypes.items():
            totals[dtype] = totals.get(dtype, 0) + nbytes
    return "+".join(dtype_name(d) for d in sorted(totals, key=lambda d: -totals[d]))


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
        totals: dict[str, int] = {}
        for tensor in self.tensors:
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    @property
    def rows(self) -> tuple[StoredRow, ...]:
        """One for each layer of codes and each other tensor."""
        if self.summary is not None:
            return self.summary.rows
        return tuple(tensor_row(t.name, t) for t in self.tensors)

    @cached_property
    def format(self) -> str:
        """`mxfp8+bf16`, `bf16+fp32`: schemes and float dtypes, those with most bytes first."""
        totals: dict[str, int] = {}
        for row in self.rows:
            word = dtype_name(row.tensors[0][1].dtype) if row.scheme in ("float", "bf16") else row.scheme
            totals[word] = totals.get(word, 0) + row.nbytes
        return "+".join(sorted(totals, key=lambda word: -totals[word]))

    def as_dict(self) -> dict[str, Any]:
        names = ("name", "library", "class_name", "files", "nbytes", "dtypes", "format")
        return {
            **{name: getattr(self, name) for name in names},
            "tensors": len(self.tensors),
            **{name: list(getattr(self, name)) for name in TENSOR_CHECKS},
            "problem": self.problem.as_dict() if self.problem else None,
            "expert": self.summary.as_dict() if self.summary else None,
        }


def scheme_texts(part: PartReport) -> list[str]:
    return [count.text() for count in part.summary.schemes] if part.summary else []


def _kept(part: PartReport) -> list[str]:
    if part.summary is None or not part.summary.is_quantized or not part.summary.kept:
        return []
    return [f"{'+'.join(part.summary.kept_dtypes)}: {', '.join(part.summary.kept)}"]


def _smoothed(part: PartReport) -> list[str]:
    words = part.summary.smoothed if part.summary else ()
    return [f"{', '.join(words)} (mul_scale)"] if words else []


def _attention(part: PartReport) -> list[str]:
    if part.summary is None:
        return []
    texts = [f"{value}: {', '.join(names)}" for value, names in part.summary.attention.items()]
    rotated = part.summary.rotated
    return [*texts, f"rotated: {', '.join(rotated)}"] if rotated else texts


def _origin(part: PartReport) -> list[str]:
    expert = part.expert
    if expert is None or (expert.origin == "float" and expert.naming == "diffusers"):
        return []
    words = [ORIGINS[expert.origin]] if ORIGINS[expert.origin] else []
    words.append("original Wan names" if expert.naming == "wan" else "Diffusers names")
    words += ["manifest"] if expert.manifest is not None else []
    words += ["quantization_config"] if expert.marker is not None else []
    texts = [", ".join(words)]
    return [*texts, f"unsure: {expert.config_problem}"] if expert.config_problem else texts


EXPERT_ROWS = (("Kept", _kept), ("Smoothed", _smoothed), ("Attention", _attention), ("Origin", _origin))
