"""The quality table: one row per quantization case, as Markdown and as JSON. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ascendit.report import selected

BASIS = 192
"""The number of videos that `most_lost` refers to."""
MEASURES = (
    "bits, per weight",
    "layers dB, worst / median",
    "cosine, first / last / worst step",
    "relative L2, first / last / worst step",
    "PSNR dB, median / least",
    "SSIM, median / least",
)
"""The columns between name and counts."""


@dataclass(frozen=True, kw_only=True)
class QualityCase:
    """One way to quantize. `options`: options of `ascendit.load` other than model and device."""

    name: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    most_lost: int | None = None
    """Allowed number of `BASIS` videos that are right with BF16 and wrong here; None: no limit."""


@dataclass(frozen=True, kw_only=True)
class QualityRow(QualityCase):
    """The measurements of one case. Tuples have one entry per video, in the same order for all cases."""

    bits: float
    """Bits per weight of the blocks' linear layers, with scales."""
    layers: Mapping[str, float] = field(default_factory=dict)
    """Quantized layer -> SQNR of its output in dB."""
    right: tuple[bool, ...]
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    cosine: tuple[tuple[float, ...], ...]
    """Per video and step: cosine similarity of the latents after the step to the latents of BF16."""
    distance: tuple[tuple[float, ...], ...]
    """Per video and step: relative L2 distance of the latents, |difference| / |latents of BF16|."""

    @property
    def per_step(self) -> dict[str, list[float]]:
        """Medians over the videos, one number per step."""
        videos = {"cosine": self.cosine, "relative_l2": self.distance}
        return {name: [median(step) for step in zip(*x, strict=True)] for name, x in videos.items()}

    def lost(self, base: QualityRow) -> int:
        """Number of videos that are right in `base` and wrong here."""
        return sum(a and not b for a, b in zip(base.right, self.right, strict=True))

    def won(self, base: QualityRow) -> int:
        """Number of videos that are right here and wrong in `base`."""
        return base.lost(self)

    def allowed(self) -> int | None:
        """The limit for this number of videos, rounded up; None: no limit."""
        return None if self.most_lost is None else math.ceil(self.most_lost * len(self.right) / BASIS)

    def as_dict(self, base: QualityRow) -> dict[str, Any]:
        """Plain data for JSON: medians, extremes and every layer."""
        steps = {key: [round(x, 6) for x in values] for key, values in self.per_step.items()}
        worst = min(self.layers, key=lambda name: self.layers[name], default=None)
        return {
            "case": self.name,
            "options": dict(self.options),
            "bits_per_weight": round(self.bits, 3),
            "layer_sqnr": {
                "worst": round(self.layers[worst], 2) if worst else None,
                "worst_layer": worst,
                "median": round(median(self.layers.values()), 2) if self.layers else None,
                "layers": {name: round(value, 2) for name, value in self.layers.items()},
            },
            "steps": steps
            | {
                "worst_cosine": round(min(map(min, self.cosine)), 6),
                "worst_relative_l2": round(max(map(max, self.distance)), 6),
            },
            "psnr": {"median": round(median(self.psnr), 2), "least": round(min(self.psnr), 2)},
            "ssim": {"median": round(median(self.ssim), 4), "least": round(min(self.ssim), 4)},
            "right": sum(self.right),
            "total": len(self.right),
            "lost": self.lost(base),
            "won": self.won(base),
            "most_lost": self.allowed(),
        }

    def cells(self, base: QualityRow) -> list[str]:
        """The cells of this row."""
        values, right = self.layers.values(), f"{sum(self.right)}"
        layers = f"{min(values):.1f} / {median(values):.1f}" if values else "-"
        head = [self.name, f"{self.bits:.2f}", layers]
        if self is base:
            return [*head, "-", "-", "-", "-", right, "-"]
        cos, distance = self.per_step.values()
        return [
            *head,
            f"{cos[0]:.4f} / {cos[-1]:.4f} / {min(map(min, self.cosine)):.4f}",
            f"{distance[0]:.4f} / {distance[-1]:.4f} / {max(map(max, self.distance)):.4f}",
            f"{median(self.psnr):.1f} / {min(self.psnr):.1f}",
            f"{median(self.ssim):.4f} / {min(self.ssim):.4f}",
            right,
            f"{self.lost(base)} / {self.won(base)}",
        ]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """All rows; the first is the BF16 baseline."""

    model: str
    device: str
    prompts: int
    seeds: tuple[int, ...]
    rows: tuple[QualityRow, ...]

    @property
    def base(self) -> QualityRow:
        """The BF16 baseline."""
        return self.rows[0]

    def verdicts(self) -> Iterable[tuple[QualityRow, bool]]:
        """The rows with a limit, and whether they are within it."""
        for row in self.rows:
            if (limit := row.allowed()) is not None:
                yield row, row.lost(self.base) <= limit

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            **selected(self, "model", "device", "prompts", "seeds"),
            "videos": len(self.base.right),
            "cases": [row.as_dict(self.base) for row in self.rows],
        }

    def table(self) -> str:
        """The table in Markdown."""
        head = ["case", *MEASURES, f"right of {len(self.base.right)}", "lost / won"]
        lines = [head, ["---"] * len(head), *(row.cells(self.base) for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
