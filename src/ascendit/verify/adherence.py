"""Prompt adherence of a model of the demo world: one video per prompt and seed, judged from pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ascendit.demo.adherence import ATTRIBUTES, Adherence, Counts, Reading, measure_adherence
from ascendit.demo.world import Scene
from ascendit.errors import QualityError, UsageError
from ascendit.exclusive import Stop
from ascendit.pages import charts
from ascendit.pages.page import Cell, Figure, Page, Part, Section, Table
from ascendit.pipeline.frame_checks import Frames
from ascendit.pipeline.generate import Pipeline
from ascendit.report import counted
from ascendit.verify.quality import OnVideo

LIMITS = {"overall": 0.90, "kept_back": 0.85}
"""JSON key of a group of videos -> minimum share that must be right in every attribute."""
TITLES = {"overall": "all videos", "kept_back": "held out"}


def check_adherence(
    pipe: Pipeline,
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    *,
    swap_experts: bool = False,
    cancel: Stop | None = None,
    on_video: OnVideo | None = None,
) -> Adherence:
    """Generate and judge a video for every scene and seed. `swap_experts`: exchange the two experts first.

    Raises UsageError (E-USE-01) if `swap_experts` is set and the model has one expert, and Cancelled.
    """
    if swap_experts:
        if pipe.transformer_2 is None:
            raise UsageError(
                "--swap-experts for a model with one expert",
                needs="a model with two experts",
                fix="omit --swap-experts",
            )
        pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer

    def make(prompt: str, seed: int) -> Frames:
        return pipe.run(pipe.request(prompt, seed=seed), cancel=cancel).frames

    def on_result(scene: Scene, seed: int, reading: Reading) -> None:
        if on_video:
            on_video("", all(reading.matches(scene).values()))

    return measure_adherence(make, scenes, seeds, on_result)


def verdict_lines(result: Adherence) -> Iterator[str]:
    """One line per group: `PASS  all videos   100.0%   at least 90%`; `-` for a group without videos."""
    groups = _groups(result)
    for key, limit in LIMITS.items():
        counts = groups[key]
        if not counts.total:
            yield f"{'-':<6}{TITLES[key]:<12}no videos: the limit is too small to include this group"
            continue
        word = "FAIL" if key in _below(result) else "PASS"
        yield f"{word:<6}{TITLES[key]:<12}{counts.share():7.1%}   at least {limit:.0%}"


def adherence_error(result: Adherence) -> QualityError | None:
    """The error E-OUT-03 if a group is below its limit, else None."""
    if not (below := _below(result)):
        return None
    groups = _groups(result)
    shares = (f"{TITLES[key]} {groups[key].share():.1%}" for key in below)
    return QualityError(
        f"prompt adherence is below its limit: {', '.join(shares)}",
        needs=", ".join(f"{TITLES[key]} at least {limit:.0%}" for key, limit in LIMITS.items()),
        fix="see the failures in --report FILE; check the weights with: ascendit inspect MODEL",
        code="E-OUT-03",
    )


def adherence_page(result: Adherence, model: str) -> Page:
    """The HTML report. Imports matplotlib."""
    names = (*ATTRIBUTES, "everything")
    groups = {"all videos": result.overall, "seen in training": result.trained, "held out": result.held_out}
    counts = [(name, *(c.text(name) for c in groups.values())) for name in names]
    shares = {name: result.overall.share(name) for name in names}
    svg = charts.bars(shares, "share of right videos", {name: f"{x:.1%}" for name, x in shares.items()})
    verdicts = [
        (TITLES[key], f"at least {LIMITS[key]:.0%}", c.text(), _verdict(result, key))
        for key, c in _groups(result).items()
    ]
    summary: list[Part] = [
        Table(head=("group", "limit", "right", "verdict"), rows=verdicts),
        Table(head=("right", *groups), rows=counts),
        Figure(svg=svg, caption="Read from the pixels of each video, without a neural network."),
    ]
    failures = [
        (f.scene.prompt(), str(f.seed), _reading_text(f.reading), "; ".join(f.reading.reasons))
        for f in result.failures
    ]
    table = Table(head=("prompt", "seed", "read from the video", "reasons"), rows=failures)
    wrong = counted(len(failures), "video")
    sections = [Section("Summary", summary), Section("Failures", [table] if failures else [], wrong)]
    return Page(title=f"Prompt adherence of {model}", about={"model": model}, sections=sections)


def _reading_text(reading: Reading) -> str:
    return ", ".join(f"{name} {getattr(reading, name) or 'unreadable'}" for name in ATTRIBUTES)


def _verdict(result: Adherence, key: str) -> Cell:
    if not _groups(result)[key].total:
        return Cell("-")
    return Cell("FAIL", "bad") if key in _below(result) else Cell("PASS", "good")


def _groups(result: Adherence) -> dict[str, Counts]:
    return {"overall": result.overall, "kept_back": result.held_out}


def _below(result: Adherence) -> list[str]:
    groups = _groups(result)
    return [key for key, counts in groups.items() if counts.total and counts.share() < LIMITS[key]]
