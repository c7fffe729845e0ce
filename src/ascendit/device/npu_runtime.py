"""NPU runtime: import torch_npu, apply its settings, detect the chip. No other module changes these settings.

`ops/open_device.py` calls these functions in order. Environment variables are set before torch_npu is
imported, and only if the user has not set them. Each setting is logged with its reason.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any

from ascendit import environment
from ascendit.device.chip import CHIPS, Chip, chip_of
from ascendit.errors import AscenditError, EnvironmentProblem

log = logging.getLogger("ascendit")


@dataclass(frozen=True)
class Variable:
    """An environment variable that torch_npu reads on import."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Setting:
    """An attribute of torch.npu, or with `call` a function of torch.npu with an argument of this name."""

    path: str
    value: bool
    reason: str
    call: str = ""


VARIABLES = (
    Variable(
        "PYTORCH_NPU_ALLOC_CONF",
        "expandable_segments:True",
        "avoids allocator fragmentation across video sizes",
    ),
    Variable("TASK_QUEUE_ENABLE", "2", "a second thread prepares launches"),
    Variable("CPU_AFFINITY_CONF", "1", "threads run on the cores near their card"),
)
SETTINGS = (
    Setting(
        "jit_compile",
        False,
        "uses the precompiled kernels of CANN; otherwise each new shape waits for a compiler",
        call="set_compile_mode",
    ),
    Setting(
        "config.allow_internal_format",
        False,
        "weights keep their layout; FRACTAL_NZ is requested explicitly",
    ),
    Setting("matmul.allow_hf32", False, "float32 matmuls stay in float32"),
    Setting("conv.allow_hf32", False, "float32 convolutions stay in float32, as in the VAE"),
)


def set_variables() -> None:
    """Set the variables that the user has not set, and log all of them."""
    user_values = environment.set_missing({v.name: v.value for v in VARIABLES})
    for v in VARIABLES:
        if v.name in user_values:
            log.info("%s=%s: set by the user, not changed", v.name, user_values[v.name])
        else:
            log.info("%s=%s: %s (export %s=... overrides it)", v.name, v.value, v.reason, v.name)


def apply(npu: Any) -> None:
    """Apply `SETTINGS` to torch.npu, and log each of them; logs a warning for a setting that it lacks."""
    for s in SETTINGS:
        *parents, name = (s.call or s.path).split(".")
        owner = npu
        for parent in parents:
            owner = getattr(owner, parent, None)
        if owner is None or (s.call and not hasattr(owner, name)):
            log.warning("torch.npu.%s: this torch_npu does not have it", s.call or s.path)
            continue
        if s.call:
            getattr(owner, name)(**{s.path: s.value})
        else:
            setattr(owner, name, s.value)
        log.info("torch.npu: %s=%s: %s", s.path, s.value, s.reason)


def import_torch_npu() -> Any:
    """Import torch_npu, which `import torch` does not load under ascendit's commands.

    Raises EnvironmentProblem (E-ENV-03) if it is not installed or cannot be imported.
    """
    try:
        return importlib.import_module("torch_npu")
    except AscenditError:  # the twin's guard
        raise
    except ModuleNotFoundError as e:
        if e.name != "torch_npu":
            raise _unusable(e) from e
        raise EnvironmentProblem(
            "device npu: torch_npu is not installed",
            needs="torch_npu of the same minor version as torch, and CANN",
            fix='pip install ".[npu]" in a clone of ascendit; or --device twin:a5, with the same calls',
            code="E-ENV-03",
        ) from e
    except (ImportError, OSError, RuntimeError) as e:
        raise _unusable(e) from e


def find_chip(npu: Any) -> Chip:
    """Detect the chip from its SoC number.

    Raises EnvironmentProblem (E-ENV-03) if ascendit does not support it.
    """
    number = int(npu.get_soc_version())
    chip = chip_of(number)
    if chip is None:
        raise EnvironmentProblem(
            f"an NPU with SoC number {number}",
            needs=", ".join(
                f"{c.product}: {c.soc_versions[0]} to {c.soc_versions[-1]}" for c in CHIPS.values()
            ),
            fix="use --device cpu, or another card",
            code="E-ENV-03",
        )
    return chip


def load_mindiesd() -> None:
    """Import MindIE-SD, which defines torch.ops.mindiesd, if it is installed."""
    try:
        module = importlib.import_module("mindiesd")
    except ModuleNotFoundError as e:
        if e.name == "mindiesd":
            log.info("MindIE-SD is not installed: AdaLN runs as two kernels instead of one")
        else:
            log.warning("MindIE-SD cannot be imported, so it is not used: %s", e)
    except Exception as e:
        log.warning("MindIE-SD cannot be imported, so it is not used: %s", e)
    else:
        log.info("MindIE-SD %s: its operators are used", getattr(module, "__version__", "of unknown version"))


def _unusable(e: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"device npu: torch_npu cannot be imported: {str(e).splitlines()[0] if str(e) else type(e).__name__}",
        needs="the CANN toolkit of this torch_npu, in the environment of this shell",
        fix="source /usr/local/Ascend/ascend-toolkit/set_env.sh, then run ascendit doctor",
        code="E-ENV-03",
    )
