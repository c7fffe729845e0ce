"""What `doctor` tells: rows, and a report of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "missing", "too old", "too little", "broken", "absent", "probe failed"]


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

    def as_dict(self) -> dict[str, Any]:
        """For `--json`, which is what a bug report should hold."""
        return {"ok": self.ok, "rows": [asdict(row) for row in self.rows]}


Probe = Callable[[], list[Row]]
