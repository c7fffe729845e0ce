"""The self-check passes on every twin and on the CPU, and reports operators that are wrong or raise."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendit import twin
from ascendit.device.device import parse_device
from ascendit.device.operator_support import CAPABILITIES
from ascendit.doctor import hardware_questions
from ascendit.doctor.operator_cases import PREPARED, CheckedDevice, Result, function_cases, operator_cases
from ascendit.doctor.self_check import MARK, SelfCheck, in_children, main, self_check
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.ops.open_device import open_device


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, which is faster on tensors this small; the twin is disabled afterwards."""
    torch.set_num_threads(1)
    yield
    twin.disable()


@pytest.fixture
def alter(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Any], Any]], None]:
    """`alter(name, change)`: change the result of one operator in torch.ops, not of the twin's function."""
    from ascendit.twin import install
    from ascendit.twin.registry import run

    def alter_operator(operator: str, change: Callable[[Any], Any]) -> None:
        def kernel(name: str, /, *args: Any, **kwargs: Any) -> Any:
            result = run(name, *args, **kwargs)
            return change(result) if name == operator else result

        monkeypatch.setattr(install, "run", kernel)

    return alter_operator


def by_name(check: SelfCheck) -> dict[str, Result]:
    return {f"{r.part}: {r.name}": r for r in check.results}


@pytest.mark.parametrize("chip", ["a2", "a3", "a5"])
def test_every_twin_passes(chip: str) -> None:
    check = self_check(f"twin:{chip}")
    assert check.ok and check.chip == chip and check.failed == []
    assert {r.verdict for r in check.results_of("operator")} == {"exact"}
    assert {r.verdict for r in check.results_of("question")} == {"answered"}
    assert {r.verdict for r in check.results_of("function")} <= {"exact", "close"}
    assert all(r.arguments and r.microseconds for r in check.results_of("operator"))


@pytest.mark.parametrize("chip", ["a2", "a5"])
def test_the_cases_cover_every_operator_that_ascendit_calls(chip: str) -> None:
    """The rows of `device/operator_support.py` with `used_for` are the operators that are launched."""
    used = {r.operator for r in CAPABILITIES if r.used_for and r.support_on(chip) == "yes"}
    device = open_device(f"twin:{chip}")
    assert used == {c.base.operator for c in operator_cases(device) if c.base.used}
    twin.reset()
    card = CheckedDevice(device)
    for case in function_cases(device):
        case.run(card, case.base)
    assert used - set(twin.launches()) == {"mindiesd::layernorm"}  # only with fast_layernorm
    assert set(twin.launches()) <= used


def test_a_wrong_operator_is_reported(alter) -> None:
    alter("npu_rotary_mul", lambda out: out * 1.01)
    check = self_check("twin:a5")
    assert not check.ok
    assert {r.operator for r in check.failed} == {"npu_rotary_mul", "rope"}
    report = check.as_dict()
    assert report["verdict"] == "failed" and report["failed"] == ["npu_rotary_mul", "rope"]
    assert "40.0 dB, at least 80 needed" in by_name(check)["operator: rope"].error


