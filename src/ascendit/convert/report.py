"""What `quantize` and `repack` say about a run: plain data, for a terminal and for `--json`. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# ---- quantize -----------------------------------------------------------------------------------

WORST = 10


@dataclass(frozen=True, kw_only=True)
class OutputQuality:
    """Signal to noise in dB of a layer's output on captured tokens: weight and tokens quantized."""

    plain: float
    smoothed: float


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """`OutputQuality` of the layers of one expert."""

    layers: Mapping[str, OutputQuality] = field(default_factory=dict)

    @property
    def mean(self) -> OutputQuality:
        """Over all layers, of the dB."""
        return _mean(list(self.layers.values()))

    @property
    def kinds(self) -> dict[str, OutputQuality]:
        """Place in a block (`attn1.to_q`) -> mean over all blocks."""
        every = dict.fromkeys(kind_of(name) for name in self.layers)
        return {k: _mean([q for n, q in self.layers.items() if kind_of(n) == k]) for k in every}

    def rows(self, worst: int) -> list[tuple[str, OutputQuality]]:
        """For a table: the `worst` smoothed layers, the mean of each kind, the mean of all."""
        found = sorted(self.layers.items(), key=lambda item: item[1].smoothed)[:worst]
        found += [(f"mean of {kind}", quality) for kind, quality in self.kinds.items()]
        return [*found, ("mean", self.mean)]


