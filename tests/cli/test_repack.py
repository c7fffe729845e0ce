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
    """The command by itself; errors come out as they are."""
    app = typer.Typer()
    app.command()(repack)

    def run(*words: str | Path, json: bool = False):
        return CliRunner().invoke(
            app, [str(w) for w in words], obj=Output(json=json, quiet=True), catch_exceptions=False
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
    told = loads(ended.stdout)
    assert (told["engine"], told["to"], told["dry_run"]) == ("mindie", "wan", True)
    assert told["experts"][0]["folder"] == "."


def test_flags_reach_the_work(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def fake(src: Path, dst: Path, **options: object):
        given.update(options, src=src, dst=dst)
        raise UsageError("stop", needs="-", fix="-", code="E-USE-01")

    monkeypatch.setattr("ascendit.convert.repack.repack", fake)
    words = [
        "--base",
        exports.MXFP4,
        "--to",
        "wan",
        "--for",
        "sglang",
        "--copy",
        "--resume",
        "--dry-run",
        "--check",
    ]
    with pytest.raises(UsageError):
        call(exports.MXFP8, "-o", tmp_path / "out", *words)
    del given["on_progress"]
    assert given == {
        "src": str(exports.MXFP8),
        "dst": tmp_path / "out",
        "base": str(exports.MXFP4),
        "to": "wan",
        "engine": "sglang",
        "check": True,
        "copy": True,
        "resume": True,
        "dry_run": True,
    }


def test_a_source_that_is_not_there(call, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model at /no/such/export") as e:
        call("/no/such/export", "-o", tmp_path / "out")
    assert e.value.code == "E-USE-02"
