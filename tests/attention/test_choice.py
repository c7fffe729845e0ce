"""The choice of a kernel: the best for the size, requests, and errors of requests that cannot be met."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ascendit.attention.choice import AttentionPolicy
from ascendit.device.attention_kernels import ATTENTION_KERNELS, Kind, parse_attention
from ascendit.device.attention_limits import AttentionCall
from ascendit.device.device import parse_device
from ascendit.errors import AscenditError, EnvironmentProblem, UsageError
from ascendit.option_text import command_line
from ascendit.schedule import StepSchedule

CALL = AttentionCall(kind="self", dtype="bfloat16", heads=12, head_dim=128, queries=8190, keys=8190)
TEXT = replace(CALL, kind="text", keys=512)


def policy(device: str, request: str = "", **kw: Any) -> AttentionPolicy:
    return AttentionPolicy(
        device=parse_device(device), request=parse_attention(request) if request else {}, **kw
    )


def fix_of(error: AscenditError) -> str:
    """The fix as the command line writes it."""
    with command_line("generate"):
        return error.fix


def refusal(device: str, request: str, call: AttentionCall = CALL, **kw: Any) -> AscenditError:
    keys: dict[Kind, int] = {"self": call.queries, "text": 512, "image": 257}
    calls = {kind: replace(call, kind=kind, keys=n) for kind, n in keys.items()}
    with pytest.raises(AscenditError) as e:
        policy(device, request, **kw).choose(call, calls=calls)
    return e.value


@pytest.mark.parametrize(
    ("device", "call", "name"),
    [
        ("cpu", CALL, "cpu"),
        ("cpu", replace(CALL, dtype="float32"), "sdpa"),
        ("cpu", replace(CALL, head_dim=48), "sdpa"),
        ("cpu", replace(CALL, head_dim=512), "sdpa"),
        ("cuda", TEXT, next(n for n, row in ATTENTION_KERNELS.items() if "cuda" in row.backends)),
        ("twin:a2", CALL, "fusion"),
        ("twin:a5", TEXT, "fusion"),
        ("twin:a5", replace(CALL, head_dim=1024), "reference"),
    ],
)
def test_the_best_kernel_for_the_size(device: str, call: AttentionCall, name: str) -> None:
    if device == "cuda" and ATTENTION_KERNELS[name].on_request:
        name = "sdpa"
    choice = policy(device).choose(call)
    assert choice.name == name and choice.reason.startswith("default")


def test_the_reason_names_better_kernels_that_cannot_be_used() -> None:
    choice = policy("cpu").choose(replace(CALL, dtype="float32"))
    assert choice.reason == "default; cpu: it takes bfloat16, not float32"
    choice = policy("cpu", missing=lambda name: "no compiler" if name == "cpu" else "").choose(CALL)
    assert (choice.name, choice.reason) == ("sdpa", "default; cpu: no compiler")


def test_a_measured_kernel_is_the_default_unless_it_cannot_be_used() -> None:
    def measured(name: str) -> Any:
        return lambda device, call, usable: (name, "measured: 2 ms") if usable(name) else None

    for name, chosen in (("sdpa", "sdpa"), ("fusion", "cpu")):
        choice = policy("cpu", measured=measured(name)).choose(CALL)
        assert choice.name == chosen
        assert (choice.reason == "measured: 2 ms") == (chosen == name)
    assert policy("cpu", "cpu", measured=measured("sdpa")).choose(CALL).name == "cpu"


def test_the_step_then_the_request_then_the_model_decide() -> None:
    by_request = policy("cpu", "self=sdpa")
    assert by_request.choose(CALL, step="int8", declared="fp8").name == "int8"
    assert by_request.choose(CALL, declared="fp8").name == "sdpa"
    assert by_request.choose(TEXT, declared="fp8").name == "fp8"
    assert by_request.choose(TEXT).name == "cpu"
    bf16 = policy("cpu", "bf16").choose(CALL, declared="fp8")
    assert (bf16.name, bf16.reason) == ("cpu", "requested: bf16; default")
    assert policy("cpu", reference=True).choose(CALL).name == "reference"


@pytest.mark.parametrize(
    ("device", "request_", "call", "got", "needs", "fix"),
    [
        ("twin:a2", "laser", TEXT, "text=laser on twin:a2: it computes self-attention only",
         "fusion or fused_infer or reference for cross-attention to the text",
         "--attention self=laser,cross=fusion"),
        ("twin:a5", "self=laser", CALL, "mindiesd::la does not run on a5",
         "fusion or fused_infer or reference", "--attention self=fusion"),
        ("twin:a2", "self=laser", replace(CALL, queries=2040, keys=2040), "at least 2048 tokens, not 2040",
         "fusion", "--attention self=fusion"),
        ("twin:a2", "self=laser", replace(CALL, key_length=8000), "it takes no padded keys", "fusion",
         "--attention self=fusion"),
        ("twin:a3", "self=laser", replace(CALL, head_dim=192), "head sizes up to 128, not 192", "fusion",
         "--attention self=fusion"),
        ("twin:a5", "fused_infer", replace(CALL, head_dim=24), "multiples of 16, not 24",
         "fusion or reference for self-attention; laser: mindiesd::la does not run on a5",
         "--attention fusion"),
        ("cpu", "cpu", replace(CALL, dtype="float16"), "it takes bfloat16, not float16",
         "sdpa or reference for self-attention; qk_int8: it takes bfloat16", "--attention sdpa"),
        ("cpu", "self=fusion,cross=sdpa", CALL, "it needs an NPU or its twin", "cpu or sdpa",
         "--attention self=cpu,cross=sdpa"),
    ],
)  # fmt: skip
def test_a_request_that_cannot_be_met_lists_what_can(
    device: str, request_: str, call: AttentionCall, got: str, needs: str, fix: str
) -> None:
    error = refusal(device, request_, call)
    assert isinstance(error, UsageError) and error.code == "E-USE-01"
    assert got in error.got and needs in error.needs and fix_of(error) == fix
    fixed = policy(device, fix.removeprefix("--attention "))
    assert fixed.choose(call).reason == "requested"


def test_a_kernel_that_is_not_installed_is_a_problem_of_the_machine() -> None:
    absent = {"laser": "mindiesd is not installed"}
    error = refusal("twin:a2", "self=laser", missing=lambda name: absent.get(name, ""))
    assert isinstance(error, EnvironmentProblem) and error.code == "E-CAP-01"
    assert "mindiesd is not installed" in error.got and fix_of(error) == "--attention self=fusion"


@pytest.mark.parametrize(
    ("device", "scheme"), [("twin:a2", "fp8"), ("twin:a3", "mxfp8"), ("twin:a5", "int8")]
)
def test_a_scheme_that_the_chip_lacks_needs_emulation(device: str, scheme: str) -> None:
    error = refusal(device, f"self={scheme}")
    assert isinstance(error, EnvironmentProblem) and error.code == "E-CAP-01"
    assert f"attention self={scheme}" in error.got and "--emulate decode-on-use" in fix_of(error)
    assert policy(device, f"self={scheme}", emulate=True).choose(CALL).name == scheme
    assert policy("cpu", f"self={scheme}").choose(CALL).name == scheme
    with pytest.raises(EnvironmentProblem, match=f"attention in {scheme}"):
        policy(device).choose(CALL, declared=scheme)


def test_native_schemes() -> None:
    assert [policy("twin:a5", x).choose(CALL).name for x in ("fp8", "mxfp8")] == ["fp8", "mxfp8"]


def test_a_rotation_needs_a_power_of_two() -> None:
    error = refusal("cpu", "self=fp8", replace(CALL, head_dim=96))
    assert "powers of two, not 96" in error.got and fix_of(error) == "--attention self=bf16"
    assert policy("cpu", "self=int8").choose(replace(CALL, head_dim=96)).name == "int8"
    schedule = StepSchedule.parse("2:attention=fp8")
    with pytest.raises(UsageError, match="fp8 of the step policy on cpu: .* not 96") as e:
        policy("cpu", schedule=schedule).choose(replace(CALL, head_dim=96), step="fp8")
    assert fix_of(e.value) == "--step-policy 2:attention=bf16"


@pytest.mark.parametrize(
    ("changes", "got"), [({"dtype": "float32"}, "not float32"), ({"head_dim": 256}, "up to 128, not 256")]
)
def test_the_limits_of_a_chip_in_a_scheme(changes: dict[str, Any], got: str) -> None:
    call = replace(CALL, **changes)
    for options in ({}, {"emulate": True}):  # a scheme that the chip has is never emulated
        error = refusal("twin:a5", "self=fp8", call, **options)
        assert isinstance(error, UsageError) and got in error.got
        assert fix_of(error) == "--attention self=bf16"
    assert policy("twin:a5", "self=bf16").choose(call).name == "fusion"
    assert policy("twin:a5", "self=fp8", reference=True).choose(call).name == "fp8"
    assert policy("twin:a2", "self=fp8", emulate=True).choose(call).name == "fp8"


def test_the_fix_for_a_step_is_a_schedule() -> None:
    schedule = StepSchedule.parse("0-3:w4a8+attention=laser,9:attention=bf16")
    with pytest.raises(UsageError) as e:
        policy("twin:a5", schedule=schedule).choose(CALL, step="laser")
    assert e.value.got.startswith("attention=laser of the step policy on twin:a5")
    assert fix_of(e.value) == "--step-policy 0-3:w4a8+attention=fusion,9:attention=bf16"


def test_a_check_of_names_alone_lists_no_limit_of_a_size() -> None:
    with pytest.raises(UsageError, match="it needs CUDA") as e:
        policy("twin:a2", "self=flash").check_names()
    assert e.value.needs == "fusion or fused_infer or reference or laser for self-attention"


def test_groups_of_heads_must_divide_the_heads() -> None:
    grouped = policy("cpu", sub_head=4)
    grouped.check_heads(12)
    assert grouped.choose(CALL).sub_head == 4 and grouped.choose(TEXT).sub_head is None
    assert policy("cpu", sub_head=12).choose(CALL).sub_head is None, "all heads in one call"
    with pytest.raises(UsageError) as e:
        policy("cpu", sub_head=5).check_heads(12)
    assert e.value.code == "E-USE-01" and e.value.needs == "a divisor of 12: 1, 2, 3, 4, 6, 12"
    assert fix_of(e.value) == "--sub-head 4"
