"""From the command line and configuration layers to a prepared call, without loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import shell
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascendit.cli import generate_options, generate_plan, main
from ascendit.cli.generate_options import read_call
from ascendit.errors import UsageError
from ascendit.pipeline import job


def read(args, *, demo=False, flags=None, settings=(), config=None):
    return read_call(args, demo=demo, flags=flags or {}, settings=list(settings), config=config)


def prepare(call):
    return job.prepare(call.options, call.prompt, **call.fields)


def test_model_and_prompt():
    assert (read(["dir", "a cat"]).options.model, read(["dir", "a cat"]).prompt) == ("dir", "a cat")
    assert (read(["a cat"], demo=True).options.model, read(["a cat"], demo=True).prompt) == ("demo", "a cat")


@pytest.mark.parametrize(
    ("args", "demo"),
    [([], False), ([], True), (["a cat"], False), (["a", "red", "cat"], True), (["dir", "a", "cat"], False)],
)
def test_a_wrong_number_of_arguments(args, demo):
    with pytest.raises(UsageError) as e:
        read(args, demo=demo)
    assert e.value.code == "E-USE-01"
    assert "PROMPT" in e.value.needs and "in quotes" in e.value.needs


def test_a_config_may_name_model_and_prompt(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text('model = "dir"\nprompt = "a cat"\n')
    for args, expected in (
        ([], ("dir", "a cat")),
        (["a dog"], ("dir", "a dog")),
        (["d", "a dog"], ("d", "a dog")),
    ):
        call = read(args, config=config)
        assert (call.options.model, call.prompt) == expected
    assert read([], config=config, demo=True).options.model == "demo"


def test_flags_win_over_set_over_environment_over_config(tmp_path, monkeypatch):
    config = tmp_path / "run.toml"
    config.write_text('seed = 1\nfps = 8\nflow_shift = 3\ntext_on = "drop"\n')
    call = read(["d", "p"], flags={"seed": 3}, settings=["seed=2", "fps=9"], config=config)
    assert call.fields == {"seed": 3, "fps": 9, "flow_shift": 3.0}
    assert call.options.text_on == "drop"
    monkeypatch.setenv("T5_LOAD_CPU", "1")
    assert read(["d", "p"], config=config).options.text_on == "cpu"
    assert read(["d", "p"], settings=["text_on=device"]).options.text_on == "device"
    assert read(["d", "p"], flags={"text_on": "drop"}, settings=["text_on=device"]).options.text_on == "drop"


def test_a_bad_flag_value_names_the_flag():
    with pytest.raises(UsageError) as e:
        read(["d", "p"], flags={"text_on": "gpu"})
    assert e.value.got == "--text-on gpu" and e.value.fix == "--text-on device"
    assert e.value.needs == "text_on: cpu or device or drop"


def test_prepare_fills_in_defaults(model):
    prepared = prepare(read([str(model), "a cat"], flags={"seed": 3, "seconds": 1.0}))
    r = prepared.request
    assert (r.width, r.height, r.num_frames, r.fps, r.num_inference_steps) == (64, 64, 9, 8, 16)
    assert prepared.video_tokens == 3 * 8 * 8


def test_the_default_output_has_time_prompt_and_seed(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = read([str(model), "A calico cat"], flags={"seed": 42})
    output = generate_plan.plan_one(call, None).output
    assert Path(output).parent == Path("outputs") and not Path(output).parent.exists()
    assert Path(output).name.endswith("_calico-cat_s42.mp4")


FLAGS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "num_inference_steps": st.integers(1, 1000),
        "num_frames": st.integers(0, 30).map(lambda n: 4 * n + 1),
        "fps": st.integers(1, 240),
        "width": st.integers(1, 40).map(lambda n: 16 * n),
        "guidance_scale": st.floats(0, 20),
        "guidance_scale_2": st.floats(0, 20),
        "flow_shift": st.floats(0.01, 20),
        "boundary_ratio": st.floats(0.01, 0.99),
        "solver": st.sampled_from(["unipc", "euler"]),
        "negative_prompt": st.text("ab -'\"=,ü", max_size=9),
        "timesteps": st.lists(st.floats(1, 1000), min_size=1, max_size=5, unique=True).map(
            lambda ts: ",".join(map(repr, sorted(ts, reverse=True)))
        ),
        "dtype": st.just("float32"),
        "device": st.sampled_from(["cpu", "cuda:1"]),
        "text_on": st.sampled_from(["device", "drop"]),
    },
)


@given(FLAGS, st.text("ab -'\"=,ü$\n", max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_replay_line_makes_the_same_request(model, fake, flags, prompt):
    if flags.keys() >= {"timesteps", "num_inference_steps"}:
        del flags["num_inference_steps"]
    if "guidance_scale" not in flags:
        flags.pop("guidance_scale_2", None)
    flags.pop("fit", None)  # refused without an image
    prepared = prepare(read([str(model), prompt], flags=flags))
    args = shell.split(prepared.replay)
    assert args[:2] == ["ascendit", "generate"]
    again = parse(args[2:])
    assert again.prompt == prompt and again.options == prepared.model.options
    assert prepare(again).request == prepared.request


def parse(args):
    """Parse arguments as the command does, up to the call."""
    group: Any = typer.main.get_command(main.app)
    ctx = group.get_command(None, "generate").make_context("generate", list(args), obj=None)
    p = dict(ctx.params)
    return read(
        p["args"],
        demo=p["demo"],
        flags=p,
        settings=p["settings"] or [],
        config=p["config"],
    )


BAD = [
    (["--frames", "80"], "E-REQ-01", "--frames 77 or --frames 81"),
    (["--size", "70x64"], "E-REQ-02", "--size 64x64 or --size 80x64"),
    (["--steps", "0"], "E-REQ-03", ""),
    (["--image", "cat.png"], "E-REQ-04", ""),
    (["-o", "/proc/nothing/out.mp4"], "E-ENV-02", ""),
    (["-o", "out.avi"], "E-USE-01", "-o out.mp4"),
]


@pytest.mark.parametrize(("args", "code", "fix"), BAD)
def test_a_bad_call_is_refused_before_loading(run, fake, model, tmp_path, monkeypatch, args, code, fix):
    monkeypatch.chdir(tmp_path)
    ended = run("generate", model, "a cat", *args)
    assert ended.code == (3 if code == "E-ENV-02" else 2)
    assert ended.err.startswith(f"error[{code}]: ") and fix in ended.err
    assert not fake.loaded and ended.out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


LIGHT = [
    (["MODEL", "a cat", "--frames", "80"], 2, "E-REQ-01"),
    (["--demo", "a cat", "--scheme", "mxfp8", "--device", "twin:a2", "--dry-run"], 3, "E-CAP-01"),
    (["--config", "gone.json"], 2, "E-USE-02"),
]


@pytest.mark.parametrize(("args", "exit_code", "name"), LIGHT)
def test_a_bad_call_imports_no_torch(model, environ, tmp_path, args, exit_code, name):
    load = {"device": "cpu", "scheme": "mxfp8"}
    beside = {"model": "x", "source": "moved/away", "load": load, "request": {"prompt": "a cat"}}
    (tmp_path / "gone.json").write_text(json.dumps(beside))
    args = [str(model) if word == "MODEL" else word for word in args]
    code = (
        "import sys; from ascendit.cli.main import main;"
        f"code = main(['generate', *{args!r}, '--json']);"
        "print('torch' in sys.modules, 'diffusers' in sys.modules, code, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path)
    assert done.stderr == f"False False {exit_code}\n"
    assert json.loads(done.stdout)["error"]["code"] == name


# ---- flags, --set and --config -------------------------------------------------------------------


@pytest.mark.parametrize("text", ["832x480", "832*480", " 832 X 480 "])
def test_size(text):
    assert generate_options.parse_size(text) == {"width": 832, "height": 480}


@pytest.mark.parametrize("text", ["", "832", "832x", "-832x480", "832x480x3", "big"])
def test_bad_size(text):
    with pytest.raises(UsageError) as e:
        generate_options.parse_size(text)
    assert e.value.code == "E-USE-01" and e.value.fix == "omit --size for the model's own size"


def test_guidance():
    assert generate_options.parse_guidance("4") == {"guidance_scale": 4.0}
    assert generate_options.parse_guidance("4,2.5") == {"guidance_scale": 4.0, "guidance_scale_2": 2.5}
    for bad in ("", "a", "1,2,3", "4,"):
        with pytest.raises(UsageError, match="one number, or two"):
            generate_options.parse_guidance(bad)


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=8))
def test_timesteps(numbers):
    text = ",".join(map(repr, numbers))
    assert generate_options.parse_timesteps(text) == {"timesteps": tuple(numbers)}


def test_settings_are_typed():
    args = ["solver=euler", "num_inference_steps=4", "flow_shift=3", "metadata=no", "boundary_ratio=none"]
    layer = generate_options.parse_settings(args)
    assert layer == {
        "solver": "euler",
        "num_inference_steps": 4,
        "flow_shift": 3.0,
        "metadata": False,
        "boundary_ratio": None,
    }
    assert type(layer["flow_shift"]) is float


@pytest.mark.parametrize(
    ("flags", "settings", "fix"),
    [
        ({"solver": "dpm"}, [], "--solver dpm++"),
        ({"solver": "foo"}, [], "--solver unipc"),
        ({"num_inference_steps": "x"}, [], "--steps 16"),
        ({}, ["solver=dpm"], "--set solver=dpm++"),
        ({}, ["schedule=oficial"], "--set schedule=official"),
    ],
)
def test_the_fix_of_a_bad_value_can_be_pasted(flags, settings, fix):
    with pytest.raises(UsageError, match="E-USE-01") as e:
        read(["d", "p"], flags=flags, settings=settings)
    assert e.value.fix == fix


@pytest.mark.parametrize(
    ("setting", "needs"),
    [
        ("solver=dpm", "solver: unipc or dpm++ or euler or renoise"),
        ("num_inference_steps=2.5", "num_inference_steps: a whole number"),
        ("flow_shift=much", "flow_shift: a number"),
        ("metadata=maybe", "metadata: true or false"),
        ("timesteps=", "timesteps: numbers"),
        ("solver", "KEY=VALUE"),
        ("dtype=int3", "dtype: float32 or bfloat16 or float16"),
    ],
)
def test_bad_settings(setting, needs):
    with pytest.raises(UsageError) as e:
        generate_options.parse_settings([setting])
    assert e.value.code == "E-USE-01"
    assert setting.partition("=")[0] in e.value.got
    assert e.value.needs == needs


def test_an_unknown_key_lists_the_known_ones():
    with pytest.raises(UsageError) as e:
        generate_options.parse_settings(["flow_shif=3"])
    assert "unknown key flow_shif" in e.value.got
    assert e.value.needs.startswith("a key of --set, as flow_shift, ") and len(e.value.needs) < 120
    assert e.value.fix == "--set flow_shift=3 instead of flow_shif"


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ("steps", "num_inference_steps"),
        ("cfg", "guidance_scale"),
        ("sample_shift", "flow_shift"),
        ("n_prompt", "negative_prompt"),
    ],
)
def test_the_key_of_another_tool_is_named(other, key):
    with pytest.raises(UsageError, match=f"unknown key {other}") as e:
        generate_options.parse_settings([f"{other}=3"])
    assert e.value.fix == f"--set {key}=3 instead of {other}"


def test_config_toml(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'seed = 7\nguidance_scale = 4\ntimesteps = [1000, 500.0]\nsolver = "euler"\nmetadata = false\n'
    )
    assert generate_options.read_config(file) == {
        "seed": 7,
        "guidance_scale": 4.0,
        "timesteps": (1000.0, 500.0),
        "solver": "euler",
        "metadata": False,
    }


def test_config_json_of_a_video(tmp_path):
    file = tmp_path / "cat.json"
    request = {"prompt": "a cat", "seed": 7, "image": None, "timesteps": None}
    file.write_text(json.dumps({"model": "demo", "request": request, "versions": {"torch": "2"}}))
    assert generate_options.read_config(file) == {"model": "demo", **request}
    load = {"device": "twin:a5", "scheme": "mxfp4", "keep": ["blocks.0.*", "proj_out"], "nz": True}
    file.write_text(
        json.dumps({"model": "ascendit-demo", "source": "demo", "load": load, "request": request})
    )
    assert generate_options.read_config(file) == {"model": "demo", **load, **request}
    assert read([], config=file).options.keep == ("blocks.0.*", "proj_out")


@pytest.mark.parametrize("value", ["8e9", "8_000_000_000", '"8GB"'])
def test_max_memory_in_a_config_is_a_number_or_text(tmp_path, value):
    file = tmp_path / "run.toml"
    file.write_text(f"max_memory = {value}\n")
    assert read(["d", "p"], config=file).options.max_memory == 8 * 10**9


@pytest.mark.parametrize(
    "line", ["nz = 5", "device = 5", "recipe = 5", "keep = 5", 'nz = "perhaps"', "model = 5"]
)
def test_a_load_option_of_a_wrong_type_in_a_config_is_refused(tmp_path, line):
    file = tmp_path / "run.toml"
    file.write_text(f"{line}\n")
    args = ["p"] if line.startswith("model") else ["d", "p"]
    with pytest.raises(UsageError, match="E-USE-01"):
        read(args, config=file)


def test_none_removes_a_load_option_of_a_config():
    low = {"scheme": "mxfp4", "attention": "fusion", "keep": "blocks.0.*", "seed": 1}
    removed = generate_options.parse_settings([f"{key}=none" for key in low if key != "seed"])
    assert {k: v for k, v in generate_options.merge(low, removed).items() if v is not None} == {"seed": 1}


@pytest.mark.parametrize(
    ("name", "text", "code", "got"),
    [
        ("a.toml", "seed = ", "E-USE-01", "a.toml: "),
        ("a.toml", "seed = true", "E-USE-01", "seed=True"),
        ("a.toml", 'seed = "7b"', "E-USE-01", "seed=7b"),
        ("a.toml", "[run]\nseed = 7", "E-USE-01", "unknown key run"),
        ("a.json", "{", "E-USE-01", "a.json: "),
        ("a.json", "[1]", "E-USE-01", "a.json"),
    ],
)
def test_bad_configs(tmp_path, name, text, code, got):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as e:
        generate_options.read_config(tmp_path / name)
    assert e.value.code == code and got in e.value.got


def test_bad_config_files(tmp_path):
    with pytest.raises(UsageError, match="E-USE-02") as e:
        generate_options.read_config(tmp_path / "none.toml")
    assert "No such file" in e.value.got
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="E-USE-01"):
        generate_options.read_config(tmp_path / "b.toml")


def test_higher_layers_win():
    assert generate_options.merge({"seed": 1, "fps": 8}, {"seed": 2}, {"seed": 3}) == {"seed": 3, "fps": 8}


def test_a_higher_value_removes_fields_that_it_replaces():
    low = {
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "num_inference_steps": 16,
        "timesteps": None,
        "num_frames": 17,
    }
    assert generate_options.merge(low, {"guidance_scale": 5.0}) == {
        "guidance_scale": 5.0,
        "num_inference_steps": 16,
        "timesteps": None,
        "num_frames": 17,
    }
    merged = generate_options.merge(low, {"timesteps": (1000.0, 500.0)}, {"seconds": 2.0})
    assert "num_inference_steps" not in merged and "num_frames" not in merged
    assert "timesteps" not in generate_options.merge({"timesteps": (900.0,)}, {"num_inference_steps": 4})
