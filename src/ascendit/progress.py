"""Progress events of a run or a conversion: plain data for terminals, servers and tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One event: `step` of `total` are done in this stage; both are 0 in a stage without steps."""

    stage: str
    """Stage of a run: `load`, `encode`, `denoise`, `decode`; of a conversion: `transformer`, `check`, ..."""
    name: str = ""
    """The last tensor or file processed."""
    step: int = 0
    total: int = 0
    unit: Literal["step", "byte"] = "step"
    """Unit of `step`, `total` and `skipped`."""
    skipped: int = 0
    """Part of `step` that an earlier, interrupted run had done; not included in `seconds`."""
    seconds: float = 0.0
    """Duration of the last step; for bytes, time since the start of the first stage."""
    expert: str | None = None
    """`transformer` (high noise) or `transformer_2` (low noise), while denoising a cascade."""
    timestep: float | None = None
    memory_bytes: int = 0
    """Memory in use: of this process (CPU) or on the device."""

    @property
    def speed(self) -> float:
        """Steps or bytes per second; 0 if unknown."""
        done = 1 if self.unit == "step" else self.step - self.skipped
        return done / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta(self) -> float | None:
        """Remaining seconds at this speed; None if unknown, or in the first percent of bytes (start-up)."""
        if self.step >= self.total:
            return 0.0
        if self.unit == "byte" and self.step - self.skipped < (self.total - self.skipped) / 100:
            return None
        return (self.total - self.step) / self.speed if self.speed else None


OnProgress = Callable[[Progress], None]


class Advance(Protocol):
    """Called with the number of source bytes done; `skipped`: an earlier run had done them."""

    def __call__(self, name: str, count: int, skipped: bool = False) -> None: ...


class Meter:
    """Counts bytes over all stages and reports them. Time starts at creation."""

    def __init__(self, total_bytes: int, on_progress: OnProgress | None) -> None:
        self._total = total_bytes
        self._done = self._skipped = 0
        self._on_progress = on_progress
        self._start = time.perf_counter()

    def stage_counter(self, stage: str) -> Advance:
        """Return the function that counts the bytes of this stage."""

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

    @contextmanager
    def part(self, stage: str, label: str, size: int) -> Iterator[Advance]:
        """A function that counts at most `size` bytes; the end of the context counts those that remain."""
        done, counter = 0, self.stage_counter(stage)

        def advance(name: str, count: int, skipped: bool = False) -> None:
            nonlocal done
            count = min(count, size - done)
            done += count
            if count:
                counter(name, count, skipped)

        yield advance
        advance(label, size)
