"""The commands as a user runs them: real processes, tiny models, real files, every kind of bad input.

The first video is made in a new Python, which takes seconds to import; the others in copies of a process that
has imported. Of the bad inputs, one of each kind runs in a process of its own, the others in this process.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import tiny
from PIL import Image

from ascendit.cli.main import main
from ascendit.schedule import StepSchedule

SMALL = ["--size", "32x32", "--frames", "5", "--steps", "3"]
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
NEW_PYTHON = [sys.executable, "-m", "ascendit"]


@pytest.fixture
def run(tmp_path: Path, environ: dict[str, str], warm: Path) -> Run:
    """Run `ascendit ...` in an empty folder. `start`: the program and its first arguments."""
    folder = tmp_path / "work"
    folder.mkdir()

    def call(*args: str | Path, start: Sequence[str | Path] = (warm / "ascendit",)) -> Done:
        command = list(map(str, [*start, *args]))
        return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environ, timeout=120)

    return call


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the same in this process."""
    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")

    def call(*args: str | Path) -> Done:
        capsys.readouterr()
        code = main([str(w) for w in args])
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())

    return call


def files_of(run: Run, tmp_path: Path) -> set[str]:
    """Files below the folder in which the command ran."""
    folder = tmp_path / "work"
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_generate_writes_an_mp4_that_can_be_replayed(
    run: Run, tiny_t2v_cascade: Path, tmp_path: Path
) -> None:
    from pipeline.metadata import read_metadata

    args = ["generate", tiny_t2v_cascade, "a cat", *SMALL, "-o", "cat.mp4", "--seed", "3"]
    done = run(*args, start=NEW_PYTHON)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "cat.mp4" and "denoise" in done.stderr
    assert files_of(run, tmp_path) == {"cat.mp4", "cat.json"}
    assert read_metadata(tmp_path / "work/cat.mp4")["prompt"] == "a cat"
    replay = next(line for line in done.stderr.splitlines() + done.stdout.splitlines() if "replay" in line)
    again = run(*shlex.split(replay.split("replay", 1)[1])[1:], "-o", "again.mp4")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "work/again.mp4").read_bytes() == (tmp_path / "work/cat.mp4").read_bytes()


