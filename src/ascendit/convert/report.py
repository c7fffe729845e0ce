"""Reports of `quantize` and `repack`: plain data, for a terminal and for `--json`. Does not import torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ascendit.report import (
    columns,
    counted,
    group_by,
    human_bytes,
    json_data,
    pace_text,
    selected,
    short_path,
    titled,
    totals,
)

# ---- common to both -----------------------------------------------------------------------------


def add_up(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums per scheme, in order of first occurrence, bf16 last."""
    total = totals(counts)
    if "bf16" in total:
        total["bf16"] = total.pop("bf16")
    return total


@dataclass(frozen=True, kw_only=True)
class ConvertedExpert:
    """Results for one transformer. Subclasses add `bytes_after`, the bytes of all written tensors."""

    name: str
    schemes: Mapping[str, int]
    """Scheme -> number of linear layers; bf16 last."""
    num_weights: int

    def counts(self) -> str:
        """Layers per scheme as text: `20 mxfp8, 12 bf16`."""
        return ", ".join(f"{count} {scheme}" for scheme, count in self.schemes.items())


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """Results of one run of `quantize` or `repack`."""

    path: Path
    """The output folder; with `dry_run` it was not written."""
    source: str
    experts: tuple[Any, ...]
    dry_run: bool
    seconds: float
    engine: str | None = None
    warnings: tuple[str, ...] = ()
    omitted: tuple[str, ...] = ()
    """Links that lead out of the checkpoint and are not in the output, as `name -> path`."""
    next: str = ""
    """The command line that uses the output."""

    @property
    def schemes(self) -> dict[str, int]:
        """Scheme -> number of linear layers in all experts."""
        return add_up(expert.schemes for expert in self.experts)

    @property
    def bytes_after(self) -> int:
        """Bytes of the written tensors of all experts."""
        return sum(expert.bytes_after for expert in self.experts)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the tensors of all experts, scales included, divided by the number of parameters."""
        num_weights: int = sum(expert.num_weights for expert in self.experts)
        nbytes: int = sum(expert.bytes_after for expert in self.experts)
        return 8 * nbytes / max(num_weights, 1)

    @property
    def bytes_done(self) -> int:
        """Bytes processed, from which the throughput is computed."""
        return self.bytes_after

    @property
    def gib_per_s(self) -> float:
        """Throughput in GiB/s, 0 for a dry run."""
        return 0.0 if self.dry_run else self.bytes_done / 2**30 / max(self.seconds, 1e-9)

    def measured(self) -> dict[str, float]:
        """Measurements, rounded for `--json`."""
        return {name: round(getattr(self, name), 3) for name in ("bits_per_weight", "seconds", "gib_per_s")}

    def closing(self, also: Sequence[str], engine: str | None = None, speed: bool = True) -> list[list[str]]:
        """The last rows for a terminal: other components and files, warnings, time."""
        rows = [["Also", ", ".join(also)]] if also else []
        rows += [["Not copied", f"{link}  (a link out of the checkpoint)"] for link in self.omitted]
        rows += [["Engine", engine]] if engine else []
        rows += [["Warning", warning] for warning in self.warnings]
        if self.dry_run:
            return [*rows, ["Dry run", f"nothing written; the output would be {self.path}"]]
        pace = f", {pace_text(self.gib_per_s * 2**30)}" if speed else ""
        return [*rows, ["Time", f"{self.seconds:.1f} s{pace}"]]

    def end_rows(self) -> list[list[str]]:
        """The very last rows for a terminal: the output, and the command that uses it."""
        if self.dry_run:
            return []
        return [["Output", short_path(self.path)], *([["Next", self.next]] if self.next else [])]

    def ends(self) -> dict[str, str]:
        """The last entries for `--json`: the output, and the command line that uses it."""
        return {"output": os.path.abspath(self.path), "next": self.next}


# ---- quantize -----------------------------------------------------------------------------------

WORST = 10


@dataclass(frozen=True, kw_only=True)
class OutputQuality:
    """SQNR in dB of a layer's output on captured activations, with both weight and activation quantized."""

    plain: float
    smoothed: float

    def as_dict(self) -> dict[str, float]:
        """Plain data for `--json`."""
        return {"plain": round(self.plain, 2), "smoothed": round(self.smoothed, 2)}


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The output quality of the layers of one expert."""

    layers: Mapping[str, OutputQuality] = field(default_factory=dict)

    @property
    def mean(self) -> OutputQuality:
        """Mean in dB over all layers."""
        return _mean(list(self.layers.values()))

    @property
    def kinds(self) -> dict[str, OutputQuality]:
        """Name within a block (`attn1.to_q`) -> mean over all blocks."""
        kinds = group_by(self.layers, lambda name: re.sub(r"^blocks\.\d+\.", "", name))
        return {kind: _mean([self.layers[name] for name in names]) for kind, names in kinds.items()}

    def rows(self, worst: int) -> list[tuple[str, OutputQuality]]:
        """Rows of a table: the `worst` smoothed layers, the mean of each kind, the mean of all layers."""
        rows = sorted(self.layers.items(), key=lambda item: item[1].smoothed)[:worst]
        rows += [(f"mean of {kind}", quality) for kind, quality in self.kinds.items()]
        return [*rows, ("mean", self.mean)]


def _mean(layers: Sequence[OutputQuality]) -> OutputQuality:
    count = max(len(layers), 1)
    return OutputQuality(
        plain=sum(q.plain for q in layers) / count, smoothed=sum(q.smoothed for q in layers) / count
    )


class StoredLayer(NamedTuple):
    """The format of a linear layer in the output."""

    scheme: str
    bits: float
    """Bits per weight, with scales, without the bias."""

    def text(self) -> str:
        """`mxfp8, 8.25 bits`."""
        return f"{self.scheme}, {self.bits:.2f} bits"


@dataclass(frozen=True, kw_only=True)
class QuantizedExpert(ConvertedExpert):
    """Results for one quantized transformer."""

    kept: Mapping[str, tuple[str, ...]]
    """Reason -> layers that were not quantized, abbreviated (`blocks.0-4`)."""
    bytes_before: int
    bytes_after: int
    attention: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Scheme -> attention modules that it quantizes, abbreviated."""
    sqnr: Mapping[str, float] = field(default_factory=dict)
    """Layer -> signal to quantization noise ratio of its weight in dB; empty without `report`."""
    outputs: Outputs = field(default_factory=Outputs)
    """SQNR of the outputs of smoothed layers, with and without smoothing; from a calibration."""
    stored: Mapping[str, StoredLayer] = field(default_factory=dict)
    """Linear layer -> its format."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of all written tensors, scales included, divided by the number of parameters."""
        return 8 * self.bytes_after / max(self.num_weights, 1)

    @property
    def worst(self) -> list[tuple[str, float]]:
        """The ten layers with the lowest SQNR, the worst first."""
        return sorted(self.sqnr.items(), key=lambda item: item[1])[:WORST]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        data = {"name": self.name, "layers": json_data(self.schemes)}
        data |= selected(self, "kept", "bytes_before", "bytes_after")
        data["bits_per_weight"] = round(self.bits_per_weight, 3)
        if self.attention:
            data["attention"] = json_data(self.attention)
        if self.sqnr:
            data["sqnr_db"] = {layer: round(value, 2) for layer, value in self.sqnr.items()}
            data["worst"] = [layer for layer, _ in self.worst]
        if self.outputs.layers:
            data["output_sqnr_db"] = json_data(self.outputs.layers)
            data["output_sqnr_db_mean"] = json_data(self.outputs.mean)
        return data

    def rows(self) -> list[list[str]]:
        """Rows for a terminal: schemes and sizes, then the layers that were not quantized."""
        sizes = f"{human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)}"
        first = [self.name, f"{self.counts()}   {sizes}   {self.bits_per_weight:.2f} bits/weight"]
        excluded = (f"{', '.join(layers)}  ({reason})" for reason, layers in self.kept.items())
        attention = (f"{scheme}: {', '.join(names)}" for scheme, names in self.attention.items())
        rows = [["  attention", text] for text in attention] + [["  excluded", text] for text in excluded]
        return [first, *rows]

    def worst_lines(self) -> list[str]:
        """Lines with the worst layers, if SQNR was measured."""
        if not self.sqnr:
            return []
        head = (
            f"{self.name}: SQNR of the weights in dB, the {len(self.worst)} worst of {len(self.sqnr)} layers"
        )
        rows = [(layer, f"{value:6.2f}") for layer, value in self.worst]
        return ["", head, *columns(rows, indent="  ")]

    def output_lines(self) -> list[str]:
        """Lines with the SQNR of layer outputs, if a calibration measured it."""
        if not self.outputs.layers:
            return []
        number = len(self.outputs.layers)
        head = f"{self.name}: SQNR in dB of the outputs of {number} layers with captured activations"
        rows = [("", "without", "smoothed", "  gain")]
        for name, q in self.outputs.rows(WORST):
            gain = q.smoothed - q.plain
            rows.append((name, f"{q.plain:7.2f}", f"{q.smoothed:8.2f}", f"{gain:+6.2f}"))
        return ["", head, *columns(rows, indent="  ")]


