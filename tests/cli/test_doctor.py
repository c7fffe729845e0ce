"""`ascendit doctor`: its table, and the page and the file of its self-check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ascendit.doctor import machine, self_check
from ascendit.doctor.operator_cases import Result
from ascendit.doctor.probe import Probe, ProbeRow
from ascendit.doctor.self_check import SelfCheck


def probes(*rows: ProbeRow) -> tuple[Probe, ...]:
    def burning() -> list[ProbeRow]:
        raise OSError("no such device")

    return (lambda: list(rows), burning)


@pytest.mark.parametrize("ready", [True, False])
def test_the_table(run, monkeypatch, ready):
    rows = (
        ProbeRow(
            item="torch",
            detected="2.13.0",
            needed=">= 2.9",
            status="ok" if ready else "too old",
            fix="pip",
            required=True,
        ),
        ProbeRow(item="NPU device", detected="none", status="absent", fix="not shown"),
    )
    monkeypatch.setattr(machine, "PROBES", probes(*rows))
    ended = run("doctor")
    assert ended.code == (0 if ready else 3)
    header, torch, npu, burning, _, verdict = ended.out.splitlines()
    assert header.split() == ["item", "detected", "needed", "status", "fix"]
    assert torch.startswith("torch") and torch.split()[4:] == (["ok"] if ready else ["too", "old", "pip"])
    assert npu.endswith("absent")
    assert "OSError: no such device" in burning and burning.endswith("probe failed")
    assert verdict.startswith("ready to run" if ready else "not ready")


def test_json(run, monkeypatch):
    monkeypatch.setattr(machine, "PROBES", probes(ProbeRow(item="torch", detected="2.13.0")))
    told = run("doctor", "--json").json
    assert told["ok"] is True
    assert [row["item"] for row in told["rows"]] == ["torch", "burning"]
    assert told["ready"] == {"cpu": True, "npu": None}


@pytest.mark.parametrize(
    ("status", "words"), [("ok", "ready to run on the NPU"), ("broken", "not ready to run on")]
)
def test_an_npu_has_a_verdict_of_its_own(run, monkeypatch, status, words):
    fix = "source set_env.sh"
    rows = (ProbeRow(item="CANN toolkit", detected="9.1.0", status=status, fix=fix, part="npu"),)
    monkeypatch.setattr(machine, "PROBES", probes(*rows))
    ended = run("doctor")
    assert ended.code == 0  # the CPU does
    assert ended.out.splitlines()[-1].startswith(words)


# ---- the self-check -----------------------------------------------------------------------------


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """What the next self-check finds, instead of running one."""
    results = [
        Result(
            part="question", name="Which?", operator="npu_a", used=False, verdict="answered", answer="that"
        ),
        Result(part="operator", name="a rope", operator="npu_rotary_mul", db=93.2, microseconds=12.4),
        Result(part="operator", name="silu", operator="npu_silu", used=False),
        Result(part="function", name="rope", operator="rope", how="npu: npu_rotary_mul"),
    ]

    def check(name: str) -> SelfCheck:
        about: dict[str, Any] = {"versions": dict.fromkeys(("torch", "cann", "mindiesd", "driver"), "1.0")}
        return SelfCheck(name, "a5", tuple(results), {"versions": {**about["versions"], "torch_npu": None}})

    monkeypatch.setattr(self_check, "self_check", check)
    return results


def test_the_page(run, found):
    ended = run("doctor", "--self-check")
    assert ended.code == 0
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert lines[0] == "Self-check of npu, chip a5 torch 1.0 cann 1.0 mindiesd 1.0 driver 1.0"
    assert lines[2:5] == ["Undocumented behaviour", "Which?", "that"]
    assert "npu_rotary_mul 1 exact 93 12" in lines
    assert "1 others 1 passed - - not called by ascendit" in lines
    assert "rope 1 exact - - npu: npu_rotary_mul" in lines
    assert lines[-1] == "passed: 4 checks"


def test_the_page_of_a_card_that_errs(run, found):
    found[0] = Result(
        part="question",
        name="Which?",
        operator="npu_a",
        used=False,
        verdict="differs",
        answer="x",
        expected="y",
    )
    found[1] = Result(
        part="operator",
        name="a rope",
        operator="npu_rotary_mul",
        verdict="crashed",
        error="ended with code -6",
    )
    found[2] = Result(
        part="operator", name="silu", operator="npu_silu", used=False, verdict="wrong", error="3.0 dB"
    )
    ended = run("doctor", "--self-check")
    assert ended.code == 1
    assert "the twin assumes: y" in ended.out and "a rope: ended with code -6" in ended.out
    assert "silu: 3.0 dB (not called by ascendit)" in ended.out
    assert ended.out.splitlines()[-1] == "failed: npu_rotary_mul; 1 answers differ from the twin's"


def test_the_file_and_json_hold_the_same(run, found, tmp_path: Path):
    file = tmp_path / "found.json"
    told = run("doctor", "--self-check", "--device", "twin:a5", "--out", file, "--json").json
    assert json.loads(file.read_text()) == told
    assert told["device"] == "twin:a5" and told["operators"][0]["db"] == 93.2
    refused = run("doctor", "--self-check", "--out", file)
    assert refused.code == 2 and "E-USE-03" in refused.err and json.loads(file.read_text()) == told
    file.unlink()
    ended = run("doctor", "--self-check", "--out", file)
    assert f"{file} has the full results" in ended.err


def test_a_file_that_cannot_be_written_is_told_first(run, found, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(self_check, "self_check", lambda name: pytest.fail("the check has begun"))
    ended = run("doctor", "--self-check", "--out", tmp_path / "no" / "found.json")
    assert ended.code == 2 and "E-USE-02" in ended.err and "--out self-check.json" in ended.err
    assert run("doctor", "--self-check", "--out", tmp_path).code == 2


def test_flags_of_the_self_check_alone(run):
    ended = run("doctor", "--device", "twin:a5", "--out", "x.json")
    assert ended.code == 2
    assert "--device and --out without --self-check" in ended.err
    assert "ascendit doctor --self-check --device twin:a5 --out x.json" in ended.err


def test_a_device_that_is_none(run):
    ended = run("doctor", "--self-check", "--device", "twin:a9")
    assert ended.code == 2 and "twin:a5" in ended.err


def test_a_card_that_is_not_here(run):
    ended = run("doctor", "--self-check")
    assert ended.code == 3 and "torch_npu is not installed" in ended.err and "twin:a5" in ended.err


def test_for_real_on_a_twin(run, monkeypatch):
    import torch

    from ascendit import twin

    torch.set_num_threads(1)
    ended = run("doctor", "--self-check", "--device", "twin:a2")
    twin.disable()
    assert ended.code == 0 and ended.out.splitlines()[-1].startswith("passed: ")
