"""Compile the C++ sources of this folder on first use, into a cache. Nothing here may make an import fail.

No compiler, a processor without the instructions, a cache that cannot be written: the reason is logged
once, and the callers keep their PyTorch path. They need the compiler's own headers only.
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

HERE = Path(__file__).parent
CACHE = Path("~/.cache/ascendit/native")
COMPILERS = ("g++", "clang++", "c++")
FLAGS: tuple[str, ...] = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-w"),
    *("-fno-math-errno", "-fno-trapping-math"),  # or roundings do not become vector instructions
)
EXTRA: dict[str, tuple[str, ...]] = dict.fromkeys(("elementwise", "encode"), ("-ffp-contract=off",))
"""Source -> more flags. Off: a product and a sum round twice, as in PyTorch."""
OPTIONAL: tuple[tuple[str, ...], ...] = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
"""Tried one after the other, for compilers that lack one. Without OpenMP there is one thread only."""
NEEDS: dict[str, frozenset[str]] = {
    "attention": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}),
    "elementwise": frozenset(),
    "encode": frozenset(),
    "linear": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni", "avx512vbmi"}),
}
"""Source -> what the processor must have, as Linux spells it."""
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


@dataclass(frozen=True)
class Built:
    """A loaded library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def native(name: str) -> Built:
    """The compiled `<name>.cpp`. Never raises; the answer is remembered for the process."""
    try:
        library = ctypes.CDLL(str(_compiled(name)))
        built = Built(library, f"compiled from native/{name}.cpp{_instructions(library)}")
    except (OSError, RuntimeError, subprocess.SubprocessError, _Unavailable) as e:
        built = Built(None, str(e).strip() or type(e).__name__)
        log.info("native/%s.cpp is not used: %s; the PyTorch path runs instead", name, built.reason)
    return built


def declared(built: Built, signatures: Mapping[str, str], result: Any = ctypes.c_int64) -> Built:
    """The same, with the types of its functions, which all return `result`.

    `signatures`: function -> its arguments, a letter each: p pointer, i int64, f float32.
    """
    if built.library is not None:
        for name, kinds in signatures.items():
            function = getattr(built.library, name)
            function.argtypes = [_TYPES[kind] for kind in kinds]
            function.restype = result
    return built


def _instructions(library: ctypes.CDLL) -> str:
    """What a library says of itself, if it does: which instructions were chosen when it was compiled."""
    if not hasattr(library, "instructions"):
        return ""
    library.instructions.restype = ctypes.c_char_p
    return f", {library.instructions().decode()}"


class _Unavailable(Exception):
    """Why there can be no native library here."""


def _compiled(name: str) -> Path:
    lacking = sorted(NEEDS[name] - processor_flags())
    if lacking:
        raise _Unavailable(f"this processor has no {', '.join(lacking)}")
    compiler = find_compiler()
    if compiler is None:
        raise _Unavailable(f"no C++ compiler ({', '.join(COMPILERS)}) on PATH")
    source = HERE / f"{name}.cpp"
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, timeout=30).stdout
    key = hashlib.sha256(version + repr((FLAGS, EXTRA.get(name), OPTIONAL)).encode())
    for path in (source, *sorted(HERE.glob("*.h"))):
        key.update(path.read_bytes())
    key.update(" ".join(sorted(processor_flags())).encode())
    target = CACHE.expanduser() / f"{name}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, source, target, OPTIONAL)
    return target


def find_compiler() -> str | None:
    """The first of COMPILERS that is on PATH."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _compile(compiler: str, source: Path, target: Path, optional: tuple[tuple[str, ...], ...]) -> None:
    """With the first of the `optional` flags that work. Under a name of its own, then renamed: two processes
    may do this at once."""
    log.info("compiling %s once, with %s", source.name, compiler)
    handle, new = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    problem = "?"
    try:
        for flags in optional:
            command = [compiler, *FLAGS, *EXTRA.get(source.stem, ()), *flags, str(source), "-o", new]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
            if done.returncode == 0:
                os.chmod(new, 0o755)
                os.replace(new, target)
                return
            problem = problem if problem != "?" else (done.stderr.strip().splitlines() or ["?"])[0]
        raise _Unavailable(f"{compiler} failed: {problem}")
    finally:
        Path(new).unlink(missing_ok=True)


@functools.cache
def processor_flags() -> frozenset[str]:
    """Instruction sets as Linux lists them, and the architecture. Empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    for line in text.splitlines():
        word, _, flags = line.partition(":")
        if word.strip().lower() in ("flags", "features"):
            return frozenset(flags.split()) | {platform.machine()}
    return frozenset({platform.machine()})
