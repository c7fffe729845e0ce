"""The cases of the quality table, and the table as Markdown, JSON and HTML. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ascendit.errors import UsageError
from ascendit.pages import charts
from ascendit.pages.page import Cell, Figure, Page, Part, Pictures, Section, Table
from ascendit.quant.attention_schemes import ATTENTION_FORMATS
from ascendit.quant.recipe import recipe_names
from ascendit.quant.schemes import QUANTIZED, SCHEMES
from ascendit.report import group_by, selected, shell_line

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


BASE = QualityCase(name="bf16")
_LIMITS = {name: SCHEMES[name].most_lost for name in QUANTIZED} | {"recommended-fp4": 6}
_POLICIES = ("default:w4a8", "0-3:w4a8,default:w4a4")


def default_cases() -> tuple[QualityCase, ...]:
    """Every scheme, MXFP4 with step policies, every recipe of ascendit, and every scheme of attention."""
    options = {name: {"scheme": name} for name in QUANTIZED}
    options |= {f"mxfp4, {p}": {"scheme": "mxfp4", "step_policy": p} for p in _POLICIES}
    options |= {name: {"recipe": name} for name in recipe_names() if name != "default"}
    options |= {f"attention {name}": {"attention": f"self={name}"} for name in ATTENTION_FORMATS}
    return tuple(QualityCase(name=n, options=o, most_lost=_LIMITS.get(n)) for n, o in options.items())


def choose_cases(names: Sequence[str]) -> tuple[QualityCase, ...]:
    """The cases of these names: default cases, or TOML files of recipes. Raises UsageError (E-USE-01)."""
    defaults = {case.name: case for case in default_cases()}
    cases = []
    for name in names:
        if name not in defaults and not name.endswith(".toml"):
            raise UsageError(
                f"case {name!r}",
                needs=f"one of {'; '.join(defaults)}; or the TOML file of a recipe",
                fix="check the name",
            )
        cases.append(defaults.get(name) or QualityCase(name=name, options={"recipe": name}))
    return tuple(cases)


@dataclass(frozen=True, kw_only=True)
class QualityRow(QualityCase):
    """The measurements of one case. Tuples have one entry per video, in the same order for all cases."""

    bits: float
    """Bits per weight of the blocks' linear layers, with scales."""
    layers: Mapping[str, float] = field(default_factory=dict)
    """Quantized layer or attention -> SQNR of its output in dB."""
    right: tuple[bool, ...]
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    cosine: tuple[tuple[float, ...], ...]
    """Per video and step: cosine similarity of the latents after the step to the latents of BF16."""
    distance: tuple[tuple[float, ...], ...]
    """Per video and step: relative L2 distance of the latents, |difference| / |latents of BF16|."""

    strips: Mapping[int, bytes] = field(default_factory=dict)
    """Number of a video -> a PNG of it: a row of frames of BF16, and one of this case."""

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
    videos: tuple[tuple[str, int], ...] = ()
    """Prompt and seed of each video."""

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

    def page(self) -> Page:
        """The HTML report. Imports matplotlib."""
        videos = len(self.base.right)
        about = {"model": self.model, "device": self.device}
        about |= {"videos": f"{videos}: {self.prompts} prompts, seeds {', '.join(map(str, self.seeds))}"}
        names = [row.name for row in self.rows[1:]]
        is_default = names == [case.name for case in default_cases()]
        cases = [] if is_default else [part for name in names for part in ("--case", name)]
        args = ["--quality", *cases, "--limit", str(self.prompts), "--seeds", str(len(self.seeds))]
        about |= {"command": shell_line(["ascendit", "verify", self.model, *args])}
        return Page(title=f"Quality of {self.model}", about=about, sections=tuple(_sections(self)))


# ---- the page -----------------------------------------------------------------------------------

MAX_STRIP_BYTES = 3 << 20
"""Pictures in a page; the remaining cases have none."""
MAX_OPEN_ROWS = 24
"""A longer table of prompts is folded."""


