"""Prompt adherence of a model of the demo world: one video per prompt and seed, judged from pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ascendit.demo.adherence import Adherence, Counts, Reading, measure_adherence
from ascendit.demo.world import Scene
from ascendit.errors import QualityError, UsageError
from ascendit.exclusive import Stop
from ascendit.pipeline.frame_checks import Frames
from ascendit.pipeline.generate import Pipeline
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
        word = "-" if not counts.total else "FAIL" if key in _below(result) else "PASS"
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


def _groups(result: Adherence) -> dict[str, Counts]:
    return {"overall": result.overall, "kept_back": result.held_out}


def _below(result: Adherence) -> list[str]:
    groups = _groups(result)
    return [key for key, counts in groups.items() if counts.total and counts.share() < LIMITS[key]]
