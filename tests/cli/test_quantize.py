"""`ascendit quantize`: flags, output, and interrupted runs."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from convert.models import TI2V, read, write_model, write_transformer
from kill import contents, run_and_kill
from safetensors.torch import save_file

from ascendit.checkpoint.layout import recognise
from ascendit.convert.quantize import quantize
from ascendit.errors import UsageError
from ascendit.progress import Progress


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def test_it_prints_the_report(run, model, tmp_path):
    ended = run("quantize", model, "-o", tmp_path / "out", "--scheme", "mxfp8", "--keep", "blocks.0.*")
    assert ended.code == 0, ended.err
    assert "10 mxfp8, 16 bf16" in ended.out and "blocks.0  (--keep blocks.0.*)" in ended.out
    assert recognise(tmp_path / "out").kind == "diffusers"
    assert "transformer_2  100 %" in ended.err


def test_json_is_one_object_and_stderr_is_silent(run, model, tmp_path):
    ended = run("quantize", model, "-o", tmp_path / "out", "--scheme", "int8", "--report", "--json")
    assert ended.code == 0 and ended.err == ""
    assert ended.json["layers"] == {"int8": 40, "bf16": 12} and len(ended.json["experts"][0]["worst"]) == 10
    assert ended.json["path"] == str(tmp_path / "out")


def test_a_report_is_a_page_or_json(run, model, tmp_path):
    start = ("quantize", model, "--scheme", "mxfp4")
    page, data = tmp_path / "r.html", tmp_path / "r.json"
    ended = run(*start, "--report", page, "-o", tmp_path / "a")
    assert ended.code == 0 and "the 10 worst of 20 layers" in ended.out
    report, output, following = (line.split(maxsplit=1) for line in ended.out.splitlines()[-3:])
    assert report == ["Report", str(page)] and output == ["Output", str(tmp_path / "a")]
    assert following[1].startswith(f"ascendit generate {tmp_path / 'a'} ")
    text = page.read_text()
    assert text.count("<svg") == 3 and "All 20 linear layers of transformer_2" in text
    assert run(*start, f"--report={data}", "-o", tmp_path / "b", "-q").code == 0
    experts = json.loads(data.read_text())["experts"]
    assert len(experts[0]["sqnr_db"]) == 20
    worst, decibels = min(experts[0]["sqnr_db"].items(), key=lambda item: item[1])
    table = text.partition("The 10 worst layers of transformer<")[2]
    assert f"<td>{worst}</td><td>mxfp4, 4." in table and f">{decibels:.2f} dB</td>" in table
    ended = run(*start, "--report", page, "-o", tmp_path / "c")
    assert ended.code == 2 and "error[E-USE-03]" in ended.err and not (tmp_path / "c").exists()


def test_report_without_a_file_measures(run, model, tmp_path):
    for n, args in enumerate([("--report", model), (model, "--report")]):
        ended = run("quantize", *args, "-o", tmp_path / str(n), "--scheme", "int8")
        assert ended.code == 0, ended.err
        assert "the 10 worst of 20 layers" in ended.out and "Report" not in ended.out


def test_a_report_inside_the_output_is_part_of_it(run, model, tmp_path):
    dst = tmp_path / "out"
    args = ("quantize", model, "-o", dst, "--scheme", "int8", "--report")
    assert run(*args, dst / "r.html").code == 0
    assert (
        json.loads((dst / "ascendit.json").read_text())["sizes"]["r.html"] == (dst / "r.html").stat().st_size
    )
    assert run(*args, dst / "r.html", "--overwrite").code == 0
    ended = run(*args, dst / "r.json", "--overwrite")
    assert ended.code == 2 and "error[E-USE-06]" in ended.err


def test_overwrite(run, model, tmp_path):
    dst = tmp_path / "out"
    for scheme in ("mxfp8", "int8"):
        assert run("quantize", model, "-o", dst, "--scheme", scheme, "--overwrite").code == 0
    assert read(dst / "transformer")["blocks.0.ffn.net.2.weight"].dtype == torch.int8
    ended = run("quantize", model, "-o", dst, "--scheme", "mxfp8")
    assert ended.code == 2 and ended.err.endswith("out-2, or add --overwrite\n")
    (dst / "mine.txt").write_text("x")
    ended = run("quantize", model, "-o", dst, "--scheme", "mxfp8", "--overwrite", "--dry-run")
    assert ended.code == 2 and "error[E-USE-03]" in ended.err and "mine.txt" in ended.err
    ended = run("quantize", model, "-o", model, "--scheme", "mxfp8", "--overwrite")
    assert ended.code == 2 and "error[E-USE-06]" in ended.err


def test_hash_records_sha256_of_the_files(run, model, tmp_path):
    ended = run("quantize", model, "-o", tmp_path / "out", "--scheme", "int8", "--hash")
    assert ended.code == 0
    record = json.loads((tmp_path / "out" / "ascendit.json").read_text())
    assert {"transformer/config.json", "model_index.json"} <= record["files"].keys() and record[
        "command"
    ].endswith("--hash")


def test_dry_run_writes_nothing(run, model, tmp_path):
    ended = run("quantize", model, "-o", tmp_path / "out", "--recipe", "dualscale-bf16-5", "--dry-run")
    assert ended.code == 2 and "quantizes no layer" in ended.err  # two blocks, and the recipe excludes five
    ended = run("quantize", model, "-o", tmp_path / "out", "--scheme", "mxfp4", "--dry-run", "-q")
    assert ended.code == 0 and "nothing written" in ended.out and ended.err == ""
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        ((), "E-USE-01", "mxfp4_dualscale"),
        (("--scheme", "w8a8"), "E-USE-01", "scheme 'w8a8'"),
        (("--scheme", "mxfp8", "--keep", "block.*"), "E-USE-05", "block.*"),
        (("--recipe", "best"), "E-USE-02", "ascend-w8a8f8"),
        (("--scheme", "mxfp8", "--for", "tgi"), "E-USE-01", "vllm-omni"),
        (("--scheme", "mxfp8", "--scale-rule", "max:7"), "E-USE-01", "ceil"),
        (("--scheme", "mxfp8", "--lora", "none.safetensors"), "E-USE-02", "none.safetensors"),
    ],
)
def test_invalid_calls_are_refused_and_leave_no_file(run, model, tmp_path, args, code, text):
    ended = run("quantize", model, "-o", tmp_path / "out", *args)
    assert ended.code == 2 and f"error[{code}]" in ended.err and text in ended.err
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_lora_keys_that_the_model_lacks_are_skipped_on_request(run, model, tmp_path):
    a, b = torch.ones(2, 64), torch.ones(64, 2)
    layers = ("self_attn.q", "cross_attn.k_img")
    lora = {f"blocks.0.{x}.lora_{y}.weight": t.clone() for x in layers for y, t in (("A", a), ("B", b))}
    save_file(lora, tmp_path / "a.safetensors", metadata={"lora_alpha": "1"})
    args = (
        "quantize",
        model,
        "-o",
        tmp_path / "out",
        "--scheme",
        "int8",
        "--lora",
        tmp_path / "a.safetensors",
    )
    ended = run(*args, "--dry-run")
    assert ended.code == 1 and "or add --lora-skip image" in ended.err
    ended = run(*args, "--lora-skip", "image", "--dry-run")
    note = "2 keys, 2 keys of group image skipped, scale 0.5 (alpha 1, rank 2; from header lora_alpha)"
    assert ended.code == 0 and f"LoRA           a.safetensors: {note} x weight 1" in ended.out
    ended = run(*args, "--lora-skip", "image", "--dry-run", "--json")
    assert ended.json["loras"][0]["applied"]["transformer_2"]["skipped"] == {"image": 2}
    assert ended.json["loras"][0]["applied"]["transformer"]["scale"] == [0.5, 0.5]
    ended = run(*args, "--lora-skip", "image", "--lora-skip", "text", "--dry-run")
    assert ended.code == 2 and "error[E-USE-05]" in ended.err and "omit --lora-skip text" in ended.err


def test_force(run, tmp_path):
    folder = write_transformer(tmp_path / "model", **TI2V)
    ended = run("quantize", folder, "-o", tmp_path / "out", "--scheme", "mxfp4")
    assert ended.code == 2 and "error[E-QNT-02]" in ended.err and "--force" in ended.err
    ended = run("quantize", folder, "-o", tmp_path / "out", "--scheme", "mxfp4", "--force")
    assert ended.code == 0


def test_calibrate_smooths_and_is_reported(run, tmp_path):
    args = ("--scheme", "mxfp4_dualscale", "--calibrate", "1", "--alpha", "0.5", "--report")
    ended = run("quantize", "demo", "-o", tmp_path / "out", *args)
    assert ended.code == 0, ended.err
    assert "alpha 0.5, from 1 prompt of 16 steps at 64x64, 17 frames" in ended.out
    assert "transformer_2: SQNR in dB of the outputs of 80 layers" in ended.out
    assert "denoise (low-noise expert) 16/16" in ended.err and "outputs of transformer_2  100 %" in ended.err
    assert ended.err.index("denoise") < ended.err.index("transformer  0 %")
    record = json.loads((tmp_path / "out" / "ascendit.json").read_text())
    assert record["command"].endswith("--report --calibrate 1 --alpha 0.5")
    assert record["calibration"]["prompts"] == 1
    assert read(tmp_path / "out" / "transformer")["blocks.0.ffn.net.2.mul_scale"].shape == (448,)


def test_a_dry_run_of_calibrate(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    args = ("--scheme", "mxfp4", "--calibrate", prompts, "--dry-run", "--json")
    ended = run("quantize", "demo", "-o", tmp_path / "out", *args)
    assert ended.code == 0 and ended.err == ""
    assert ended.json["calibration"]["prompts"] == 2 and ended.json["calibration"]["alpha"] == 0.9
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("--alpha", "0.5"), "E-USE-01", "--alpha 0.5 without --calibrate"),
        (("--device", "cpu"), "E-USE-01", "--device cpu without --calibrate"),
        (("--set", "height=32"), "E-USE-01", "--set height=32 without --calibrate"),
        (("--calibrate", "4", "--set", "dtype=float32"), "E-USE-01", "--set dtype"),
        (("--calibrate", "4", "--alpha", "2"), "E-USE-01", "alpha 2"),
        (("--calibrate", "4", "--device", "tpu"), "E-USE-01", "tpu"),
        (("--calibrate", "0"), "E-USE-01", "0 prompts of the demo model"),
        (("--calibrate", "none.txt"), "E-USE-02", "no file none.txt"),
        (("--calibrate", "4", "--for", "sglang", "--scale-rule", "floor"), "E-ENG-01", "dual-scale"),
    ],
)
def test_invalid_calibrations(run, tmp_path, args, code, text):
    ended = run("quantize", "demo", "-o", tmp_path / "out", "--scheme", "mxfp4_dualscale", *args)
    assert ended.code == 2 and f"error[{code}]" in ended.err and text in ended.err, ended.err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_a_calibration_suggests_resume(run, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    args = ("quantize", "demo", "-o", tmp_path / "out", "--scheme", "mxfp4", "--calibrate", "1")
    monkeypatch.setattr("ascendit.pipeline.calibrate.denoise", interrupted)
    ended = run(*args)
    assert ended.code == 130 and "error[E-CAN-01]" in ended.err and "--resume" in ended.err
    assert not list(tmp_path.iterdir())


def test_out_of_memory_in_a_calibration(run, tmp_path, monkeypatch):
    def exhausted(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("ascendit.pipeline.calibrate.denoise", exhausted)
    ended = run("quantize", "demo", "-o", tmp_path / "out", "--scheme", "mxfp4", "--calibrate", "1")
    assert ended.code == 4 and "error[E-MEM-01]" in ended.err and "omit --calibrate" in ended.err
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_not_overwritten(run, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    ended = run("quantize", model, "-o", tmp_path / "out", "--scheme", "mxfp8")
    assert ended.code == 2 and "error[E-USE-03]" in ended.err
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_ctrl_c_suggests_resume(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr("ascendit.cli.progress.LineView.__call__", lambda self, event: stop(event))
    ended = run("quantize", model, "-o", tmp_path / "out", "--scheme", "mxfp8")
    assert ended.code == 130 and "error[E-CAN-01]" in ended.err and "--resume" in ended.err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run("quantize", model, "-o", tmp_path / "out", "--scheme", "mxfp8", "--resume").code == 0


# ---- killed -------------------------------------------------------------------------------------


def quantize_argv(model: Path, dst: Path, *args: str) -> list[str]:
    return [
        *(sys.executable, "-m", "ascendit", "quantize", str(model), "-o", str(dst)),
        *("--scheme", "mxfp8", "--scale-rule", "floor", "-q", *args),
    ]


def test_killed_at_ten_moments_and_resumed(tmp_path, environ):
    model = write_model(tmp_path / "model", num_attention_heads=16, ffn_dim=2048, num_layers=6)
    reference, dst = tmp_path / "a" / "out", tmp_path / "b" / "out"
    partial = dst.parent / ".out.partial"
    start = time.perf_counter()
    assert not run_and_kill(quantize_argv(model, reference), 60, env=environ)
    duration = time.perf_counter() - start
    expected = contents(reference)
    draw = random.Random(7)
    killed = 0
    for i in range(10):
        args = ("--resume",) if i % 2 else ()
        delay = draw.uniform(0, (0.02 if i < 4 else 0.3) * duration)  # some early, some late
        killed += run_and_kill(
            quantize_argv(model, dst, *args), delay, until=lambda: partial.exists(), env=environ
        )
        if dst.exists():  # it finished before the signal
            assert contents(dst) == expected
            for path in sorted(dst.rglob("*"), reverse=True):
                path.unlink() if path.is_file() or path.is_symlink() else path.rmdir()
            dst.rmdir()
    assert killed >= 3
    assert not run_and_kill(quantize_argv(model, dst, "--resume"), 60, env=environ)
    assert contents(dst) == expected and not partial.exists()


def stop(event: Progress) -> None:
    if event.stage == "transformer_2":
        raise KeyboardInterrupt


@pytest.mark.parametrize("report", [False, True])
def test_a_resumed_run_writes_only_missing_files(model, tmp_path, report):
    options = {"scheme": "mxfp8", "report": report}
    quantize(model, tmp_path / "whole" / "out", **options)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", **options, on_progress=stop)
    assert not (tmp_path / "out").exists()
    first = tmp_path / ".out.partial" / "out" / "transformer" / "diffusion_pytorch_model.safetensors"
    stamp = os.stat(first).st_mtime_ns
    events: list[Progress] = []
    quantize(model, tmp_path / "out", **options, resume=True, on_progress=events.append)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")
    assert (tmp_path / "out" / "transformer" / first.name).stat().st_mtime_ns == stamp
    done_before = sum(tensor.nbytes for tensor in read(model / "transformer").values())
    if report:  # its layers are measured again
        assert 0 < events[-1].skipped < done_before
    else:
        assert events[-1].skipped == done_before


def test_resuming_with_other_options_is_refused(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", scheme="mxfp8", on_progress=stop)
    with pytest.raises(UsageError, match="E-USE-01"):
        quantize(model, tmp_path / "out", scheme="mxfp8", keep=["blocks.0.*"], resume=True)
