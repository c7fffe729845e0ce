"""From a name to a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from ascendit.checkpoint import hub
from ascendit.checkpoint.hub import model_folder
from ascendit.errors import EnvironmentProblem, UsageError


def test_names(tmp_path, monkeypatch):
    monkeypatch.setattr("ascendit.checkpoint.hub.fetch", lambda name, experts=True: Path("/cache") / name)
    monkeypatch.setattr(hub, "DEMO", tmp_path / "demo")
    (tmp_path / "demo").mkdir()
    assert model_folder("demo") == tmp_path / "demo"
    assert model_folder(tmp_path) == model_folder(str(tmp_path)) == tmp_path
    for name in ("hf:org/name", "ms:org/name@v1"):
        assert model_folder(name) == Path("/cache") / name


def test_absent(tmp_path, monkeypatch):
    with pytest.raises(UsageError) as e:
        model_folder("Wan-AI/Wan2.2")
    assert e.value.code == "E-USE-02" and "hf:" in e.value.fix
    monkeypatch.setattr(hub, "DEMO", tmp_path / "demo")
    with pytest.raises(EnvironmentProblem, match="install ascendit again"):
        model_folder("demo")
