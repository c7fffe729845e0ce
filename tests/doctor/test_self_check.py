"""The self-check passes on every twin and on the CPU, and sees an operator that is wrong or raises."""

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
def _alone() -> Iterator[None]:
    """One thread, since threads only hinder each other on tensors this small; afterwards no twin is left."""
    torch.set_num_threads(1)
    yield
    twin.disable()


@pytest.fixture
def bent(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[Any], Any]], None]:
    """`bent(name, change)`: what torch.ops gives for this operator is changed; the twin's function is not."""
    from ascendit.twin import install
    from ascendit.twin.registry import run

    def bend(operator: str, change: Callable[[Any], Any]) -> None:
        def kernel(name: str, /, *args: Any, **kwargs: Any) -> Any:
            result = run(name, *args, **kwargs)
            return change(result) if name == operator else result

        monkeypatch.setattr(install, "run", kernel)

    return bend


def named(check: SelfCheck) -> dict[str, Result]:
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
def test_it_covers_what_ascendit_calls_and_the_table_says_so(chip: str) -> None:
    """The rows of `device/operator_support.py` with `used_for` are the operators that are really launched."""
    asked = {r.operator for r in CAPABILITIES if r.used_for and r.support_on(chip) == "yes"}
    device = open_device(f"twin:{chip}")
    assert asked == {c.base.operator for c in operator_cases(device) if c.base.used}
    twin.reset()
    card = CheckedDevice(device)
    for case in function_cases(device):
        case.run(card, case.base)
    assert asked - set(twin.launches()) == {"mindiesd::layernorm"}  # only with fast_layernorm
    assert set(twin.launches()) <= asked


def test_a_wrong_operator_is_named(bent) -> None:
    bent("npu_rotary_mul", lambda out: out * 1.01)
    check = self_check("twin:a5")
    assert not check.ok
    assert {r.operator for r in check.failed} == {"npu_rotary_mul", "rope"}
    told = check.as_dict()
    assert told["verdict"] == "failed" and told["failed"] == ["npu_rotary_mul", "rope"]
    assert "40.0 dB, at least 80 needed" in named(check)["operator: rope"].error


