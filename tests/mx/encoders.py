"""Every implementation of the encoder that some machine selects, forced on this one."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from ascendit.mx import encoder, native_encoder, reference
from ascendit.mx.codec import Encoded, encode
from ascendit.native import build

LEVELS = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512bw"}
"""-march -> the processor flag it needs: plain C++, AVX2, AVX-512."""
HARNESS = Path(__file__).resolve().parents[1] / "native" / "encode_main.cpp"
VARIANTS = ("native", *LEVELS, "aarch64", "pytorch")
"""native: compiled for this processor. aarch64: with a cross compiler and an emulator, if installed."""


def reference_encode(x: Tensor, format: str, **options: Any) -> Encoded:
    """`encode` with `mx.reference` only: the same bits, slowly."""
    with mock.patch.object(encoder, "encode_rows", reference.encode_rows):
        return encode(x, format, **options)


def use(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `mx.encode` use this variant, or skip the test. Call `forget` afterwards."""
    encoder.encoder.cache_clear()
    if variant == "native":
        if build.native("encode").library is None:
            pytest.skip(build.native("encode").reason)
        return
    monkeypatch.setattr(
        native_encoder, "library", {"pytorch": _none, "aarch64": _emulated}.get(variant, _level(variant))
    )
    if variant == "x86-64-v4" and "AVX-512" in build.native("encode").reason:
        pytest.skip("equal to native here")
    if variant != "pytorch" and native_encoder.library().library is None:
        pytest.skip(native_encoder.library().reason)


def forget() -> None:
    encoder.encoder.cache_clear()


def _none() -> build.Built:
    return build.Built(None, "no compiler wanted")


def _level(march: str) -> Any:
    return lambda: _compiled(march)


@cache
def _compiled(march: str) -> build.Built:
    compiler = build.find_compiler()
    if compiler is None or LEVELS.get(march) not in build.processor_flags():
        return build.Built(None, f"no compiler, or no {march} processor")
    target = Path(mkdtemp()) / f"encode-{march}.so"
    flags = ((f"-march={march}", "-fopenmp"),)
    target.write_bytes(build._compile(compiler, build.SOURCES / "encode.cpp", flags))
    return build.declared(build.Built(ctypes.CDLL(str(target)), march), native_encoder.ENCODER_SIGNATURES)


# ---- another processor --------------------------------------------------------------------------


@cache
def _emulated() -> build.Built:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None or platform.machine() == "aarch64":
        return build.Built(None, "no aarch64-linux-gnu-g++, or no qemu-aarch64")
    target = Path(mkdtemp()) / "encode-aarch64"
    flags = [f for f in (*build.FLAGS, *build.EXTRA_FLAGS["encode"]) if f not in ("-shared", "-fPIC")]
    command = [compiler, *flags, "-static", f"-I{build.SOURCES}", str(HARNESS), "-o", str(target)]
    subprocess.run(command, check=True, timeout=300)
    library: Any = Emulated([emulator, str(target)])
    return build.Built(library, "aarch64")


class Emulated:
    """Replaces the library: each call runs a process that receives the memory and returns it."""

    NAMES = (
        "encode_table",
        "encode_choice",
        "encode_rule",
        "encode_dual",
        "encode_rows",
        "search",
        "measure",
        "encode_tiles",
    )

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def prefer_large_pages(self, *arguments: int) -> None:
        """No-op."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.call(name, arguments)

    def call(self, name: str, arguments: tuple[int, ...]) -> int:
        kinds = native_encoder.ENCODER_SIGNATURES[name]
        sizes = _sizes(name, arguments)
        sent = [struct.pack("<qq", self.NAMES.index(name), len(kinds))]
        for kind, value, size in zip(kinds, arguments, sizes, strict=True):
            if kind == "i" or not value:
                sent.append(struct.pack("<qq", 0 if kind == "i" else 2, value))
            else:
                sent += [struct.pack("<qq", 1, size), ctypes.string_at(value, size)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("QEMU")}
        done = subprocess.run(
            self.command, input=b"".join(sent), capture_output=True, env=environment, check=True
        )
        at = 8
        for kind, value, size in zip(kinds, arguments, sizes, strict=True):
            if kind == "p" and value:
                ctypes.memmove(value, done.stdout[at : at + size], size)
                at += size
        assert at == len(done.stdout)
        return int.from_bytes(done.stdout[:8], "little")


def _sizes(name: str, arguments: tuple[int, ...]) -> list[int]:
    """Bytes that each argument of the function points to."""
    typed = name not in ("encode_table", "encode_choice", "search")
    rows, length = arguments[1 + typed], arguments[2 + typed]
    packed = name == "encode_dual" or (
        name in ("encode_table", "encode_choice", "encode_rule", "measure") and arguments[4 + typed] == 2
    )
    by_row = name == "encode_rows" or (name == "measure" and arguments[6])
    values = rows * length * (4 if typed and arguments[1] == 2 else 2)
    qdata = rows * (-(-length // 2) if packed else length)
    blocks = rows * -(-length // 32)
    scale, dual = rows * 4 if by_row else blocks, rows * -(-length // 512) * 4
    behind = {
        "encode_table": {0: values, 6: 0x8000, 7: qdata, 8: blocks, 9: blocks},
        "encode_choice": {0: values, 5: 0x10000, 6: qdata, 7: blocks, 8: blocks},
        "encode_rule": {0: values, 9: qdata, 10: blocks},
        "encode_dual": {0: values, 5: 0x8000, 6: 1024, 7: qdata, 8: blocks, 9: dual},
        "encode_rows": {0: values, 7: qdata, 8: scale},
        "encode_tiles": {0: values, 6: qdata, 7: -(-rows // 128) * -(-length // 128) * 4},
        "search": {0: values, 4: 3 * 0x8000, 5: 25 * 8},
        "measure": {0: values, 7: qdata, 8: scale, 9: dual, 10: 16},
    }[name]
    return [behind.get(i, 0) for i in range(len(arguments))]
