"""`ascendit generate` with a fake pipeline: output, files and exit codes."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pipeline.headers import write_weights
from pipeline.metadata import read_metadata

import ascendit
from ascendit.errors import QualityError
from ascendit.family import PRESETS


def test_it_saves_and_prints_a_summary(run, fake, model, tmp_path):
    out = tmp_path / "cat.mp4"
    ended = run("generate", model, "a cat", "--seed", "7", "--set", "dtype=float32", "-o", out)
    assert ended.code == 0
    path, summary, replay = ended.out.splitlines()
    assert path == str(out) and out.is_file() and out.with_suffix(".json").is_file()
    assert summary.startswith("  64x64, 17 frames, 8 fps, 2.12 s of video; took ") and summary.endswith(
        "; seed 7"
    )
    assert replay.startswith(
        f"  replay  ascendit generate --set dtype=float32 {model} 'a cat' --seed 7 --size 64x64"
    )
    assert fake.loaded[0][0] == str(model)
    assert fake.loaded[0][1].keys() == {"device", "text_on", "dtype"}
    assert fake.requests[0].seed == 7


def test_the_json_beside_the_video_replays_it(run, fake, model, tmp_path):
    run("generate", model, "a cat", "--frames", "5", "--guidance", "4,2", "-o", tmp_path / "a.mp4")
    ended = run("generate", "--config", tmp_path / "a.json", "-o", tmp_path / "b.mp4")
    assert ended.code == 0, ended.err
    assert fake.requests[0] == fake.requests[1]
    assert read_metadata(tmp_path / "a.mp4")["model"] == str(model)


def test_progress_lines_if_stderr_is_no_terminal(run, fake, model, tmp_path):
    ended = run("generate", model, "a cat", "--steps", "40", "-o", tmp_path / "a.mp4")
    lines = [line for line in ended.err.splitlines() if line.startswith(("encode", "denoise"))]
    assert lines[0] == "encode"
    assert lines[1] == "denoise (high-noise expert) 1/40  2.0 s/step  eta 1:18  3.0 GiB"
    assert "denoise (low-noise expert) 20/40  2.0 s/step  eta 0:40  3.0 GiB" in lines
    assert lines[-1] == "denoise (low-noise expert) 40/40  2.0 s/step  eta 0:00  3.0 GiB"
    assert 11 <= len(lines) <= 14
    assert "\x1b" not in ended.err


def test_quiet_prints_only_the_path(run, fake, model, tmp_path):
    ended = run("generate", model, "a cat", "-q", "-o", tmp_path / "a.mp4")
    assert ended.out == f"{tmp_path / 'a.mp4'}\n"
    assert ended.err == "a library prints on stdout\n"


def test_json_is_one_object_without_progress(run, fake, model, tmp_path):
    ended = run("generate", model, "a cat", "--seed", "7", "--json", "-o", tmp_path / "a.mp4")
    data = ended.json
    assert data["output"] == str(tmp_path / "a.mp4")
    assert data["request"]["seed"] == 7 and data["request"]["prompt"] == "a cat"
    assert data["versions"]["python"] and data["seconds"] > 0 and data["num_frames"] == 17
    assert shlex.split(data["replay"])[:3] == ["ascendit", "generate", str(model)]
    assert ended.err == "a library prints on stdout\n"


def test_dry_run_loads_nothing(run, fake, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run("generate", model, "a cat", "--seed", "7", "--frames", "5", "--dry-run")
    assert ended.code == 0 and not fake.loaded
    printed = ended.out.split()
    assert f"would run  ascendit-demo in {model}" in ended.out
    assert "num_frames             5\n" in ended.out or "num_frames           5\n" in ended.out
    assert "num_inference_steps  16  (default)" in ended.out
    assert "family.py" in ended.out and "128 video and 512 text tokens, two passes per step" in ended.out
    assert "replay" in printed and "--seed" in printed
    assert not (tmp_path / "outputs").exists()


def test_dry_run_of_the_replay_line_gives_the_same_request(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run("generate", model, "a cat", "--guidance", "3", "--shift", "2.5", "--dry-run", "--json").json
    assert first["given"] == ["flow_shift", "guidance_scale"] and first["defaults_from"]
    again = run(*shlex.split(first["replay"])[1:], "--dry-run", "--json").json
    assert again["request"] == first["request"] and again["replay"] == first["replay"]


def test_dry_run_shows_the_timesteps_and_the_experts(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["generate", model, "a cat", "--timesteps", "1000,750,500,250", "--shift", "5", "--guidance", "1"]
    args += ["--set", "solver=euler", "--dry-run"]
    lines = run(*args).out.splitlines()
    assert "timesteps  1000, 937.5, 833.333, 625 (2 high-noise, 2 low-noise)" in lines
    data = run(*args, "--json").json["schedule"]
    assert data["timesteps"] == pytest.approx([1000, 937.5, 833.3333, 625]) and data["sigmas"][-1] == 0
    many = run("generate", model, "a cat", "--steps", "40", "--set", "solver=dpm++", "--dry-run")
    line = next(line for line in many.out.splitlines() if line.startswith("timesteps"))
    assert ", .., " in line and "low-noise" in line


def test_dry_run_names_the_origin_of_each_value(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "lightning", replace(PRESETS["lightning"], models=("ascendit-demo",)))
    args = ["generate", model, "a cat", "--dry-run"]
    shown = run(*args, "--guidance", "1", "--timesteps", "1000,500").out
    assert re.search(r"guidance_scale_2 +1.0  \(from guidance_scale\)\n", shown)
    assert re.search(r"num_inference_steps +2  \(from timesteps\)\n", shown)
    assert "  solver, shift, boundary, steps, guidance, negative prompt" in shown
    assert "  schedule: diffusers (of every model)\n" in shown
    shown = run(*args, "--preset", "lightning").out
    assert (
        len(re.findall(r"\(preset lightning\)\n", shown)) == 7
        and "guidance_scale_2     1.0  (preset" in shown
    )
    assert "defaults from\n  timesteps, num_inference_steps, flow_shift, solver," in shown


def test_a_preset_sets_what_the_call_does_not(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PRESETS, "lightning", replace(PRESETS["lightning"], models=("ascendit-demo",)))
    args = ["generate", model, "a cat", "--preset", "lightning", "--dry-run"]
    shown = run(*args).out
    assert re.search(r"flow_shift +5.0  \(preset lightning\)\n", shown)
    assert re.search(r"solver +euler  \(preset lightning\)\n", shown) and re.search(
        r"seed +\d+  \(default\)", shown
    )
    data = run(*args, "--shift", "7", "--json").json
    assert (data["preset"], data["request"]["flow_shift"]) == ("lightning", 7.0)
    assert data["given"] == ["flow_shift"] and data["request"]["guidance_scale_2"] == 1
    again = run(*shlex.split(data["replay"])[1:], "--dry-run", "--json").json
    assert again["request"] == data["request"] and "--preset" not in data["replay"]
    (tmp_path / "a.toml").write_text("flow_shift = 3.0\nguidance_scale_2 = 4.0\nseed = 5\n")
    merged = run(*args, "--config", "a.toml", "--json").json["request"]  # flags win over a config
    assert (merged["flow_shift"], merged["guidance_scale_2"], merged["seed"]) == (5.0, 1.0, 5)
    (tmp_path / "b.toml").write_text('preset = "lightning"\nflow_shift = 3.0\n')
    same = run("generate", model, "a cat", "--config", "b.toml", "--dry-run", "--json").json["request"]
    assert (same["flow_shift"], same["solver"]) == (3.0, "euler")


def test_a_preset_of_another_model_is_refused(run, model):
    ended = run("generate", model, "a cat", "--preset", "lightning", "--dry-run")
    assert ended.code == 2 and "error[E-REQ-03]: preset lightning with ascendit-demo" in ended.err
    ended = run("generate", model, "a cat", "--set", "preset=turbo", "--dry-run")
    assert ended.code == 2 and "one of lightning, lightx2v, fastwan, causvid" in ended.err


def test_a_folder_with_another_shift_says_so_once(run, fake, model, tmp_path):
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("4.0", "3.0"))
    note = "shift 4 (authors of ascendit-demo); the folder has 3: --defaults folder uses this"
    ended = run("generate", model, "a cat", "-o", tmp_path / "a.mp4")
    assert ended.code == 0 and fake.requests[-1].flow_shift == 4.0 and "--shift 4" in ended.out
    dry = run("generate", model, "a cat", "--dry-run")
    assert note not in dry.out and "flow_shift           4.0  (default)" in dry.out  # a warning has it
    assert note in run("generate", model, "a cat", "--dry-run", "-q").out
    assert run("generate", model, "a cat", "--dry-run", "--json").json["difference"].startswith(note)
    assert note in run("inspect", model).out and run("inspect", model, "--json").json["limits"][
        "difference"
    ].startswith(note)
    ended = run("generate", model, "a cat", "--defaults", "folder", "-o", tmp_path / "b.mp4")
    assert fake.requests[-1].flow_shift == 3.0 and "--defaults folder" in ended.out
    assert "shift 4" not in run("generate", model, "a cat", "--defaults", "folder", "--dry-run").err
    ended = run("generate", model, "a cat", "--defaults", "mine", "--dry-run")
    assert ended.code == 2 and "model or folder" in ended.err


def test_the_log_has_one_line_about_the_difference(model, environ):
    scheduler = model / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("4.0", "3.0"))
    call = [sys.executable, "-m", "ascendit", "generate", str(model), "a cat", "--dry-run"]
    for more, count in (([], 1), (["-q"], 0), (["--defaults", "folder"], 0), (["--shift", "5"], 0)):
        done = subprocess.run([*call, *more], env=environ, capture_output=True, text=True, check=True)
        assert done.stderr.count("the folder has 3") == count, done.stderr


def test_metadata_false(run, fake, model, tmp_path):
    ended = run("generate", model, "a secret", "--set", "metadata=false", "-o", tmp_path / "a.mp4")
    assert ended.code == 0
    assert not (tmp_path / "a.json").exists()
    assert b"secret" not in (tmp_path / "a.mp4").read_bytes()


def test_overwriting_needs_a_flag(run, fake, model, tmp_path):
    out = tmp_path / "a.mp4"
    out.write_text("mine")
    ended = run("generate", model, "a cat", "-o", out)
    assert ended.code == 2 and ended.err.startswith("error[E-USE-03]: ")
    assert out.read_text() == "mine" and not fake.loaded
    assert run("generate", model, "a cat", "-o", out, "--overwrite").code == 0
    assert out.read_bytes() != b"mine"


def test_frames_and_seconds_together(run, model):
    ended = run("generate", model, "a cat", "--frames", "5", "--seconds", "1")
    assert ended.code == 2
    assert ended.err.splitlines() == [
        "error[E-USE-01]: --frames and --seconds",
        "  needs  one of the two",
        "  try    omit --seconds",
    ]


def test_environment_variables_are_reported(run, fake, model, monkeypatch, tmp_path):
    monkeypatch.setenv("T5_LOAD_CPU", "1")
    monkeypatch.setenv("ALGO", "2")
    ended = run("generate", model, "a cat", "-o", tmp_path / "a.mp4")
    assert "note: T5_LOAD_CPU=1: the text encoder runs on the CPU" in ended.err
    assert "note: ALGO=2: not used by this version" in ended.err
    assert fake.loaded[0][1]["text_on"] == "cpu"


def test_a_failing_run_leaves_no_file(run, fake, model, tmp_path):
    fake.error = QualityError(
        "3 of 9 latents are not finite", needs="finite numbers", fix="f", code="E-OUT-01"
    )
    ended = run("generate", model, "a cat", "-o", tmp_path / "a.mp4")
    assert ended.code == 1 and "error[E-OUT-01]: 3 of 9 latents" in ended.err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_out_of_memory_names_stage_sizes_and_flag(run, fake, model, tmp_path):
    fake.error = RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476736 bytes."
    )
    ended = run("generate", model, "a cat", "-o", tmp_path / "a.mp4")
    assert ended.code == 4
    error = ended.err[ended.err.index("error[") :]
    assert error.startswith(
        "error[E-MEM-01]: out of memory on cpu in stage denoise\n  needs  64.0 GiB more; "
    )
    assert "is free" in error and "--size" in error and "--text-on drop" in error


def test_ctrl_c_stops_between_steps(run, fake, model, tmp_path, monkeypatch):
    """A real SIGINT sets the event of the run; no file is written, even if the run completes."""
    cancelled = []

    def press(request, *, cancel, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        cancelled.append(cancel.is_set())
        return real(request, cancel=cancel, **kwargs)

    real = fake.run
    monkeypatch.setattr(fake, "run", press)
    before = signal.getsignal(signal.SIGINT)
    ended = run("generate", model, "a cat", "-o", tmp_path / "a.mp4")
    assert cancelled == [True]
    assert ended.code == 130 and "error[E-CAN-01]: cancelled" in ended.err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(run, fake, model, tmp_path, monkeypatch):
    def press(request, **_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(fake, "run", press)
    ended = run("generate", model, "a cat", "--json", "-o", tmp_path / "a.mp4")
    assert ended.code == 130 and ended.json["error"]["code"] == "E-CAN-01"


def test_ctrl_c_in_a_real_run(tiny_t2v_cascade: Path, tmp_path, environ):
    """The complete program on real weights exits with 130 and leaves no file."""
    args = [str(tiny_t2v_cascade), "a cat", "--steps", "1000", "--frames", "1", "--size", "16x16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ascendit", "generate", *args, "-o", str(tmp_path / "a.png")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        # A shell may have started the tests with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("denoise"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, "".join(lines) + err
    assert "stopping after this step" in err and "error[E-CAN-01]: cancelled" in err
    assert out == "" and list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model(run, tmp_path):
    ended = run("generate", tmp_path, "a cat", "--json")
    assert ended.code == 1 and ended.json["error"]["code"] == "E-CKP-01"


def test_the_config_of_a_video_whose_model_is_missing(run, fake, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"model": "gone", "request": {"prompt": "a cat"}}))
    ended = run("generate", "--config", tmp_path / "a.json")
    assert ended.code == 2 and ended.err.startswith("error[E-USE-02]: no model at gone, named in ")
    assert "pass MODEL on the command line: ascendit generate MODEL 'a cat' --config " in ended.err
    ended = run("generate", "--config", tmp_path / "a.json", "missing", "a cat")
    assert ended.code == 2 and "no model at missing\n" in ended.err
    for args in (["--demo"], ["demo", "a cat"], ["--set", "model=demo"]):
        ended = run(
            "generate", *args, "--config", tmp_path / "a.json", "-o", tmp_path / "a.gif", "--overwrite"
        )
        assert ended.code == 0 and fake.loaded[-1][0] == "demo", ended.err


EXCLUDED = ["blocks.0.*", "blocks.7.*"]
EVERY_LOAD_OPTION = {  # of those that can be combined: `attention` names a kernel that `ops` replaces
    "defaults": "folder",
    "device": "twin:a5",
    "text_on": "cpu",
    "scheme": "mxfp4",
    "recipe": "default",
    "keep": EXCLUDED,
    "step_policy": "0:w4a8",
    "emulate": "decode-once",
    "activation_rule": "mxfp4=max:7",
    "force": True,
    "dtype": "bfloat16",
    "vae_dtype": "bfloat16",
    "ops": "reference",
    "nz": True,
    "fast_layernorm": True,
    "max_memory": 8 * 10**9,
}


def test_every_load_option_is_replayed_from_the_json_and_both_replay_lines(run, fake, tmp_path):
    args = []
    for key, value in EVERY_LOAD_OPTION.items():
        text = ";".join(value) if isinstance(value, list) else "true" if value is True else value
        args += ["--set", f"{key}={text}"]
    first = run("generate", "--demo", "a cat", "--seed", "7", *args, "-o", tmp_path / "a.mp4")
    assert first.code == 0, first.err
    beside = json.loads((tmp_path / "a.json").read_text())
    assert beside["source"] == "demo" and read_metadata(tmp_path / "a.mp4")["load"] == beside["load"]
    assert beside["load"] == EVERY_LOAD_OPTION
    assert first.out.splitlines()[-1] == f"  replay  {beside['replay']}"
    assert run("generate", "--config", tmp_path / "a.json", "-o", tmp_path / "b.mp4").code == 0
    assert run(*shlex.split(beside["replay"])[1:], "-o", tmp_path / "c.mp4").code == 0
    assert fake.loaded == [("demo", EVERY_LOAD_OPTION)] * 3
    args = ["--config", tmp_path / "a.json", "--device", "cpu", "--set", "vae_dtype=none"]
    assert run("generate", *args, "-o", tmp_path / "d.mp4").code == 0
    assert fake.loaded[3][1]["device"] == "cpu" and "vae_dtype" not in fake.loaded[3][1]
    args = [
        "--config",
        tmp_path / "a.json",
        "--set",
        "ops=none",
        "--set",
        "attention=fusion",
        "--sub-head",
        "3",
    ]
    assert run("generate", *args, "-o", tmp_path / "e.mp4").code == 0
    assert fake.loaded[4][1]["attention"] == "fusion" and "ops" not in fake.loaded[4][1]
    assert (tmp_path / "b.json").read_text() == (tmp_path / "a.json").read_text()


def test_every_option_of_load_is_in_the_test_above():
    names = set(inspect.signature(ascendit.load).parameters) - {"model", "on_progress"}
    others = {"attention", "attention_probabilities", "sub_head", "parts", "loras", "lora_skip"}
    assert names == EVERY_LOAD_OPTION.keys() | others


@pytest.fixture
def loras(model):
    """Two LoRA files for `model`, whose paths need quotes in a shell."""
    files = [model.parent / f"{name} $x.safetensors" for name in ("a", "b")]
    for file in files:
        write_weights(file, {"diffusion_model.blocks.0.self_attn.q.diff": ("BF16", (192, 192))})
    return files


def test_loras_are_replayed_from_the_json_and_both_replay_lines(run, fake, model, loras, tmp_path):
    a, b = loras
    chosen = [f"{a}:0.5", f"transformer_2={b}:-1.25"]
    args = ["--seed", "7", "--lora", chosen[0], "--lora", f"low={b}:-1.25", "-o", tmp_path / "a.mp4"]
    first = run("generate", model, "a cat", *args)
    assert first.code == 0, first.err
    beside = json.loads((tmp_path / "a.json").read_text())
    assert beside["load"]["loras"] == chosen
    assert run("generate", "--config", tmp_path / "a.json", "-o", tmp_path / "b.mp4").code == 0
    assert run(*shlex.split(beside["replay"])[1:], "-o", tmp_path / "c.mp4").code == 0
    listed = json.dumps([f"{a}:0.5", f"low={b}:-1.25"])
    (tmp_path / "run.toml").write_text(f'model = "{model}"\nprompt = "a"\nloras = {listed}\n')
    assert run("generate", "--config", tmp_path / "run.toml", "-o", tmp_path / "d.mp4").code == 0
    args = ["generate", "--config", tmp_path / "run.toml", "-o"]
    assert run(*args, tmp_path / "e.mp4", "--lora", b).code == 0  # a flag replaces the list of the file
    assert run(*args, tmp_path / "f.mp4", "--set", "loras=none").code == 0
    assert [options.get("loras") for _, options in fake.loaded] == [chosen] * 4 + [[str(b)], None]


def test_the_scale_of_each_lora_is_printed_and_checked_by_a_dry_run(run, fake, model, loras):
    chosen = ["--lora", f"high={loras[0]}:0.5", "--lora", loras[1]]
    ended = run("generate", model, "a cat", *chosen, "--dry-run")
    assert ended.code == 0 and not fake.loaded, ended.err
    lines = [line for line in ended.out.splitlines() if line.startswith("LoRA ")]
    assert lines == [
        f"LoRA       transformer: {loras[0].name}: 1 key x weight 0.5",
        f"LoRA       {loras[1].name}: 1 key x weight 1",
    ]
    data = run("generate", model, "a cat", *chosen, "--dry-run", "--json").json["loras"]
    assert [(x["file"], x["weight"], x["expert"]) for x in data] == [
        (loras[0].name, 0.5, "transformer"),
        (loras[1].name, 1.0, "all"),
    ]
    args = ["--frames", "1", "-o", model.parent / "a.png"]
    assert f"note: {' '.join(lines[0].split())}\n" in run("generate", model, "a cat", *chosen, *args).err
    assert run("generate", model, "a cat", *chosen, *args, "--overwrite", "--json").json["loras"] == data
    missing = run("generate", model, "a cat", "--lora", "nowhere.safetensors", "--dry-run")
    assert missing.code == 2 and "error[E-USE-02]: no LoRA file at nowhere.safetensors" in missing.err


@pytest.mark.parametrize("chip", ["a2", "a3"])
def test_a_dry_run_refuses_a_scheme_that_the_chip_lacks(run, fake, chip):
    from ascendit.device.device import parse_device
    from ascendit.errors import EnvironmentProblem
    from ascendit.ops.operators import Schemes

    args = ["generate", "--demo", "a cat", "--dry-run", "--device", f"twin:{chip}", "--scheme"]
    with pytest.raises(EnvironmentProblem) as real:
        Schemes(parse_device(f"twin:{chip}")).kernel("mxfp8")
    ended = run(*args, "mxfp8", "--json")
    assert ended.code == 3 and not fake.loaded
    data = ended.json["error"]
    assert (data["code"], data["got"], data["needs"], data["try"]) == (
        real.value.code,
        real.value.got,
        real.value.needs,
        real.value.fix,
    )
    for flags in (["--emulate", "decode-on-use"], ["--set", "ops=reference"]):
        assert run(*args, "mxfp8", *flags).code == 0
    assert run(*args, "int8").code == 0 and run(*args, "bf16").code == 0
    assert (
        run("generate", "--demo", "a cat", "--dry-run", "--device", "twin:a5", "--scheme", "mxfp8").code == 0
    )


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_the_device_reaches_the_loader(run, fake, model, tmp_path, device):
    run("generate", model, "a cat", "--device", device, "-o", tmp_path / "a.mp4")
    assert fake.loaded[0][1]["device"] == device


def test_scheme_recipe_policy_and_emulation_reach_the_loader_and_the_replay_line(run, fake, tmp_path):
    args = ["generate", "--demo", "a cat", "--seed", "7", "-o", tmp_path / "a.mp4", "--device", "twin:a5"]
    args += ["--scheme", "mxfp4", "--step-policy", "0-1:w4a8,default:w4a4", "--emulate", "decode-once"]
    ended = run(*args, "--set", "keep=blocks.0.*;blocks.7.*", "--set", "activation_rule=mxfp4=max:7")
    assert ended.code == 0, ended.err
    options = fake.loaded[0][1]
    assert options["scheme"] == "mxfp4" and options["keep"] == ["blocks.0.*", "blocks.7.*"]
    assert options["step_policy"] == "0-1:w4a8,default:w4a4" and options["emulate"] == "decode-once"
    assert options["activation_rule"] == "mxfp4=max:7"
    assert "recipe" not in options and "force" not in options
    replay = shlex.split(ended.out.splitlines()[-1].removeprefix("  replay  "))
    again = run(*replay[1:], "-o", tmp_path / "b.mp4")
    assert again.code == 0, again.err
    assert fake.loaded[1][1] == options


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--scheme", "mxfp6"], "E-USE-01", "--scheme mxfp6"),
        (["--recipe", "nope"], "E-USE-02", "nope"),
        (["--scheme", "mxfp8", "--step-policy", "0:w4a8"], "E-USE-01", "no layer is in mxfp4"),
        (["--scheme", "mxfp4", "--step-policy", "40:w4a8"], "E-REQ-03", "names step 40"),
        (["--scheme", "mxfp4", "--step-policy", "x"], "E-USE-01", "no settings"),
        (["--scheme", "mxfp4", "--emulate", "often"], "E-USE-01", "--emulate often"),
        (["--set", "keep=blocks.0.*"], "E-USE-01", "without a scheme"),
        (["--scheme", "mxfp8", "--set", "keep=blocks.99.*"], "E-USE-05", "blocks.99"),
    ],
)
def test_invalid_options_are_refused_before_loading(run, fake, args, code, text):
    ended = run("generate", "--demo", "a cat", *args, "--dry-run")
    assert ended.code == 2 and code in ended.err and text in ended.err and not fake.loaded


def test_a_dry_run_shows_the_attention_kernels(run, fake):
    args = ["generate", "--demo", "a cat", "--attention", "self=int8", "--step-policy", "0:attention=sdpa"]
    rows = run(*args, "--dry-run", "--json").json["attention"]
    assert [(x["kind"], x["kernel"], x["steps"]) for x in rows if x["expert"] == "transformer"] == [
        ("self", "sdpa", "0"),
        ("text", "cpu", "0-5"),
        ("self", "int8", "1-5"),
    ]
    assert rows[0]["reason"].startswith("step policy; ") and rows[2]["reason"].startswith("requested; ")
    text = run(*args, "--dry-run").out
    assert "\nattention  text: cpu on cpu (default; " in text
    assert "self, transformer, blocks 0-7, steps 1-5: int8 on cpu (requested; " in text and not fake.loaded


def test_heads_in_one_call_from_the_environment(run, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("USE_SUB_HEAD", "2")
    ended = run("generate", "--demo", "a cat", "--dry-run")
    assert (
        ended.code == 2 and "--sub-head 2 with 3 heads" in ended.err and "a divisor of 3: 1, 3" in ended.err
    )
    assert run("generate", "--demo", "a cat", "--sub-head", "1", "-o", tmp_path / "a.mp4").code == 0
    assert fake.loaded[0][1]["sub_head"] == 1


def test_algo_of_the_environment_applies_only_to_npus(run, fake, tmp_path, monkeypatch):
    monkeypatch.setenv("ALGO", "3")
    for i, args in enumerate((["--device", "twin:a5"], ["--device", "cpu"])):
        assert run("generate", "--demo", "a cat", *args, "-o", tmp_path / f"{i}.mp4").code == 0
    kernels = [options.get("attention") for _, options in fake.loaded]
    assert kernels == ["self=fused_infer", None]
    args = ["--device", "twin:a5", "--set", "attention=fusion", "-o", tmp_path / "c.mp4"]
    assert run("generate", "--demo", "a cat", *args).code == 0
    assert fake.loaded[2][1]["attention"] == "fusion"


@pytest.mark.parametrize(
    ("flag", "following"), [("--negative", "--dry-run"), ("-o", "--json"), ("--set", "--lora")]
)
def test_a_flag_is_no_value_of_another(run, flag, following):
    ended = run("generate", "--demo", "a red circle", flag, following)
    long = "--output" if flag == "-o" else flag
    assert ended.code == 2 and f"{long} without a value before {following}" in ended.err + ended.out
    assert f"or omit {long}" in ended.err + ended.out


def test_a_group_without_a_file_names_the_flags(run):
    ended = run("generate", "--demo", "a red circle", "--lora-skip", "image", "--dry-run")
    assert ended.code == 2 and "--lora-skip image without a LoRA" in ended.err
    assert "add --lora FILE, or omit --lora-skip\n" in ended.err
