"""The two solvers of flow-matching Wan models, UniPC and Euler; equal to Diffusers' to 1e-6.

All coefficients are Python floats, computed before the loop: no device solves a linear system (Diffusers'
UniPC calls `torch.linalg.solve` in each step, which NPUs lack) and nothing is read back.

UniPC (Zhao et al. 2023, B(h) = e^h - 1, order 2, data prediction): with lambda = log(alpha / sigma),
alpha = 1 - sigma and h the step in lambda, predictor and corrector are linear in the last sample, the
last two predictions of the clean sample x0 and, for the corrector, the new prediction.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ascendit.pipeline.request import GenerateRequest

TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """`timesteps` [n], the inputs of the model; `sigmas` [n + 1], the last is 0."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]


class Solver(Protocol):
    """Integrates from noise to latents. One instance per run."""

    schedule: Schedule

    def step(self, i: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample after step `i`, from the velocity and the previous sample; float32 [1, z, F, h, w]."""


def make_solver(request: GenerateRequest) -> Solver:
    """The solver of a request, with its schedule."""
    if request.solver == "euler":
        return Euler(euler_schedule(request.num_inference_steps, request.flow_shift, request.timesteps))
    return UniPC(unipc_schedule(request.num_inference_steps, request.flow_shift, request.timesteps))


def shifted(sigma: float, shift: float) -> float:
    """The shifted noise level: shift * s / (1 + (shift - 1) * s)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def float32(x: float) -> float:
    """Round to float32, the dtype of Diffusers' schedules: 1 - sigma of the first step depends on it."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def unipc_schedule(steps: int, shift: float, timesteps: tuple[float, ...] | None = None) -> Schedule:
    """The schedule of Diffusers' UniPCMultistepScheduler with use_flow_sigmas: timesteps are truncated."""
    if timesteps is None:
        last = 1 / TRAIN_STEPS
        levels = [1 + (last - 1) * i / steps for i in range(steps)]
    else:
        levels = [t / TRAIN_STEPS for t in timesteps]
    sigmas = [shifted(s, shift) for s in levels]
    if abs(sigmas[0] - 1) < 1e-6:  # log(1 - sigma) must be finite
        sigmas[0] -= 1e-6
    truncated = tuple(float(int(s * TRAIN_STEPS)) for s in sigmas)
    return Schedule(truncated, (*(float32(s) for s in sigmas), 0.0))


def euler_schedule(steps: int, shift: float, timesteps: tuple[float, ...] | None = None) -> Schedule:
    """The schedule of Diffusers' FlowMatchEulerDiscreteScheduler: the last level is shifted twice."""
    if timesteps is None:
        last = shifted(1 / TRAIN_STEPS, shift)
        levels = [1 + (last - 1) * i / max(steps - 1, 1) for i in range(steps)]
    else:
        levels = [t / TRAIN_STEPS for t in timesteps]
    sigmas = tuple(float32(shifted(s, shift)) for s in levels)
    return Schedule(tuple(float32(s * TRAIN_STEPS) for s in sigmas), (*sigmas, 0.0))


@dataclass
class Euler:
    """Euler's method: x + (sigma' - sigma) v."""

    schedule: Schedule

    def step(self, i: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """See `Solver.step`."""
        s = self.schedule.sigmas
        return torch.add(sample, velocity, alpha=s[i + 1] - s[i])


@dataclass(frozen=True)
class Update:
    """x' = sample * x + current * m0 + previous * m1 + new * m_new; each m predicts the clean sample."""

    sample: float
    current: float
    previous: float = 0.0
    new: float = 0.0


@dataclass
class UniPC:
    """UniPC of order 2, with the corrector in every step but the first."""

    schedule: Schedule
    predict: list[Update] = field(default_factory=list)
    correct: list[Update] = field(default_factory=list)
    _clean: list[Tensor] = field(default_factory=list)
    """The last two predictions of the clean sample, newest last."""
    _last: Tensor | None = None
    """The corrected sample of the previous step."""

    def __post_init__(self) -> None:
        sigmas = self.schedule.sigmas
        steps = len(sigmas) - 1
        for i in range(steps):
            older = sigmas[i - 1] if 0 < i < steps - 1 else None
            self.predict.append(predictor(sigmas[i], sigmas[i + 1], older))
            if i + 1 < steps:
                self.correct.append(corrector(sigmas[i], sigmas[i + 1], older))

    def step(self, i: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """See `Solver.step`."""
        clean = torch.add(sample, velocity, alpha=-self.schedule.sigmas[i])
        if i > 0:
            assert self._last is not None
            sample = self._apply(self.correct[i - 1], self._last, clean)
        self._clean = [*self._clean[-1:], clean]
        self._last = sample
        return self._apply(self.predict[i], sample, None)

    def _apply(self, u: Update, x: Tensor, new: Tensor | None) -> Tensor:
        out = torch.add(x * u.sample, self._clean[-1], alpha=u.current)
        if u.previous:
            out.add_(self._clean[-2], alpha=u.previous)
        if new is not None:
            out.add_(new, alpha=u.new)
        return out


def log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma)."""
    return math.log(1 - sigma) - math.log(sigma)


def predictor(sigma: float, sigma_next: float, older: float | None) -> Update:
    """UniP from `sigma` to `sigma_next`; `older`: the previous level, None for order 1."""
    if sigma_next == 0:  # lambda is infinite: the result is the clean sample
        return Update(0.0, 1.0)
    h = log_snr(sigma_next) - log_snr(sigma)
    phi = math.expm1(-h)
    alpha = 1 - sigma_next
    previous = 0.0
    if older is not None:
        previous = -alpha * phi * 0.5 / ((log_snr(older) - log_snr(sigma)) / h)  # rho of UniP-2 is 1/2
    return Update(sigma_next / sigma, -alpha * phi - previous, previous)


def corrector(sigma: float, sigma_next: float, older: float | None) -> Update:
    """UniC from `sigma` to `sigma_next`, with the prediction at `sigma_next`; `older` as in `predictor`."""
    h = log_snr(sigma_next) - log_snr(sigma)
    phi = math.expm1(-h)
    alpha = 1 - sigma_next
    rho1, rho2, ratio = 0.0, 0.5, 1.0  # UniC-1
    if older is not None:  # the 2x2 system [1 1; ratio 1] rho = b, solved explicitly
        ratio = (log_snr(older) - log_snr(sigma)) / h
        g2 = phi / -h - 1
        g3 = g2 / -h - 0.5
        b1, b2 = g2 / phi, 2 * g3 / phi
        rho1 = (b1 - b2) / (1 - ratio)
        rho2 = b1 - rho1
    previous, new = -alpha * phi * rho1 / ratio, -alpha * phi * rho2
    return Update(sigma_next / sigma, -alpha * phi - previous - new, previous, new)
