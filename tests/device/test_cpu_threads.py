"""Threads: the quota of a container, variables that the user keeps, and what OpenMP makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from ascendit.device import cpu_threads

CHILD = """
import json, os, sys
if "torch first" in sys.argv: import torch
import ascendit
from ascendit.device.cpu_threads import report, set_variables
import logging
logging.basicConfig(level="WARNING", format="%(message)s")
os.getloadavg = lambda: (99.0, 0.0, 0.0)
report()
print(json.dumps({"variables": dict(set_variables().set), "text": str(set_variables())}))
if "torch" in sys.argv: import torch
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*cpu_threads.SPINNING, cpu_threads.COUNT):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(cpu_threads, "cpu_quota", lambda: None)
    monkeypatch.setattr(cpu_threads, "available_cores", lambda: 64)
    cpu_threads.set_variables.cache_clear()
    yield
    cpu_threads.set_variables.cache_clear()


def child(*argv: str, **environ: str) -> tuple[dict, str]:
    kept = {k: v for k, v in os.environ.items() if k not in (*cpu_threads.SPINNING, cpu_threads.COUNT)}
    env = kept | {"PYTHONPATH": os.pathsep.join(sys.path)} | environ
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *argv], env=env, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout), done.stderr


def test_importing_ascendit_sets_what_openmp_reads() -> None:
    """libgomp prints its settings when torch loads it."""
    answer, log = child("torch", OMP_DISPLAY_ENV="VERBOSE")
    assert answer["variables"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in log
    if "GOMP" in log:
        assert "GOMP_SPINCOUNT = '1000'" in log


@pytest.mark.parametrize(
    "variable", [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "1")]
)
def test_a_choice_of_the_user_is_kept(variable: tuple[str, str]) -> None:
    answer, log = child(**dict([variable]))
    assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(answer["variables"])
    assert "=".join(variable) + " (set by you)" in answer["text"] and log == ""


def test_torch_before_ascendit_is_too_late(fresh: None, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setattr(os, "getloadavg", lambda: (65.0, 0.0, 0.0))
    cpu_threads.report()
    assert "import ascendit first, or export OMP_WAIT_POLICY=PASSIVE" in caplog.text
    assert "too late for torch" in str(cpu_threads.set_variables())
    caplog.clear()
    monkeypatch.setattr(os, "getloadavg", lambda: (63.0, 0.0, 0.0))
    cpu_threads.report()
    assert caplog.text == ""  # a quiet machine


@pytest.mark.parametrize(
    ("quota", "set_by_user", "threads"),
    [(None, "", None), (2.0, "", "2"), (1.5, "", "2"), (0.5, "", "1"), (64.0, "", None), (2.0, "8", None)],
)
def test_as_many_threads_as_the_quota_allows(
    fresh: None, monkeypatch: pytest.MonkeyPatch, quota: float | None, set_by_user: str, threads: str | None
) -> None:
    monkeypatch.setattr(cpu_threads, "cpu_quota", lambda: quota)
    monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    assert cpu_threads.set_variables().set.get("OMP_NUM_THREADS") == threads
    assert os.environ["OMP_NUM_THREADS"] == (threads or set_by_user)


V1 = "4:memory:/a\n3:cpu,cpuacct:/docker/x\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("", {"cpu.max": "200000 100000\n"}, None),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../b\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (V1, {"cpu,cpuacct/docker/x/cpu.cfs_quota_us": "400000\n"}, 4.0),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "400000\n"}, 4.0),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n"}, None),
        ("0::/\n", {"cpu.max": "0 0\n"}, None),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
    ],
)
def test_quota_of_control_groups(
    tmp_path: Path, groups: str, files: Mapping[str, str], quota: float | None
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if path.name == "cpu.cfs_quota_us":
            path.with_name("cpu.cfs_period_us").write_text("100000\n")
    assert cpu_threads.cpu_quota(tmp_path) == quota
