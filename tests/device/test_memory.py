"""Memory of the host in a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from ascendit.device.memory import host_memory, total_memory
from ascendit.doctor import machine


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_of_a_container(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "") / "docker" / "a"
    group.mkdir(parents=True)
    names = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if version == 1
        else ("memory.max", "memory.current")
    )
    (group / names[0]).write_text("1000000\n")
    (group / names[1]).write_text("700000\n")
    (group / "memory.stat").write_text(f"anon 1\n{'total_' if version == 1 else ''}inactive_file 200000\n")
    (group.parent / names[0]).write_text("max\n")
    process = tmp_path / "proc/self/cgroup"
    process.parent.mkdir(parents=True)
    process.write_text("4:memory:/docker/a\n1:cpu:/x\n" if version == 1 else "0::/docker/a\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4096 kB\n")
    assert host_memory(tmp_path) == 500_000 and total_memory(tmp_path) == 9 * 1024
    monkeypatch.setattr("ascendit.device.cgroup.ROOT", tmp_path)
    assert host_memory() == 500_000
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4096 kB\nMemAvailable:    4096 kB\n")
    assert total_memory(tmp_path) == 1_000_000
    assert "0.0 of 0.0 GiB free" in str(machine._memory())
    process.unlink()
    assert host_memory(tmp_path) == total_memory(tmp_path) == 4096 * 1024
    (tmp_path / "proc/meminfo").unlink()
    assert host_memory(tmp_path) is total_memory(tmp_path) is None