@dataclass(frozen=True, kw_only=True)
class QuantizedExpert:
    """One transformer."""

    name: str
    schemes: Mapping[str, int]
    """Scheme -> number of linear layers; bf16 last."""
    kept: Mapping[str, tuple[str, ...]]
    """Why -> layers that stayed as they were, in few words (`blocks.0-4`)."""
    bytes_before: int
    bytes_after: int
    num_weights: int
    sqnr: Mapping[str, float] = field(default_factory=dict)
    """Layer -> signal to quantization noise in dB; empty without `report`."""
    outputs: Outputs = field(default_factory=Outputs)
    """The same of what comes out of smoothed layers, and would without smoothing; from a calibration."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of all stored tensors, scales included, over the parameters of the source."""
        return 8 * self.bytes_after / max(self.num_weights, 1)

    @property
    def worst(self) -> list[tuple[str, float]]:
        """The ten layers with the least SQNR, the worst first."""
        return sorted(self.sqnr.items(), key=lambda item: item[1])[:WORST]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        data: dict[str, Any] = {
            "name": self.name,
            "layers": dict(self.schemes),
            "kept": {why: list(layers) for why, layers in self.kept.items()},
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": round(self.bits_per_weight, 3),
        }
        if self.sqnr:
            data["sqnr_db"] = {layer: round(value, 2) for layer, value in self.sqnr.items()}
            data["worst"] = [layer for layer, _ in self.worst]
        if self.outputs.layers:
            data["output_sqnr_db"] = {name: _rounded(q) for name, q in self.outputs.layers.items()}
            data["output_sqnr_db_mean"] = _rounded(self.outputs.mean)
        return data


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """The whole run."""

    path: Path
    """The folder that was written, or would be."""
    source: str
    recipe: str
    model_kind: str
    experts: tuple[QuantizedExpert, ...]
    dry_run: bool
    seconds: float
    linked: tuple[str, ...] = ()
    """Other components and files that were linked or copied."""
    loras: tuple[Mapping[str, Any], ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """How the inputs were captured that the smoothing is from: alpha, prompts, steps."""
    engine: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def schemes(self) -> dict[str, int]:
        """Scheme -> number of linear layers in all experts."""
        return add_up(expert.schemes for expert in self.experts)

    @property
    def bytes_before(self) -> int:
        """Bytes of the experts' tensors in the source."""
        return sum(expert.bytes_before for expert in self.experts)

    @property
    def bytes_after(self) -> int:
        """Bytes of the experts' tensors as written."""
        return sum(expert.bytes_after for expert in self.experts)

    @property
    def bits_per_weight(self) -> float:
        """As in QuantizedExpert, over all experts."""
        return 8 * self.bytes_after / max(sum(expert.num_weights for expert in self.experts), 1)

    @property
    def gib_per_s(self) -> float:
        """Source bytes per second, 0 for a dry run."""
        return 0.0 if self.dry_run else self.bytes_before / 2**30 / max(self.seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": str(self.path),
            "source": self.source,
            "recipe": self.recipe,
            "model_kind": self.model_kind,
            "dry_run": self.dry_run,
            "engine": self.engine,
            "layers": self.schemes,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "seconds": round(self.seconds, 3),
            "gib_per_s": round(self.gib_per_s, 3),
            "experts": [expert.as_dict() for expert in self.experts],
            "linked": list(self.linked),
            "loras": [dict(lora) for lora in self.loras],
            "calibration": dict(self.calibration),
            "warnings": list(self.warnings),
        }

    def lines(self) -> list[str]:
        """For a terminal: titled rows, then the ten worst layers of each expert."""
        ratio = self.bytes_after / max(self.bytes_before, 1)
        size = f"{human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)}  ({ratio:.0%})"
        rows = [("Source", f"{self.source}  ({self.model_kind})"), ("Recipe", self.recipe)]
        rows += [("LoRA", f"{lora['file']} at {lora['weight']:g}") for lora in self.loras]
        if self.calibration:
            rows.append(("Smoothing", calibration_words(self.calibration)))
        for expert in self.experts:
            counts = ", ".join(f"{count} {scheme}" for scheme, count in expert.schemes.items())
            sizes = f"{human_bytes(expert.bytes_before)} -> {human_bytes(expert.bytes_after)}"
            rows.append((expert.name, f"{counts}   {sizes}   {expert.bits_per_weight:.2f} bits/weight"))
            rows += [("  kept", f"{', '.join(layers)}  ({why})") for why, layers in expert.kept.items()]
        rows.append(("Size", f"{size}   {self.bits_per_weight:.2f} bits/weight"))
        if self.linked:
            rows.append(("Also", ", ".join(self.linked)))
        if self.engine:
            rows.append(("Engine", self.engine))
        rows += [("Warning", warning) for warning in self.warnings]
        if self.dry_run:
            rows.append(("Dry run", f"nothing written; it would be {self.path}"))
        else:
            pace = "" if self.calibration else f", {self.gib_per_s:.2f} GiB/s"
            rows.append(("Time", f"{self.seconds:.1f} s{pace}"))
        width = max(len(title) for title, _ in rows)
        lines = [f"{title:<{width}}  {text}" for title, text in rows]
        for expert in self.experts:
            lines += _worst_lines(expert)
        for expert in self.experts:
            lines += _output_lines(expert)
        return lines


def _worst_lines(expert: QuantizedExpert) -> list[str]:
    if not expert.sqnr:
        return []
    width = max(len(layer) for layer, _ in expert.worst)
    head = f"{expert.name}: the {len(expert.worst)} worst of {len(expert.sqnr)} layers, SQNR in dB"
    return ["", head, *(f"  {layer:<{width}}  {value:6.2f}" for layer, value in expert.worst)]


def calibration_words(record: Mapping[str, Any]) -> str:
    """`alpha 0.9, from 4 prompts of 16 steps at 64x64, 17 frames`."""
    return (
        f"alpha {record['alpha']:g}, from {record['prompts']} prompt{'s'[: record['prompts'] != 1]} of "
        f"{record['steps']} steps at {record['size']}, {record['frames']} frames"
    )


def _output_lines(expert: QuantizedExpert) -> list[str]:
    if not expert.outputs.layers:
        return []
    rows = expert.outputs.rows(WORST)
    width = max(len(name) for name, _ in rows)
    head = (
        f"{expert.name}: SQNR in dB of the outputs of {len(expert.outputs.layers)} layers on captured tokens"
    )
    lines = ["", head, f"  {'':<{width}}  without  smoothed    gain"]
    for name, q in rows:
        lines.append(f"  {name:<{width}}  {q.plain:7.2f}  {q.smoothed:8.2f}  {q.smoothed - q.plain:+6.2f}")
    return lines


def _rounded(quality: OutputQuality) -> dict[str, float]:
    return {"plain": round(quality.plain, 2), "smoothed": round(quality.smoothed, 2)}


# ---- repack -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RepackedExpert:
    """One transformer."""

    name: str
    folder: str
    """Below the output; `.` when it is the output."""
    origin: str
    """Who wrote the source."""
    schemes: Mapping[str, int]
    """Scheme -> number of linear layers; bf16 last."""
    num_tensors: int
    """Written."""
    num_renamed: int
    moved_bytes: int
    """Bytes that are as they were."""
    rewritten_bytes: int
    """Bytes of tensors that were stored otherwise."""
    num_weights: int
    rewritten: Mapping[str, int]
    """What was done -> number of tensors."""
    decoded_sha256: str = ""
    """Of all numbers, the same before and after; empty without `check`."""
    num_checked: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        data: dict[str, Any] = {
            "name": self.name,
            "folder": self.folder,
            "origin": self.origin,
            "layers": dict(self.schemes),
            "tensors": self.num_tensors,
            "renamed": self.num_renamed,
            "moved_bytes": self.moved_bytes,
            "rewritten_bytes": self.rewritten_bytes,
            "rewritten": dict(self.rewritten),
        }
        if self.decoded_sha256:
            data |= {"checked": self.num_checked, "decoded_sha256": self.decoded_sha256}
        return data


@dataclass(frozen=True, kw_only=True)
class RepackReport:
    """The whole run. Every tensor of the source is in it: one that cannot be placed is an error."""

    path: Path
    """The folder that was written, or would be."""
    source: str
    layout: str
    """Of the source, in words."""
    to: str
    engine: str | None
    experts: tuple[RepackedExpert, ...]
    placed: tuple[str, ...]
    """Other parts that were linked or copied."""
    warnings: tuple[str, ...]
    dry_run: bool
    seconds: float

    @property
    def schemes(self) -> dict[str, int]:
        """Scheme -> number of linear layers in all experts."""
        return add_up(expert.schemes for expert in self.experts)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as written."""
        return sum(expert.moved_bytes + expert.rewritten_bytes for expert in self.experts)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all stored tensors, scales included, over the numbers of the model."""
        return 8 * self.nbytes / max(sum(expert.num_weights for expert in self.experts), 1)

    @property
    def gib_per_s(self) -> float:
        """Written bytes per second, 0 for a dry run."""
        return 0.0 if self.dry_run else self.nbytes / 2**30 / max(self.seconds, 1e-9)

    @property
    def checked(self) -> bool:
        """Whether all numbers were compared."""
        return all(expert.decoded_sha256 for expert in self.experts)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "path": str(self.path),
            "source": self.source,
            "layout": self.layout,
            "to": self.to,
            "engine": self.engine,
            "dry_run": self.dry_run,
            "checked": self.checked,
            "layers": self.schemes,
            "bytes": self.nbytes,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "seconds": round(self.seconds, 3),
            "gib_per_s": round(self.gib_per_s, 3),
            "experts": [expert.as_dict() for expert in self.experts],
            "placed": list(self.placed),
            "warnings": list(self.warnings),
        }

    def lines(self) -> list[str]:
        """For a terminal: titled rows."""
        rows = [("Source", f"{self.source}  ({self.layout})")]
        rows.append(("Layout", f"for {self.engine}" if self.engine else f"{self.to} names"))
        for expert in self.experts:
            counts = ", ".join(f"{count} {scheme}" for scheme, count in expert.schemes.items())
            renamed = f"{expert.num_tensors} tensors, {expert.num_renamed} under another name, none left over"
            rows += [(expert.name, counts), ("", renamed), ("", _bytes(expert))]
            if expert.decoded_sha256:
                text = (
                    f"{expert.num_checked} tensors decode to the same numbers, sha256 {expert.decoded_sha256}"
                )
                rows.append(("", text))
        rows.append(("Size", f"{human_bytes(self.nbytes)}   {self.bits_per_weight:.2f} bits/weight"))
        rows += [("Also", ", ".join(self.placed))] if self.placed else []
        rows += [("Warning", warning) for warning in self.warnings]
        if self.dry_run:
            rows.append(("Dry run", f"nothing written; it would be {self.path}"))
        else:
            rows.append(("Time", f"{self.seconds:.1f} s, {self.gib_per_s:.2f} GiB/s"))
        width = max(len(title) for title, _ in rows)
        return [f"{title:<{width}}  {text}" for title, text in rows]


