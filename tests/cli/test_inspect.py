"""`ascendit inspect`."""

from __future__ import annotations

import pytest


class FakeReport:
    def __init__(self, ok: bool) -> None:
        self.ok = ok

    def lines(self) -> list[str]:
        return ["Model  x", "Checks  1 missing"]

    def as_dict(self) -> dict[str, object]:
        return {"ok": self.ok}


@pytest.mark.parametrize("ok", [True, False])
def test_it_prints_the_report(run, model, monkeypatch, ok):
    monkeypatch.setattr("ascendit.pipeline.inspect.inspect_folder", lambda path: FakeReport(ok))
    ended = run("inspect", model)
    assert ended.out == "Model  x\nChecks  1 missing\n" and ended.err == ""
    assert ended.code == (0 if ok else 1)
    assert run("inspect", model, "--json").json == {"ok": ok}


def test_a_folder_without_weights_is_not_whole(run, model):
    ended = run("inspect", model, "--json")
    assert ended.code == 1
    assert "transformer" in ended.out and ended.json


def test_no_folder(run):
    ended = run("inspect", "/no/such/folder")
    assert ended.code == 2 and ended.err.startswith("error[E-USE-02]: no model at /no/such/folder")
