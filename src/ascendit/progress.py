"""What a run reports while it goes: plain data, so that a terminal, a server and a test can all read it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

# ---- generating a video -------------------------------------------------------------------------

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


# ---- converting a checkpoint --------------------------------------------------------------------


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
        """Seconds to go at the speed so far; None in the first percent, which is mostly start-up."""
        worked = self.done_bytes - self.skipped_bytes
        if self.done_bytes >= self.total_bytes:
            return 0.0
        if worked < (self.total_bytes - self.skipped_bytes) / 100:
            return None
        return self.seconds * (self.total_bytes - self.done_bytes) / worked


OnConversionProgress = Callable[[ConversionProgress], None]


class Advance(Protocol):
    """Called with the bytes of the source that are done; `skipped`: an earlier run had done them."""

    def __call__(self, name: str, count: int, skipped: bool = False) -> None: ...


class ConversionMeter:
    """Counts bytes and reports them. The clock starts when it is made."""

    def __init__(self, total_bytes: int, on_progress: OnConversionProgress | None) -> None:
        self._total = total_bytes
        self._done = self._skipped = 0
        self._on_progress = on_progress
        self._start = time.perf_counter()

    def advance_in(self, stage: str) -> Advance:
        """The call that counts bytes of this stage."""

        def advance(name: str, count: int, skipped: bool = False) -> None:
            self._done += count
            self._skipped += count if skipped else 0
            if self._on_progress is not None:
                seconds = time.perf_counter() - self._start
                event = ConversionProgress(stage, name, self._done, self._total, seconds, self._skipped)
                self._on_progress(event)

        return advance
