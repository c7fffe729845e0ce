"""What `inspect` found in one part of a model, and how an expert is told in words. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ascendit.checkpoint.expert import Expert
from ascendit.checkpoint.store import TensorInfo
from ascendit.errors import AscenditError
from ascendit.pipeline.expert_report import Row, Summary, spelled, tensor_row

CHECKS = ("missing", "unexpected", "misshapen", "mistyped")
ORIGINS = {
    "msmodelslim": "msModelSlim",
    "vllm-omni": "the merge tool of vLLM-Omni",
    "sglang": "the repack tool of SGLang",
    "ascendit": "ascendit",
    "fp8-block": "FP8 in 128 x 128 tiles",
    "float": "",
}


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
    def summary(self) -> Summary | None:
        return Summary(self.expert) if self.expert is not None else None

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
    def rows(self) -> tuple[Row, ...]:
        """One for each layer of codes and each other tensor."""
        if self.summary is not None:
            return self.summary.rows
        return tuple(tensor_row(t.name, t) for t in self.tensors)

    @cached_property
    def format(self) -> str:
        """`mxfp8+bf16`, `bf16+fp32`: schemes and float dtypes, those with most bytes first."""
        totals: dict[str, int] = {}
        for row in self.rows:
            word = spelled(row.tensors[0][1].dtype) if row.scheme in ("float", "bf16") else row.scheme
            totals[word] = totals.get(word, 0) + row.nbytes
        return "+".join(sorted(totals, key=lambda word: -totals[word]))

    def as_dict(self) -> dict[str, Any]:
        names = ("name", "library", "class_name", "files", "nbytes", "dtypes", "format")
        return {
            **{name: getattr(self, name) for name in names},
            "tensors": len(self.tensors),
            **{name: list(getattr(self, name)) for name in CHECKS},
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
