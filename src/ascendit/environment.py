"""The one place that reads environment variables.

Ascend users steer other runtimes with `ALGO`, `FAST_LAYERNORM`, `USE_SUB_HEAD`, `T5_LOAD_CPU`,
`PRECISION` and `OVERLAP`. `read_environment` maps what they mean onto our options; flags win over
all of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ascendit.errors import UsageError

TOOLKIT_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
"""Set by CANN's `set_env.sh`: the folder of the toolkit."""

ATTENTION = {"0": "fusion", "3": "fused_infer"}
"""Values of ALGO that name a kernel which is here."""
_NOT_USED = {
    "USE_SUB_HEAD": "attention is not split by heads",
    "OVERLAP": "there is nothing to overlap on one device",
}


@dataclass(frozen=True, kw_only=True)
class EnvironmentOptions:
    """What the environment asks for; None where it says nothing."""

    text_on: str | None = None
    """`cpu` when T5_LOAD_CPU=1."""
    fast_layernorm: bool | None = None
    """True when FAST_LAYERNORM=1."""
    attention: str | None = None
    """An NPU's kernel, by ALGO=0 or ALGO=3; other devices have no such choice."""
    notes: tuple[str, ...] = ()
    """One line for each variable that was found: what it did, or that it did nothing."""


def read_environment(environ: Mapping[str, str] | None = None) -> EnvironmentOptions:
    """Map the variables that Ascend users know onto options. Raises UsageError E-USE-01 for a bad value."""
    environ = os.environ if environ is None else environ
    text_on = None
    notes = []
    if _is_on(environ, "T5_LOAD_CPU"):
        text_on = "cpu"
        notes.append("T5_LOAD_CPU=1: the text encoder runs on the CPU (--text-on device overrides it)")
    fast_layernorm = _is_on(environ, "FAST_LAYERNORM") or None
    if fast_layernorm:
        notes.append(
            "FAST_LAYERNORM=1: layer norms by MindIE-SD where the device has it, the same numbers "
            "(--set fast_layernorm=false overrides it)"
        )
    attention = ATTENTION.get(algo := environ.get("ALGO", "").strip())
    if attention:
        notes.append(f"ALGO={algo}: attention={attention} on an NPU (--set attention overrides it)")
    elif algo:
        notes.append(f"ALGO={algo}: not used by this version, it has {', '.join(ATTENTION)}")
    if environ.get("PRECISION"):
        notes.append(
            f"PRECISION={environ['PRECISION']}: nothing left to do, noise is always drawn on the CPU"
        )
    for name, why in _NOT_USED.items():
        if environ.get(name):
            notes.append(f"{name}={environ[name]}: not used by this version, {why}")
    return EnvironmentOptions(
        text_on=text_on, fast_layernorm=fast_layernorm, attention=attention, notes=tuple(notes)
    )


def set_missing(values: Mapping[str, str]) -> dict[str, str]:
    """Set each variable that is not set; what the others were set to."""
    kept = {name: os.environ[name] for name in values if os.environ.get(name)}
    os.environ.update({name: value for name, value in values.items() if name not in kept})
    return kept


def toolkit_folder(environ: Mapping[str, str] | None = None) -> Path | None:
    """The CANN toolkit that this shell has sourced, or None."""
    environ = os.environ if environ is None else environ
    for name in TOOLKIT_VARIABLES:
        if environ.get(name):
            return Path(environ[name])
    return None


def library_folders(environ: Mapping[str, str] | None = None) -> tuple[Path, ...]:
    """The folders of LD_LIBRARY_PATH."""
    environ = os.environ if environ is None else environ
    return tuple(Path(p) for p in environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if p)


def without_device_plugins(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a child process in which `import torch` loads no torch_npu by itself."""
    environ = os.environ if environ is None else environ
    return {**environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def disable_device_plugins() -> None:
    """From now on `import torch` loads no torch_npu by itself, in this process and in its children."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "").strip().lower()
    if value in ("", "0", "false", "off", "no"):
        return False
    if value in ("1", "true", "on", "yes"):
        return True
    raise UsageError(
        f"environment variable {name}={environ[name]!r}",
        needs=f"{name} to be 0 or 1",
        fix=f"export {name}=1, or unset {name}",
        code="E-USE-01",
    )
