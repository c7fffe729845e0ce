"""Timing that the benchmarks share: all candidates in turn, so that a busy machine is unfair to none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def interleaved(runs: Mapping[str, Callable[[], object]], reps: int) -> dict[str, list[float]]:
    """Seconds of each run, `reps` of them, one candidate after the other in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(reps):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds
