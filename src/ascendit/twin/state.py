"""What is switched on in this process: the twin's chip, its flags and its counts. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class State:
    """One for the whole process, as the operators under torch.ops are."""

    chip: str | None = None
    """a2, a3 or a5; None while the twin is off."""
    internal_format: bool = False
    """`torch.npu.config.allow_internal_format`; a5 ignores it."""
    launches: dict[str, int] = field(default_factory=dict)
    """Operator -> calls that were computed."""


STATE = State()
