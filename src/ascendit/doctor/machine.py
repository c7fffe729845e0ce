"""Is everything here that ascendit needs? One row per thing: found, needed, status, fix.

Each probe is on its own: what goes wrong in one becomes a row, and the others go on. Libraries that can
take the process down with them, or take seconds, are imported in a child process.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ascendit
from ascendit.checkpoint.hub import DEMO
from ascendit.doctor import npu
from ascendit.doctor.probe import (
    DoctorReport,
    Probe,
    ProbeRow,
    Status,
    at_least,
    child,
    failed,
    read,
)
from ascendit.native.build import native
from ascendit.version import installed

PYTHON = "3.11"
PYTHON_LIBRARIES = {
    "torch": "2.9",
    "diffusers": "0.36",
    "transformers": "4.57",
    "safetensors": "0.4.5",
    "huggingface-hub": "0.34",
    "numpy": "1.26",
    "pillow": "10.1",
    "av": "13",
}
"""Oldest versions that ascendit runs with; the same as in `pyproject.toml`."""
MEMORY_GIB = 2.0
DISK_GIB = 1.0
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm")
GIB = 2**30


def examine(probes: Sequence[Probe] | None = None) -> DoctorReport:
    """Run every probe. Never raises: a probe that fails is a row."""
    rows: list[ProbeRow] = []
    for probe in PROBES if probes is None else probes:
        try:
            rows += probe()
        except (Exception, SystemExit) as e:
            name = probe.__name__.strip("_").replace("_", " ")
            rows.append(ProbeRow(name, f"{type(e).__name__}: {e}".splitlines()[0], status="probe failed"))
    return DoctorReport(tuple(rows))


def _python() -> list[ProbeRow]:
    found = platform.python_version()
    status: Status = "ok" if at_least(found, PYTHON) else "too old"
    fix = f"install Python {PYTHON} or newer"
    row = ProbeRow("Python", found, needed=f">= {PYTHON}", status=status, fix=fix, required=True)
    return [row, ProbeRow("platform", f"{platform.system()} {platform.release()} {platform.machine()}")]


def _cpu() -> list[ProbeRow]:
    text = read(Path("/proc/cpuinfo"))
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    useful = [name for name in CPU_FEATURES if flags and name in flags[1].split()]
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.M)
    name = model[1] if model else platform.processor() or platform.machine()
    return [ProbeRow("CPU", f"{os.cpu_count()} x {name}; {' '.join(useful) or 'features unknown'}")]


def _memory() -> list[ProbeRow]:
    sizes = {
        k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB", read(Path("/proc/meminfo")), re.M)
    }
    total = sizes.get("MemTotal", 0) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = read(Path("/sys/fs/cgroup/memory.max")).strip()
    total = min(total, int(limit)) if limit.isdigit() else total
    free = min(sizes.get("MemAvailable", total), total)
    found, needed = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", f"{MEMORY_GIB:g} GiB for the demo"
    status: Status = "ok" if free >= MEMORY_GIB * GIB else "too little"
    return [ProbeRow("memory", found, needed=needed, status=status, fix="close other programs")]


def _disk() -> list[ProbeRow]:
    free = shutil.disk_usage(Path.cwd()).free
    writable = os.access(Path.cwd(), os.W_OK)
    found = f"{free / GIB:.1f} GiB free" + ("" if writable else ", not writable")
    good = free >= DISK_GIB * GIB and writable
    fix = "work in another folder, or write with -o elsewhere"
    needed = f"{DISK_GIB:g} GiB, writable"
    return [ProbeRow("this folder", found, needed=needed, status="ok" if good else "too little", fix=fix)]


def _compiler() -> list[ProbeRow]:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    row = ProbeRow(
        "C++ compiler", found or "none", needed="optional, for native code", fix="install g++ or clang++"
    )
    return [row if found else replace(row, status="absent")]


def _ascendit() -> list[ProbeRow]:
    version = installed("ascendit").get("ascendit", "not installed, run from source")
    package = ProbeRow("ascendit", f"{version} in {Path(ascendit.__file__).parent}")
    fix = "reinstall ascendit; a checkout needs its large files"
    demo = ProbeRow("demo model", "present", needed="for --demo", fix=fix)
    if not (DEMO / "model_index.json").is_file():
        demo = replace(demo, found="none", status="missing")
    return [package, demo]


def _libraries() -> list[ProbeRow]:
    versions, rows = installed(*PYTHON_LIBRARIES), []
    for name, needed in PYTHON_LIBRARIES.items():
        found = versions.get(name)
        status: Status = "missing" if found is None else "ok" if at_least(found, needed) else "too old"
        label = "PyAV" if name == "av" else name
        fix = f'pip install "{name}>={needed}"'
        row = ProbeRow(label, found or "none", needed=f">= {needed}", status=status, fix=fix, required=True)
        rows.append(row)
    return rows


def _torch_imports() -> list[ProbeRow]:
    if find_spec("torch") is None:
        return []  # the row of the libraries says it
    row = ProbeRow("import torch", "works", needed="works", required=True)
    told = _torch()
    if "error" in told:
        return [failed(row, told, fix="pip install --force-reinstall torch")]
    row = replace(row, found=f"works, {told['threads']} threads, CPU kernels {told['capability']}")
    if find_spec("torch_npu") is None:
        return [row]
    plain = child("import json, torch; print(json.dumps({}))", plugins=True)
    if "error" in plain:  # torch loads torch_npu by itself, and that needs CANN
        fix = f"{npu.source_line()}, or export TORCH_DEVICE_BACKEND_AUTOLOAD=0 to run without the NPU"
        row = failed(row, {**plain, "error": f"with torch_npu: {plain['error']}"}, fix=fix)
    return [row]


def _video_codec() -> list[ProbeRow]:
    row = ProbeRow("H.264 (libx264)", "present", needed="to write .mp4", required=True)
    fix = "pip install --force-reinstall av"
    if find_spec("av") is None:
        return [replace(row, found="no PyAV", status="missing", fix=fix)]
    told = child("import json, av; print(json.dumps({'x264': 'libx264' in av.codecs_available}))")
    if "error" in told:
        return [failed(row, told, fix=fix)]
    return [row if told["x264"] else replace(row, found="none", status="missing", fix=fix)]


def _cuda() -> list[ProbeRow]:
    row = ProbeRow("CUDA device", "none", needed="optional", status="absent", fix="not needed on the CPU")
    told = _torch() if find_spec("torch") else {}
    if not told.get("cuda"):
        return [row]
    names = ", ".join(f"{name} {size / GIB:.0f} GiB" for name, size in told["cuda"])
    return [replace(row, found=names, status="ok", fix="")]


NATIVE_SOURCES = {
    "encode": "quantizing weights",
    "attention": "attention on a CPU",
    "linear": "linear layers on codes on a CPU",
    "elementwise": "norms, RoPE and GELU on a CPU",
}
"""Source in `native/` -> what it is for."""


def compiled_kernels() -> list[ProbeRow]:
    """One row for each source. What was never compiled is compiled now, which takes seconds."""
    rows = []
    for name, use in NATIVE_SOURCES.items():
        built = native(name)
        row = ProbeRow(f"kernel: {name}", f"native, {built.reason}", needed=f"optional, for {use}")
        if built.library is None:
            found = f"PyTorch instead: {built.reason}"
            row = replace(row, found=found, status="absent", fix="not needed: it is slower")
        rows.append(row)
    return rows


_TORCH_CODE = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
cards = [torch.cuda.get_device_properties(i) for i in range(count)]
names = [(card.name, card.total_memory) for card in cards]
capability = torch.backends.cpu.get_cpu_capability()
print(json.dumps({"cuda": names, "capability": capability, "threads": torch.get_num_threads()}))
"""


@cache
def _torch() -> dict[str, Any]:
    return child(_TORCH_CODE)


PROBES: tuple[Probe, ...] = (
    _python,
    _cpu,
    _memory,
    _disk,
    _ascendit,
    _libraries,
    _torch_imports,
    _video_codec,
    _compiler,
    compiled_kernels,
    _cuda,
    *npu.NPU_PROBES,
)
