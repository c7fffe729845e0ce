"""`ascendit doctor`: its table, and the text and file of its self-check."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ascendit.doctor import machine, self_check
from ascendit.doctor.operator_cases import Result
from ascendit.doctor.probe import Probe, ProbeRow
from ascendit.doctor.self_check import SelfCheck


def probes(*rows: ProbeRow) -> tuple[Probe, ...]:
    def failing() -> list[ProbeRow]:
        raise OSError("no such device")

    return (lambda: list(rows), failing)


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
    header, torch, npu, failing, _, summary = ended.out.splitlines()
    assert header.split() == ["item", "detected", "needed", "status", "fix"]
    assert torch.startswith("torch") and torch.split()[4:] == (["ok"] if ready else ["too", "old", "pip"])
    assert npu.endswith("absent")
    assert "OSError: no such device" in failing and failing.endswith("probe failed")
    assert summary.startswith("ready to run" if ready else "not ready")


def test_long_cells_are_wrapped(run, monkeypatch):
    row = ProbeRow(
        item="threads", detected="OMP_NUM_THREADS=1 (set by you), " * 5, needed="import it first " * 3
    )
    monkeypatch.setattr(machine, "PROBES", (lambda: [row],))
    lines = run("doctor").out.splitlines()
    assert len(lines) > 5 and max(map(len, lines)) <= 120
    assert "".join(lines).count("OMP_NUM_THREADS=1") == 5 and "".join(lines).count("first") == 3


def test_a_narrow_terminal_has_the_fix_below(run, monkeypatch):
    fix = "pip install 'torch>=2.9' --index-url https://download.pytorch.org/whl/cpu"
    row = ProbeRow(item="torch", detected="2.1 " * 9, needed=">= 2.9", status="too old", fix=fix)
    other = ProbeRow(item="CUDA device", detected="none", status="absent", fix="not shown")
    monkeypatch.setattr(machine, "PROBES", (lambda: [row, other],))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    for width in (80, 40):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = run("doctor").out.splitlines()
        assert f"  fix  {fix}" in lines, "a command stays on one line"
        assert "torch  too old: needs >= 2.9" in lines and "not shown" not in "".join(lines)
        assert max(len(line) for line in lines if fix not in line) <= width


def test_json(run, monkeypatch):
    monkeypatch.setattr(machine, "PROBES", probes(ProbeRow(item="torch", detected="2.13.0")))
    data = run("doctor", "--json").json
    assert data["ok"] is True
    assert [row["item"] for row in data["rows"]] == ["torch", "failing"]
    assert data["ready"] == {"cpu": True, "npu": None}


@pytest.mark.parametrize(
    ("status", "text"), [("ok", "ready to run on the NPU"), ("broken", "not ready to run on")]
)
def test_readiness_of_an_npu_is_reported(run, monkeypatch, status, text):
    fix = "source set_env.sh"
    rows = (ProbeRow(item="CANN toolkit", detected="9.1.0", status=status, fix=fix, part="npu"),)
    monkeypatch.setattr(machine, "PROBES", probes(*rows))
    ended = run("doctor")
    assert ended.code == 0  # the CPU is ready
    assert ended.out.splitlines()[-1].startswith(text)


# ---- the self-check -----------------------------------------------------------------------------


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Results of the next self-check, which is not run."""
    results = [
        Result(
            part="question", name="Which?", operator="npu_a", used=False, verdict="answered", answer="that"
        ),
        Result(part="operator", name="a rope", operator="npu_rotary_mul", db=93.2, microseconds=12.4),
        Result(part="operator", name="silu", operator="npu_silu", used=False),
        Result(part="function", name="rope", operator="rope", how="npu: npu_rotary_mul"),
    ]

    def check(name: str) -> SelfCheck:
        versions = dict.fromkeys(("torch", "cann", "mindiesd", "driver"), "1.0")
        return SelfCheck(name, "a5", tuple(results), {"versions": {**versions, "torch_npu": None}})

    monkeypatch.setattr(self_check, "self_check", check)
    return results


def test_the_text(run, results):
    ended = run("doctor", "--self-check")
    assert ended.code == 0
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert lines[0] == "Self-check of npu, chip a5 torch 1.0 cann 1.0 mindiesd 1.0 driver 1.0"
    assert lines[2:5] == ["Undocumented behaviour", "Which?", "that"]
    assert "npu_rotary_mul 1 exact 93 12" in lines
    assert "1 others 1 passed - - not called by ascendit" in lines
    assert "rope 1 exact - - npu: npu_rotary_mul" in lines
    assert lines[-1] == "passed: 4 checks"


def test_the_text_of_a_failing_card(run, results):
    results[0] = Result(
        part="question",
        name="Which?",
        operator="npu_a",
        used=False,
        verdict="differs",
        answer="x",
        expected="y",
    )
    results[1] = Result(
        part="operator",
        name="a rope",
        operator="npu_rotary_mul",
        verdict="crashed",
        error="ended with code -6",
    )
    results[2] = Result(
        part="operator", name="silu", operator="npu_silu", used=False, verdict="wrong", error="3.0 dB"
    )
    ended = run("doctor", "--self-check")
    assert ended.code == 1
    assert "the twin assumes: y" in ended.out and "a rope: ended with code -6" in ended.out
    assert "silu: 3.0 dB (not called by ascendit)" in ended.out
    assert ended.out.splitlines()[-1] == "failed: npu_rotary_mul; 1 answers differ from the twin's"


def test_the_file_and_json_are_equal(run, results, tmp_path: Path):
    file = tmp_path / "results.json"
    data = run("doctor", "--self-check", "--device", "twin:a5", "--out", file, "--json").json
    assert json.loads(file.read_text()) == data
    assert data["device"] == "twin:a5" and data["operators"][0]["db"] == 93.2
    refused = run("doctor", "--self-check", "--out", file)
    assert refused.code == 2 and "E-USE-03" in refused.err and json.loads(file.read_text()) == data
    file.unlink()
    ended = run("doctor", "--self-check", "--out", file)
    assert f"{file} has the full results" in ended.err


def test_a_file_that_cannot_be_written_is_refused_first(run, results, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(self_check, "self_check", lambda name: pytest.fail("the check has begun"))
    ended = run("doctor", "--self-check", "--out", tmp_path / "no" / "results.json")
    assert ended.code == 2 and "E-USE-02" in ended.err and "--out self-check.json" in ended.err
    assert run("doctor", "--self-check", "--out", tmp_path).code == 2


def test_flags_of_the_self_check_need_it(run):
    ended = run("doctor", "--device", "twin:a5", "--out", "x.json")
    assert ended.code == 2
    assert "--device and --out without --self-check" in ended.err
    assert "ascendit doctor --self-check --device twin:a5 --out x.json" in ended.err


def test_an_invalid_device(run):
    ended = run("doctor", "--self-check", "--device", "twin:a9")
    assert ended.code == 2 and "twin:a5" in ended.err


def test_a_missing_card(run):
    ended = run("doctor", "--self-check")
    assert ended.code == 3 and "torch_npu is not installed" in ended.err and "twin:a5" in ended.err


def test_a_real_self_check_on_a_twin(run, monkeypatch):
    import torch

    from ascendit import twin

    torch.set_num_threads(1)
    ended = run("doctor", "--self-check", "--device", "twin:a2")
    twin.disable()
    assert ended.code == 0 and ended.out.splitlines()[-1].startswith("passed: ")
