"""Wheels of packages that must not be installed beside torch, in a cache of their own.

An installed torch_npu breaks `import torch` on a machine without CANN, so it is never installed: pip
downloads it, and its files are read from the wheel or unpacked into a folder for a subprocess.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

CACHE = Path("~/.cache/ascendit").expanduser()
TORCH_NPU = "torch_npu==2.13.0"
MINDIESD = "mindiesd==3.1.0"
EINOPS = "einops==0.8.2"
"""MindIE-SD imports it without declaring it."""


class NoWheel(Exception):
    """A wheel is not available; the text has the reason."""


def download(requirement: str, cache: Path = CACHE) -> Path:
    """The wheel of `name==version` for this Python, from the cache or downloaded by pip."""
    folder = cache / "wheels"
    if not (matches := _cached(folder, requirement)):
        folder.mkdir(parents=True, exist_ok=True)
        _pip("download", requirement, "--no-deps", "--only-binary=:all:", "--dest", str(folder))
        matches = _cached(folder, requirement)
    if not matches:
        raise NoWheel(f"pip downloaded no wheel of {requirement}")
    return matches[0]


def _cached(folder: Path, requirement: str) -> list[Path]:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    paths = folder.glob(f"{requirement.replace('==', '-')}-*.whl")
    return [path for path in paths if path.name.split("-")[2] in (python, "py3")]


def unpack(wheels: Sequence[Path], cache: Path = CACHE) -> Path:
    """A folder with the packages of `wheels`, for PYTHONPATH of a subprocess."""
    target = cache / "unpacked" / "+".join("-".join(w.name.split("-")[:2]) for w in wheels)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as new:
            folder = Path(new) / "packages"
            _pip(
                "install",
                "--no-deps",
                "--no-index",
                "--no-compile",
                "--target",
                str(folder),
                *map(str, wheels),
            )
            try:
                os.rename(folder, target)
            except OSError:  # another process was first
                if not target.is_dir():
                    raise
    return target


def read_text(wheel: Path, path: str) -> str:
    """The text of one file in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(path).decode()


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired as e:
        raise NoWheel(f"pip {arguments[0]} {arguments[1]}: no result in 15 minutes") from e
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            done.stderr.strip()
        ]
        raise NoWheel(f"pip {arguments[0]} {arguments[1]}: {errors[-1]}")
