"""What a conversion reports while it goes: plain data for a terminal, a server and a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One event: `done_bytes` of `total_bytes` are read and dealt with."""

    stage: str
    """`transformer`, `transformer_2`, `check`, ..."""
    name: str
    """The tensor or file that was last worked on."""
    done_bytes: int
    total_bytes: int
    seconds: float
    """Since the stage began."""
    skipped_bytes: int = 0
    """Of `done_bytes`, those that a killed run had done before: they took none of `seconds`."""

    @property
    def gib_per_s(self) -> float:
        """Speed so far, in GiB/s; 0 before anything is known."""
        return (self.done_bytes - self.skipped_bytes) / 2**30 / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds to go at the speed so far; None in the first percent, which is mostly the way to begin."""
        worked = self.done_bytes - self.skipped_bytes
        if self.done_bytes >= self.total_bytes:
            return 0.0
        if worked < (self.total_bytes - self.skipped_bytes) / 100:
            return None
        return self.seconds * (self.total_bytes - self.done_bytes) / worked


OnProgress = Callable[[Progress], None]
