"""Timing shared by the benchmarks: candidates take turns, so that load on the machine affects all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def interleaved(runs: Mapping[str, Callable[[], object]], reps: int) -> dict[str, list[float]]:
    """Name -> seconds of its `reps` runs. Every round runs each candidate once."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(reps):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds
