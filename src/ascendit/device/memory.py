"""Memory of the host, with the limit of its container. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ascendit.device import cgroup

_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
_VERSION_2 = ("memory.max", "memory.current", "memory.stat")


def host_memory(root: Path | None = None) -> int | None:
    """Bytes that a process of this host can still allocate; None if the system does not report it.

    The smallest of MemAvailable and the free part of the limit of each control group. `root`: the folder with
    `proc` and `sys`.
    """
    limits = _meminfo("MemAvailable", root)
    limits += [max(limit - used, 0) for limit, used in _cgroup_limits(root)]
    return min(limits, default=None)


def total_memory(root: Path | None = None) -> int | None:
    """Bytes of memory of the host, or the smallest limit of a control group; None if not reported."""
    return min([*_meminfo("MemTotal", root), *(limit for limit, _ in _cgroup_limits(root))], default=None)


def _meminfo(name: str, root: Path | None) -> list[int]:
    text = cgroup.read_text((root or cgroup.ROOT) / "proc/meminfo")
    return [int(size) * 1024 for size in re.findall(rf"^{name}:\s+(\d+) kB", text, re.M)]


def _cgroup_limits(root: Path | None) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of the control groups of this process.

    The page cache counts as in use, but is freed when memory is needed.
    """
    for limit, used, stat in cgroup.group_values("memory", _VERSION_1, _VERSION_2, root):
        if limit.isdecimal() and used.isdecimal():
            cache = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.M)
            yield int(limit), int(used) - int(cache[1] if cache else 0)
