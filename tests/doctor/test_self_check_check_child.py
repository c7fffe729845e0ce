"""A self-check in a process of its own: cases that crash or hang are results, and the rest is still run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ascendit.doctor import self_check
from ascendit.doctor.operator_cases import Result
from ascendit.doctor.self_check import MARK, in_children
from ascendit.errors import EnvironmentProblem

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
    seen: list[str] = []

    def run(**trouble: str) -> tuple[str | None, list[Result], list[str]]:
        def command(first: int) -> list[str]:
            return [sys.executable, str(script), json.dumps([first, NAMES, results, trouble])]

        chip, found = in_children("npu:0", seen.append, command)
        return chip, found, seen

    return run


def test_all_goes_well(children) -> None:
    chip, found, seen = children()
    assert chip == "a5" and seen == list(NAMES)
    assert [r.name for r in found] == list(NAMES) and found[0].arguments == ("int8 [1]",)


def test_a_case_that_takes_the_process_along(children) -> None:
    _, found, _ = children(second="os.abort()")
    assert [r.verdict for r in found] == ["exact", "crashed", "exact"]
    assert found[1].error == "the process ended with code -6" and found[1].failed


def test_a_case_that_hangs(children, monkeypatch) -> None:
    monkeypatch.setattr(self_check, "CASE_SECONDS", 0.5)
    _, found, _ = children(third="time.sleep(60)")
    assert [r.verdict for r in found] == ["exact", "exact", "crashed"]
    assert found[2].error == "no answer in 0.5 s"


def test_a_card_that_answers_nothing_more(children) -> None:
    """The child ends itself after a result; another one goes on."""
    dead = "tell(result=results[i]); tell(end='the device answers nothing'); sys.exit()"
    _, found, seen = children(first=dead)
    assert [r.verdict for r in found] == ["exact", "exact", "exact"] and seen == list(NAMES)


def test_a_device_that_is_refused(children) -> None:
    refusal = {"got": "no card", "needs": "a card", "try": "--device cpu", "code": "E-ENV-03"}
    with pytest.raises(EnvironmentProblem, match="no card"):
        children(start=f"tell(refused={refusal!r}); sys.exit()")


def test_a_child_that_never_starts(children) -> None:
    with pytest.raises(EnvironmentProblem) as e:
        children(start="sys.exit(3)")
    assert "ended with code 3 before its first check" in e.value.got and e.value.fix == "ascendit doctor"


def test_the_real_child(capsys: pytest.CaptureFixture[str]) -> None:
    """From the last but one case on, on the CPU; and on a device that this machine lacks."""
    self_check.main("cpu", 19)
    lines = [json.loads(t.removeprefix(MARK)) for t in capsys.readouterr().out.splitlines()]
    assert [next(iter(line)) for line in lines] == ["chip", "begins", "result", "begins", "result", "end"]
    assert lines[2]["result"]["name"] == "w4a8 linear" and lines[2]["result"]["verdict"] in ("exact", "close")
    self_check.main("npu", 0)
    told = json.loads(capsys.readouterr().out.removeprefix(MARK))
    assert told["refused"]["code"] == "E-ENV-03"