def test_one_wrong_scale_byte_is_detected(alter) -> None:
    def one_off(out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        out[1].view(-1)[0] += 1
        return out

    alter("npu_dynamic_mx_quant", one_off)
    failed = self_check("twin:a5").failed
    assert {"npu_dynamic_mx_quant", "linear in mxfp8"} <= {r.operator for r in failed}
    assert any("of the elements differ" in r.error for r in failed)


def test_an_operator_that_raises_is_reported_and_the_others_run(alter) -> None:
    def fail(out: Any) -> Any:
        raise RuntimeError("aclnnGelu failed, error code is 507015\nstack")

    alter("npu_gelu", fail)
    check, least = self_check("twin:a5"), 108
    assert len(check.results) >= least
    assert {r.operator for r in check.failed} == {"npu_gelu", "gelu", "gelu_tanh"}
    row = by_name(check)["operator: gelu"]
    assert row.verdict == "error" and row.error == "RuntimeError: aclnnGelu failed, error code is 507015"


def test_an_operator_that_ascendit_does_not_call_does_not_change_the_verdict(alter) -> None:
    alter("npu_fast_gelu", lambda out: out + 1)
    check = self_check("twin:a5")
    assert check.ok and by_name(check)["operator: fast gelu"].verdict == "wrong"


def test_an_answer_that_differs_from_the_twins_is_reported(alter) -> None:
    def ignores(out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.ones_like(out[0]), torch.ones_like(out[1]))

    alter("npu_dynamic_quant", ignores)
    row = by_name(self_check("twin:a2"))["question: How does the int8 quantizer treat zeros, inf and nan?"]
    assert row.verdict == "differs" and row.answer == "; ".join(
        f"{name}: scale 1, values [1]" for name in ("zeros", "inf", "nan")
    )
    assert row.expected.startswith("zeros: scale 0, values [0]")


def test_missing_packages_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascendit.ops.npu import kernels

    real = kernels.missing
    monkeypatch.setattr(
        kernels, "missing", lambda call, *rest: "gone" if "mindiesd" in call else real(call, *rest)
    )
    check = self_check("twin:a5")
    assert check.ok and by_name(check)["operator: adaln"].verdict == "not installed"
    assert "aten::layer_norm" in by_name(check)["function: adaln"].how


# ---- the questions ------------------------------------------------------------------------------


def answers(question: Callable[..., str], change: Callable[[str, Any, dict[str, Any]], Any]) -> str:
    open_device("twin:a5")

    def call(name: str, *args: Any, **kwargs: Any) -> Any:
        return change(name, twin.call(name, *args, **kwargs), kwargs)

    return question(call)


def test_answers_about_smooth_scale() -> None:
    ask = hardware_questions._smooth_scale
    assert answers(ask, lambda name, out, kwargs: out) == "multiplied in the dtype of the activation"

    def call(name: str, x: torch.Tensor, smooth_scale: torch.Tensor | None = None) -> Any:
        return twin.call(name, x)

    assert ask(call) == "ignored"


def test_answers_about_dst_type_max() -> None:
    def call(name: str, x: torch.Tensor, **kwargs: Any) -> Any:
        if kwargs.get("dst_type_max") == 7.25:
            raise RuntimeError("dst_type_max is not supported")
        return twin.call(name, x, dst_type=kwargs["dst_type"])

    open_device("twin:a5")
    parts = hardware_questions._dst_type_max(call).split("; ")
    assert parts[2] == "7 acts as scale_alg=0" and parts[3].startswith("7.25 refused (dst_type_max is not")


def test_answers_about_the_order_of_sums() -> None:
    ask = hardware_questions._order_of_sums
    for value, text in ((0.0, "in the order of K"), (126 * 32.0, "exactly"), (64.0, "in another order")):
        assert text in ask(lambda *args, v=value, **kwargs: torch.full((16, 16), v))


def test_questions_for_a_card_have_no_answer_on_a_twin() -> None:
    unanswered = [
        r for r in self_check("twin:a5").results_of("question") if r.answer == hardware_questions.NO_TWIN
    ]
    assert len(unanswered) == sum(q.card_only is not None for q in hardware_questions.QUESTIONS) == 3


def test_the_answer_about_the_speed_of_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for cards; here its steps run once, on small sizes."""
    monkeypatch.setattr(hardware_questions, "SIZES", (64, (8, 16)))
    answer = hardware_questions._formats(CheckedDevice(open_device("twin:a5")))
    assert answer.startswith("8 tokens: ND ") and "NZ" in answer and answer.endswith("GB/s")


# ---- inputs and other devices -------------------------------------------------------------------


def test_inputs_are_copied_with_their_strides() -> None:
    card = CheckedDevice(parse_device("cpu"))
    for t in (torch.rand(4, 6).t(), torch.rand(2, 3, 4).permute(2, 0, 1), torch.rand(3).expand(2, 3)):
        copy = card.to_device(t)
        assert torch.equal(copy, t) and copy.data_ptr() != t.data_ptr()
        assert t.stride() == copy.stride() or 0 in t.stride()
    assert card.to_device([torch.ones(1), 2, "x"])[1:] == [2, "x"]


def test_on_the_cpu_the_bound_functions_are_checked() -> None:
    check = self_check("cpu")
    assert (
        check.ok
        and check.chip is None
        and not check.results_of("operator")
        and not check.results_of("question")
    )
    names = {r.name for r in check.results}
    assert {"attention", "adaln", "int8 linear", "w4a8 linear, smoothed"} <= names
    assert all(r.how for r in check.results) and not list(operator_cases(parse_device("cpu")))
    assert set(PREPARED) <= names


def test_a_wrong_function_on_the_cpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascendit.kernels.cpu import elementwise
    from ascendit.kernels.kernel import Kernel

    wrong = Kernel("rms_norm", "cpu", lambda x, weight, eps: x, "cpu: wrong")
    monkeypatch.setattr(elementwise, "list_kernels", lambda: (wrong,))
    assert [r.name for r in self_check("cpu").failed] == ["rms_norm"]


def test_the_report_file() -> None:
    data = json.loads(json.dumps(self_check("twin:a2").as_dict()))
    assert (data["format"], data["verdict"], data["device"], data["chip"]) == (1, "passed", "twin:a2", "a2")
    assert set(data["versions"]) >= {"ascendit", "torch", "torch_npu", "cann", "mindiesd", "driver"}
    case = next(c for c in data["operators"] if c["name"] == "int8 matmul")
    assert case["arguments"][:2] == ["int8 [5, 96]", "int8 [96, 16] strides [1, 96]"]
    assert {"max_abs", "max_rel", "db", "different", "microseconds", "verdict", "error"} <= set(case)
    assert "/home" not in json.dumps(data) and "/root" not in json.dumps(data)


def test_invalid_and_missing_devices_are_refused() -> None:
    with pytest.raises(UsageError, match="device 'tpu'"):
        self_check("tpu")
    with pytest.raises(EnvironmentProblem) as e:
        self_check("npu:0")
    assert e.value.code == "E-ENV-03" and "torch_npu is not installed" in e.value.got


# ---- child processes -----------------------------------------------------------------------------

NAMES = ("first", "second", "third")

SCRIPT = """
import json, os, sys, time
first, names, results, trouble = json.loads(sys.argv[1])
def send(**line):
    print({mark!r} + json.dumps(line), flush=True)
print("a banner of a library")
if trouble.get("start"):
    exec(trouble["start"])
send(chip="a5")
for i in range(first, len(names)):
    send(begins=results[i])
    exec(trouble.get(names[i], ""))
    send(result=results[i])
send(end="done")
"""


@pytest.fixture
def children(tmp_path: Path) -> Callable[..., Any]:
    """`children(**trouble)`: the check with fake cases; `trouble` maps cases to code to run in them."""
    script = tmp_path / "child.py"
    script.write_text(SCRIPT.format(mark=MARK))
    results = [
        asdict(Result(part="operator", name=n, operator=f"npu_{n}", arguments=("int8 [1]",))) for n in NAMES
    ]

    def run(**trouble: str) -> tuple[str | None, list[Result]]:
        def command(first: int) -> list[str]:
            return [sys.executable, str(script), json.dumps([first, NAMES, results, trouble])]

        return in_children("npu:0", command)

    return run


def test_every_case_succeeds(children) -> None:
    chip, results = children()
    assert chip == "a5"
    assert [r.name for r in results] == list(NAMES) and results[0].arguments == ("int8 [1]",)


def test_a_case_that_ends_the_process(children) -> None:
    _, results = children(second="os.abort()")
    assert [r.verdict for r in results] == ["exact", "crashed", "exact"]
    assert results[1].error == "the process ended with code -6" and results[1].failed


def test_a_case_that_hangs(children, monkeypatch) -> None:
    monkeypatch.setattr("ascendit.doctor.self_check.CASE_SECONDS", 0.5)
    _, results = children(third="time.sleep(60)")
    assert [r.verdict for r in results] == ["exact", "exact", "crashed"]
    assert results[2].error == "no answer in 0.5 s"


def test_a_device_that_stops_answering(children) -> None:
    """The child exits after a result; another child continues."""
    stop = "send(result=results[i]); send(end='the device answers nothing'); sys.exit()"
    _, results = children(first=stop)
    assert [r.verdict for r in results] == ["exact", "exact", "exact"]
    assert [r.name for r in results] == list(NAMES)


def test_a_device_that_is_refused(children) -> None:
    refusal = {"got": "no card", "needs": "a card", "try": "--device cpu", "code": "E-ENV-03"}
    with pytest.raises(EnvironmentProblem, match="no card"):
        children(start=f"send(refused={refusal!r}); sys.exit()")


def test_a_child_that_never_starts(children) -> None:
    with pytest.raises(EnvironmentProblem) as e:
        children(start="sys.exit(3)")
    assert "ended with code 3 before its first check" in e.value.got and e.value.fix == "run ascendit doctor"


def test_the_real_child(capsys: pytest.CaptureFixture[str]) -> None:
    """The last two cases on the CPU; and a device that this machine lacks."""
    main("cpu", 21)
    lines = [json.loads(t.removeprefix(MARK)) for t in capsys.readouterr().out.splitlines()]
    assert [next(iter(line)) for line in lines] == ["chip", "begins", "result", "begins", "result", "end"]
    assert lines[2]["result"]["name"] == "w4a8 linear" and lines[2]["result"]["verdict"] in ("exact", "close")
    main("npu", 0)
    refusal = json.loads(capsys.readouterr().out.removeprefix(MARK))
    assert refusal["refused"]["code"] == "E-ENV-03"
    assert refusal["refused"]["try"].endswith("or --device twin:a5, with the same calls")
