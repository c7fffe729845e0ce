"""The commands as a user runs them: real processes, tiny models, real files, bad input of each kind.

Of the bad input one of each sort goes to a real process, and the others to the command in this one: a process
imports for seconds before it says no.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import tiny

from ascendit.cli.main import main
from ascendit.schedule import StepSchedule

SMALL = ["--size", "32x32", "--frames", "5", "--steps", "3"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, environ: dict[str, str]) -> Run:
    """Run `ascendit ...` in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()

    def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ascendit", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=work, env=environ, timeout=120)

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The same in this process."""
    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")

    def call(*words: str | Path) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = main([str(w) for w in words])
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return call


def made(run: Run, tmp_path: Path) -> set[str]:
    """Files below the folder the command ran in."""
    work = tmp_path / "work"
    return {str(p.relative_to(work)) for p in work.rglob("*") if p.is_file()}


def test_a_sentence_becomes_an_mp4(run: Run, tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    from pipeline.metadata import read_metadata

    done = run("generate", tiny_t2v_cascade, "a cat", *SMALL, "-o", "cat.mp4", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "cat.mp4" and "denoise" in done.stderr
    assert made(run, tmp_path) == {"cat.mp4", "cat.json"}
    assert read_metadata(tmp_path / "work/cat.mp4")["prompt"] == "a cat"
    replay = next(line for line in done.stderr.splitlines() + done.stdout.splitlines() if "replay" in line)
    again = run(*shlex.split(replay.split("replay", 1)[1])[1:], "-o", "again.mp4")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "work/again.mp4").read_bytes() == (tmp_path / "work/cat.mp4").read_bytes()


def frames_of(path: Path) -> Any:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_the_json_makes_a_quantized_video_again(run: Run, tmp_path: Path) -> None:
    work = tmp_path / "work"
    words = ["generate", "--demo", "a red circle moves right on a black background", "--seed", "1"]
    words += ["--steps", "3", "--frames", "5"]
    quantized = ["--scheme", "mxfp4", "--step-policy", "0:w4a8", "--set", "keep=blocks.0.*"]
    assert run(*words, "-o", "plain.gif").returncode == 0
    assert run(*words, *quantized, "-o", "first.gif").returncode == 0
    assert (frames_of(work / "plain.gif") != frames_of(work / "first.gif")).any()
    done = run("generate", "--config", "first.json", "-o", "again.gif")
    assert done.returncode == 0, done.stderr
    assert (work / "again.gif").read_bytes() == (work / "first.gif").read_bytes()


def test_a_video_made_in_python_is_made_again_by_the_command(
    run: Run, tiny_t2v_cascade: Path, tmp_path: Path
) -> None:
    import ascendit

    policy = StepSchedule.parse("0:w4a8")
    pipe = ascendit.load(
        tiny_t2v_cascade, scheme="mxfp4", step_policy=policy, keep=["blocks.0.*"], emulate=True
    )
    size: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 3}
    video = pipe.generate("a cat", seed=3, **size)
    work = tmp_path / "work"
    video.save(work / "first.gif")
    told = json.loads((work / "first.json").read_text())
    assert told["source"] == str(tiny_t2v_cascade) == pipe.source and told["load"] == dict(pipe.loaded)
    for name, words in (
        ("a", ["generate", "--config", "first.json"]),
        ("b", shlex.split(told["replay"])[1:]),
    ):
        done = run(*words, "-o", f"{name}.gif")
        assert done.returncode == 0, done.stderr
        assert (work / f"{name}.gif").read_bytes() == (work / "first.gif").read_bytes()


def test_json_says_everything(run: Run, tiny_t2v_cascade: Path) -> None:
    done = run("generate", tiny_t2v_cascade, "a cat", *SMALL, "--json", "--seed", "3", "-o", "out.gif")
    told = json.loads(done.stdout)
    assert told["output"] == "out.gif" and told["request"]["seed"] == 3 and told["num_frames"] == 5


DAMAGES = {
    "truncate_shard": ("E-CKP-02", 1),
    "not_safetensors": ("E-CKP-02", 1),
    "no_weights": ("E-CKP-02", 1),
    "drop_tensor": ("E-CKP-04", 1),
    "wrong_dtype": ("E-CKP-04", 1),
    "index_missing_file": ("E-CKP-03", 1),
    "index_outside": ("E-CKP-03", 1),
    "other_class": ("E-CKP-05", 1),
    "nan_weights": ("E-OUT-01", 1),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_models(how: str, run: Run, here: Run, tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    folder = tiny.damage(tiny.copy(tiny_t2v_cascade, tmp_path / "model"), how)
    done = (run if how == "truncate_shard" else here)("generate", folder, "a cat", *SMALL, "-o", "cat.mp4")
    code, status = DAMAGES[how]
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert f"error[{code}]" in done.stderr and "needs" in done.stderr and "try" in done.stderr
    assert "Traceback" not in done.stderr
    assert made(run, tmp_path) == set()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--frames", "10"], "E-REQ-01", "--frames 9 or --frames 13"),
        (["--size", "40x32"], "E-REQ-02", "--size 32x32 or --size 48x32"),
        (["--steps", "0"], "E-REQ-03", "num_inference_steps"),
        (["--size", "big"], "E-USE-01", "832x480"),
        (["--image", "no.png"], "E-USE-02", "no.png"),
        (["--image", "text.png"], "E-REQ-04", "text-to-video"),
        (["--device", "cuda"], "E-ENV-03", "CUDA"),
        (["-o", "/proc/x/cat.mp4"], "E-ENV-02", "cannot write in /proc"),
        (["-o", "cat.avi"], "E-USE-01", ".mp4"),
        (["--set", "stepz=3"], "E-USE-01", "stepz"),
    ],
)
def test_bad_requests(
    words: list[str], code: str, text: str, run: Run, here: Run, tiny_t2v_cascade: Path, tmp_path: Path
) -> None:
    (tmp_path / "work/text.png").write_text("no picture")
    done = (run if code == "E-REQ-01" else here)("generate", tiny_t2v_cascade, "a cat", *words)
    assert done.returncode in (2, 3) and done.stdout == "", done.stderr
    assert text in done.stderr and "Traceback" not in done.stderr
    if code not in ("E-USE-02", "E-REQ-04"):  # which of the two is found first is not promised
        assert f"error[{code}]" in done.stderr
    assert made(run, tmp_path) == {"text.png"}


def test_an_image_that_is_none(here: Run, tiny_i2v_cascade: Path, tmp_path: Path) -> None:
    (tmp_path / "work/photo.png").write_text("no picture")
    done = here("generate", tiny_i2v_cascade, "a cat", *SMALL, "--image", "photo.png")
    assert done.returncode == 2 and "error[E-USE-04]" in done.stderr
    assert made(run, tmp_path) == {"photo.png"}


def test_an_output_that_is_there_is_kept(here: Run, tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    (tmp_path / "work/cat.mp4").write_text("mine")
    done = here("generate", tiny_t2v_cascade, "a cat", *SMALL, "-o", "cat.mp4")
    assert done.returncode == 2 and "error[E-USE-03]" in done.stderr and "cat-2.mp4" in done.stderr
    assert (tmp_path / "work/cat.mp4").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_in_mid_run(tiny_t2v_cascade: Path, tmp_path: Path, environ: dict[str, str]) -> None:
    words = ["generate", tiny_t2v_cascade, "a cat", "--size", "64x64", "--frames", "5", "--steps", "900"]
    command = [sys.executable, "-m", "ascendit", *map(str, words), "-o", "cat.mp4"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    for line in process.stderr:  # wait for the loop
        if "denoise" in line:
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "", err
    assert "cancelled" in err and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == []
