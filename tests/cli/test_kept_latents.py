"""Latents of a run that fails after its last step are kept, and can be decoded; Ctrl-C in the decoder."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ascendit.cli.progress import ProgressView
from ascendit.pipeline import frame_checks
from ascendit.pipeline.latents import read_latents
from ascendit.pipeline.video import Video
from ascendit.vae.autoencoder import VideoCoder

SMALL = ["--size", "32x32", "--frames", "9", "--steps", "2", "--seed", "3"]
Run = Callable[..., Any]


@pytest.fixture
def call(tiny_t2v_cascade: Path) -> list[str]:
    return ["generate", str(tiny_t2v_cascade), "a cat", *SMALL]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def black(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every video counts as black."""
    monkeypatch.setattr(frame_checks, "FLAT_SHARE", 1.0)


def frames(folder: Path) -> list[Any]:
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def command(fix: str) -> list[str]:
    """The arguments of the command in a fix."""
    return shlex.split(fix[fix.index("ascendit generate") :])[1:]


def test_a_refused_video_keeps_its_latents_and_the_command_decodes_them(
    call: list[str], folder: Path, run: Run, black: None
) -> None:
    failed = run(*call, "-o", "out/", "--json")
    error = failed.json["error"]
    assert failed.code == 1 and error["code"] == "E-OUT-02" and names(folder) == {"out.latents.safetensors"}
    assert error["latents"] == "out.latents.safetensors" and "out.latents.safetensors" in error["got"]
    again = run(*command(error["try"]), "--json")
    assert again.code == 0 and "is black" in str(again.json["warnings"])
    assert "--allow-flat" in again.json["replay"]
    direct = run(*call, "-o", "direct/", "--allow-flat", "--json")
    assert "is black" in str(direct.json["warnings"]) and direct.json["request"] == again.json["request"]
    assert len(frames(folder / "out")) == 9
    assert all(map(np.array_equal, frames(folder / "out"), frames(folder / "direct")))


def test_a_run_without_faults_keeps_latents_on_request_only(call: list[str], folder: Path, run: Run) -> None:
    assert run(*call, "-o", "a.png", "--json").json["warnings"] == []
    assert names(folder) == {"a", "a.json"}
    assert run(*call, "-o", "b.png", "--keep-latents").code == 0
    kept = read_latents(folder / "b.latents.safetensors")
    assert kept.latents.shape == (1, 16, 3, 4, 4) and kept.request.seed == 3
    taken = run(*call, "-o", "b.png", "--keep-latents", "--json")
    assert taken.code == 2 and taken.json["error"]["code"] == "E-USE-03"
    assert run("generate", "--latents", "b.latents.safetensors", "-o", "c/", "--fps", "4").code == 0
    assert all(map(np.array_equal, frames(folder / "b"), frames(folder / "c")))
    assert json.loads((folder / "c.json").read_text())["fps"] == 4


