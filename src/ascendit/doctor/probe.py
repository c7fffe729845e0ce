"""What the probes of `doctor` share: the row that each gives, the report of all rows, and how they look.

They look at versions, at files that may be absent, and into a Python of their own: a library that can take
the process down with it, or hang, is imported in a child process with a time limit.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ascendit import environment

Status = Literal[
    "ok", "missing", "too old", "too little", "broken", "unlisted", "absent", "not checked", "probe failed"
]
"""`unlisted`: works or does not, no public table says. `absent`: not here, and nothing asks for it."""
NO_FIX = ("ok", "absent")
"""Nothing to do about these."""


@dataclass(frozen=True)
class ProbeRow:
    """One line of the report."""

    item: str
    found: str
    needed: str = "-"
    status: Status = "ok"
    fix: str = ""
    required: bool = False
    """Whether nothing runs on the CPU without it."""
    part: str = ""
    """`npu` for what a run on an Ascend card needs."""
    data: dict[str, Any] = field(default_factory=dict)
    """What `found` says, for programs."""


@dataclass(frozen=True)
class DoctorReport:
    """All rows."""

    rows: tuple[ProbeRow, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is here that a run on the CPU needs."""
        return all(row.status == "ok" for row in self.rows if row.required)

    @property
    def npu(self) -> bool | None:
        """Whether an Ascend card can be used; None where there is nothing of one."""
        states = {row.status for row in self.rows if row.part == "npu"}
        if states <= {"absent"}:
            return None
        return self.ok and states <= {"ok", "unlisted"}

    def verdicts(self) -> list[str]:
        """A line for the CPU, and one for an Ascend card if there is anything of one."""
        lines = ["ready to run on the CPU" if self.ok else "not ready: see the rows with a fix"]
        if self.npu is not None:
            ready = "ready to run on the NPU: ascendit doctor --self-check tries it"
            lines.append(ready if self.npu else "not ready to run on an NPU: see the rows with a fix")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For `--json`, which is what a bug report should hold."""
        ready = {"cpu": self.ok, "npu": self.npu}
        return {"ok": self.ok, "ready": ready, "rows": [asdict(row) for row in self.rows]}


Probe = Callable[[], list[ProbeRow]]


COMMAND_SECONDS = 20.0


def version_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) for 2.13.0+cpu."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(n) for n in found[0].split(".")) if found else ()


def at_least(found: str, needed: str) -> bool:
    """Compare versions by their leading numbers: 2.13.0+cpu is at least 2.9."""
    return version_numbers(found) >= version_numbers(needed)


def read(path: Path) -> str:
    """The text of a file, "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def command(words: Sequence[str]) -> str:
    """What a command prints, "" where it is absent, fails or takes too long."""
    try:
        done = _run(words, COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _run(
    words: Sequence[str], seconds: float, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=seconds, env=env)


PROBE_SECONDS = 120.0


def child(code: str, *, plugins: bool = False) -> dict[str, Any]:
    """The JSON that `code` prints last in a Python of its own, or `{"error": ...}`. Warnings are dropped.

    `plugins`: let `import torch` load torch_npu by itself, as it does where nothing forbids it.
    """
    env = None if plugins else environment.without_device_plugins()
    try:
        done = _run((sys.executable, "-W", "ignore", "-c", code), PROBE_SECONDS, env)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {PROBE_SECONDS:g} s", "late": True}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
        return {"error": lines[-1]}
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def failed(row: ProbeRow, told: dict[str, Any], *, fix: str) -> ProbeRow:
    """The row for a child process that did not do what it should."""
    if told.get("late"):
        again = "run ascendit doctor again when the machine is less busy"
        return replace(row, found=told["error"], status="probe failed", fix=again)
    return replace(row, found=told["error"], status="broken", fix=fix)
