"""The solvers against Diffusers' schedulers, step by step, on the same velocities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from ascendit.pipeline.request import GenerateRequest
from ascendit.pipeline.solver import UniPC, euler_schedule, make_solver, unipc_schedule

SHAPE = (1, 4, 3, 6, 5)


def request(**fields: Any) -> GenerateRequest:
    base: dict[str, Any] = {
        "prompt": "x",
        "width": 16,
        "height": 16,
        "num_frames": 5,
        "fps": 16,
        "num_inference_steps": 10,
        "guidance_scale": 5.0,
        "flow_shift": 5.0,
        "seed": 0,
    }
    return GenerateRequest(**(base | fields))


def unipc(shift: float) -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def velocity(x: Tensor, t: float) -> Tensor:
    """A smooth stand-in for a model: it depends on the sample and on the time."""
    return torch.tanh(x * (0.5 + t / 1000)) - 0.3 * x + 0.1


def worst_step(ours: Any, theirs: Any) -> float:
    """Largest relative difference of any step, each from the same sample."""
    x = y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    worst = 0.0
    for i, t in enumerate(theirs.timesteps):
        x = ours.step(i, velocity(y, float(t)), x)
        y = theirs.step(velocity(y, float(t)), t, y, return_dict=False)[0]
        worst = max(worst, float((x - y).norm() / y.norm()))
    return worst


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 50])
def test_unipc_equals_diffusers(steps: int, shift: float) -> None:
    theirs = unipc(shift)
    theirs.set_timesteps(steps)
    ours = make_solver(request(num_inference_steps=steps, flow_shift=shift))
    assert list(ours.schedule.timesteps) == theirs.timesteps.tolist()
    assert list(ours.schedule.sigmas) == pytest.approx(theirs.sigmas.tolist(), abs=1e-7)
    assert worst_step(ours, theirs) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_euler_equals_diffusers(steps: int, shift: float) -> None:
    theirs: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(steps)
    ours = make_solver(request(solver="euler", num_inference_steps=steps, flow_shift=shift))
    assert list(ours.schedule.timesteps) == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)
    assert list(ours.schedule.sigmas) == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)
    assert worst_step(ours, theirs) < 1e-6


def test_distilled_timesteps_equal_diffusers_custom_sigmas() -> None:
    theirs = unipc(5.0)
    theirs.set_timesteps(sigmas=torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64).numpy())
    four = request(timesteps=(1000.0, 750.0, 500.0, 250.0), num_inference_steps=4)
    ours = make_solver(four)
    assert list(ours.schedule.timesteps) == theirs.timesteps.tolist() == [999, 937, 833, 625]
    assert worst_step(ours, theirs) < 1e-6
    euler = euler_schedule(4, 5.0, four.timesteps)
    assert euler.timesteps == pytest.approx((1000.0, 937.5, 833.3333, 625.0))


def test_coefficients_are_floats_computed_before_the_loop() -> None:
    solver = UniPC(unipc_schedule(7, 5.0))
    assert len(solver.predict) == 7 and len(solver.correct) == 6
    assert all(type(v) is float for u in solver.predict + solver.correct for v in vars(u).values())
    assert type(solver.schedule.timesteps[0]) is float


def test_last_step_gives_the_clean_sample() -> None:
    solver = UniPC(unipc_schedule(3, 5.0))
    x = torch.randn(SHAPE)
    for i in range(3):
        sigma, v, before = solver.schedule.sigmas[i], torch.randn(SHAPE), x
        x = solver.step(i, v, x)
    torch.testing.assert_close(x, before - sigma * v)