def test_only_the_vae_is_loaded_to_decode(
    call: list[str], folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*call, "-o", "b.png", "--keep-latents")
    monkeypatch.setattr("ascendit.pipeline.load.load_expert", None)
    monkeypatch.setattr("ascendit.pipeline.load.TextEncoder", None)
    assert run("generate", "--latents", "b.latents.safetensors", "-o", "c/").code == 0


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), MemoryError(), RuntimeError("out of memory")]
)
def test_failures_of_saving_and_decoding_keep_latents(
    call: list[str], folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise failure

    owner, name = (Video, "save") if isinstance(failure, OSError) else (torch.nn.Module, "clear_cache")
    if isinstance(failure, OSError):
        monkeypatch.setattr(owner, name, fails)
    else:
        monkeypatch.setattr("ascendit.pipeline.generate.to_uint8", fails)
    done = run(*call, "-o", "a.mp4")
    assert done.code != 0 and names(folder) == {"a.latents.safetensors"}
    assert "ascendit generate --latents a.latents.safetensors -o a.mp4" in done.err
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run("generate", "--latents", "a.latents.safetensors", "-o", "a.mp4").code == 0


def test_latents_go_to_the_temporary_folder_if_the_output_cannot_be_written(
    call: list[str], folder: Path, run: Run, black: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.parent.name == "full":
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    done = run(*call, "-o", "full/a.mp4", "--json")
    kept = Path(done.json["error"]["latents"])
    assert kept.is_file() and kept.parent != folder / "full" and read_latents(kept).request.prompt == "a cat"


def test_latents_that_cannot_be_kept_name_the_disk_and_the_video(
    call: list[str], folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a.latents.safetensors").mkdir()
    before = run(*call, "-o", "a.mp4", "--keep-latents", "--overwrite", "--json")
    assert before.code == 2 and before.json["error"]["code"] == "E-USE-03" and not (folder / "a.mp4").exists()
    assert "mv a.latents.safetensors" in before.json["error"]["try"]

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    real = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda p, d: full(p, d) if "latents" in p.name else real(p, d))
    after = run(*call, "-o", "b.mp4", "--keep-latents", "--json")
    assert after.code == 3 and after.json["error"]["code"] == "E-ENV-04" and (folder / "b.mp4").exists()
    assert "the video is in b.mp4" in after.json["error"]["got"]


@pytest.mark.parametrize(("letters", "flags"), [(251, []), (235, ["--keep-latents"])])
def test_a_name_that_is_too_long_is_refused_before_the_run(
    call: list[str], folder: Path, run: Run, letters: int, flags: list[str]
) -> None:
    done = run(*call, "-o", f"new/{'c' * letters}.mp4", *flags, "--dry-run", "--json")
    assert done.code == 3 and done.json["error"]["code"] == "E-ENV-02"
    assert "a shorter name" in done.json["error"]["needs"] and names(folder) == set()


def test_latents_get_a_short_name_if_that_of_the_video_is_long(
    call: list[str], folder: Path, run: Run, black: None
) -> None:
    error = run(*call, "-o", f"{'c' * 240}.mp4", "--json").json["error"]
    assert error["code"] == "E-OUT-02" and names(folder) == {"video.latents.safetensors"}


def test_the_command_in_an_error_is_safe_to_paste(
    call: list[str], folder: Path, run: Run, black: None
) -> None:
    error = run(*call, "-o", "a\x1bb.mp4", "--json").json["error"]
    assert r"-o $'a\x1bb.mp4'" in error["try"]


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_stops_the_decoder_between_frames(
    call: list[str], folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch, presses: int
) -> None:
    decoded = []

    def show(self: ProgressView, event: Any, text: str = "") -> None:
        if event.stage == "decode":
            decoded.append(event.step)
            if event.step == 1:
                for _ in range(presses):
                    signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ProgressView, "show", show)
    done = run(*call, "-o", "out/", "--json")
    error = done.json["error"]
    assert done.code == 130 and error["code"] == "E-CAN-01" and decoded == [0, 1]
    assert names(folder) == {"out.latents.safetensors"}
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run(*command(error["try"])).code == 0 and run(*call, "-o", "direct/").code == 0
    assert all(map(np.array_equal, frames(folder / "out"), frames(folder / "direct")))


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--seed", "4"], "E-USE-01", "seed"),
        (["--size", "64x64"], "E-USE-01", "height, width"),
        (["--config", "b.json"], "E-USE-01", "--config and --latents"),
        (["a dog"], "E-USE-01", "prompt"),
        (["--latents", "no.safetensors"], "E-USE-02", "no file no.safetensors"),
        (["--latents", "b.json"], "E-USE-01", "has no latents"),
        (["--latents", "weights.safetensors"], "E-USE-01", "has no latents"),
    ],
)
def test_latents_of_another_request_and_other_files_are_refused(
    call: list[str], folder: Path, run: Run, args: list[str], code: str, text: str
) -> None:
    from safetensors.numpy import save_file

    run(*call, "-o", "b.png", "--keep-latents")
    save_file({"latents": np.zeros(3)}, folder / "weights.safetensors")
    latents = [] if args[0] == "--latents" else ["--latents", "b.latents.safetensors"]
    done = run("generate", *latents, *args, "-o", "c.mp4", "--json")
    assert done.code == 2 and done.json["error"]["code"] == code and text in done.json["error"]["got"]


def test_a_dry_run_of_latents_plans_the_vae_alone(call: list[str], folder: Path, run: Run) -> None:
    run(*call, "-o", "b.png", "--keep-latents")
    plan = ["generate", "--latents", "b.latents.safetensors", "-o", "c/", "--dry-run"]
    data = run(*plan, "--json").json
    assert data["latents"] == "b.latents.safetensors" and data["work"]["flops"] == 0
    assert list(data["memory"]["parts"]) == ["vae"]
    text = run(*plan).out
    assert "latents    b.latents.safetensors" in text and "FLOP" not in text and "text_encoder" not in text


