"""What a run reports while it goes: plain data, so that a terminal, a server and a test can all read it.

What a conversion reports while it goes: plain data for a terminal, a server and a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ConversionProgress:
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


OnConversionProgress = Callable[[ConversionProgress], None]


# ---- What a run reports while it goes: plain data, so that a terminal, a server and a test can  -

Stage = Literal["load", "encode", "denoise", "decode", "save"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One event. `step` of `total` is done in this stage; both are 0 where a stage has no steps."""

    stage: Stage
    step: int = 0
    total: int = 0
    expert: str | None = None
    """`transformer` (high noise) or `transformer_2` (low noise), while denoising a cascade."""
    timestep: float | None = None
    seconds: float = 0.0
    """Seconds the last step took."""
    memory_bytes: int = 0
    """Memory in use by this process (CPU) or on the device."""


OnProgress = Callable[[Progress], None]
