"""One pipeline in several threads: every video equals that of the same call alone, or the call is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ascendit
from ascendit.errors import Cancelled, UsageError
from ascendit.pipeline.calibrate import Calibrator, inputs_of, with_recording
from ascendit.pipeline.generate import Pipeline
from ascendit.progress import Progress
from ascendit.verify.quality import trace

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}
PROMPTS = ("a cat", "a dog", "two birds", "rain")


def calls(count: int) -> list[dict[str, Any]]:
    """Different prompts and seeds, so that a mixture of two calls differs from both."""
    return [{"prompt": PROMPTS[i % len(PROMPTS)], "seed": i % 7, **SMALL} for i in range(count)]


def together(jobs: list[Callable[[], Any]], threads: int = 4) -> list[Any]:
    """The results, or errors, of the jobs in a pool whose threads start at the same time."""
    barrier, first = threading.Barrier(threads), threading.local()

    def run(job: Callable[[], Any]) -> Any:
        if not hasattr(first, "started"):
            first.started = True
            barrier.wait(60)
        torch.set_num_threads(1)
        try:
            return job()
        except Exception as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, jobs))


def check_calls(pipe: Pipeline, count: int) -> None:
    alone = {(c["prompt"], c["seed"]): pipe.generate(**c).frames for c in calls(28)}
    pipe.text._cache.clear()
    results = together([lambda c=c: pipe.generate(**c).frames for c in calls(count)])  # type: ignore[misc]
    for call, frames in zip(calls(count), results, strict=True):
        assert isinstance(frames, np.ndarray), frames
        assert np.array_equal(frames, alone[call["prompt"], call["seed"]])


def test_calls_of_four_threads_give_the_same_frames_as_alone(tiny_t2v_cascade: Path) -> None:
    check_calls(ascendit.load(tiny_t2v_cascade), 16)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"scheme": "mxfp4"}, {"text_on": "drop"}])
def test_500_calls_of_four_threads(tiny_t2v_cascade: Path, options: dict[str, Any]) -> None:
    check_calls(ascendit.load(tiny_t2v_cascade, **options), 500)


def test_warm_up_copies_and_traces_wait_too(tiny_t2v_cascade: Path) -> None:
    """Other entry points, and `replace`d pipelines, which share the encoders and the lock."""
    pipe = ascendit.load(tiny_t2v_cascade)
    call, other = calls(2)
    request = pipe.request(**other)
    expected = pipe.generate(**call).frames
    expected_trace = trace(pipe, request).frames
    recording = with_recording(pipe, inputs_of(pipe, 4), torch.Generator().manual_seed(0))
    jobs: list[Callable[[], Any]] = [
        lambda: pipe.generate(**call).frames,
        lambda: pipe.warm_up(request),
        lambda: trace(pipe, request).frames,
        lambda: recording.generate(**call).frames,
        lambda: replace(pipe, source="x").generate(**call).frames,
        lambda: pipe.vae.decode(torch.zeros(pipe.vae.latent_shape(5, 32, 32))),
    ]
    videos = together(jobs * 2)
    for video, wanted in zip(
        videos, [expected, None, expected_trace, expected, expected, None] * 2, strict=True
    ):
        assert not isinstance(video, Exception), video
        assert wanted is None or np.array_equal(video, wanted)


def test_a_call_from_on_progress_is_an_error_and_not_a_deadlock(tiny_t2v_cascade: Path) -> None:
    pipe, (call, other) = ascendit.load(tiny_t2v_cascade), calls(2)
    expected, errors = pipe.generate(**call).frames, []

    def nested(event: Progress) -> None:
        for again in (lambda: pipe.generate(**other), lambda: pipe.warm_up(pipe.request(**other))):
            with pytest.raises(UsageError, match="inside a run of its own") as error:
                again()
            errors.append(error.value.code)

    assert np.array_equal(pipe.generate(**call, on_progress=nested).frames, expected)
    assert len(errors) > 6 and set(errors) == {"E-USE-01"}


def test_a_waiting_call_is_cancelled_and_an_error_lets_the_next_one_run(tiny_t2v_cascade: Path) -> None:
    pipe, (call, other) = ascendit.load(tiny_t2v_cascade), calls(2)
    expected, cancel, outcome = pipe.generate(**other).frames, threading.Event(), []

    def waiting() -> None:
        with pytest.raises(Cancelled):
            pipe.generate(**other, cancel=cancel)
        outcome.append("cancelled")

    thread = threading.Thread(target=waiting)

    def fail(event: Progress) -> None:
        if not thread.ident:
            thread.start()
            cancel.set()
            thread.join(30)
            raise RuntimeError("a broken callback")

    with pytest.raises(RuntimeError, match="a broken callback"):
        pipe.generate(**call, on_progress=fail)
    assert outcome == ["cancelled"]
    assert np.array_equal(pipe.generate(**other).frames, expected)


def test_a_copied_pipeline_has_its_own_lock(tiny_t2v_cascade: Path) -> None:
    pipe, (call, _) = ascendit.load(tiny_t2v_cascade), calls(2)
    expected = pipe.generate(**call).frames
    with pipe.exclusive():
        assert np.array_equal(copy.deepcopy(pipe).generate(**call).frames, expected)


def test_twins_of_different_chips_take_turns(tiny_t2v_cascade: Path, twin: None) -> None:
    names = ("twin:a2", "twin:a5")
    pipes = [ascendit.load(tiny_t2v_cascade, device=name) for name in names]
    call, _ = calls(2)
    expected = [pipe.generate(**call).frames for pipe in pipes]
    results = together([lambda p=p: p.generate(**call).frames for p in pipes * 3], threads=2)  # type: ignore[misc]
    for frames, wanted in zip(results, expected * 3, strict=True):
        assert isinstance(frames, np.ndarray), frames
        assert np.array_equal(frames, wanted)

    def change(event: Progress) -> None:
        with pytest.raises(UsageError, match="chip a2 during a run on chip a5"):
            ascendit.twin.enable("a2")
        with pytest.raises(UsageError, match="the twin was called inside a run"):
            pipes[0].generate(**call)

    assert np.array_equal(pipes[1].generate(**call, on_progress=change).frames, expected[1])


def test_models_load_in_several_threads_beside_a_run(tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    """transformers sets the default dtype of the process while it loads."""
    import tiny

    low = tiny.build_t2v_single(tmp_path / "bf16", dtype=torch.bfloat16)
    pipe, (call, _) = ascendit.load(tiny_t2v_cascade, text_on="drop"), calls(2)
    expected = pipe.generate(**call).frames
    expected_low = ascendit.load(low).generate(**call).frames

    def running() -> Any:
        pipe.text._cache.clear()
        return pipe.generate(**call).frames

    def loading() -> Any:
        return ascendit.load(low).generate(**call).frames

    videos = together([running, loading, loading] * 2, threads=3)
    for frames, wanted in zip(videos, [expected, expected_low, expected_low] * 2, strict=True):
        assert isinstance(frames, np.ndarray), frames
        assert np.array_equal(frames, wanted)
    assert torch.get_default_dtype() == torch.float32


def test_calibration_holds_the_pipeline(
    tiny_t2v_single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    monkeypatch.setattr(Pipeline, "exclusive", spy(Pipeline.exclusive, held))
    ascendit.quantize(
        tiny_t2v_single,
        tmp_path / "calibrated",
        scheme="int8",
        calibrate=Calibrator(prompts=["a cat"], fields=SMALL),
    )
    assert held == [1]


def spy(real: Any, calls: list[int]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    return call