@dataclass(frozen=True, kw_only=True)
class QuantizeReport(ConversionReport):
    """Results of one run of `quantize`."""

    recipe: str
    model_kind: str
    experts: tuple[QuantizedExpert, ...]
    linked: tuple[str, ...] = ()
    """Other components and files that were linked or copied."""
    loras: tuple[Mapping[str, Any], ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """How the activations for smoothing were captured: alpha, prompts, steps."""
    report_file: Path | None = None
    command: str = ""
    """The command line, with the names of folders instead of their paths."""

    @property
    def bytes_before(self) -> int:
        """Bytes of the experts' tensors in the source."""
        return sum(expert.bytes_before for expert in self.experts)

    @property
    def bytes_done(self) -> int:
        """Bytes of the source, from which the throughput is computed."""
        return self.bytes_before

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        data = selected(self, "path", "source", "recipe", "model_kind", "dry_run", "engine")
        data |= {"layers": self.schemes, **selected(self, "bytes_before", "bytes_after"), **self.measured()}
        data |= selected(self, "experts", "linked", "omitted", "loras", "calibration", "warnings")
        if self.report_file:
            data["report"] = str(self.report_file)
        return data | self.ends()

    def lines(self) -> list[str]:
        """Lines for a terminal: titled rows, then the ten worst layers of each expert."""
        ratio = self.bytes_after / max(self.bytes_before, 1)
        size = f"{human_bytes(self.bytes_before)} -> {human_bytes(self.bytes_after)}  ({ratio:.0%})"
        rows = [["Source", f"{self.source}  ({self.model_kind})"], ["Recipe", self.recipe]]
        rows += [["LoRA", line] for line in lora_lines(self.loras)]
        rows += [["Smoothing", calibration_text(self.calibration)]] if self.calibration else []
        rows += [row for expert in self.experts for row in expert.rows()]
        rows += [["Size", f"{size}   {self.bits_per_weight:.2f} bits/weight"]]
        rows += self.closing(self.linked, self.engine, speed=not self.calibration)
        measured = [line for expert in self.experts for line in expert.worst_lines()]
        measured += [line for expert in self.experts for line in expert.output_lines()]
        end = self.end_rows()
        if self.report_file and not self.dry_run:
            end.insert(0, ["Report", short_path(self.report_file)])
        if not measured or not end:
            return columns(rows + end) + measured
        width = max(len(title) for title, _ in rows)
        return [*columns(rows), *measured, "", *columns(end, first_width=width)]


def lora_lines(loras: Iterable[Mapping[str, Any]]) -> list[str]:
    """The notes of `Folds`, once for all experts if they are the same."""
    lines: list[str] = []
    for lora in loras:
        notes = {expert: applied["note"] for expert, applied in lora.get("applied", {}).items()}
        same = len(set(notes.values())) == 1 and lora["expert"] == "all"
        lines += list(notes.values())[:1] if same else [f"{expert}: {note}" for expert, note in notes.items()]
    return lines


def calibration_text(record: Mapping[str, Any]) -> str:
    """A calibration as text: `alpha 0.9, from 4 prompts of 16 steps at 64x64, 17 frames`."""
    videos = f"{record['steps']} steps at {record['size']}, {record['frames']} frames"
    return f"alpha {record['alpha']:g}, from {counted(record['prompts'], 'prompt')} of {videos}"


# ---- repack -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RepackedExpert(ConvertedExpert):
    """Results for one repacked transformer."""

    folder: str
    """Relative to the output; `.` for the output itself."""
    origin: str
    """The tool that wrote the source."""
    num_tensors: int
    """Number of written tensors."""
    num_renamed: int
    moved_bytes: int
    """Bytes of unchanged tensors."""
    rewritten_bytes: int
    """Bytes of tensors in another representation."""
    rewritten: Mapping[str, int]
    """Kind of change -> number of tensors."""
    decoded_sha256: str = ""
    """sha256 of all decoded values, equal before and after; empty without `check`."""
    num_checked: int = 0

    @property
    def bytes_after(self) -> int:
        """Bytes of all written tensors."""
        return self.moved_bytes + self.rewritten_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        data = selected(self, "name", "folder", "origin")
        data |= {"layers": json_data(self.schemes), "tensors": self.num_tensors, "renamed": self.num_renamed}
        data |= selected(self, "moved_bytes", "rewritten_bytes", "rewritten")
        if self.decoded_sha256:
            data |= {"checked": self.num_checked, "decoded_sha256": self.decoded_sha256}
        return data

    def texts(self) -> list[str]:
        """Rows for a terminal: schemes, tensors, bytes, and the result of `check`."""
        sizes = f"{human_bytes(self.moved_bytes)} unchanged"
        if self.rewritten:
            changes = ", ".join(f"{count} {change}" for change, count in self.rewritten.items())
            sizes += f", {human_bytes(self.rewritten_bytes)} rewritten ({changes})"
        tensors = f"all {self.num_tensors} tensors, {self.num_renamed} of them renamed"
        checked = f"{self.num_checked} tensors decode to the same values, sha256 {self.decoded_sha256}"
        return [self.counts(), tensors, sizes, *([checked] if self.decoded_sha256 else [])]


@dataclass(frozen=True, kw_only=True)
class RepackReport(ConversionReport):
    """Results of one run of `repack`.

    It covers every tensor of the source: an unexpected tensor is an error.
    """

    layout: str
    """Label of the layout of the source."""
    to: str
    experts: tuple[RepackedExpert, ...]
    linked: tuple[str, ...]
    """Other components and files that were linked or copied."""
    parts: tuple[Mapping[str, Any], ...] = ()
    """Text encoder and VAE from files: name, file, tensors, bytes_before, bytes_after."""

    @property
    def bytes_after(self) -> int:
        """Bytes of the written tensors of all experts and parts."""
        parts: int = sum(part["bytes_after"] for part in self.parts)
        return super().bytes_after + parts

    @property
    def checked(self) -> bool:
        """Whether all values were compared."""
        return all(expert.decoded_sha256 for expert in self.experts)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        data = selected(self, "path", "source", "layout", "to", "engine", "dry_run", "checked")
        data |= {"layers": self.schemes, "bytes": self.bytes_after, **self.measured()}
        data |= selected(self, "experts", "parts", "linked", "omitted", "warnings")
        return {"placed" if key == "linked" else key: value for key, value in data.items()} | self.ends()

    def lines(self) -> list[str]:
        """Lines for a terminal: titled rows."""
        rows = [("Source", [f"{self.source}  ({self.layout})"])]
        rows += [("Layout", [f"for {self.engine}" if self.engine else f"{self.to} names"])]
        rows += [(expert.name, expert.texts()) for expert in self.experts]
        for part in self.parts:
            sizes = " -> ".join(human_bytes(part[key]) for key in ("bytes_before", "bytes_after"))
            rows += [(part["name"], [f"all {part['tensors']} tensors of {part['file']}, {sizes}"])]
        bits = f"   {self.bits_per_weight:.2f} bits/weight" if self.experts else ""
        rows += [("Size", [f"{human_bytes(self.bytes_after)}{bits}"])]
        return columns([*titled(rows), *self.closing(self.linked), *self.end_rows()])
