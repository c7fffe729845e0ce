"""Shared code of the probes of `doctor`: the row of a probe, the report, helpers to run commands.

Probes read versions and files that may be absent. A library that may crash or hang the process is imported in
a child process with a time limit.
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
"""`unlisted`: in no public table, but may work. `absent`: not installed and not needed."""
NO_FIX = ("ok", "absent")
"""Statuses that need no fix."""


@dataclass(frozen=True)
class ProbeRow:
    """One line of the report."""

    item: str
    detected: str
    needed: str = "-"
    status: Status = "ok"
    fix: str = ""
    required: bool = False
    """Whether a run on the CPU needs it."""
    part: str = ""
    """`npu` for requirements of a run on an Ascend card."""
    data: dict[str, Any] = field(default_factory=dict)
    """`detected` as data."""


@dataclass(frozen=True)
class DoctorReport:
    """The rows of all probes."""

    rows: tuple[ProbeRow, ...]

    @property
    def ok(self) -> bool:
        """Whether all requirements of a run on the CPU are met."""
        return all(row.status == "ok" for row in self.rows if row.required)

    @property
    def npu(self) -> bool | None:
        """Whether an Ascend card can be used; None if the machine has no part of one."""
        states = {row.status for row in self.rows if row.part == "npu"}
        if states <= {"absent"}:
            return None
        return self.ok and states <= {"ok", "unlisted"}

    def verdicts(self) -> list[str]:
        """A line for the CPU, and one for an Ascend card if the machine has any part of one."""
        lines = ["ready to run on the CPU" if self.ok else "not ready: see the rows with a fix"]
        if self.npu is not None:
            ready = "ready to run on the NPU: check it with ascendit doctor --self-check"
            lines.append(ready if self.npu else "not ready to run on an NPU: see the rows with a fix")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The report in JSON, for `--json` and bug reports."""
        ready = {"cpu": self.ok, "npu": self.npu}
        rows = [{"found" if k == "detected" else k: v for k, v in asdict(r).items()} for r in self.rows]
        return {"ok": self.ok, "ready": ready, "rows": rows}


Probe = Callable[[], list[ProbeRow]]


COMMAND_SECONDS = 20.0


def version_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) for 2.13.0+cpu."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(n) for n in match[0].split(".")) if match else ()


def at_least(version: str, needed: str) -> bool:
    """Compare versions by their leading numbers: 2.13.0+cpu is at least 2.9."""
    return version_numbers(version) >= version_numbers(needed)


def read_text(path: Path) -> str:
    """The text of a file, "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def run_command(args: Sequence[str]) -> str:
    """The output of a command, "" if it is not installed, fails or takes too long."""
    try:
        result = _run(args, COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def _run(
    args: Sequence[str], seconds: float, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(args, capture_output=True, text=True, timeout=seconds, env=env)


PROBE_SECONDS = 120.0


def run_child(code: str, *, plugins: bool = False) -> dict[str, Any]:
    """Run `code` in a new Python process; return the JSON of its last line, or `{"error": ...}`.

    `plugins`: let `import torch` load torch_npu automatically, which is torch's default.
    """
    env = None if plugins else environment.without_device_plugins()
    try:
        result = _run((sys.executable, "-P", "-W", "ignore", "-c", code), PROBE_SECONDS, env)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {PROBE_SECONDS:g} s", "late": True}
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"ended with code {result.returncode}"]
        return {"error": lines[-1]}
    answer: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return answer


def failed_row(row: ProbeRow, answer: dict[str, Any], *, fix: str) -> ProbeRow:
    """Make the row for a child process that failed."""
    if answer.get("late"):
        again = "run ascendit doctor again when the machine is less busy"
        return replace(row, detected=answer["error"], status="probe failed", fix=again)
    return replace(row, detected=answer["error"], status="broken", fix=fix)
