"""What a model folder holds, and whether it is whole. Headers and configs only; torch is not imported."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendit.checkpoint.layout import EXPERTS, Layout, Part, recognise
from ascendit.checkpoint.names import TOLERATED, expected_tensors
from ascendit.checkpoint.store import Shards, TensorInfo, listed
from ascendit.errors import AscenditError, CheckpointError
from ascendit.pipeline.defaults import defaults_for
from ascendit.pipeline.request import Defaults

FLOATS = ("BF16", "F16", "F32", "F64")
"""What the weights of an expert can be stored in."""
NEEDED = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
NEEDED_FOR_IMAGE_TOKENS = ("image_encoder", "image_processor")
_SPELLING = {
    "BF16": "bf16",
    "F16": "fp16",
    "F32": "fp32",
    "F64": "fp64",
    "F8_E4M3": "e4m3",
    "F8_E5M2": "e5m2",
}


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """One part of the pipeline."""

    name: str
    library: str
    class_name: str
    tensors: tuple[TensorInfo, ...] = ()
    files: int = 0
    missing: tuple[str, ...] = ()
    """Names the class needs and the files lack. Checked for the experts, as are the next three."""
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    """`name [found], not [needed]`."""
    mistyped: tuple[str, ...] = ()
    """`name dtype`, where the dtype is none of FLOATS."""
    problem: AscenditError | None = None
    """Why the part cannot be used."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def values(self) -> int:
        """Number of weights."""
        return sum(math.prod(t.shape) for t in self.tensors)

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes in each dtype (safetensors spelling), most first."""
        totals: dict[str, int] = {}
        for tensor in self.tensors:
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def as_dict(self) -> dict[str, Any]:
        names = ("name", "library", "class_name", "files", "nbytes", "dtypes")
        checks = ("missing", "unexpected", "misshapen", "mistyped")
        return {
            **{name: getattr(self, name) for name in names},
            "tensors": len(self.tensors),
            **{name: list(getattr(self, name)) for name in checks},
            "problem": self.problem.as_dict() if self.problem else None,
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """A model folder. `ok` says that nothing was found that would stop it from running."""

    layout: Layout
    defaults: Defaults | None
    """None when the configs are so damaged that there are none; `problems` says why."""
    parts: tuple[PartReport, ...]
    problems: tuple[AscenditError, ...]
    """All of them, those of the parts too."""

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def spec(self) -> str | None:
        """The row of the Wan family that has this shape."""
        return self.defaults.spec.name if self.defaults and self.defaults.spec else None

    @property
    def bits_per_weight(self) -> float | None:
        """Over the experts; None when no header of theirs could be read."""
        experts = [p for p in self.parts if p.name in EXPERTS]
        values = sum(p.values for p in experts)
        return 8 * sum(p.nbytes for p in experts) / values if values else None

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

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: plain data."""
        return {
            "name": self.layout.name,
            "ok": self.ok,
            "kind": self.layout.kind,
            "path": str(self.layout.root),
            "source": self.layout.source,
            "pipeline": self.layout.pipeline,
            "spec": self.spec,
            "bits_per_weight": self.bits_per_weight,
            "parts": [p.as_dict() for p in self.parts],
            "limits": self.limits,
            "problems": [p.as_dict() for p in self.problems],
        }

    def lines(self) -> list[str]:
        """For a terminal: titled blocks in two columns."""
        layout = self.layout
        rows = [("Model", f"{layout.name}   layout {layout.kind}   {layout.pipeline}")]
        rows.append(("Source", layout.source or str(layout.root)))
        family = f"{self.spec} of the Wan family" if self.spec else "no row of the Wan family has this shape"
        rows.append(("Matches", family))
        rows += zip(["Parts"] + [""] * len(self.parts), _part_lines(self.parts), strict=False)
        if (bits := self.bits_per_weight) is not None:
            rows.append(("Format", f"{_dtypes(self._experts())}   {bits:.2f} bits/weight"))
        if self.defaults is not None:
            rows += [("Limits", _limits(self.defaults)), ("Defaults", _defaults(self.defaults))]
        rows.append(("Checks", self._checks()))
        rows += [("Problem", f"{p.code}  {p.got}") for p in self.problems]
        return [f"{title:<9}  {text}".rstrip() for title, text in rows]

    def layer_lines(self) -> list[str]:
        """For `--layers`: every tensor with its shape, dtype and bytes, in the order on disk."""
        rows = [(p.name, t) for p in self.parts for t in p.tensors]
        width = max((len(p) + 1 + len(t.name) for p, t in rows), default=0)
        return [
            f"{f'{part}.{t.name}':<{width}}  {_dtype(t.dtype):<5} {t.nbytes:>12}  {list(t.shape)}"
            for part, t in rows
        ]

    def _experts(self) -> list[PartReport]:
        return [p for p in self.parts if p.name in EXPERTS]

    def _checks(self) -> str:
        counts = [_counts(self.parts)]
        for check in ("missing", "unexpected", "misshapen", "mistyped"):
            counts.append(f"{sum(len(getattr(p, check)) for p in self.parts)} {check}")
        return ", ".join(counts) + ("   ok" if self.ok else "   NOT OK")


