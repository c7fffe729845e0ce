"""The precision of each step: its text, meaning and errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendit.errors import RequestError, UsageError
from ascendit.schedule import PRECISIONS, Step, StepSchedule


def test_spans_single_steps_and_default():
    policy = StepSchedule.parse("0-1:w4a8,default:w4a4")
    assert [step.precision for step in policy.resolve(4)] == ["w4a8", "w4a8", "w4a4", "w4a4"]
    policy = StepSchedule.parse("0,47-49:bf16, 3:w4a8")
    assert [i for i in range(60) if policy.settings_of(i).precision == "bf16"] == [0, 47, 48, 49]
    assert policy.settings_of(3) == Step("w4a8") and policy.settings_of(4) == Step("stored")
    assert policy.precisions == {"bf16", "w4a8", "stored"}


def test_a_schedule_resolves_to_one_record_per_step():
    sparse = Step(attention="sparse", cache="reuse")
    schedule = StepSchedule(((1, sparse), (2, Step("w4a8"))), Step("bf16"))
    assert schedule.resolve(4) == (Step("bf16"), sparse, Step("w4a8"), Step("bf16"))
    assert schedule.resolve(2) == (schedule.settings_of(0), schedule.settings_of(1))
    assert StepSchedule().resolve(2) == (Step("stored", None, None),) * 2


SETTINGS = st.builds(
    Step, st.sampled_from((*PRECISIONS, "stored")), st.sampled_from((None, "bf16", "fp8", "laser"))
)


@given(st.dictionaries(st.integers(0, 60), SETTINGS, min_size=1), SETTINGS)
def test_a_schedule_can_be_parsed_from_its_text(steps, default):
    policy = StepSchedule(tuple(sorted(steps.items())), default)
    assert StepSchedule.parse(str(policy)) == policy


def test_attention_of_a_step():
    policy = StepSchedule.parse("0-3:w4a8+attention=bf16, 5:attention=fp8,default:w4a4")
    assert policy.settings_of(3) == Step("w4a8", "bf16") and policy.settings_of(5) == Step("stored", "fp8")
    assert policy.settings_of(4) == Step("w4a4") and policy.precisions == {"w4a8", "stored", "w4a4"}
    assert str(policy) == "0-3:w4a8+attention=bf16,5:attention=fp8,default:w4a4"
    attention_only = StepSchedule.parse("0:attention=laser")
    attention_only.check_schemes({"bf16"}, floats=False)
    assert attention_only.map(lambda step: replace(step, attention=None)) == StepSchedule(((0, Step()),))


def test_stored_appears_in_the_text():
    policy = StepSchedule.parse("0:stored,default:w4a8")
    assert [step.precision for step in policy.resolve(2)] == ["stored", "w4a8"]
    assert StepSchedule.parse("default:stored") == StepSchedule()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no settings"),
        ("0-1", "0-1 has no settings"),
        ("0:w4a8+w4a4", "'w4a4' is not one of w4a4, w4a8, bf16, attention=NAME"),
        ("0:attention=", "'attention=' is not one of"),
        ("0:attention=fp8+attention=int8", "'attention=int8' is not one of"),
        ("0-1:w4a16", "'w4a16' is not one of w4a4, w4a8, bf16"),
        ("1-0:w4a8", "is in reverse order"),
        ("first:w4a8", "'first' is not a step"),
        ("0:w4a8,0:bf16", "step 0 is named twice"),
        ("default:w4a8,default:w4a4", "default is named twice"),
        ("-1:w4a8", "'-1' is not a step"),
    ],
)
def test_an_invalid_schedule_is_an_error(text, problem):
    with pytest.raises(UsageError) as e:
        StepSchedule.parse(text)
    assert problem in e.value.got and e.value.code == "E-USE-01" and "step_policy" in e.value.fix


def test_steps_beyond_the_last_are_refused():
    StepSchedule.parse("0-5:w4a8").check_steps(6)
    with pytest.raises(RequestError, match="names step 6, but there are 6 steps") as e:
        StepSchedule.parse("0-9:w4a8").check_steps(6)
    assert e.value.code == "E-REQ-03" and "0 to 5" in e.value.needs


def test_a_precision_needs_weights_of_its_scheme():
    policy = StepSchedule.parse("0:w4a8")
    policy.check_schemes({"mxfp4", "bf16"}, floats=False)
    with pytest.raises(UsageError, match="no layer is in mxfp4; the model has bf16, mxfp8"):
        policy.check_schemes({"mxfp8", "bf16"}, floats=True)
    with pytest.raises(UsageError, match="this model has only quantized weights"):
        StepSchedule.parse("0:bf16").check_schemes({"mxfp4"}, floats=False)
    StepSchedule.parse("0:bf16").check_schemes({"int8"}, floats=True)
