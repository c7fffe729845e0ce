"""The twin: the operators of an Ascend NPU on CPU tensors, with its rules, its layouts and its numbers.

    import ascendit.twin
    ascendit.twin.enable("a5")                         # torch.ops.npu.*, torch.ops.mindiesd.*
    q, s = torch.ops.npu.npu_dynamic_mx_quant(x, dst_type=292)
    ascendit.twin.launches()                           # {"npu_dynamic_mx_quant": 1}

All 440 schemas of torch_npu 2.13.0 and MindIE-SD 3.1.0 are defined; those that a Wan stack calls are
computed, the others say so by name. A call that the card refuses, or reads wrongly in silence, is a
`TwinError` that says what to do. Importing this imports no torch.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from typing import Any

from ascendit import environment
from ascendit.device.chip import CHIPS
from ascendit.errors import UsageError

__all__ = ["allow_internal_format", "call", "chip", "disable", "enable", "launches", "reset", "use"]


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


def enable(chip: str, *, fake_module: bool = False) -> None:
    """Define the operators under torch.ops for `chip`: a2, a3 or a5. Again with another chip changes it.

    `fake_module`: also provide a minimal `torch_npu`, so that other code written for NPUs runs; see
    `ascendit.twin.install`. TwinImportError if torch_npu is loaded, which from now on cannot be.
    """
    _check(chip)
    _keep_torch_npu_out()
    _module("install").install(chip, with_module=fake_module)


def use(chip: str) -> None:
    """Choose the chip for `call` alone. Nothing is defined, so this goes beside a loaded torch_npu."""
    _check(chip)
    STATE.chip = chip


def disable() -> None:
    """Undo `enable`; for tests."""
    if install := sys.modules.get("ascendit.twin.install"):
        install.uninstall()


def chip() -> str | None:
    """The chip that is switched on, None if the twin is off."""
    return STATE.chip


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """One operator as a plain function: `call("npu_rms_norm", x, gamma)`, `call("mindiesd::adaln", ...)`."""
    return _module("operators").call(name, *args, **kwargs)


def launches() -> dict[str, int]:
    """Calls that were computed since `reset`, by operator."""
    return dict(STATE.launches)


def reset() -> None:
    """Set the counts of `launches` to nothing."""
    STATE.launches.clear()


def allow_internal_format(value: bool) -> None:
    """torch.npu.config.allow_internal_format: without it a2 and a3 keep every weight in ND. a5 ignores it."""
    STATE.internal_format = value


def _module(name: str) -> Any:
    """A module of the twin, and so torch and every operator: loaded at the first use."""
    return importlib.import_module(f"ascendit.twin.{name}")


def _check(chip: str) -> None:
    if chip not in CHIPS:
        raise UsageError(
            f"chip {chip!r}",
            needs=", ".join(f"{c.name} ({c.product})" for c in CHIPS.values()),
            fix='ascendit.twin.enable("a5")',
        )


def _keep_torch_npu_out() -> None:
    """`import torch` would load an installed torch_npu by itself."""
    if "torch" not in sys.modules:
        environment.disable_device_plugins()
