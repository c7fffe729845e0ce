"""Timesteps and noise levels of a run: those of Diffusers' schedulers, or of the authors' code. No torch.

    make_schedule("euler", 4, 5.0, (1000, 750, 500, 250)).timesteps   # 1000, 937.5, 833.3, 625

Floats are rounded where the originals round, so that both are equal to the bit. Sources: Diffusers'
UniPCMultistepScheduler, DPMSolverMultistepScheduler and FlowMatchEulerDiscreteScheduler; `fm_solvers.py` and
`fm_solvers_unipc.py` of Wan-Video/Wan2.2; for Euler, `fm_solvers_euler.py` of ModelTC/Wan2.2-Lightning.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ascendit.errors import RequestError
from ascendit.family import ScheduleName, Solver

TRAIN_STEPS = 1000
MARGIN = 1e-6
"""UniPC lowers a first noise level of 1 by this much, as Diffusers does: log(1 - sigma) has to be finite."""


def is_high_noise(t: float, boundary_ratio: float | None) -> bool:
    """Whether the first expert runs at timestep `t`; always without a boundary, which models of one lack."""
    return boundary_ratio is None or t >= TRAIN_STEPS * boundary_ratio


def expert_of(t: float, boundary_ratio: float | None) -> str:
    """The expert that runs at timestep `t`; the second one has its own guidance."""
    return "transformer" if is_high_noise(t, boundary_ratio) else "transformer_2"


@dataclass(frozen=True)
class Schedule:
    """`timesteps` [n], the inputs of the model; `sigmas` [n + 1], the last is 0."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]


def shifted(sigma: float, shift: float) -> float:
    """The shifted noise level: shift * s / (1 + (shift - 1) * s)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def float32(x: float) -> float:
    """Round to float32, the dtype of noise levels in all originals."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def shifted32(sigma: float, shift: float) -> float:
    """`shifted` in float32 arithmetic; `sigma` is a float32 number."""
    slope = float32(float32(shift - 1) * sigma)
    return float32(float32(float32(shift) * sigma) / float32(1 + slope))


def linspace(start: float, stop: float, count: int) -> list[float]:
    """`count` evenly spaced numbers from `start` to `stop`, rounded as by numpy."""
    step = (stop - start) / max(count - 1, 1)
    numbers = [i * step + start for i in range(count)]
    return [*numbers[:-1], stop] if count > 1 else numbers


def _truncated(sigmas: Sequence[float]) -> Schedule:
    """A schedule with whole timesteps: those of UniPC and DPM-Solver++ are cut to integers."""
    timesteps = tuple(float(int(s * TRAIN_STEPS)) for s in sigmas)
    return Schedule(timesteps, (*(float32(s) for s in sigmas), 0.0))


def unipc_schedule(
    steps: int, shift: float, timesteps: tuple[float, ...] | None = None, rule: ScheduleName = "diffusers"
) -> Schedule:
    """The schedule of UniPC. Diffusers' begins at 1 - 1e-6, the official one at the shifted 0.999."""
    if timesteps is not None:
        levels = [t / TRAIN_STEPS for t in timesteps]
    elif rule == "official":
        levels = linspace(float32(1 - 1 / TRAIN_STEPS), 0, steps + 1)[:-1]
    else:
        levels = linspace(1, 1 / TRAIN_STEPS, steps + 1)[:-1]
    sigmas = [shifted(s, shift) for s in levels]
    if abs(sigmas[0] - 1) < MARGIN:
        sigmas[0] -= MARGIN
    return _truncated(sigmas)


def dpm_schedule(
    steps: int, shift: float, timesteps: tuple[float, ...] | None = None, rule: ScheduleName = "diffusers"
) -> Schedule:
    """The schedule of DPM-Solver++. Diffusers' begins at the shifted 0.999, the official one at 1."""
    if timesteps is not None:
        levels = [t / TRAIN_STEPS for t in timesteps]
    elif rule == "official":
        levels = linspace(1, 0, steps + 1)[:-1]
    else:
        levels = [1 - alpha for alpha in linspace(1, 1 / TRAIN_STEPS, steps + 1)[:0:-1]]
    return _truncated([shifted(s, shift) for s in levels])


def euler_schedule(
    steps: int, shift: float, timesteps: tuple[float, ...] | None = None, rule: ScheduleName = "diffusers"
) -> Schedule:
    """The schedule of Euler's method, with timesteps that are not whole.

    Diffusers shifts the ends of the training schedule before it spaces the steps, and all steps again, so
    the last level is shifted twice. Wan2.2-Lightning ("official") spaces the steps from 1 to 0, and shifts
    them once.
    """
    if timesteps is not None:
        sigmas = [shifted32(float32(t / TRAIN_STEPS), shift) for t in timesteps]
    elif rule == "official":
        even = [float32(t) for t in linspace(TRAIN_STEPS, 0, steps + 1)[:-1]]
        sigmas = [shifted32(float32(t / TRAIN_STEPS), shift) for t in even]
    else:
        first, last = (shifted32(float32(s), shift) for s in (1, 1 / TRAIN_STEPS))
        spaced = linspace(first * TRAIN_STEPS, last * TRAIN_STEPS, steps)
        sigmas = [float32(shifted(t / TRAIN_STEPS, shift)) for t in spaced]
    return Schedule(tuple(float32(s * TRAIN_STEPS) for s in sigmas), (*sigmas, 0.0))


SCHEDULES: dict[Solver, Callable[[int, float, tuple[float, ...] | None, ScheduleName], Schedule]] = {
    "unipc": unipc_schedule,
    "dpm++": dpm_schedule,
    "euler": euler_schedule,
    "renoise": euler_schedule,
}


def make_schedule(
    solver: Solver,
    steps: int,
    shift: float,
    timesteps: tuple[float, ...] | None = None,
    rule: ScheduleName = "diffusers",
) -> Schedule:
    """The schedule of a solver. `timesteps`: unshifted positions, instead of evenly spaced steps.

    Raises RequestError (E-REQ-03) for a shift that float32 does not resolve, and if two steps have the same
    noise level in float32, or the last a level of 0.
    """
    if not 1e-3 <= shift <= 1e4:
        needs = "0.001 to 10000; published shifts are between 1 and 16"
        raise RequestError(f"flow_shift {shift:g}", needs=needs, fix="--shift 5")
    schedule = SCHEDULES[solver](steps, shift, timesteps, rule)
    if not all(a > b for a, b in pairwise(schedule.sigmas)):
        kind = "custom timesteps" if timesteps else f"{steps} steps"
        raise RequestError(
            f"{kind} with shift {shift:g} have equal noise levels",
            needs="noise levels above 0 that decrease in float32; published shifts are between 1 and 16",
            fix="--shift 5, or timesteps that are farther apart" if timesteps else "--shift 5",
        )
    return schedule
