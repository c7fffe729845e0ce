"""Check the requirements of ascendit on this machine, one row per requirement.

Probes are independent: an error in one becomes a row, and the others still run. Libraries that may crash the
process, or take seconds to import, are imported in a child process.
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
from ascendit.device.cpu_threads import set_variables
from ascendit.device.memory import host_memory, total_memory
from ascendit.doctor import npu
from ascendit.doctor.probe import (
    DoctorReport,
    Probe,
    ProbeRow,
    Status,
    at_least,
    failed_row,
    read_text,
    run_child,
)
from ascendit.native.build import cache_folder, native, processor_name, temporary_folder
from ascendit.native.cache import CacheError, open_folder
from ascendit.report import counted
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
    "tokenizers": "0.22",
    "accelerate": "1.0",
    "filelock": "3.13",
    "ftfy": "6.1",
    "pydantic": "2.7",
    "typer": "0.16",
    "rich": "13.7",
}
"""Oldest supported versions, the same as in `pyproject.toml`."""
OPTIONAL_LIBRARIES = {
    "gguf": ("0.17", "to read GGUF files"),
    "matplotlib": ("3.8", "for plots in reports"),
}
"""Library of an extra -> oldest supported version, use."""
MEMORY_GIB = 2.0
DISK_GIB = 1.0
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm")
GIB = 2**30


def examine(probes: Sequence[Probe] | None = None) -> DoctorReport:
    """Run every probe. Does not raise: a probe that raises becomes a row."""
    rows: list[ProbeRow] = []
    for probe in PROBES if probes is None else probes:
        try:
            rows += probe()
        except (Exception, SystemExit) as e:
            name = probe.__name__.strip("_").replace("_", " ")
            rows.append(ProbeRow(name, f"{type(e).__name__}: {e}".splitlines()[0], status="probe failed"))
    return DoctorReport(tuple(rows))


def _python() -> list[ProbeRow]:
    version = platform.python_version()
    status: Status = "ok" if at_least(version, PYTHON) else "too old"
    fix = f"install Python {PYTHON} or newer"
    row = ProbeRow("Python", version, needed=f">= {PYTHON}", status=status, fix=fix, required=True)
    return [row, ProbeRow("platform", f"{platform.system()} {platform.release()} {platform.machine()}")]


def _cpu() -> list[ProbeRow]:
    text = read_text(Path("/proc/cpuinfo"))
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    useful = [name for name in CPU_FEATURES if flags and name in flags[1].split()]
    processor = f"{os.cpu_count()} x {processor_name()}"
    return [ProbeRow("CPU", f"{processor}; {' '.join(useful) or 'features unknown'}")]


def _memory() -> list[ProbeRow]:
    total = total_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = host_memory()
    free = total if free is None else min(free, total)
    detected, needed = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", f"{MEMORY_GIB:g} GiB for the demo"
    status: Status = "ok" if free >= MEMORY_GIB * GIB else "too little"
    return [ProbeRow("memory", detected, needed=needed, status=status, fix="close other programs")]


def _disk() -> list[ProbeRow]:
    free = shutil.disk_usage(Path.cwd()).free
    writable = os.access(Path.cwd(), os.W_OK)
    detected = f"{free / GIB:.1f} GiB free" + ("" if writable else ", not writable")
    status: Status = "ok" if free >= DISK_GIB * GIB and writable else "too little"
    fix = "work in another folder, or write to another one with -o"
    return [ProbeRow("this folder", detected, needed=f"{DISK_GIB:g} GiB, writable", status=status, fix=fix)]


def _compiler() -> list[ProbeRow]:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    row = ProbeRow(
        "C++ compiler", compiler or "none", needed="optional, for native code", fix="install g++ or clang++"
    )
    return [row if compiler else replace(row, status="absent")]


def _ascendit() -> list[ProbeRow]:
    version = installed("ascendit").get("ascendit", "not installed, run from source")
    package = ProbeRow("ascendit", f"{version} in {Path(ascendit.__file__).parent}")
    fix = "reinstall ascendit; in a git checkout, also fetch its large files"
    demo = ProbeRow("demo model", "present", needed="for --demo", fix=fix)
    if not (DEMO / "model_index.json").is_file():
        demo = replace(demo, detected="none", status="missing")
    return [package, demo]


def _libraries() -> list[ProbeRow]:
    versions, rows = installed(*PYTHON_LIBRARIES), []
    for name, needed in PYTHON_LIBRARIES.items():
        version = versions.get(name)
        status: Status = "missing" if version is None else "ok" if at_least(version, needed) else "too old"
        label = "PyAV" if name == "av" else name
        fix = f'pip install "{name}>={needed}"'
        row = ProbeRow(label, version or "none", needed=f">= {needed}", status=status, fix=fix, required=True)
        rows.append(row)
    return rows + _optional_libraries()


def _optional_libraries() -> list[ProbeRow]:
    versions, rows = installed(*OPTIONAL_LIBRARIES), []
    for name, (needed, use) in OPTIONAL_LIBRARIES.items():
        version, fix = versions.get(name), f'pip install "{name}>={needed}"'
        status: Status = "absent" if version is None else "ok" if at_least(version, needed) else "too old"
        needs = f"optional, >= {needed}, {use}"
        rows.append(ProbeRow(name, version or "none", needed=needs, status=status, fix=fix))
    return rows


def _torch_imports() -> list[ProbeRow]:
    if find_spec("torch") is None:
        return []  # reported by the row of the library
    row = ProbeRow("import torch", "works", needed="works", required=True)
    answer = _torch()
    if "error" in answer:
        return [failed_row(row, answer, fix="pip install --force-reinstall torch")]
    row = replace(
        row, detected=f"works, {counted(answer['threads'], 'thread')}, CPU kernels {answer['capability']}"
    )
    if find_spec("torch_npu") is None:
        return [row]
    with_plugins = run_child("import json, torch; print(json.dumps({}))", plugins=True)
    if "error" in with_plugins:  # torch loads torch_npu automatically, which needs CANN
        fix = f"{npu.source_line()}, or export TORCH_DEVICE_BACKEND_AUTOLOAD=0 to run without the NPU"
        row = failed_row(row, {**with_plugins, "error": f"with torch_npu: {with_plugins['error']}"}, fix=fix)
    return [row]


def _video_codec() -> list[ProbeRow]:
    row = ProbeRow("H.264 (libx264)", "present", needed="to write .mp4", required=True)
    fix = "pip install --force-reinstall av"
    if find_spec("av") is None:
        return [replace(row, detected="no PyAV", status="missing", fix=fix)]
    answer = run_child("import json, av; print(json.dumps({'x264': 'libx264' in av.codecs_available}))")
    if "error" in answer:
        return [failed_row(row, answer, fix=fix)]
    return [row if answer["x264"] else replace(row, detected="none", status="missing", fix=fix)]


def _cuda() -> list[ProbeRow]:
    row = ProbeRow("CUDA device", "none", needed="optional", status="absent", fix="not needed on the CPU")
    answer = _torch() if find_spec("torch") else {}
    if not answer.get("cuda"):
        return [row]
    names = ", ".join(f"{name} {size / GIB:.0f} GiB" for name, size in answer["cuda"])
    return [replace(row, detected=names, status="ok", fix="")]


NATIVE_SOURCES = {
    "encode": "quantizing weights",
    "attention": "attention on a CPU",
    "attention_int8": "attention with int8 scores on a CPU, on request",
    "linear": "quantized matmuls on a CPU",
    "elementwise": "norms, RoPE and GELU on a CPU",
    "ggml": "reading GGUF files",
}
"""Source in `native/` -> its use."""


def _cache() -> list[ProbeRow]:
    row = ProbeRow("kernel cache", "", needed="a folder that only you can write to")
    try:
        with open_folder(cache_folder()) as cache:
            sizes = [path.stat().st_size for path in cache.path.glob("*.so")]
            detected = f"{len(sizes)} libraries, {sum(sizes) / 2**20:.1f} MiB, in {cache.path}"
            return [replace(row, detected=detected)]
    except CacheError as e:
        detected = f"not used, {temporary_folder()} instead: {e}"
        return [replace(row, detected=detected, status="broken", fix=e.fix)]


def compiled_kernels() -> list[ProbeRow]:
    """One row per native source. Compiles those that are not compiled yet, which takes seconds."""
    rows = []
    for name, use in NATIVE_SOURCES.items():
        built = native(name)
        row = ProbeRow(f"kernel: {name}", f"native, {built.reason}", needed=f"optional, for {use}")
        if built.library is None:
            detected = f"PyTorch instead: {built.reason}"
            row = replace(row, detected=detected, status="absent", fix="not needed: it is slower")
        rows.append(row)
    return rows


def _threads() -> list[ProbeRow]:
    """How many threads there are, how they wait, and the OpenMP runtimes in use."""
    if find_spec("torch") is None:
        return []
    row = ProbeRow("threads", "", needed="import ascendit before torch")
    answer = run_child(_THREADS_CODE)
    if "error" in answer:
        return [failed_row(row, answer, fix="ascendit doctor --json")]
    runtimes = ", ".join(answer["runtimes"]) or "unknown"
    detected = f"{counted(answer['threads'], 'thread')} on {set_variables()}; OpenMP: {runtimes}"
    return [replace(row, detected=detected, data=answer)]


_THREADS_CODE = """
import json, re, ascendit, torch
from ascendit.native.build import native
torch.ones(9).sum()
native("elementwise")
try: maps = open("/proc/self/maps").read()
except OSError: maps = ""
runtimes = sorted(set(re.findall(r"/((?:lib)?(?:gomp|iomp|omp)[^/\\s]*)$", maps, re.M)))
print(json.dumps({"threads": torch.get_num_threads(), "runtimes": runtimes}))
"""


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
    return run_child(_TORCH_CODE)


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
    _cache,
    compiled_kernels,
    _threads,
    _cuda,
    *npu.NPU_PROBES,
)