def test_a_video_from_latents_has_the_record_of_the_run(call: list[str], folder: Path, run: Run) -> None:
    run(*call, "--set", "dtype=float32", "-o", "b.png", "--keep-latents")
    kept = read_latents(folder / "b.latents.safetensors")
    assert kept.versions == json.loads((folder / "b.json").read_text())["versions"]
    replace(kept, versions={"torch": "0"}).save(folder / "old.latents.safetensors")
    again = [
        "generate",
        "--latents",
        "old.latents.safetensors",
        "--set",
        "dtype=bfloat16",
        "-o",
        "c/",
        "--json",
    ]
    data = run(*again).json
    assert data["load"]["dtype"] == "float32" and data["versions"] == {"torch": "0"}
    assert data["decoded"]["load"]["dtype"] == "bfloat16" and "torch" in data["decoded"]["versions"]
    assert "dtype=float32" in data["replay"] or "--dtype float32" in data["replay"]


def test_latents_of_another_shape_or_model_are_refused_before_loading(
    call: list[str], folder: Path, run: Run, tiny_t2v_single: Path
) -> None:
    run(*call, "-o", "b.png", "--keep-latents")
    kept = read_latents(folder / "b.latents.safetensors")
    replace(kept, latents=kept.latents[:, :8]).save(folder / "8.latents.safetensors")
    error = run("generate", "--latents", "8.latents.safetensors", "--dry-run", "--json").json["error"]
    assert error["code"] == "E-USE-01" and "[1, 8, 3, 4, 4]" in error["got"]
    other = ["generate", str(tiny_t2v_single), "a cat", "--latents", "b.latents.safetensors"]
    error = run(*other, "--dry-run", "--json").json["error"]
    assert error["code"] == "E-USE-01" and f"latents of {call[1]}" in error["got"]


def test_the_record_and_the_replay_line_keep_allow_flat_and_metadata(
    call: list[str], folder: Path, run: Run, black: None
) -> None:
    run(*call, "-o", "a/", "--allow-flat")
    assert json.loads((folder / "a.json").read_text())["allow_flat"] is True
    again = run("generate", "--config", "a.json", "--set", "metadata=false", "-o", "b/", "--json")
    assert again.code == 0 and "--allow-flat --set metadata=false" in again.json["replay"]


def test_an_interrupted_decode_leaves_nothing_in_the_cache(tiny_t2v_cascade: Path) -> None:
    from ascendit.checkpoint.layout import recognise
    from ascendit.checkpoint.weight_files import Shards

    layout = recognise(tiny_t2v_cascade)
    vae = VideoCoder(layout, Shards.from_part(layout.part("vae")), device="cpu")
    z = torch.randn(vae.latent_shape(17, 32, 32), generator=torch.Generator().manual_seed(0))
    expected, steps = vae.decode(z), []

    def stop() -> None:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), vae.between_frames(stop):
        vae.decode(z)
    assert not any(isinstance(x, torch.Tensor) for x in vae.model._feat_map)
    assert torch.equal(vae.decode(z), expected) and len(steps) == 3
    with pytest.raises(KeyboardInterrupt), vae.between_frames(stop):
        steps.clear()
        vae.encode(expected.clamp(-1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
def test_a_real_ctrl_c_in_the_decoder(tmp_path: Path, environ: dict[str, str], presses: int) -> None:
    args = ["--demo", "a red circle", "--size", "128x128", "--frames", "17", "--steps", "1", "--seed", "1"]
    start = [sys.executable, "-m", "ascendit", "generate"]
    process = subprocess.Popen(
        [*start, *args, "-o", "out/"], stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environ
    )
    assert process.stderr is not None
    text = ""
    for line in process.stderr:
        text += line
        if "decode 1/5" in line:
            for _ in range(presses):
                process.send_signal(signal.SIGINT)
        elif "stopping" in line and presses == 2:
            process.send_signal(signal.SIGINT)
    process.stderr.close()
    assert process.wait(120) == 130, text
    assert "decode 5/5" not in text and names(tmp_path) == {"out.latents.safetensors"}
    fix = text[text.index("ascendit generate --latents") :].splitlines()[0]
    again = [*start, *shlex.split(fix)[2:], "--allow-flat"]  # one step makes a grey video
    done = subprocess.run(again, cwd=tmp_path, env=environ, timeout=300)
    assert done.returncode == 0 and len(frames(tmp_path / "out")) == 17
