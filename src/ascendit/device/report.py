"""What `doctor` tells: rows, and a report of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal[
    "ok", "missing", "too old", "too little", "broken", "unlisted", "absent", "not checked", "probe failed"
]
"""`unlisted`: works or does not, no public table says. `absent`: not here, and nothing asks for it."""
NO_FIX = ("ok", "absent")
"""Nothing to do about these."""


@dataclass(frozen=True, kw_only=True)
class Row:
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

    @property
    def good(self) -> bool:
        """Whether this stands in nobody's way."""
        return self.status == "ok" or not self.required


@dataclass(frozen=True)
class Report:
    """All rows."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is here that a run on the CPU needs."""
        return all(row.good for row in self.rows)

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


Probe = Callable[[], list[Row]]
