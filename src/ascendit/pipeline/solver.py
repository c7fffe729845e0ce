"""The solvers of flow-matching Wan models; equal to Diffusers' to 1e-6, step by step.

All coefficients are Python floats, computed before the loop: no device solves a linear system (Diffusers'
UniPC calls `torch.linalg.solve` in each step, which NPUs lack) and nothing is read back.

UniPC (Zhao et al. 2023, B(h) = e^h - 1, order 2, data prediction): with lambda = log(alpha / sigma),
alpha = 1 - sigma and h the step in lambda, predictor and corrector are linear in the last sample, the
last two predictions of the clean sample x0 and, for the corrector, the new prediction. The predictor alone is
DPM-Solver++ of order 2, midpoint (Lu et al. 2022).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ascendit.pipeline.request import GenerateRequest
from ascendit.pipeline.sigmas import Schedule, euler_schedule, unipc_schedule

__all__ = [  # the two schedules for scripts that import them from here
    "DPM",
    "Euler",
    "Renoise",
    "Solver",
    "UniPC",
    "euler_schedule",
    "make_solver",
    "unipc_schedule",
]


class Solver(Protocol):
    """Integrates from noise to latents. One instance per run."""

    schedule: Schedule

    def step(self, i: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """The sample after step `i`, from the velocity and the previous sample; float32 [1, z, F, h, w]."""


def make_solver(request: GenerateRequest) -> Solver:
    """The solver of a request, with its schedule. Raises RequestError (E-REQ-03) for equal noise levels."""
    schedule = request.denoising_schedule
    if request.solver == "renoise":
        return Renoise(schedule, request.seed)
    if request.solver == "euler":
        return Euler(schedule)
    return DPM(schedule) if request.solver == "dpm++" else UniPC(schedule)


@dataclass
class Euler:
    """Euler's method: x + (sigma' - sigma) v."""

    schedule: Schedule

    def step(self, i: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """See `Solver.step`."""
        s = self.schedule.sigmas
        return torch.add(sample, velocity, alpha=s[i + 1] - s[i])


@dataclass
class Renoise:
    """The sampler of models distilled by distribution matching: (1 - sigma') x0 + sigma' noise.

    Equals Diffusers' FlowMatchEulerDiscreteScheduler with `stochastic_sampling`. The noise of each step is
    drawn on the CPU, by the generator that drew the initial latents.
    """

    schedule: Schedule
    seed: int
    _generator: torch.Generator | None = None

    def step(self, i: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """See `Solver.step`."""
        sigma, sigma_next = self.schedule.sigmas[i : i + 2]
        clean = torch.add(sample, velocity, alpha=-sigma)
        if sigma_next == 0:
            return clean
        noise = self._draw(sample).to(sample.device)
        return torch.add(clean * (1 - sigma_next), noise, alpha=sigma_next)

    def _draw(self, sample: Tensor) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator("cpu").manual_seed(self.seed)
            torch.randn(sample.shape, generator=self._generator)  # the initial latents
        return torch.randn(sample.shape, generator=self._generator)


@dataclass(frozen=True)
class Update:
    """x' = sample * x + current * m0 + previous * m1 + new * m_new; each m predicts the clean sample."""

    sample: float
    current: float
    previous: float = 0.0
    new: float = 0.0


@dataclass
class DPM:
    """DPM-Solver++ of order 2: midpoint, of order 1 in the first and in the last step."""

    schedule: Schedule
    predict: list[Update] = field(default_factory=list)
    _clean: list[Tensor] = field(default_factory=list)
    """The last two predictions of the clean sample, newest last."""

    def __post_init__(self) -> None:
        sigmas = self.schedule.sigmas
        pairs = enumerate(pairwise(sigmas))
        self.predict += [predictor(s, s_next, self.older(i)) for i, (s, s_next) in pairs]

    def older(self, i: int) -> float | None:
        """The noise level before step `i`; None if the step is of order 1."""
        return self.schedule.sigmas[i - 1] if 0 < i < len(self.schedule.sigmas) - 2 else None

    def step(self, i: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """See `Solver.step`."""
        clean = torch.add(sample, velocity, alpha=-self.schedule.sigmas[i])
        self._clean = [*self._clean[-1:], clean]
        return self._apply(self.predict[i], sample, None)

    def _apply(self, u: Update, x: Tensor, new: Tensor | None) -> Tensor:
        out = torch.add(x * u.sample, self._clean[-1], alpha=u.current)
        if u.previous:
            out.add_(self._clean[-2], alpha=u.previous)
        if new is not None:
            out.add_(new, alpha=u.new)
        return out


@dataclass
class UniPC(DPM):
    """UniPC of order 2: the steps of `DPM`, and a corrector before each but the first."""

    correct: list[Update] = field(default_factory=list)
    _last: Tensor | None = None
    """The corrected sample of the previous step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sigmas = self.schedule.sigmas
        pairs = enumerate(pairwise(sigmas[:-1]))
        self.correct += [corrector(s, s_next, self.older(i)) for i, (s, s_next) in pairs]

    def step(self, i: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """See `Solver.step`."""
        clean = torch.add(sample, velocity, alpha=-self.schedule.sigmas[i])
        if i > 0:
            assert self._last is not None
            sample = self._apply(self.correct[i - 1], self._last, clean)
        self._clean = [*self._clean[-1:], clean]
        self._last = sample
        return self._apply(self.predict[i], sample, None)


def log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma); -infinity at 1, where DPM-Solver++ may begin."""
    return math.log(1 - sigma) - math.log(sigma) if sigma < 1 else -math.inf


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