def frames_of(path: Path) -> Any:
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_the_json_replays_a_quantized_video(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    args = ["generate", "--demo", "a red circle moves right on a black background", "--seed", "1"]
    args += ["--steps", "3", "--frames", "5"]
    quantized = ["--scheme", "mxfp4", "--step-policy", "0:w4a8", "--set", "keep=blocks.0.*"]
    assert run(*args, "-o", "plain.gif").returncode == 0
    assert run(*args, *quantized, "-o", "first.gif").returncode == 0
    assert (frames_of(folder / "plain.gif") != frames_of(folder / "first.gif")).any()
    done = run("generate", "--config", "first.json", "-o", "again.gif")
    assert done.returncode == 0, done.stderr
    assert (folder / "again.gif").read_bytes() == (folder / "first.gif").read_bytes()


def test_the_command_replays_a_video_made_in_python(run: Run, tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    import ascendit

    policy = StepSchedule.parse("0:w4a8")
    pipe = ascendit.load(
        tiny_t2v_cascade, scheme="mxfp4", step_policy=policy, keep=["blocks.0.*"], emulate=True
    )
    size: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 3}
    video = pipe.generate("a cat", seed=3, **size)
    folder = tmp_path / "work"
    video.save(folder / "first.gif")
    data = json.loads((folder / "first.json").read_text())
    assert data["source"] == str(tiny_t2v_cascade) == pipe.source and data["load"] == dict(pipe.loaded)
    for name, args in (
        ("a", ["generate", "--config", "first.json"]),
        ("b", shlex.split(data["replay"])[1:]),
    ):
        done = run(*args, "-o", f"{name}.gif")
        assert done.returncode == 0, done.stderr
        assert (folder / f"{name}.gif").read_bytes() == (folder / "first.gif").read_bytes()


def test_json_has_output_request_and_size(run: Run, tiny_t2v_cascade: Path) -> None:
    done = run("generate", tiny_t2v_cascade, "a cat", *SMALL, "--json", "--seed", "3", "-o", "out.gif")
    data = json.loads(done.stdout)
    assert data["output"] == "out.gif" and data["request"]["seed"] == 3 and data["num_frames"] == 5


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


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models(damage: str, run: Run, run_here: Run, tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    broken = tiny.damage(tiny.copy(tiny_t2v_cascade, tmp_path / "model"), damage)
    done = (run if damage == "truncate_shard" else run_here)(
        "generate", broken, "a cat", *SMALL, "-o", "cat.mp4"
    )
    code, status = DAMAGES[damage]
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert f"error[{code}]" in done.stderr and "needs" in done.stderr and "try" in done.stderr
    assert "Traceback" not in done.stderr
    assert files_of(run, tmp_path) == set()


@pytest.mark.parametrize(
    ("args", "code", "text"),
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
    args: list[str], code: str, text: str, run: Run, run_here: Run, tiny_t2v_cascade: Path, tmp_path: Path
) -> None:
    (tmp_path / "work/text.png").write_text("not an image")
    done = (run if code == "E-REQ-01" else run_here)("generate", tiny_t2v_cascade, "a cat", *args)
    assert done.returncode in (2, 3) and done.stdout == "", done.stderr
    assert text in done.stderr and "Traceback" not in done.stderr
    if code not in ("E-USE-02", "E-REQ-04"):  # the order of these two checks is not fixed
        assert f"error[{code}]" in done.stderr
    assert files_of(run, tmp_path) == {"text.png"}


def test_the_dry_run_says_how_images_become_frames(
    run_here: Run, tiny_i2v_cascade: Path, tmp_path: Path
) -> None:
    work, few = tmp_path / "work", ["--frames", "5", "--dry-run"]
    Image.new("RGB", (64, 128), "red").save(work / "tall.png")
    Image.new("RGB", (128, 64), "red").save(work / "broad.png")
    images = ["--image", "tall.png", "--last-image", "broad.png"]
    done = run_here("generate", tiny_i2v_cascade, "a cat", *images, "--size", "128x64", *few)
    assert done.returncode == 0, done.stderr
    assert "image      64x128, cropped to 64x32, the ratio of 128x64" in done.stdout
    assert "last_image 128x64\n" in done.stdout and "--last-image broad.png" in done.stdout
    done = run_here("--quiet", "generate", tiny_i2v_cascade, "a cat", *images, "--fit", "pad", "--json", *few)
    data = json.loads(done.stdout)
    assert (data["request"]["width"], data["request"]["height"]) == (432, 880)
    assert data["images"]["last_image"] == "128x64, resized to 432x216, with black bars to 432x880"
    assert "--size 432x880" in data["replay"] and "--fit pad" in data["replay"]


def test_an_invalid_image(run_here: Run, tiny_i2v_cascade: Path, tmp_path: Path) -> None:
    (tmp_path / "work/photo.png").write_text("not an image")
    done = run_here("generate", tiny_i2v_cascade, "a cat", *SMALL, "--image", "photo.png")
    assert done.returncode == 2 and "error[E-USE-04]" in done.stderr
    assert files_of(run, tmp_path) == {"photo.png"}


def test_an_existing_output_is_not_overwritten(run_here: Run, tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    (tmp_path / "work/cat.mp4").write_text("mine")
    done = run_here("generate", tiny_t2v_cascade, "a cat", *SMALL, "-o", "cat.mp4")
    assert done.returncode == 2 and "error[E-USE-03]" in done.stderr and "cat-2.mp4" in done.stderr
    assert (tmp_path / "work/cat.mp4").read_text() == "mine"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_during_a_run(tiny_t2v_cascade: Path, tmp_path: Path, environ: dict[str, str]) -> None:
    args = ["generate", tiny_t2v_cascade, "a cat", "--size", "64x64", "--frames", "5", "--steps", "900"]
    command = [sys.executable, "-m", "ascendit", *map(str, args), "-o", "cat.mp4"]
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
