"""Timesteps and noise levels: equal to the bit to Diffusers', and to a description of the official code."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendit.errors import RequestError
from ascendit.family import Solver
from ascendit.pipeline.sigmas import SCHEDULES, Schedule, float32, is_high_noise, linspace, make_schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of DPMSolverMultistepScheduler
SHIFTS = (*range(1, 13), *(1 + 11 * i / 17 for i in range(1, 17)), 2.5, math.pi)  # 30 from 1 to 12
STEPS = range(1, 101)

# ---- Diffusers ----------------------------------------------------------------------------------


def unipc(shift: float) -> Any:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def dpm(shift: float) -> Any:
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def euler(shift: float) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def renoise(shift: float) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)


DIFFUSERS: dict[Solver, Callable[[float], Any]] = {
    "unipc": unipc,
    "dpm++": dpm,
    "euler": euler,
    "renoise": renoise,
}


def of(scheduler: Any) -> Schedule:
    return Schedule(tuple(float(t) for t in scheduler.timesteps.tolist()), tuple(scheduler.sigmas.tolist()))


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_3000_schedules_equal_those_of_diffusers_to_the_bit(solver: Solver) -> None:
    assert len(set(SHIFTS)) == 30
    for shift in SHIFTS:
        scheduler = DIFFUSERS[solver](shift)
        for steps in STEPS:
            scheduler.set_timesteps(steps)
            assert make_schedule(solver, steps, shift) == of(scheduler), (shift, steps)


@settings(max_examples=60, deadline=None)
@given(
    solver=st.sampled_from(sorted(DIFFUSERS)),
    steps=st.integers(1, 1000),
    shift=st.floats(0.1, 30),
)
def test_any_schedule_equals_that_of_diffusers(solver: Solver, steps: int, shift: float) -> None:
    scheduler = DIFFUSERS[solver](shift)
    scheduler.set_timesteps(steps)
    assert make_schedule(solver, steps, shift) == of(scheduler)


@settings(max_examples=60, deadline=None)
@given(
    solver=st.sampled_from(["unipc", "euler", "renoise"]),
    positions=st.sets(st.integers(1, 4000), min_size=1, max_size=12),
    shift=st.floats(1, 12),
)
def test_custom_timesteps_are_sigmas_of_diffusers(solver: Solver, positions: set[int], shift: float) -> None:
    timesteps = tuple(sorted((p / 4 for p in positions), reverse=True))
    scheduler = DIFFUSERS[solver](shift)
    scheduler.set_timesteps(sigmas=np.array([t / 1000 for t in timesteps]))
    assert make_schedule(solver, len(timesteps), shift, timesteps) == of(scheduler)


# ---- the official code, from its description ----------------------------------------------------


def official_unipc(steps: int, shift: float) -> Schedule:
    """Wan's UniPC: levels are 1 - (1 .. 1/1000) in float32; the steps run from the largest, 0.999, to
    0, then they are shifted; timesteps are cut to int64."""
    training = (1.0 - np.linspace(1, 1 / 1000, 1000)[::-1]).astype(np.float32)
    return whole(np.linspace(float(training[0]), float(training[-1]), steps + 1)[:-1], shift)


def official_dpm(steps: int, shift: float) -> Schedule:
    """Wan's DPM++: the steps run from 1 to 0, then they are shifted; timesteps are cut to int64."""
    return whole(np.linspace(1, 0, steps + 1)[:steps], shift)


def whole(levels: Any, shift: float) -> Schedule:
    sigmas = shift * levels / (1 + (shift - 1) * levels)
    timesteps = (sigmas * 1000).astype(np.int64)
    return Schedule(tuple(map(float, timesteps)), tuple(np.append(sigmas, 0).astype(np.float32).tolist()))


def official_euler(steps: int, shift: float) -> Schedule:
    """Wan2.2-Lightning's Euler: float32 timesteps from 1000 to 0, and everything after it in float32."""
    levels = np.linspace(1000, 0, steps + 1, dtype=np.float32) / np.float32(1000)
    sigmas = shift * levels / (1 + (shift - 1) * levels)
    return Schedule(tuple((sigmas * 1000)[:-1].tolist()), tuple(sigmas.tolist()))


