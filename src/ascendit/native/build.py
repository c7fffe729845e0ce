"""Compile the C++ sources of this folder on first use, into a cache.

Failures never raise: without a compiler or the required instructions, the reason is logged once and callers
use PyTorch. If the cache cannot be used, or others can write to it, that is logged once with a fix, and a
folder among the temporary files is used. Files of former versions and compilers stay in the cache, which can
be deleted at any time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendit import environment
from ascendit.native.cache import SHARED, CacheError, CacheFolder, open_folder

log = logging.getLogger("ascendit")

SOURCES = Path(__file__).parent
CACHE = Path("ascendit/native")
"""In the folder of `environment.cache_home`."""
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
    "attention_int8": frozenset(
        {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni", "avx512vbmi"}
    ),
    "elementwise": frozenset(),
    "encode": frozenset(),
    "ggml": frozenset(),
    "linear": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni", "avx512vbmi"}),
}
"""Source -> required processor features, by their names in Linux."""
COMPILE_SECONDS = 1200.0
"""A quantizer takes 10 s, and minutes on a busy machine."""
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
        library = _library(name)
        built = Built(library, f"compiled from native/{name}.cpp{_instructions(library)}")
    except (OSError, RuntimeError, subprocess.SubprocessError, _Unavailable) as e:
        built = Built(None, str(e).strip() or type(e).__name__)
        log.info("native/%s.cpp is not used: %s; the PyTorch path runs instead", name, built.reason)
    _requested[name] = built
    return built


_requested: dict[str, Built] = {}


def describe_requested() -> str:
    """Which compiled libraries this process uses, and which PyTorch replaces; "" if it needs none.

    The two round differently, so a video depends on it.
    """
    items = sorted(_requested.items())
    compiled = ", ".join(name for name, built in items if built.library is not None)
    replaced = [f"PyTorch for {name}: {built.reason}" for name, built in items if built.library is None]
    return "; ".join(filter(None, (compiled and f"compiled {compiled}", *replaced)))


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


def unavailable(name: str) -> str:
    """Why `<name>.cpp` cannot be compiled for this machine, as far as is known before; else ""."""
    if missing := sorted(REQUIRED_FEATURES[name] - processor_flags()):
        return f"this processor has no {', '.join(missing)}"
    if find_compiler() is None:
        return f"no C++ compiler ({', '.join(COMPILERS)}) on PATH"
    if os.name != "posix":
        return f"compiled kernels are not available on {platform.system()}"
    return ""


def _library(name: str) -> ctypes.CDLL:
    """Load a library from the cache, compiling it if it is not there."""
    compiler = find_compiler()
    if (reason := unavailable(name)) or compiler is None:
        raise _Unavailable(reason)
    source, file = SOURCES / f"{name}.cpp", f"{name}-{_key(name, compiler)}.so"
    problem = ""
    for folder in (cache_folder, temporary_folder):
        try:
            with open_folder(folder()) as cache:
                return _from_cache(cache, file, source, compiler)
        except CacheError as e:
            problem = str(e)
            _report(problem, e.fix)
    raise _Unavailable(problem)


def _from_cache(cache: CacheFolder, file: str, source: Path, compiler: str) -> ctypes.CDLL:
    library = cache.load(file, logging.DEBUG)
    if library is None:
        with cache.lock(source.stem):
            library = cache.load(file)  # another process may have compiled it
            if library is None:
                cache.store(file, _compile(compiler, source, OPTIONAL_FLAGS))
                library = cache.load(file)
    if library is None:
        raise CacheError(f"{cache.path / file}: changed after it was written")
    return library


def cache_folder() -> Path:
    """The folder of compiled libraries. Raises CacheError if this user has no home folder."""
    try:
        return environment.cache_home() / CACHE
    except RuntimeError as e:
        raise CacheError(f"~/.cache: {e}") from e


def temporary_folder() -> Path:
    """The folder to use when `cache_folder` is unusable."""
    return Path(tempfile.gettempdir(), f"ascendit-{os.geteuid()}", "native").absolute()


@functools.cache
def _report(problem: str, fix: str) -> None:
    log.warning("compiled kernels are not cached in %s; try: %s", problem, fix)


def _key(name: str, compiler: str) -> str:
    """Name of all that a library depends on: source, headers, flags, compiler, processor."""
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, timeout=30).stdout
    key = hashlib.sha256(version + repr(("sha256", FLAGS, EXTRA_FLAGS.get(name), OPTIONAL_FLAGS)).encode())
    for path in (SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h"))):
        key.update(path.read_bytes())
    key.update(" ".join(sorted(processor_flags())).encode())
    return key.hexdigest()[:16]


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A temporary folder that others cannot replace. Raises _Unavailable if they can."""
    parent = os.stat(tempfile.gettempdir())
    if parent.st_uid not in (0, os.geteuid()) or (
        parent.st_mode & SHARED and not parent.st_mode & stat.S_ISVTX
    ):
        raise _Unavailable(f"others can replace files in {tempfile.gettempdir()}; try: chmod +t on it")
    with tempfile.TemporaryDirectory(prefix="ascendit-") as folder:
        yield Path(folder)


def find_compiler() -> str | None:
    """The first of COMPILERS on PATH, or None."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _compile(compiler: str, source: Path, optional: tuple[tuple[str, ...], ...]) -> bytes:
    """The library, compiled with the first working set of `optional` flags."""
    log.info("compiling %s once, with %s", source.name, compiler)
    problem = ""
    with _private_folder() as folder:
        target = folder / f"{source.stem}.so"
        for flags in optional:
            command = [compiler, *FLAGS, *EXTRA_FLAGS.get(source.stem, ()), *flags]
            command += [str(source), "-o", str(target)]
            result = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS
            )
            if result.returncode == 0:
                return target.read_bytes()
            problem = problem or (result.stderr.strip().splitlines() or ["?"])[0]
    raise _Unavailable(f"{compiler} failed: {problem}")


@functools.cache
def processor_flags() -> frozenset[str]:
    """Processor features listed by Linux, and the architecture; only the architecture on other systems."""
    return frozenset(_processor_info("flags", "features").split()) | {platform.machine()}


def processor_name() -> str:
    """The model of the processor, as `AMD EPYC 9R14`; the architecture if the system does not report it."""
    return _processor_info("model name") or platform.processor() or platform.machine()


def _processor_info(*keys: str) -> str:
    """The first value in /proc/cpuinfo of one of these keys, "" without one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in pairs if key.strip().lower() in keys), "")
