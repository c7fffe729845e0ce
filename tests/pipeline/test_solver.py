"""The solvers against Diffusers' schedulers, step by step, on the same velocities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from ascendit.pipeline.request import GenerateRequest
from ascendit.pipeline.solver import DPM, UniPC, euler_schedule, make_solver, unipc_schedule

SHAPE = (1, 4, 3, 6, 5)
FOUR = (1000.0, 750.0, 500.0, 250.0)


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


def dpm(shift: float) -> Any:
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return DPMSolverMultistepScheduler(**settings)


def euler(shift: float) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


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


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 14, 15, 50])
def test_dpm_equals_diffusers(steps: int, shift: float) -> None:
    theirs = dpm(shift)
    theirs.set_timesteps(steps)
    ours = make_solver(request(solver="dpm++", num_inference_steps=steps, flow_shift=shift))
    assert list(ours.schedule.timesteps) == theirs.timesteps.tolist()
    assert worst_step(ours, theirs) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
@pytest.mark.parametrize(
    "fields", [{"num_inference_steps": 1}, {"num_inference_steps": 30}, {"timesteps": FOUR}]
)
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_official_and_custom_schedules_are_integrated_as_by_diffusers(
    solver: str, fields: dict[str, Any], shift: float
) -> None:
    steps = len(fields.get("timesteps", ())) or fields["num_inference_steps"]
    fields = {"solver": solver, "schedule": "official", "flow_shift": shift} | fields
    ours = make_solver(request(**fields | {"num_inference_steps": steps}))
    theirs: Any = {"unipc": unipc, "dpm++": dpm, "euler": euler}[solver](shift)
    theirs.num_inference_steps = steps
    theirs.timesteps = torch.arange(steps, 0, -1).float()  # each once: they are only looked up
    theirs.sigmas = torch.tensor(ours.schedule.sigmas)
    assert worst_step(ours, theirs) < 1e-6


def test_dpm_from_pure_noise_is_the_formula_of_the_official_code() -> None:
    """From sigma 1, lambda is -infinity: the first step and the second are of order 1."""
    ours = make_solver(request(solver="dpm++", schedule="official", num_inference_steps=20))
    assert ours.schedule.timesteps[0] == 1000 and isinstance(ours, DPM)
    s = ours.schedule.sigmas
    x = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    clean: list[Tensor] = []
    for i in range(20):
        v = velocity(x, ours.schedule.timesteps[i])
        clean.append(x - s[i] * v)
        slope = torch.zeros(())
        if 1 < i < 19:
            lam = [float(torch.log((1 - t) / t)) for t in torch.tensor(s[i - 1 : i + 2], dtype=torch.float64)]
            slope = (lam[2] - lam[1]) / (lam[1] - lam[0]) * (clean[i] - clean[i - 1])
        decay = s[i + 1] / s[i] * (1 - s[i]) / (1 - s[i + 1])  # e^-h
        expected = s[i + 1] / s[i] * x + (1 - s[i + 1]) * (1 - decay) * (clean[i] + slope / 2)
        x = ours.step(i, v, x)
        assert float((x - expected).norm() / expected.norm()) < 1e-12, i


@pytest.mark.parametrize("fields", [{"num_inference_steps": 6}, {"timesteps": (1000.0, 280.0, 120.0)}])
def test_renoise_equals_stochastic_sampling_of_diffusers(fields: dict[str, Any]) -> None:
    theirs: Any = FlowMatchEulerDiscreteScheduler(shift=8.0, stochastic_sampling=True)
    timesteps = fields.get("timesteps")
    if timesteps:
        theirs.set_timesteps(sigmas=[t / 1000 for t in timesteps])
        fields = fields | {"num_inference_steps": len(timesteps)}
    else:
        theirs.set_timesteps(fields["num_inference_steps"])
    make = lambda: make_solver(request(solver="renoise", flow_shift=8.0, seed=7, **fields))  # noqa: E731
    ours, again = make(), make()
    torch.manual_seed(7)
    x = y = z = torch.randn(SHAPE)  # the initial latents of seed 7; the noise of the steps follows
    for i, t in enumerate(theirs.timesteps):
        x, z = ours.step(i, velocity(x, float(t)), x), again.step(i, velocity(z, float(t)), z)
        y = theirs.step(velocity(y, float(t)), t, y, return_dict=False)[0]
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, z)


@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_euler_equals_diffusers(steps: int, shift: float) -> None:
    theirs = euler(shift)
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
    assert euler_schedule(4, 5.0, four.timesteps).timesteps == pytest.approx((1000.0, 937.5, 833.3333, 625.0))


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
