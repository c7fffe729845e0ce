"""A stub CANN: libraries with every symbol that torch_npu needs, so that it can be imported on a CPU.

    stub = build([*wheel.glob("torch_npu/**/*.so")], cache)     # gcc, some seconds, once per input
    env["LD_LIBRARY_PATH"] = str(stub)

`runtime.c` has the functions with results. The others are generated from the libraries: their undefined
symbols and the names that they pass to dlsym. The stub contains no part of CANN.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from fake_cann import elf

RUNTIME = Path(__file__).with_name("runtime.c")
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-std=gnu11", "-O1", "-fPIC", "-shared", "-w")
DLSYM_NAME = rb"(?:acl[a-z]*[A-Z]|Hccl[A-Z])\w{2,}"
"""Names for dlsym. Fragments of longer names may match too; they do no harm."""
DLOPEN_LIBRARIES = ("libopapi.so", "libnnopbase.so", "libascend_hal.so")
"""Libraries for dlopen; the first has the kernels."""


class NoCompiler(Exception):
    """There is no C compiler, or it fails; the text says which."""


def build(libraries: Iterable[Path], cache: Path) -> Path:
    """A folder with the stub under every library name that `libraries` need. Raises NoCompiler."""
    parsed = [elf.read(path) for path in libraries]
    source = generate(symbols(parsed))
    files = library_names(parsed)
    key = hashlib.sha256("\0".join([source, RUNTIME.read_text(), *files, *FLAGS]).encode()).hexdigest()[:16]
    target = cache / f"fake-cann-{key}"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as new:
            folder = Path(new) / "stub"
            folder.mkdir()
            _compile(source, folder / "libfake_cann.so")
            for name in files:
                (folder / name).symlink_to("libfake_cann.so")
            try:
                os.rename(folder, target)
            except OSError:  # another process was first
                if not target.is_dir():
                    raise
    return target


def symbols(libraries: Sequence[elf.Library]) -> list[str]:
    """Every name that the libraries need from CANN, its collectives and its transformer library, sorted."""
    process = ctypes.CDLL(None)  # libc, libm, Python
    names: set[str] = set()
    for library in libraries:
        c_names = {n for n in library.undefined if not n.startswith("_Z") and not _has(process, n)}
        names |= {n for n in c_names if re.match(r"acl|Hccl|Msprof|rt[A-Z]", n)}
        names |= {n for n in library.undefined if n.startswith("_ZN3atb")}
        names |= library.strings(DLSYM_NAME)
    kernels = {n for n in names if re.match("aclnn[A-Z]", n) and not n.endswith("GetWorkspaceSize")}
    return sorted(names | {f"{n}GetWorkspaceSize" for n in kernels})  # some names are composed at run time


def library_names(libraries: Sequence[elf.Library]) -> list[str]:
    """File names that the libraries need and that are neither among them nor on this machine."""
    needed = {n for library in libraries for n in library.needed} - {library.name for library in libraries}
    absent = {n for n in needed if not n.startswith(("libtorch", "libc10")) and not _loads(n)}
    return sorted(absent | set(DLOPEN_LIBRARIES))


def generate(names: Sequence[str]) -> str:
    """C source: a function that returns 0 (success) for each name that runtime.c does not define."""
    defined = set(re.findall(r"^\w[\w \*]*?\b\*?(\w+)\(", RUNTIME.read_text(), re.MULTILINE))
    lines = ["void fake_cann_record(const char *format, ...);"]
    for i, name in enumerate(n for n in names if n not in defined):
        body = f'fake_cann_record("{_kind(name)} {name}");' if _kind(name) else ""
        lines.append(f'int stub_{i}(void) __asm__("{name}"); int stub_{i}(void) {{ {body} return 0; }}')
    return "\n".join(lines) + "\n"


def _kind(name: str) -> str:
    """Its event in the trace; "" for the first half of a launch and for functions without effect."""
    if name.endswith("GetWorkspaceSize") or name.startswith(("Msprof", "aclprof", "aclopSetAttr")):
        return ""
    if name in ("aclAppLog", "aclSetTensorFormat", "aclSetTensorShape", "aclSetTensorDescName"):
        return ""
    return "launch" if re.match(r"acl(nn|Rfft|Stft)", name) else "stub"


def _compile(source: str, target: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NoCompiler(f"no C compiler ({', '.join(COMPILERS)}) on PATH")
    stubs = target.with_name("stubs.c")
    stubs.write_text(source)
    command = [compiler, *FLAGS, str(RUNTIME), str(stubs), "-o", str(target), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise NoCompiler(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['?'])[0]}")


def _has(process: ctypes.CDLL, name: str) -> bool:
    try:
        process[name]
    except AttributeError:
        return False
    return True


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
