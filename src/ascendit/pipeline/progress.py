"""What a run reports while it goes: plain data, so that a terminal, a server and a test can all read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
