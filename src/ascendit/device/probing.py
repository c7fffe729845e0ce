"""What the probes of `doctor` share: versions, files that may be absent, and a Python of its own.

A library that can take the process down with it, or hang, is imported in a child process with a time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ascendit.device import environment
from ascendit.device.report import Row

PROBE_SECONDS = 120.0
COMMAND_SECONDS = 20.0


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) for 2.13.0+cpu."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(n) for n in found[0].split(".")) if found else ()


def at_least(found: str, needed: str) -> bool:
    """Compare versions by their leading numbers: 2.13.0+cpu is at least 2.9."""
    return numbers(found) >= numbers(needed)


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read(path: Path) -> str:
    """The text of a file, "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def command(words: Sequence[str]) -> str:
    """What a command prints, "" where it is absent, fails or takes too long."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def child(code: str, *, plugins: bool = False) -> dict[str, Any]:
    """The JSON that `code` prints last in a Python of its own, or `{"error": ...}`. Warnings are dropped.

    `plugins`: let `import torch` load torch_npu by itself, as it does where nothing forbids it.
    """
    env = None if plugins else environment.without_device_plugins()
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            env=env,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {PROBE_SECONDS:g} s", "late": True}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        return {"error": lines[-1]}
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def failed(row: Row, told: dict[str, Any], *, fix: str) -> Row:
    """The row for a child process that did not do what it should."""
    if told.get("late"):
        again = "run ascendit doctor again when the machine is less busy"
        return replace(row, found=told["error"], status="probe failed", fix=again)
    return replace(row, found=told["error"], status="broken", fix=fix)