OFFICIAL = {"unipc": official_unipc, "dpm++": official_dpm, "euler": official_euler}


@pytest.mark.parametrize("solver", OFFICIAL)
def test_3000_schedules_equal_those_of_the_official_code_to_the_bit(solver: Solver) -> None:
    for shift in SHIFTS:
        for steps in STEPS:
            ours = make_schedule(solver, steps, shift, rule="official")
            assert ours == OFFICIAL[solver](steps, shift), (shift, steps)


@pytest.mark.parametrize(
    ("solver", "shift", "steps", "diffusers", "official"),
    [
        ("unipc", 12.0, 40, (999, 997, 995), (999, 997, 995)),
        ("unipc", 5.0, 50, (999, 995, 991), (999, 995, 991)),
        ("unipc", 5.0, 4, (999, 937, 833), (999, 937, 833)),
        ("dpm++", 12.0, 40, (999, 997, 995), (1000, 997, 995)),
        ("dpm++", 5.0, 4, (999, 937, 833), (1000, 937, 833)),
        ("euler", 5.0, 4, (1000.0, 909.71, 717.31), (1000.0, 937.5, 833.333)),
    ],
)
def test_the_first_timesteps_as_a_user_sees_them(
    solver: Solver, shift: float, steps: int, diffusers: tuple[float, ...], official: tuple[float, ...]
) -> None:
    assert make_schedule(solver, steps, shift).timesteps[:3] == pytest.approx(diffusers, abs=0.01)
    assert make_schedule(solver, steps, shift, rule="official").timesteps[:3] == pytest.approx(
        official, abs=0.01
    )


# ---- limits -------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    solver=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 300),
    shift=st.floats(0.1, 1e4),
    rule=st.sampled_from(["diffusers", "official"]),
    positions=st.none() | st.sets(st.floats(1e-300, 1000), min_size=1, max_size=5),
)
def test_a_schedule_decreases_to_0_or_is_refused(
    solver: Solver, steps: int, shift: float, rule: Any, positions: set[float] | None
) -> None:
    timesteps = tuple(sorted(positions, reverse=True)) if positions else None
    try:
        schedule = make_schedule(solver, len(timesteps or range(steps)), shift, timesteps, rule)
    except RequestError as e:
        assert e.code == "E-REQ-03" and "equal noise levels" in e.got
        return
    sigmas = np.array(schedule.sigmas)
    assert sigmas[0] <= 1.0000002 and sigmas[-1] == 0 and (np.diff(sigmas) < 0).all()
    assert all(0 <= t <= 1000.0002 for t in schedule.timesteps)


@pytest.mark.parametrize(
    ("shift", "timesteps", "got"),
    [
        (1e308, None, "flow_shift 1e.308"),
        (1e-300, None, "flow_shift 1e-300"),
        (1e4, (1000.0, 999.9), "custom timesteps with shift 10000 have equal noise levels"),
        (5.0, (1000.0, 1e-60), "equal noise levels"),
        (5.0, (500.0, 500 - 1e-12), "equal noise levels"),
    ],
)
@pytest.mark.parametrize("solver", SCHEDULES)
def test_equal_noise_levels_are_refused(
    solver: Solver, shift: float, timesteps: tuple[float, ...] | None, got: str
) -> None:
    with pytest.raises(RequestError, match=got) as error:
        make_schedule(solver, 2, shift, timesteps)
    assert error.value.code == "E-REQ-03" and "flow_shift=5" in error.value.fix


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.integers(1, 300))
def test_linspace_and_float32_round_as_numpy(start: float, stop: float, count: int) -> None:
    assert linspace(start, stop, count) == np.linspace(start, stop, count).tolist()
    assert float32(start) == float(np.float32(start))


def test_schedules_need_no_torch() -> None:
    code = (
        "import sys, ascendit.pipeline.sigmas; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_boundary_itself_is_high_noise() -> None:
    at = [is_high_noise(t, 0.875) for t in (1000.0, 875.0, 874.999, 0.0)]
    assert at == [True, True, False, False]
    assert is_high_noise(0.0, None)
