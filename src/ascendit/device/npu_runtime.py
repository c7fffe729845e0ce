"""What a real NPU is started with: torch_npu, its settings, the chip. Only this file changes any of them.

`ops/open_device.py` calls these in order. Environment variables are set before torch_npu is imported, and
only those that the user left out. Each setting is logged with its reason. `SETTINGS` is data; `apply` takes
any object for `torch.npu`, so a test needs no card.
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
    """An environment variable that torch_npu reads when it starts."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class Setting:
    """An attribute of torch.npu, or with `call` a function of it whose argument has that name."""

    path: str
    value: bool
    why: str
    call: str = ""


VARIABLES = (
    Variable(
        "PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", "memory does not break up over sizes of videos"
    ),
    Variable("TASK_QUEUE_ENABLE", "2", "launches are prepared by a second thread"),
    Variable("CPU_AFFINITY_CONF", "1", "threads stay near their card"),
)
SETTINGS = (
    Setting(
        "jit_compile",
        False,
        "kernels come compiled with CANN; else each new shape waits for a compiler",
        call="set_compile_mode",
    ),
    Setting(
        "config.allow_internal_format",
        False,
        "weights keep the layout they are given; FRACTAL_NZ is asked for by name",
    ),
    Setting("matmul.allow_hf32", False, "float32 means float32"),
    Setting("conv.allow_hf32", False, "float32 means float32, in the VAE too"),
)


def set_variables() -> None:
    """Set what the user did not, and log each."""
    kept = environment.set_missing({v.name: v.value for v in VARIABLES})
    for v in VARIABLES:
        if v.name in kept:
            log.info("%s=%s: kept as it was set", v.name, kept[v.name])
        else:
            log.info("%s=%s: %s (export %s=... overrides it)", v.name, v.value, v.why, v.name)


def apply(npu: Any) -> None:
    """Apply `SETTINGS` to torch.npu, and log each. What this torch_npu does not have is logged too."""
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
        log.info("torch.npu: %s=%s: %s", s.path, s.value, s.why)


def import_torch_npu() -> Any:
    """The module; `import torch` need not have loaded it, and with ascendit's commands does not."""
    try:
        return importlib.import_module("torch_npu")
    except AscenditError:  # the twin's guard
        raise
    except ModuleNotFoundError as e:
        if e.name != "torch_npu":
            raise _unusable(e) from e
        raise EnvironmentProblem(
            "device npu: torch_npu is not installed",
            needs="torch_npu with the minor version of torch, and CANN",
            fix='pip install "ascendit[npu]"; --device twin:a5 runs the same calls without a card',
            code="E-ENV-03",
        ) from e
    except (ImportError, OSError, RuntimeError) as e:
        raise _unusable(e) from e


def find_chip(npu: Any) -> Chip:
    """By the SoC number. EnvironmentProblem for a chip that has none of the kernels Wan needs."""
    number = int(npu.get_soc_version())
    chip = chip_of(number)
    if chip is None:
        raise EnvironmentProblem(
            f"an NPU with SoC number {number}",
            needs=", ".join(
                f"{c.product}: {c.soc_versions[0]} to {c.soc_versions[-1]}" for c in CHIPS.values()
            ),
            fix="--device cpu, or another card",
            code="E-ENV-03",
        )
    return chip


def load_mindiesd() -> None:
    """Import MindIE-SD where it is installed: that defines torch.ops.mindiesd. It is never required."""
    try:
        module = importlib.import_module("mindiesd")
    except ModuleNotFoundError as e:
        if e.name == "mindiesd":
            log.info("MindIE-SD is not installed: AdaLN takes two kernels instead of one")
        else:
            log.warning("MindIE-SD cannot be imported, so it is not used: %s", e)
    except Exception as e:
        log.warning("MindIE-SD cannot be imported, so it is not used: %s", e)
    else:
        log.info("MindIE-SD %s: its operators are used", getattr(module, "__version__", "of unknown version"))


def _unusable(e: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"device npu: torch_npu cannot be imported: {str(e).splitlines()[0] if str(e) else type(e).__name__}",
        needs="the CANN toolkit that this torch_npu belongs to, in the environment of this shell",
        fix="source /usr/local/Ascend/ascend-toolkit/set_env.sh, then ascendit doctor",
        code="E-ENV-03",
    )
