"""The probes on this machine and on simulated ones."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ascendit.doctor import machine, npu, probe
from ascendit.doctor.machine import examine
from ascendit.doctor.probe import Probe, ProbeRow, at_least
from ascendit.native.build import Built
from ascendit.version import installed

ROOT = Path(__file__).resolve().parents[2]


def rows(probe: Probe) -> dict[str, ProbeRow]:
    report = examine([probe])
    assert not [r for r in report.rows if r.status == "probe failed"], report
    return {r.item: r for r in report.rows}


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Answers of child processes, which are not started: by a word of their code, or `""` for all others."""
    answers: dict[str, Any] = {"": {"cuda": [], "capability": "AVX2", "threads": 2}}

    def answer(code: str, *, plugins: bool = False) -> dict[str, Any]:
        if plugins and "plain" in answers:
            return dict(answers["plain"])
        return dict(next((v for k, v in answers.items() if k and k in code), answers[""]))

    machine._torch.cache_clear()
    monkeypatch.setattr(machine, "run_child", answer)
    yield answers
    machine._torch.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, *, versions: dict[str, str | None], specs: set[str]) -> None:
    real_spec = importlib.util.find_spec

    def pretended(*names: str) -> dict[str, str]:
        merged = {**installed(*names), **{n: v for n, v in versions.items() if n in names}}
        return {name: version for name, version in merged.items() if version is not None}

    monkeypatch.setattr(machine, "installed", pretended)
    monkeypatch.setattr(machine, "find_spec", lambda n: True if n in specs else real_spec(n))


def test_a_failing_probe_is_a_row_and_the_others_run():
    def _broken_card() -> list[ProbeRow]:
        raise RuntimeError("dcmi init failed\nsecond line")

    def _leaving() -> list[ProbeRow]:
        sys.exit("bye")

    report = examine([_broken_card, _leaving, lambda: [ProbeRow(item="x", detected="1", required=True)]])
    assert [r.status for r in report.rows] == ["probe failed", "probe failed", "ok"]
    assert report.rows[0].item == "broken card"
    assert report.rows[0].detected == "RuntimeError: dcmi init failed"
    assert report.ok


@pytest.mark.parametrize(
    ("version", "needed", "answer"),
    [
        ("2.13.0+cpu", "2.9", True),
        ("2.9", "2.9", True),
        ("2.8.1", "2.9", False),
        ("13", "13", True),
        ("odd", "1", False),
    ],
)
def test_at_least(version, needed, answer):
    assert at_least(version, needed) is answer


def test_this_machine():
    items = (
        rows(machine._python)
        | rows(machine._cpu)
        | rows(machine._memory)
        | rows(machine._disk)
        | rows(machine._ascendit)
    )
    assert items["Python"].status == "ok" and items["Python"].detected.startswith("3.")
    assert "GiB free" in items["memory"].detected and "GiB free" in items["this folder"].detected
    assert {"platform", "CPU", "ascendit", "demo model"} <= set(items)
    libraries = rows(machine._libraries)
    assert {"torch", "diffusers", "transformers", "safetensors", "PyAV"} <= set(libraries)
    optional = {name: libraries.pop(name) for name in machine.OPTIONAL_LIBRARIES}
    assert all(r.status == "ok" and r.required for r in libraries.values())
    assert all(r.status in ("ok", "absent") and not r.required for r in optional.values())
    assert {"accelerate", "ftfy", "typer", "rich", "filelock"} <= set(libraries)


def test_the_minimum_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(d.split(">=") for d in project["dependencies"])
    assert bounds == machine.PYTHON_LIBRARIES
    extras = dict(
        d.split(">=") for name in ("gguf", "report") for d in project["optional-dependencies"][name]
    )
    assert {name: needed for name, (needed, _) in machine.OPTIONAL_LIBRARIES.items()} == extras
    assert project["requires-python"] == f">={machine.PYTHON}"


def test_a_missing_and_an_old_library_are_reported(monkeypatch):
    pretend(monkeypatch, versions={"diffusers": None, "torch": "2.8.0"}, specs=set())
    items = rows(machine._libraries)
    assert (items["diffusers"].status, items["torch"].status) == ("missing", "too old")
    assert items["torch"].fix == 'pip install "torch>=2.9"'
    assert not examine([machine._libraries]).ok


def test_the_answer_of_a_child_process():
    assert probe.run_child("print('noise'); print('{\"a\": 1}')") == {"a": 1}
    assert probe.run_child(
        "import os; print('{\"v\": \"' + os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] + '\"}')"
    ) == {"v": "0"}
    assert probe.run_child("raise ValueError('bad')") == {"error": "ValueError: bad"}
    assert probe.run_child("import os; os.kill(os.getpid(), 11)")["error"] == "ended with code -11"


def test_a_child_that_hangs(monkeypatch):
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.2)
    assert probe.run_child("import time; time.sleep(60)") == {"error": "no answer in 0.2 s", "late": True}


