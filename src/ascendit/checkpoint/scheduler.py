"""The scheduler of a model: its class, and the only settings that the solvers of `pipeline` implement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ascendit.checkpoint.component import CONFIG_FILES, Part
from ascendit.checkpoint.part_configs import SchedulerConfig
from ascendit.errors import CheckpointError
from ascendit.family import Solver

SOLVERS: dict[str, Solver] = {
    "UniPCMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpm++",
    "FlowMatchEulerDiscreteScheduler": "euler",
}
# Scheduler settings that change the numbers, with the only values that these solvers implement.
_OFF = "use_dynamic_shifting use_karras_sigmas use_exponential_sigmas use_beta_sigmas".split()
_SUPPORTED = dict.fromkeys(_OFF, False) | {"shift_terminal": None, "num_train_timesteps": 1000}
_MULTISTEP: dict[str, Any] = {
    "solver_order": 2,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "final_sigmas_type": "zero",
    **_SUPPORTED,
    "thresholding": False,
}
SUPPORTED: dict[Solver, dict[str, Any]] = {
    "unipc": {
        **_MULTISTEP,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
    },
    "dpm++": {
        **_MULTISTEP,
        "solver_type": "midpoint",
        "algorithm_type": "dpmsolver++",
        "use_lu_lambdas": False,
        "variance_type": None,
    },
    "euler": _SUPPORTED | {"invert_sigmas": False},
}
MULTISTEP_DEFAULTS = {"prediction_type": "epsilon", "use_flow_sigmas": False}
"""Defaults of both multistep classes, for settings that the file omits; all other defaults are supported."""


def scheduler_class(part: Part) -> str:
    """The class of a scheduler: that of its config, else that of `model_index.json`."""
    return str(part.config.get("_class_name", part.class_name))


def scheduler_of(part: Part) -> tuple[Solver, float]:
    """(solver, shift) of a scheduler.

    Raises CheckpointError: E-CKP-05 for an unsupported scheduler class, E-CKP-06 for an invalid or
    unsupported setting.
    """
    SchedulerConfig.read(_file(part), part.config)
    name = scheduler_class(part)
    if name not in SOLVERS:
        raise CheckpointError(
            f"{part.path} is a {name}",
            needs=f"{' or '.join(SOLVERS)}",
            fix="restore the scheduler_config.json of the model's authors",
            code="E-CKP-05",
        )
    solver = SOLVERS[name]
    supported = SUPPORTED[solver]
    config: dict[str, Any] = {**({} if solver == "euler" else MULTISTEP_DEFAULTS), **part.config}
    wrong = [k for k, v in supported.items() if k in config and (config[k] or None) != (v or None)]
    if wrong:
        raise CheckpointError(
            f"{part.path} sets {', '.join(f'{k}={config[k]!r}' for k in wrong)}",
            needs="the flow-matching settings of Wan models: "
            + ", ".join(f"{k}={supported[k]!r}" for k in wrong),
            fix="restore the scheduler_config.json of the model's authors",
            code="E-CKP-06",
        )
    if solver == "euler" and config.get("stochastic_sampling"):
        solver = "renoise"
    return solver, float(config.get("flow_shift", config.get("shift", 1.0)) or 1.0)


def _file(part: Part) -> Path:
    return part.folder / CONFIG_FILES["scheduler"][0]
