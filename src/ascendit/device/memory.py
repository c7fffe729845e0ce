"""Free memory of the host, with the limit of its container. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
SELF_CGROUP = Path("/proc/self/cgroup")


def host_memory() -> int | None:
    """Bytes that a process of this host can still allocate; None if the system does not report it.

    The smallest of MemAvailable and what the limit of each control group leaves.
    """
    match = re.search(r"MemAvailable:\s+(\d+) kB", _read(MEMINFO))
    limits = [int(match[1]) * 1024] if match else []
    limits += [max(limit - used, 0) for limit, used in _cgroup_limits()]
    return min(limits, default=None)


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of the control groups of this process, versions 2 and 1.

    The page cache counts as in use, but is freed when memory is needed.
    """
    for line in _read(SELF_CGROUP).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            root = CGROUPS / ("memory" if controllers else "")
            files = _VERSION_1 if controllers else _VERSION_2
            folder = root / path.lstrip("/")
            for group in (folder, *folder.parents):
                limit, used = (_read(group / name).strip() for name in files)
                if limit.isdecimal() and used.isdecimal():
                    cache = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(group / "memory.stat"), re.M)
                    yield int(limit), int(used) - int(cache[1] if cache else 0)
                if group == root:
                    break


_VERSION_2 = ("memory.max", "memory.current")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
