"""`ascendit bench attention`: shapes, the table, the file, and refused calls."""

from __future__ import annotations

import json

import pytest

from ascendit.attention import bench as runner
from ascendit.attention import measured
from ascendit.cli.bench import named_shape
from ascendit.cli.interruptions import Interrupt
from ascendit.errors import OutOfMemory

QUICK = ("bench", "attention", "--shape", "24,2,64", "--repeats", "2")


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "FOLDER", tmp_path / "cache")


def test_the_table_and_the_file_that_the_choice_reads(run, tmp_path):
    ended = run(*QUICK, "--cross", "9")
    assert ended.code == 0, ended.err
    (file,) = (tmp_path / "cache").iterdir()
    lines = ended.out.splitlines()
    assert lines[0].startswith("Attention on cpu: ") and "ascendit 0." in lines[0]
    assert "self-attention, 24 x 24, 2 heads of 64, bfloat16" in lines
    assert "cross-attention, 24 x 9, 2 heads of 64, bfloat16" in lines
    assert "  kernel            ms " in ended.out and " 2 of 2" in ended.out
    assert any(line.split()[:2] == ["fp8", "(emulated)"] for line in lines)
    assert ended.err.splitlines()[-1].endswith(f"{file.name}, which the automatic choice reads")
    assert "self cpu  1/" in ended.err or "self sdpa  1/" in ended.err
    rows = measured.read_measurements(file, json.loads(file.read_text())["hardware"])
    assert {row.shape.kind for row in rows} == {"self", "cross"}
    run("bench", "attention", "--shape", "25,2,64", "--repeats", "1", "--cross", "0")
    sizes = {row["queries"] for row in json.loads(file.read_text())["rows"]}
    assert sizes == {24, 25}, "rows of other shapes remain"


def test_json_and_another_file(run, tmp_path):
    file = tmp_path / "new" / "times.json"
    ended = run(*QUICK, "--cross", "0", "--json", "-o", file)
    assert ended.code == 0 and ended.err == ""
    data = ended.json
    assert data["file"] == str(file) and data["device"] == "cpu" and not (tmp_path / "cache").exists()
    assert {row["kind"] for row in data["rows"]} == {"self"}
    assert json.loads(file.read_text())["rows"] == data["rows"]
    refused = run(*QUICK, "-o", file)
    assert refused.code == 2 and refused.err.startswith("error[E-USE-03]")
    assert run(*QUICK, "--cross", "0", "-o", file, "--overwrite").code == 0


def test_the_times_of_a_twin_are_not_written(run, tmp_path):
    ended = run(*QUICK, "--cross", "0", "--device", "twin:a5")
    assert ended.code == 0 and not (tmp_path / "cache").exists()
    assert "note: times of a twin are those of this processor, so they are not written" in ended.err
    refused = run(*QUICK, "--device", "twin:a5", "-o", tmp_path / "x.json")
    assert refused.code == 2 and "omit --output" in refused.err


def test_the_named_shapes_are_those_of_81_frames():
    assert named_shape("720p") == (75_600, 40, 128)
    assert named_shape("480p") == (32_760, 40, 128)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("linear",), "bench linear"),
        (("attention", "--shape", "1080p"), "--shape 1080p"),
        (("attention", "--shape", "0,1,64"), "--shape 0,1,64"),
        (("attention", "--repeats", "0"), "--repeats 0"),
        (("attention", "--cross", "-1"), "--cross -1"),
        (("attention", "--device", "tpu"), "device 'tpu'"),
    ],
)
def test_invalid_calls(run, args, text):
    ended = run("bench", *args)
    assert ended.code == 2 and ended.err.startswith(f"error[E-USE-01]: {text}"), ended.err


def test_too_little_memory(run, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "host_memory", lambda: 2**20)
    ended = run(*QUICK[:3], "9000,1,128")
    assert ended.code == OutOfMemory.exit_code and "try    --shape 102,1,128" in ended.err
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_kernels_run(run, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    monkeypatch.setattr(runner, "run_benchmark", lambda *a, **k: pytest.fail("measured"))
    ended = run(*QUICK)
    assert ended.code == 3 and ended.err.startswith("error[E-ENV-02]: cannot write in"), ended.err
    assert "try    -o times.json; or export XDG_CACHE_HOME=" in ended.err


def test_ctrl_c_writes_nothing(run, monkeypatch, tmp_path):
    monkeypatch.setattr(Interrupt, "__enter__", lambda self: self.event.set() or self)
    ended = run(*QUICK)
    assert ended.code == 130 and not (tmp_path / "cache").exists()
