"""The adherence check: limits, verdicts, and the control with swapped experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ascendit.demo.adherence import Adherence, Counts, pick
from ascendit.errors import QualityError, UsageError
from ascendit.verify.adherence import adherence_error, check_adherence, verdict_lines


def result(trained: int, held_out: int, total: int = 10) -> Adherence:
    return Adherence(
        trained=Counts(total=total, everything=trained), held_out=Counts(total=total, everything=held_out)
    )


def test_each_group_has_its_limit() -> None:
    assert adherence_error(result(10, 9)) is None
    error = adherence_error(result(10, 8))
    assert error is not None and error.code == "E-OUT-03" and error.exit_code == 1
    assert error.got == "prompt adherence is below its limit: held out 80.0%"
    assert error.needs == "all videos at least 90%, held out at least 85%"
    assert list(verdict_lines(result(10, 8))) == [
        "PASS  all videos    90.0%   at least 90%",
        "FAIL  held out      80.0%   at least 85%",
    ]


def test_a_group_without_videos_is_not_judged() -> None:
    empty = Adherence(trained=Counts(total=4, everything=4), held_out=Counts())
    assert adherence_error(empty) is None
    assert list(verdict_lines(empty))[1].startswith("-     held out")


def pipeline(transformer_2: object) -> Any:
    """Makes grey videos; refuses those of seed 1."""

    def run(request: Any, cancel: object) -> Any:
        if request.seed == 1:
            raise QualityError("black", needs="n", fix="f", code="E-OUT-02")
        return SimpleNamespace(frames=np.full((17, 64, 64, 3), 128, np.uint8))

    def request(prompt: str, seed: int) -> Any:
        return SimpleNamespace(prompt=prompt, seed=seed)

    return SimpleNamespace(transformer="high", transformer_2=transformer_2, request=request, run=run)


def test_a_refused_video_counts_as_wrong() -> None:
    reported: list[bool] = []
    adherence = check_adherence(
        pipeline("low"), pick(2), [0, 1], on_video=lambda case, right: reported.append(right)
    )
    assert adherence.overall.total == 4 and adherence.overall.everything == 0 and reported == [False] * 4
    assert [f.reading.reasons for f in adherence.failures if f.seed == 1] == [("black",)] * 2


def test_the_control_swaps_the_experts() -> None:
    pipe = pipeline("low")
    check_adherence(pipe, pick(1), [0], swap_experts=True)
    assert (pipe.transformer, pipe.transformer_2) == ("low", "high")
    pipe.transformer_2 = None
    with pytest.raises(UsageError, match="swap_experts=True for a model with one expert"):
        check_adherence(pipe, pick(1), [0], swap_experts=True)
