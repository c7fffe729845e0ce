"""From a name to a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from ascendit.cli.models import model_folder
from ascendit.errors import UsageError
from ascendit.pipeline.generate import resolve_model


def test_names_mean_the_same_as_to_load(tmp_path, monkeypatch):
    monkeypatch.setattr("ascendit.checkpoint.hub.fetch", lambda name: Path("/cache") / name)
    monkeypatch.setattr("ascendit.pipeline.generate.fetch", lambda name: Path("/cache") / name)
    for name in ("demo", str(tmp_path), "hf:org/name", "ms:org/name@v1"):
        assert model_folder(name) == resolve_model(name)


def test_absent():
    with pytest.raises(UsageError) as e:
        model_folder("Wan-AI/Wan2.2")
    assert e.value.code == "E-USE-02" and "hf:" in e.value.fix