def test_one_wrong_scale_byte_is_seen(bent) -> None:
    def one_off(out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        out[1].view(-1)[0] += 1
        return out

    bent("npu_dynamic_mx_quant", one_off)
    failed = self_check("twin:a5").failed
    assert {"npu_dynamic_mx_quant", "linear in mxfp8"} <= {r.operator for r in failed}
    assert any("of the elements differ" in r.error for r in failed)


def test_an_operator_that_raises_is_reported_and_the_rest_goes_on(bent) -> None:
    def burn(out: Any) -> Any:
        raise RuntimeError("aclnnGelu failed, error code is 507015\nstack")

    bent("npu_gelu", burn)
    check, whole = self_check("twin:a5"), 108
    assert len(check.results) >= whole
    assert {r.operator for r in check.failed} == {"npu_gelu", "gelu", "gelu_tanh"}
    row = named(check)["operator: gelu"]
    assert row.verdict == "error" and row.error == "RuntimeError: aclnnGelu failed, error code is 507015"


def test_an_operator_that_ascendit_does_not_call_decides_nothing(bent) -> None:
    bent("npu_fast_gelu", lambda out: out + 1)
    check = self_check("twin:a5")
    assert check.ok and named(check)["operator: fast gelu"].verdict == "wrong"


def test_an_answer_other_than_the_twins(bent) -> None:
    def ignores(out: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.ones_like(out[0]), torch.ones_like(out[1]))

    bent("npu_dynamic_quant", ignores)
    row = named(self_check("twin:a2"))["question: How does the int8 quantizer treat zeros, inf and nan?"]
    assert row.verdict == "differs" and row.answer == "; ".join(
        f"{name}: scale 1, values [1]" for name in ("zeros", "inf", "nan")
    )
    assert row.expected.startswith("zeros: scale 0, values [0]")


def test_what_is_not_installed_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascendit.ops.npu import kernels

    real = kernels.missing
    monkeypatch.setattr(
        kernels, "missing", lambda call, chip: "gone" if "mindiesd" in call else real(call, chip)
    )
    check = self_check("twin:a5")
    assert check.ok and named(check)["operator: adaln"].verdict == "not installed"
    assert "aten::layer_norm" in named(check)["function: adaln"].how


# ---- the questions ------------------------------------------------------------------------------


def answers(question: Callable[..., str], change: Callable[[str, Any, dict[str, Any]], Any]) -> str:
    open_device("twin:a5")

    def call(name: str, *args: Any, **kwargs: Any) -> Any:
        return change(name, twin.call(name, *args, **kwargs), kwargs)

    return question(call)


def test_readings_of_smooth_scale() -> None:
    ask = hardware_questions._smooth_scale
    assert answers(ask, lambda name, out, kwargs: out) == "multiplied in the dtype of the activation"

    def call(name: str, x: torch.Tensor, smooth_scale: torch.Tensor | None = None) -> Any:
        return twin.call(name, x)

    assert ask(call) == "ignored"


def test_readings_of_dst_type_max() -> None:
    def call(name: str, x: torch.Tensor, **kwargs: Any) -> Any:
        if kwargs.get("dst_type_max") == 7.25:
            raise RuntimeError("dst_type_max is not supported")
        return twin.call(name, x, dst_type=kwargs["dst_type"])

    open_device("twin:a5")
    words = hardware_questions._dst_type_max(call).split("; ")
    assert words[2] == "7 acts as scale_alg=0" and words[3].startswith("7.25 refused (dst_type_max is not")


def test_readings_of_the_order_of_sums() -> None:
    ask = hardware_questions._order_of_sums
    for value, words in ((0.0, "in the order of K"), (126 * 32.0, "exactly"), (64.0, "in another order")):
        assert words in ask(lambda *args, v=value, **kwargs: torch.full((16, 16), v))


def test_questions_for_a_card_alone_say_so_on_a_twin() -> None:
    found = [
        r for r in self_check("twin:a5").results_of("question") if r.answer == hardware_questions.NO_TWIN
    ]
    assert len(found) == sum(q.card_only is not None for q in hardware_questions.QUESTIONS) == 3


def test_the_speed_of_formats_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card alone; here its steps run once, small."""
    monkeypatch.setattr(hardware_questions, "SIZES", (64, (8, 16)))
    words = hardware_questions._formats(CheckedDevice(open_device("twin:a5")))
    assert words.startswith("8 tokens: ND ") and "NZ" in words and words.endswith("GB/s")


# ---- inputs and other devices -------------------------------------------------------------------


def test_inputs_keep_their_strides_and_are_copies() -> None:
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


def test_a_wrong_function_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascendit.kernels.cpu import elementwise
    from ascendit.kernels.kernel import Kernel

    wrong = Kernel("rms_norm", "cpu", lambda x, weight, eps: x, "cpu: wrong")
    monkeypatch.setattr(elementwise, "list_kernels", lambda: (wrong,))
    assert [r.name for r in self_check("cpu").failed] == ["rms_norm"]


def test_the_file_to_send_in() -> None:
    told = json.loads(json.dumps(self_check("twin:a2").as_dict()))
    assert (told["format"], told["verdict"], told["device"], told["chip"]) == (1, "passed", "twin:a2", "a2")
    assert set(told["versions"]) >= {"ascendit", "torch", "torch_npu", "cann", "mindiesd", "driver"}
    case = next(c for c in told["operators"] if c["name"] == "int8 matmul")
    assert case["arguments"][:2] == ["int8 [5, 96]", "int8 [96, 16] strides [1, 96]"]
    assert {"max_abs", "max_rel", "db", "different", "microseconds", "verdict", "error"} <= set(case)
    assert "/home" not in json.dumps(told) and "/root" not in json.dumps(told)


def test_devices_that_are_none_or_not_here() -> None:
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
def tell(**line):
    print({mark!r} + json.dumps(line), flush=True)
print("a banner of a library")
if trouble.get("start"):
    exec(trouble["start"])
tell(chip="a5")
for i in range(first, len(names)):
    tell(begins=results[i])
    exec(trouble.get(names[i], ""))
    tell(result=results[i])
tell(end="done")
"""


@pytest.fixture
def children(tmp_path: Path) -> Callable[..., Any]:
    """`children(trouble)`: the check with made-up cases, where `trouble` is code that runs inside some."""
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


def test_all_goes_well(children) -> None:
    chip, found = children()
    assert chip == "a5"
    assert [r.name for r in found] == list(NAMES) and found[0].arguments == ("int8 [1]",)


def test_a_case_that_takes_the_process_along(children) -> None:
    _, found = children(second="os.abort()")
    assert [r.verdict for r in found] == ["exact", "crashed", "exact"]
    assert found[1].error == "the process ended with code -6" and found[1].failed


def test_a_case_that_hangs(children, monkeypatch) -> None:
    monkeypatch.setattr("ascendit.doctor.self_check.CASE_SECONDS", 0.5)
    _, found = children(third="time.sleep(60)")
    assert [r.verdict for r in found] == ["exact", "exact", "crashed"]
    assert found[2].error == "no answer in 0.5 s"


def test_a_card_that_answers_nothing_more(children) -> None:
    """The child ends itself after a result; another one goes on."""
    dead = "tell(result=results[i]); tell(end='the device answers nothing'); sys.exit()"
    _, found = children(first=dead)
    assert [r.verdict for r in found] == ["exact", "exact", "exact"]
    assert [r.name for r in found] == list(NAMES)


def test_a_device_that_is_refused(children) -> None:
    refusal = {"got": "no card", "needs": "a card", "try": "--device cpu", "code": "E-ENV-03"}
    with pytest.raises(EnvironmentProblem, match="no card"):
        children(start=f"tell(refused={refusal!r}); sys.exit()")


def test_a_child_that_never_starts(children) -> None:
    with pytest.raises(EnvironmentProblem) as e:
        children(start="sys.exit(3)")
    assert "ended with code 3 before its first check" in e.value.got and e.value.fix == "run ascendit doctor"


def test_the_real_child(capsys: pytest.CaptureFixture[str]) -> None:
    """From the last but one case on, on the CPU; and on a device that this machine lacks."""
    main("cpu", 21)
    lines = [json.loads(t.removeprefix(MARK)) for t in capsys.readouterr().out.splitlines()]
    assert [next(iter(line)) for line in lines] == ["chip", "begins", "result", "begins", "result", "end"]
    assert lines[2]["result"]["name"] == "w4a8 linear" and lines[2]["result"]["verdict"] in ("exact", "close")
    main("npu", 0)
    told = json.loads(capsys.readouterr().out.removeprefix(MARK))
    assert told["refused"]["code"] == "E-ENV-03"