def inspect_folder(path: Path | str) -> Report:
    """Read the configs and headers of a folder.

    What is wrong inside a recognised folder stands in the report; a folder that is not recognised
    raises, as in `recognise`.
    """
    layout = recognise(path)
    problems: list[AscenditError] = []
    image_tokens = layout.experts[0].config.get("image_dim") is not None
    for name in NEEDED + (NEEDED_FOR_IMAGE_TOKENS if image_tokens else ()):
        try:
            layout.part(name)
        except CheckpointError as e:
            problems.append(e)
    parts = tuple(_inspect_part(part) for part in layout.parts.values())
    problems += [p.problem for p in parts if p.problem is not None]
    try:
        defaults = defaults_for(layout) if "vae" in layout.parts else None
    except (AscenditError, TypeError, ValueError, LookupError, AttributeError) as e:
        defaults = None
        problems.append(e if isinstance(e, AscenditError) else _bad_config(layout, e))
    return Report(layout=layout, defaults=defaults, parts=parts, problems=tuple(problems))


def _inspect_part(part: Part) -> PartReport:
    named: dict[str, Any] = {"name": part.name, "library": part.library, "class_name": part.class_name}
    if not part.has_weights:
        return PartReport(**named)
    try:
        with Shards.open(part.path, part.stem) as shards:
            named["tensors"] = tuple(info for _, infos in shards.by_file() for info in infos)
            named["files"] = len(shards.files)
        checks: dict[str, Any] = compare(part.config, shards.tensors) if part.name in EXPERTS else {}
    except AscenditError as e:
        return PartReport(**named, problem=e)
    return PartReport(**named, **checks, problem=_incomplete(part, checks))


def compare(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> dict[str, tuple[str, ...]]:
    """What a WanTransformer3DModel with this config lacks among `tensors`, and what it cannot use.

    Keys: missing, unexpected, misshapen, mistyped. Raises CheckpointError E-CKP-06 for a config
    that describes no model.
    """
    expected = expected_tensors(config)
    both = [info for name, info in tensors.items() if name in expected]
    extra = [n for n in tensors if n not in expected and not any(part in n for part in TOLERATED)]
    return {
        "missing": tuple(name for name in expected if name not in tensors),
        "unexpected": tuple(extra),
        "misshapen": tuple(
            f"{t.name} {list(t.shape)}, not {list(expected[t.name])}"
            for t in both
            if t.shape != expected[t.name]
        ),
        "mistyped": tuple(f"{t.name} {t.dtype}" for t in both if t.dtype not in FLOATS),
    }


def _incomplete(part: Part, checks: dict[str, tuple[str, ...]]) -> CheckpointError | None:
    wrong = [f"{len(names)} {check} ({listed(names)})" for check, names in checks.items() if names]
    if not wrong:
        return None
    return CheckpointError(
        f"{part.name} does not fit its config.json: {'; '.join(wrong)}",
        needs=f"exactly the tensors of a {part.class_name} with this config",
        fix="download the weights and config.json again, both from the same revision",
        code="E-CKP-04",
    )


def _bad_config(layout: Layout, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"a config of {layout.root} holds a value of the wrong kind: {error}",
        needs="configs as the model's authors wrote them",
        fix="download the JSON files again",
        code="E-CKP-06",
    )


def _part_lines(parts: Iterable[PartReport]) -> list[str]:
    lines = []
    for p in parts:
        text = f"{p.name:<15} {p.class_name:<26}"
        if p.tensors:
            text += f" {_dtypes([p]):<12} {human_bytes(p.nbytes):>10}  {_counts([p])}"
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
    return "+".join(_dtype(d) for d in sorted(totals, key=lambda d: -totals[d]))


def _dtype(name: str) -> str:
    return _SPELLING.get(name, name.lower())


def human_bytes(nbytes: int) -> str:
    """`10.6 GiB`, `14.1 MiB`, `512 B`."""
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << exponent:
            return f"{nbytes / (1 << exponent):.1f} {unit}"
    return f"{nbytes} B"
