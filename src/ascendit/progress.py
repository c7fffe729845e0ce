"""What a run or a conversion reports while it goes: plain data for a terminal, a server and a test alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One event. `step` of `total` are done in this stage; both are 0 in a stage without steps."""

    stage: str
    """Of a run: `load`, `encode`, `denoise`, `decode`; of a conversion: `transformer`, `check`, ..."""
    name: str = ""
    """The tensor or file that was last worked on."""
    step: int = 0
    total: int = 0
    unit: Literal["step", "byte"] = "step"
    """What `step`, `total` and `skipped` count."""
    skipped: int = 0
    """Of `step`, those that a killed run had done before: they took none of `seconds`."""
    seconds: float = 0.0
    """Duration of the last step; for bytes, the time since the first stage began."""
    expert: str | None = None
    """`transformer` (high noise) or `transformer_2` (low noise), while denoising a cascade."""
    timestep: float | None = None
    memory_bytes: int = 0
    """Memory in use by this process (CPU) or on the device."""

    @property
    def speed(self) -> float:
        """Steps or bytes per second; 0 before anything is known."""
        done = 1 if self.unit == "step" else self.step - self.skipped
        return done / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds to go at this speed; None while it is unknown. The first percent of bytes is start-up."""
        if self.step >= self.total:
            return 0.0
        if self.unit == "byte" and self.step - self.skipped < (self.total - self.skipped) / 100:
            return None
        return (self.total - self.step) / self.speed if self.speed else None


OnProgress = Callable[[Progress], None]


class Advance(Protocol):
    """Called with the bytes of the source that are done; `skipped`: an earlier run had done them."""

    def __call__(self, name: str, count: int, skipped: bool = False) -> None: ...


class Meter:
    """Counts bytes over all stages and reports them. The clock starts when it is made."""

    def __init__(self, total_bytes: int, on_progress: OnProgress | None) -> None:
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
                event = Progress(
                    stage=stage,
                    name=name,
                    step=self._done,
                    total=self._total,
                    unit="byte",
                    skipped=self._skipped,
                    seconds=time.perf_counter() - self._start,
                )
                self._on_progress(event)

        return advance
