"""Prompt adherence of a model of the demo's world: one video for each prompt and seed, judged from pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ascendit.demo.adherence import Adherence, Reading, measure_adherence
from ascendit.demo.world import Scene
from ascendit.errors import QualityError, UsageError
from ascendit.pipeline.frame_checks import Frames
from ascendit.pipeline.generate import Pipeline, Stop
from ascendit.verify.quality import OnVideo

LIMITS = {"overall": 0.90, "kept_back": 0.85}
"""Least share of videos that are right in everything."""
TITLES = {"overall": "all videos", "kept_back": "kept back"}


def check_adherence(
    pipe: Pipeline,
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    *,
    swap_experts: bool = False,
    cancel: Stop | None = None,
    on_video: OnVideo | None = None,
) -> Adherence:
    """Judge a video of every scene and seed. `swap_experts`: each in the other's place.

    Raises UsageError E-USE-01 if there is no second expert to swap, and Cancelled.
    """
    if swap_experts:
        if pipe.transformer_2 is None:
            raise UsageError(
                "--swap-experts with one expert",
                needs="a cascade of two experts",
                fix="leave it out",
            )
        pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer

    def make(prompt: str, seed: int) -> Frames:
        return pipe.run(pipe.request(prompt, seed=seed), cancel=cancel).frames

    def judged(scene: Scene, seed: int, reading: Reading) -> None:
        if on_video:
            on_video("", all(reading.right(scene).values()))

    return measure_adherence(make, scenes, seeds, judged)


def verdict_lines(result: Adherence) -> Iterator[str]:
    """One for each group: `PASS  all videos   100.0%   at least 90%`. A group without videos has none."""
    for key, limit in LIMITS.items():
        counts = getattr(result, key)
        word = "-" if not counts.total else "FAIL" if key in _below(result) else "PASS"
        yield f"{word:<6}{TITLES[key]:<12}{counts.share():7.1%}   at least {limit:.0%}"


def adherence_error(result: Adherence) -> QualityError | None:
    """E-OUT-03 if a group is below its limit."""
    if not (below := _below(result)):
        return None
    shares = (f"{TITLES[key]} {getattr(result, key).share():.1%}" for key in below)
    return QualityError(
        f"prompt adherence is below its limit: {', '.join(shares)}",
        needs=", ".join(f"{TITLES[key]} at least {limit:.0%}" for key, limit in LIMITS.items()),
        fix="--report FILE lists each failure; check the weights with ascendit inspect",
        code="E-OUT-03",
    )


def _below(result: Adherence) -> list[str]:
    groups = {key: getattr(result, key) for key in LIMITS}
    return [key for key, counts in groups.items() if counts.total and counts.share() < LIMITS[key]]