def _sections(quality: Quality) -> Iterator[Section]:
    others, total = quality.rows[1:], len(quality.base.right)
    right = {row.name: sum(row.right) for row in quality.rows}
    texts = {name: f"{count} of {total}" for name, count in right.items()}
    bars = charts.bars(right, "videos that match their prompt", texts)
    adherence = Figure(svg=bars, caption="Colour, shape, direction and background are read from the pixels.")
    yield Section("Summary", [_summary_table(quality), adherence])
    if others:
        psnr = charts.spread({row.name: row.psnr for row in others}, "PSNR in dB, against the BF16 video")
        ssim = charts.spread({row.name: row.ssim for row in others}, "SSIM, against the BF16 video")
        figures = [Figure(svg=psnr, caption=_DOTS), Figure(svg=ssim, caption=_DOTS)]
        yield Section("Frames", figures)
        steps = {row.name: row.per_step["relative_l2"] for row in others}
        svg = charts.curves(steps, "relative L2", "step", log=True)
        yield Section(
            "Latents", [Figure(svg=svg, caption="Distance to the latents of BF16, median over the videos.")]
        )
    if layers := _layers_by_depth(others):
        svg = charts.by_depth(layers, "SQNR in dB")
        caption = "SQNR of the outputs with the activations of a BF16 run, median over each block."
        yield Section("Layers", [Figure(svg=svg, caption=caption)])
    if strips := list(_strips(quality)):
        yield Section("Videos", strips, "Top row: BF16. Bottom row: the case. The least PSNR first.")
    if quality.videos:
        yield Section(
            "Prompts",
            [_prompt_table(quality)],
            f"PSNR in dB; {_RIGHT} matches its prompt, {_WRONG} does not.",
        )


_DOTS = "A dot for each video, a line at the median. Higher is better."
_RIGHT, _WRONG = "\u2713", "\u2717"


def _summary_table(quality: Quality) -> Table:
    verdicts = {row.name: within for row, within in quality.verdicts()}
    texts = {True: Cell("PASS", "good"), False: Cell("FAIL", "bad")}
    rows = []
    for row in quality.rows:
        name, bits, layers, _, _, psnr, ssim, right, lost = row.cells(quality.base)
        verdict = texts[verdicts[row.name]] if row.name in verdicts else Cell("-")
        rows.append((name, bits, layers, psnr, ssim, right, lost, verdict))
    head = ("case", "bits", *(MEASURES[i] for i in (1, 4, 5)), "right", "lost / won", "verdict")
    return Table(head=head, rows=rows)


def _layers_by_depth(rows: Sequence[QualityRow]) -> dict[str, dict[str, float]]:
    """Expert -> `blocks.N.case` -> median SQNR of the layers of the block."""
    panels: dict[str, dict[str, float]] = {}
    for row in rows:
        blocks = group_by(row.layers, lambda name: name.rpartition("blocks.")[2].partition(".")[0])
        for block, names in blocks.items():
            for expert, group in group_by(names, lambda name: name.partition("/")[0]).items():
                values = [row.layers[name] for name in group]
                panels.setdefault(expert, {})[f"blocks.{block}.{row.name}"] = median(values)
    return panels


def _strips(quality: Quality) -> Iterator[Part]:
    budget = MAX_STRIP_BYTES
    for row in quality.rows:
        images = []
        for index, png in row.strips.items():
            prompt, seed = quality.videos[index] if quality.videos else (f"video {index}", 0)
            mark = _RIGHT if row.right[index] else _WRONG
            images.append((f"{mark} {row.psnr[index]:.1f} dB, seed {seed}: {prompt}", png))
        budget -= sum(len(png) for _, png in images)
        if images and budget > 0:
            yield Pictures(images=images, title=row.name)


def _prompt_table(quality: Quality) -> Table:
    rows = []
    for index, (prompt, seed) in enumerate(quality.videos):
        cells: list[str | Cell] = [prompt, str(seed)]
        for row in quality.rows:
            right = row.right[index]
            number = "" if row is quality.base else f" {row.psnr[index]:.1f}"
            cells.append(Cell(f"{_RIGHT if right else _WRONG}{number}", "" if right else "bad"))
        rows.append(cells)
    head = ("prompt", "seed", *(row.name for row in quality.rows))
    title = f"{len(rows)} videos"
    return Table(head=head, rows=rows, title=title, folded=len(rows) > MAX_OPEN_ROWS)
