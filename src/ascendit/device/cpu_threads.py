"""Threads on a CPU: their number, and how they wait for one another.

OpenMP runtimes let a thread that waits spin for milliseconds. If other programs use the cores, the thread
that it waits for is often the one that it keeps from running: a video then takes up to ten times as long.
They also start a thread for each core, even in a container with a quota of fewer. OpenMP reads its variables
when it is loaded, so `import ascendit` sets them, unless the user has.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ascendit import environment
from ascendit.device import cgroup

log = logging.getLogger("ascendit")

WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""Waiting threads soon sleep. With the first alone they sleep at once in GNU's runtime, the one of torch, but
waking a thread takes longer than most waits of a small model."""
SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which users choose how long threads spin, if at all."""
COUNT = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Threads:
    """The result of `set_variables`."""

    cores: int
    """Cores on which this process may run."""
    quota: float | None
    """Cores' worth of time that its control group allows; None without a limit."""
    set: Mapping[str, str]
    """Variables set by ascendit."""
    user: Mapping[str, str]
    """Variables that were set already, here or in a parent process."""
    late: bool
    """Whether torch was imported first, so that none of `set` affects it."""

    def __str__(self) -> str:
        quota = "" if self.quota is None else f", quota of {self.quota:g}"
        names = [f"{k}={v} (set by ascendit)" for k, v in self.set.items()]
        names += [f"{k}={v} (set by you)" for k, v in self.user.items()]
        late = "; too late for torch, which was imported before ascendit" if self.late and self.set else ""
        return f"{self.cores} cores{quota}; {', '.join(names)}{late}"


@functools.cache
def set_variables() -> Threads:
    """Set the variables that the user has not set. Once per process, before torch is imported."""
    cores, quota = available_cores(), cpu_quota()
    user = environment.values_of((*SPINNING, COUNT))
    values = {} if user.keys() & set(SPINNING) else dict(WAIT)
    if quota is not None and quota < cores and COUNT not in user:
        values[COUNT] = str(max(1, math.ceil(quota)))
    environment.set_missing(values)
    return Threads(cores, quota, values, user, late="torch" in sys.modules)


def report() -> None:
    """Log the settings; as a warning if they came too late and other programs use the cores."""
    threads = set_variables()
    log.info("threads: %s", threads)
    if threads.late and "OMP_WAIT_POLICY" in threads.set and _load() > threads.cores:
        log.warning(
            "this machine is busy, and torch was imported before ascendit, so its threads spin while they "
            "wait, which is slow; import ascendit first, or export OMP_WAIT_POLICY=PASSIVE"
        )


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def available_cores() -> int:
    """Cores on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path | None = None) -> float | None:
    """The smallest CPU quota of the control groups of this process, in cores; None without one.

    `root`: the folder with `proc` and `sys`.
    """
    quotas = []
    for texts in cgroup.group_values("cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us"), ("cpu.max",), root):
        limit, _, period = " ".join(texts).partition(" ")  # microseconds, of a period of microseconds
        if limit.isdigit() and period.isdigit() and int(limit) > 0 and int(period) > 0:
            quotas.append(int(limit) / int(period))
    return min(quotas, default=None)