def _bytes(expert: RepackedExpert) -> str:
    moved = f"{human_bytes(expert.moved_bytes)} as they were"
    if not expert.rewritten:
        return moved
    ways = ", ".join(f"{count} {way}" for way, count in expert.rewritten.items())
    return f"{moved}, {human_bytes(expert.rewritten_bytes)} rewritten ({ways})"


# ---- both ---------------------------------------------------------------------------------------


def add_up(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums by key, in the order in which keys come; bf16 last."""
    total: dict[str, int] = {}
    for count in counts:
        for key, number in count.items():
            total[key] = total.get(key, 0) + number
    if "bf16" in total:
        total["bf16"] = total.pop("bf16")
    return total


def human_bytes(nbytes: int) -> str:
    """`10.6 GiB`, `14.1 MiB`, `512 B`."""
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << exponent:
            return f"{nbytes / (1 << exponent):.1f} {unit}"
    return f"{nbytes} B"


def kind_of(layer: str) -> str:
    """`blocks.12.attn1.to_q` -> `attn1.to_q`."""
    return re.sub(r"^blocks\.\d+\.", "", layer)


def _mean(every: Sequence[OutputQuality]) -> OutputQuality:
    count = max(len(every), 1)
    return OutputQuality(
        plain=sum(q.plain for q in every) / count, smoothed=sum(q.smoothed for q in every) / count
    )