def test_torch_works(child):
    row = rows(machine._torch_imports)["import torch"]
    assert row.status == "ok" and row.detected == "works, 2 threads, CPU kernels AVX2"
    assert rows(machine._cuda)["CUDA device"].status == "absent"


def test_torch_is_broken(child):
    child[""] = {"error": "ImportError: libcudart.so.12"}
    report = examine([machine._torch_imports, machine._cuda])
    assert report.rows[0].status == "broken" and report.rows[0].detected == "ImportError: libcudart.so.12"
    assert not report.ok


def test_torch_is_slow(child):
    child[""] = {"error": "no answer in 120 s", "late": True}
    report = examine([machine._torch_imports])
    assert report.rows[0].status == "probe failed" and "less busy" in report.rows[0].fix
    assert not report.ok


def test_cuda(child):
    child[""] = {"cuda": [["H200", 139 * 2**30]], "capability": "AVX512", "threads": 8}
    row = rows(machine._cuda)["CUDA device"]
    assert row.status == "ok" and row.detected == "H200 139 GiB"


def test_codec(child):
    child["x264"] = {"x264": False}
    assert rows(machine._video_codec)["H.264 (libx264)"].status == "missing"
    child["x264"] = {"x264": True}
    assert rows(machine._video_codec)["H.264 (libx264)"].status == "ok"


def test_torch_npu_without_cann_breaks_torch_itself(child, monkeypatch):
    """`import torch` loads an installed torch_npu."""
    pretend(monkeypatch, versions={}, specs={"torch_npu"})
    child["plain"] = {"error": "ImportError: libhccl.so: cannot open shared object file"}
    row = rows(machine._torch_imports)["import torch"]
    assert row.status == "broken" and "libhccl.so" in row.detected
    assert row.fix.startswith(npu.source_line()) and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in row.fix
    assert not examine([machine._torch_imports]).ok


def test_the_npu_probes_are_separate_probes():
    assert set(npu.NPU_PROBES) < set(machine.PROBES) and len(npu.NPU_PROBES) == 9


# ---- kernels ------------------------------------------------------------------------------------


def test_compiled_kernels_are_listed(monkeypatch):
    reasons = {name: f"compiled from native/{name}.cpp" for name in machine.NATIVE_SOURCES}
    monkeypatch.setattr(machine, "native", lambda name: Built(ctypes.CDLL(None), reasons[name]))
    items = rows(machine.compiled_kernels)
    assert set(items) == {
        f"kernel: {name}"
        for name in ("encode", "attention", "attention_int8", "linear", "elementwise", "ggml")
    }
    assert all(r.status == "ok" and not r.required for r in items.values())
    assert items["kernel: encode"].detected == "native, compiled from native/encode.cpp"


def test_a_kernel_that_cannot_be_compiled_is_reported_and_not_required(monkeypatch):
    monkeypatch.setattr(machine, "native", lambda name: Built(None, "no C++ compiler (g++) on PATH"))
    report = examine([machine.compiled_kernels])
    assert report.ok and {r.status for r in report.rows} == {"absent"}
    assert report.rows[0].detected == "PyTorch instead: no C++ compiler (g++) on PATH"


def test_the_cache_of_kernels(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "cache_folder", lambda: tmp_path / "cache")
    row = rows(machine._cache)["kernel cache"]
    assert row.status == "ok" and row.detected == f"0 libraries, 0.0 MiB, in {tmp_path / 'cache'}"
    (tmp_path / "cache").chmod(0o777)
    row = rows(machine._cache)["kernel cache"]
    assert row.status == "broken" and "others can write to it (mode 0777)" in row.detected
    assert row.fix == f"chmod 700 {tmp_path / 'cache'}" and not row.required


def test_threads_and_how_they_wait():
    """In a new process, which has the variables of this one."""
    row = rows(machine._threads)["threads"]
    assert (
        re.match(r"(1 thread|\d+ threads) on \d+ cores", row.detected) and "OMP_WAIT_POLICY=" in row.detected
    )
    assert row.status == "ok" and row.data["threads"] >= 1
    if sys.platform == "linux":
        assert [name for name in row.data["runtimes"] if "omp" in name]


def test_the_report_shows_the_encoder_that_runs():
    from ascendit.mx import native_encoder

    built = native_encoder.library()
    detected = rows(machine.compiled_kernels)["kernel: encode"].detected
    assert detected == (f"native, {built.reason}" if built.library else f"PyTorch instead: {built.reason}")


def test_every_source_has_a_row():
    from ascendit.native import build

    assert (
        set(machine.NATIVE_SOURCES)
        == set(build.REQUIRED_FEATURES)
        == {p.stem for p in build.SOURCES.glob("*.cpp")}
    )
    assert machine.compiled_kernels in machine.PROBES
