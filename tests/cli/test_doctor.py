"""`ascendit doctor`."""

from __future__ import annotations

import pytest

from ascendit.device import doctor
from ascendit.device.report import Probe, Row


def probes(*rows: Row) -> tuple[Probe, ...]:
    def burning() -> list[Row]:
        raise OSError("no such device")

    return (lambda: list(rows), burning)


@pytest.mark.parametrize("ready", [True, False])
def test_the_table(run, monkeypatch, ready):
    rows = (
        Row(
            item="torch",
            found="2.13.0",
            needed=">= 2.9",
            status="ok" if ready else "too old",
            fix="pip",
            required=True,
        ),
        Row(item="NPU device", found="none", status="absent", fix="not shown"),
    )
    monkeypatch.setattr(doctor, "PROBES", probes(*rows))
    ended = run("doctor")
    assert ended.code == (0 if ready else 3)
    header, torch, npu, burning, _, verdict = ended.out.splitlines()
    assert header.split() == ["item", "found", "needed", "status", "fix"]
    assert torch.startswith("torch") and torch.split()[4:] == (["ok"] if ready else ["too", "old", "pip"])
    assert npu.endswith("absent")
    assert "OSError: no such device" in burning and burning.endswith("probe failed")
    assert verdict.startswith("ready to run" if ready else "not ready")


def test_json(run, monkeypatch):
    monkeypatch.setattr(doctor, "PROBES", probes(Row(item="torch", found="2.13.0")))
    told = run("doctor", "--json").json
    assert told["ok"] is True
    assert [row["item"] for row in told["rows"]] == ["torch", "burning"]
