"""The twin: the operators of an Ascend NPU on CPU tensors, with the same checks, layouts and numbers.

    import ascendit.twin
    ascendit.twin.enable("a5")                         # torch.ops.npu.*, torch.ops.mindiesd.*
    q, s = torch.ops.npu.npu_dynamic_mx_quant(x, dst_type=292)
    ascendit.twin.launches()                           # {"npu_dynamic_mx_quant": 1}

All 440 schemas of torch_npu 2.13.0 and MindIE-SD 3.1.0 are defined. The operators that a Wan stack calls are
computed; the others raise an error with their name. A call that the card refuses, or silently misreads,
raises a `TwinError` with a fix. Importing this module does not import torch.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from typing import Any

from ascendit import environment
from ascendit.device.chip import CHIPS
from ascendit.errors import UsageError
from ascendit.exclusive import Exclusive

__all__ = ["allow_internal_format", "call", "chip", "disable", "enable", "launches", "reset", "use"]


@dataclass
class TwinState:
    """State of the process: the operators under torch.ops exist once per process too."""

    chip: str | None = None
    """a2, a3 or a5; None while the twin is off."""
    internal_format: bool = False
    """`torch.npu.config.allow_internal_format`; a5 ignores it."""
    launches: dict[str, int] = field(default_factory=dict)
    """Operator -> number of computed calls."""


STATE = TwinState()
IN_USE = Exclusive("the twin")
"""Held by runs and loads with their chip as `shared`: those of one chip may overlap, others wait."""


def enable(chip: str, *, fake_module: bool = False) -> None:
    """Define the operators under torch.ops for `chip`: a2, a3 or a5. A second call changes the chip.

    `fake_module`: also provide a minimal `torch_npu`, for other code written for NPUs; see
    `ascendit.twin.install`. While the twin is enabled, `import torch_npu` fails. Raises UsageError (E-USE-01)
    for an unknown chip and during a run on another one, TwinImportError (E-TWN-02) if torch_npu is already
    loaded.
    """
    _check(chip)
    if IN_USE.shared not in (None, chip):
        got, needs = f"chip {chip} during a run on chip {IN_USE.shared}", "one chip at a time in a process"
        raise UsageError(got, needs=needs, fix="wait for the end of the run, or use another process")
    _disable_torch_npu()
    _module("install").install(chip, with_module=fake_module)


def use(chip: str) -> None:
    """Set the chip for `call` only; torch_npu may be loaded.

    Raises UsageError (E-USE-01) for an unknown chip.
    """
    _check(chip)
    STATE.chip = chip


def disable() -> None:
    """Undo `enable`; for tests."""
    if install := sys.modules.get("ascendit.twin.install"):
        install.uninstall()


def chip() -> str | None:
    """The current chip; None if the twin is not enabled."""
    return STATE.chip


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """Call an operator, `npu_rms_norm` or `mindiesd::adaln`.

    Raises TwinError (E-TWN-01, E-CAP-01) if refused.
    """
    return _module("operators").call(name, *args, **kwargs)


def launches() -> dict[str, int]:
    """Number of computed calls since `reset`, by operator."""
    return dict(STATE.launches)


def reset() -> None:
    """Clear the counts of `launches`."""
    STATE.launches.clear()


def allow_internal_format(value: bool) -> None:
    """Set torch.npu.config.allow_internal_format. Without it, a2 and a3 keep weights in ND. a5 ignores it."""
    STATE.internal_format = value


def _module(name: str) -> Any:
    """Import a module of the twin, which imports torch, on first use."""
    return importlib.import_module(f"ascendit.twin.{name}")


def _check(chip: str) -> None:
    if chip not in CHIPS:
        raise UsageError(
            f"chip {chip!r}",
            needs=", ".join(f"{c.name} ({c.product})" for c in CHIPS.values()),
            fix='ascendit.twin.enable("a5")',
        )


def _disable_torch_npu() -> None:
    """`import torch` would load an installed torch_npu automatically."""
    if "torch" not in sys.modules:
        environment.disable_device_plugins()
