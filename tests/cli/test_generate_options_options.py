"""Values of flags, `--set` and `--config`."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendit.cli import generate_options
from ascendit.errors import UsageError


@pytest.mark.parametrize("text", ["832x480", "832*480", " 832 X 480 "])
def test_size(text):
    assert generate_options.parse_size(text) == {"width": 832, "height": 480}


@pytest.mark.parametrize("text", ["", "832", "832x", "-832x480", "832x480x3", "big"])
def test_bad_size(text):
    with pytest.raises(UsageError) as e:
        generate_options.parse_size(text)
    assert e.value.code == "E-USE-01" and e.value.fix == "--size 832x480"


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
    words = ["solver=euler", "num_inference_steps=4", "flow_shift=3", "metadata=no", "boundary_ratio=none"]
    layer = generate_options.parse_settings(words)
    assert layer == {
        "solver": "euler",
        "num_inference_steps": 4,
        "flow_shift": 3.0,
        "metadata": False,
        "boundary_ratio": None,
    }
    assert type(layer["flow_shift"]) is float


@pytest.mark.parametrize(
    ("setting", "needs"),
    [
        ("solver=dpm", "solver: unipc or euler"),
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
    assert "boundary_ratio" in e.value.needs and "metadata" in e.value.needs and "solver" in e.value.needs
    assert e.value.fix == "did you mean flow_shift?"


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
    given = {**load, "keep": "blocks.0.*;proj_out"}
    assert generate_options.read_config(file) == {"model": "demo", **given, **request}


def test_none_takes_a_load_option_of_a_config_away():
    low = {"scheme": "mxfp4", "attention": "fusion", "keep": "blocks.0.*", "seed": 1}
    undone = generate_options.parse_settings([f"{key}=none" for key in low if key != "seed"])
    assert {k: v for k, v in generate_options.merge(low, undone).items() if v is not None} == {"seed": 1}


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


def test_a_higher_value_takes_what_it_replaces_with_it():
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
