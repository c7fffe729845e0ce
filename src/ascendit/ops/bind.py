"""Choose one implementation of each operator, once, for one device.

`bind("cpu")` gives an `Ops`: a frozen set of functions that is handed to the model. There is no global
choice and no look at `tensor.device`. Each choice is logged with its reason; `force="reference"` takes
the plain PyTorch ones everywhere.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ascendit.errors import UsageError
from ascendit.ops import reference

log = logging.getLogger("ascendit")

Function = Callable[..., Tensor]

# Modules of fast paths, by device type. A module implements what its device has a faster kernel for.
BACKENDS: Mapping[str, str] = {"cpu": "ascendit.ops.cpu", "cuda": "ascendit.ops.cuda"}


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The operators of the denoiser, by name. Contracts: `ascendit.ops.reference`."""

    linear: Function
    rms_norm: Function
    layer_norm: Function
    adaln: Function
    gated_residual: Function
    rope: Function
    gelu_tanh: Function
    attention: Function
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Operator -> `backend: reason`."""


NAMES = tuple(f.name for f in dataclasses.fields(Ops) if f.name != "choices")


def bind(device: str, force: str | None = None) -> Ops:
    """The operators for `device` ("cpu", "cuda", "cuda:1"). `force`: None or "reference"."""
    if force not in (None, "reference"):
        raise UsageError(
            f"ops={force}",
            needs="reference, or nothing for the fastest of this device",
            fix="--set ops=reference",
            code="E-USE-01",
        )
    kind = device.split(":")[0]
    found = {} if force else _fast_forms(kind)
    functions: dict[str, Function] = {}
    choices: dict[str, str] = {}
    for name in NAMES:
        plain = "asked for" if force else f"{kind} has no faster form"
        functions[name], choices[name] = found.get(name, (getattr(reference, name), f"reference: {plain}"))
    for backend in sorted({c.split(":")[0] for c in choices.values()}):
        names = ", ".join(n for n, c in choices.items() if c.startswith(backend + ":"))
        log.info("operators on %s: %s -> %s (--set ops=reference for the plain ones)", device, names, backend)
    return Ops(**functions, choices=choices)


def _fast_forms(kind: str) -> dict[str, tuple[Function, str]]:
    """Operator -> (function, "backend: reason") of a device kind; the native ones before the fused ones."""
    if kind not in BACKENDS:
        return {}
    module: Any = importlib.import_module(BACKENDS[kind])
    forms: dict[str, tuple[Function, str]] = {
        name: (getattr(module, name), f"{kind}: fused PyTorch kernel")
        for name in NAMES
        if hasattr(module, name)
    }
    if kind == "cpu":
        from ascendit.ops import cpu_native

        native = cpu_native.forms().items()
        forms |= {
            name: (function, f"native: {reason}, for BF16 tokens") for name, (function, reason) in native
        }
    return forms
