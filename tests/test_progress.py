"""Speed and remaining time of an event, and the meter of a conversion."""

import subprocess
import sys

import pytest

from ascendit.progress import Meter, Progress


def moved(done: int, total: int, seconds: float, skipped: int = 0) -> Progress:
    return Progress(stage="write", step=done, total=total, unit="byte", seconds=seconds, skipped=skipped)


def test_speed_and_remaining_time() -> None:
    progress = moved(3 << 30, 12 << 30, 2.0)
    assert progress.speed == 1.5 * 2**30
    assert progress.eta == 6.0


def test_there_is_no_estimate_at_the_start() -> None:
    progress = moved(0, 1 << 30, 0.0)
    assert progress.speed == 0.0
    assert progress.eta is None


def test_there_is_no_estimate_in_the_first_percent() -> None:
    """Opening files and loading code takes longer than the first bytes."""
    assert moved(9 << 20, 1000 << 20, 0.3).eta is None
    assert moved(10 << 20, 1000 << 20, 0.3).eta == pytest.approx(29.7)
    assert moved(501 << 20, 1000 << 20, 0.3, 500 << 20).eta is None


def test_bytes_of_a_killed_run_do_not_count_for_the_speed() -> None:
    progress = moved(9 << 30, 12 << 30, 2.0, 5 << 30)
    assert progress.speed == 2 << 30
    assert progress.eta == 1.5
    assert moved(5 << 30, 12 << 30, 0.1, 5 << 30).eta is None


@pytest.mark.parametrize("total", [0, 7])
def test_the_remaining_time_is_zero_at_the_end(total: int) -> None:
    assert moved(total, total, 1.0).eta == 0.0


def test_speed_of_steps() -> None:
    progress = Progress(stage="denoise", step=3, total=10, seconds=0.5)
    assert (progress.speed, progress.eta) == (2.0, 3.5)
    assert Progress(stage="denoise", total=10).eta is None


def test_the_meter_counts_over_stages() -> None:
    events: list[Progress] = []
    meter = Meter(10, events.append)
    first, second = meter.stage_counter("transformer"), meter.stage_counter("check")
    first("a", 3, skipped=True)
    second("b", 4)
    assert [(p.stage, p.name, p.step, p.skipped) for p in events] == [
        ("transformer", "a", 3, 3),
        ("check", "b", 7, 3),
    ]
    assert {(p.total, p.unit) for p in events} == {(10, "byte")} and events[1].seconds >= events[
        0
    ].seconds > 0
    Meter(1, None).stage_counter("quiet")("a", 1)


def test_the_module_imports_no_torch() -> None:
    code = "import ascendit.progress, sys; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_part_counts_exactly_its_bytes() -> None:
    events: list[Progress] = []
    meter = Meter(150, events.append)
    with meter.part("load", "a", 100) as advance:
        advance("x", 30)
        advance("y", 0)
        advance("z", 90)
        advance("z", 90)
    with meter.part("load", "b", 50):
        pass
    with meter.part("load", "c", 0) as advance:
        advance("d", 10)
    assert [(e.name, e.step) for e in events] == [("x", 30), ("z", 100), ("b", 150)]
