"""`ascendit repack`."""

from __future__ import annotations

from json import loads
from pathlib import Path

import pytest
import typer
from convert import exports
from typer.testing import CliRunner

from ascendit.cli.output import Output
from ascendit.cli.repack import repack
from ascendit.errors import UsageError


@pytest.fixture
def call():
    """The command alone; its errors are raised."""
    app = typer.Typer()
    app.command()(repack)

    def run(*args: str | Path, json: bool = False):
        return CliRunner().invoke(
            app, [str(w) for w in args], obj=Output(json=json, quiet=True), catch_exceptions=False
        )

    return run


def test_it_writes_and_reports(call, tmp_path: Path) -> None:
    ended = call(exports.MXFP8, "-o", tmp_path / "out", "--check")
    assert ended.exit_code == 0
    assert "10 mxfp8" in ended.stdout and "decode to the same values, sha256" in ended.stdout
    assert (tmp_path / "out" / "transformer" / "quant_model_description.json").is_file()


def test_json_and_dry_run(call, tmp_path: Path) -> None:
    ended = call(exports.MXFP8, "-o", tmp_path / "out", "--for", "mindie", "--dry-run", json=True)
    assert ended.exit_code == 0 and not (tmp_path / "out").exists()
    data = loads(ended.stdout)
    assert (data["engine"], data["to"], data["dry_run"]) == ("mindie", "wan", True)
    assert data["experts"][0]["folder"] == "."


def test_flags_are_passed_on(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: dict[str, object] = {}

    def fake(src: Path, dst: Path, **options: object):
        passed.update(options, src=src, dst=dst)
        raise UsageError("stop", needs="-", fix="-", code="E-USE-01")

    monkeypatch.setattr("ascendit.convert.repack.repack", fake)
    args = [
        "--base",
        exports.MXFP4,
        "--to",
        "wan",
        "--for",
        "sglang",
        "--copy",
        "--resume",
        "--overwrite",
        "--dry-run",
        "--check",
    ]
    with pytest.raises(UsageError):
        call(exports.MXFP8, "-o", tmp_path / "out", *args)
    del passed["on_progress"]
    assert passed == {
        "src": [str(exports.MXFP8)],
        "dst": tmp_path / "out",
        "base": str(exports.MXFP4),
        "to": "wan",
        "engine": "sglang",
        "check": True,
        "copy": True,
        "resume": True,
        "overwrite": True,
        "dry_run": True,
    }


def test_a_missing_source(call, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model at /no/such/export") as e:
        call("/no/such/export", "-o", tmp_path / "out")
    assert e.value.code == "E-USE-02"
