"""Compile the C++ sources of this folder on first use, into a cache.

Failures never raise: without a compiler, the required instructions or a writable cache, the reason is logged
once and callers use PyTorch. The sources need only the headers of the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

log = logging.getLogger("ascendit")

SOURCES = Path(__file__).parent
CACHE = Path("~/.cache/ascendit/native")
COMPILERS = ("g++", "clang++", "c++")
FLAGS: tuple[str, ...] = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-w"),
    *("-fno-math-errno", "-fno-trapping-math"),  # otherwise rounding is not vectorized
)
EXTRA_FLAGS: dict[str, tuple[str, ...]] = dict.fromkeys(("elementwise", "encode"), ("-ffp-contract=off",))
"""Source -> additional flags. This one rounds a product and a sum separately, as PyTorch does."""
OPTIONAL_FLAGS: tuple[tuple[str, ...], ...] = (
    ("-march=native", "-fopenmp"),
    ("-march=native",),
    ("-fopenmp",),
    (),
)
"""Sets of flags, tried in this order, since some compilers lack a flag. Without OpenMP the kernels are
single-threaded."""
REQUIRED_FEATURES: dict[str, frozenset[str]] = {
    "attention": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}),
    "elementwise": frozenset(),
    "encode": frozenset(),
    "linear": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni", "avx512vbmi"}),
}
"""Source -> required processor features, by their names in Linux."""
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


@dataclass(frozen=True)
class Built:
    """A loaded library, or the reason why it is unavailable."""

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def native(name: str) -> Built:
    """The compiled `<name>.cpp`. Never raises; cached for the process."""
    try:
        library = ctypes.CDLL(str(_compiled(name)))
        built = Built(library, f"compiled from native/{name}.cpp{_instructions(library)}")
    except (OSError, RuntimeError, subprocess.SubprocessError, _Unavailable) as e:
        built = Built(None, str(e).strip() or type(e).__name__)
        log.info("native/%s.cpp is not used: %s; the PyTorch path runs instead", name, built.reason)
    return built


def declared(built: Built, signatures: Mapping[str, str], result: Any = ctypes.c_int64) -> Built:
    """Declare the types of the functions of a library, which all return `result`; return `built`.

    `signatures`: function -> one letter per argument: p pointer, i int64, f float32.
    """
    if built.library is not None:
        for name, letters in signatures.items():
            function = getattr(built.library, name)
            function.argtypes = [_TYPES[letter] for letter in letters]
            function.restype = result
    return built


def _instructions(library: ctypes.CDLL) -> str:
    """The instruction set that a library was compiled for, if it has a function that returns it."""
    if not hasattr(library, "instructions"):
        return ""
    library.instructions.restype = ctypes.c_char_p
    return f", {library.instructions().decode()}"


class _Unavailable(Exception):
    """The reason why there is no native library on this machine."""


def _compiled(name: str) -> Path:
    missing = sorted(REQUIRED_FEATURES[name] - processor_flags())
    if missing:
        raise _Unavailable(f"this processor has no {', '.join(missing)}")
    compiler = find_compiler()
    if compiler is None:
        raise _Unavailable(f"no C++ compiler ({', '.join(COMPILERS)}) on PATH")
    source = SOURCES / f"{name}.cpp"
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, timeout=30).stdout
    key = hashlib.sha256(version + repr((FLAGS, EXTRA_FLAGS.get(name), OPTIONAL_FLAGS)).encode())
    for path in (source, *sorted(SOURCES.glob("*.h"))):
        key.update(path.read_bytes())
    key.update(" ".join(sorted(processor_flags())).encode())
    target = CACHE.expanduser() / f"{name}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, source, target, OPTIONAL_FLAGS)
    return target


def find_compiler() -> str | None:
    """The first of COMPILERS on PATH, or None."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _compile(compiler: str, source: Path, target: Path, optional: tuple[tuple[str, ...], ...]) -> None:
    """Compile with the first working set of `optional` flags.

    The library is written under a temporary name and then renamed, since two processes may compile at once.
    """
    log.info("compiling %s once, with %s", source.name, compiler)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    problem = "?"
    try:
        for flags in optional:
            command = [
                compiler,
                *FLAGS,
                *EXTRA_FLAGS.get(source.stem, ()),
                *flags,
                str(source),
                "-o",
                temporary,
            ]
            result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
            if result.returncode == 0:
                os.chmod(temporary, 0o755)
                os.replace(temporary, target)
                return
            problem = problem if problem != "?" else (result.stderr.strip().splitlines() or ["?"])[0]
        raise _Unavailable(f"{compiler} failed: {problem}")
    finally:
        Path(temporary).unlink(missing_ok=True)


@functools.cache
def processor_flags() -> frozenset[str]:
    """Processor features listed by Linux, and the architecture; only the architecture on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, flags = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(flags.split()) | {platform.machine()}
    return frozenset({platform.machine()})
