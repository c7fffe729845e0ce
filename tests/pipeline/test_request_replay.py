"""A request written and read back without loss: as JSON, and as the command that makes the video again."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from wan_defaults import CASCADE, I2V, SINGLE, TI2V

from ascendit.errors import RequestError, UsageError
from ascendit.pipeline.request import MAX_SEED, Defaults, GenerateRequest, load_record, replay_line, resolve
from ascendit.schedule import StepPolicy

FIELDS = {f.name for f in dataclasses.fields(GenerateRequest)}

positive = st.floats(1e-6, 1e6)
some_text = st.text(max_size=30)


@st.composite
def requests(draw: st.DrawFn) -> tuple[Defaults, GenerateRequest]:
    """A model and a request it takes."""
    defaults = draw(st.sampled_from([CASCADE, SINGLE, TI2V, I2V]))
    m = defaults.size_multiple
    fields: dict[str, Any] = {
        "negative_prompt": draw(some_text),
        "width": m * draw(st.integers(1, 100)),
        "height": m * draw(st.integers(1, 100)),
        "num_frames": 4 * draw(st.integers(0, 50)) + 1,
        "fps": draw(st.integers(1, 240)),
        "guidance_scale": draw(st.floats(0, 1e6) | st.integers(0, 20)),
        "flow_shift": draw(positive),
        "solver": draw(st.sampled_from(["unipc", "euler"])),
        "seed": draw(st.integers(0, MAX_SEED)),
        "max_sequence_length": draw(st.integers(1, 512)),
    }
    steps = st.lists(st.floats(1e-3, 1000), min_size=1, max_size=6, unique=True)
    if draw(st.booleans()):
        fields["timesteps"] = sorted(draw(steps), reverse=True)
    else:
        fields["num_inference_steps"] = draw(st.integers(1, 1000))
    if defaults.num_experts == 2:
        fields["guidance_scale_2"] = draw(st.none() | st.floats(0, 1e6))
        fields["boundary_ratio"] = draw(st.floats(0.001, 0.999))
    if defaults.task != "t2v":
        fields["image"] = draw(st.sampled_from(["x.png", "my pictures/a b's.jpg"]))
    return defaults, resolve(defaults, draw(some_text), **fields)


@given(requests())
def test_json_round_trip(case: tuple[Defaults, GenerateRequest]) -> None:
    request = case[1]
    text = request.to_json()
    assert GenerateRequest.from_json(text) == request
    assert set(json.loads(text)) == FIELDS
    assert GenerateRequest.from_json(text).to_json() == text


def parse_replay(line: str) -> tuple[list[str], dict[str, Any]]:
    """Read a replay line the way a shell and a command-line parser do: positional words, fields."""
    words = shlex.split(line)
    assert words[:2] == ["ascendit", "generate"]
    rest = words[2:]
    positional: list[str] = []
    fields: dict[str, Any] = {}
    plain: dict[str, Any] = {
        "--seed": ("seed", int),
        "--frames": ("num_frames", int),
        "--fps": ("fps", int),
        "--steps": ("num_inference_steps", int),
        "--shift": ("flow_shift", float),
        "--negative": ("negative_prompt", str),
        "--image": ("image", str),
        "-o": ("output", str),
    }
    typed = {"boundary_ratio": float, "max_sequence_length": int, "solver": str}
    while rest:
        word = rest.pop(0)
        if word == "--":
            positional, rest = positional + rest, []
        elif word == "--demo":
            fields["demo"] = True
        elif not word.startswith("-"):
            positional.append(word)
        elif word in plain:
            name, kind = plain[word]
            fields[name] = kind(rest.pop(0))
        elif word == "--size":
            fields["width"], fields["height"] = map(int, rest.pop(0).split("x"))
        elif word == "--timesteps":
            fields["timesteps"] = [float(t) for t in rest.pop(0).split(",")]
        elif word == "--guidance":
            scales = [float(g) for g in rest.pop(0).split(",")]
            fields |= dict(zip(("guidance_scale", "guidance_scale_2"), scales, strict=False))
        elif word == "--set":
            name, value = rest.pop(0).split("=", 1)
            fields[name] = typed[name](value)
        else:
            raise AssertionError(f"no such flag: {word}")
    return positional, fields


@given(requests(), st.sampled_from(["demo", "models/Wan 2.2", "hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers"]))
def test_the_replay_line_makes_the_same_request(case: tuple[Defaults, GenerateRequest], model: str) -> None:
    defaults, request = case
    positional, fields = parse_replay(request.replay_line(model, "out dir/a.mp4"))
    assert fields.pop("output") == "out dir/a.mp4"
    assert fields.pop("demo", False) == (model == "demo")
    assert positional == ([request.prompt] if model == "demo" else [model, request.prompt])
    assert resolve(defaults, positional[-1], **fields) == request


def test_a_replay_line_as_a_user_sees_it() -> None:
    request = resolve(CASCADE, "a cat's hat", seed=7, width=832, height=480)
    assert request.replay_line("demo") == (
        "ascendit generate --demo 'a cat'\"'\"'s hat' --seed 7 --size 832x480 --frames 81 --fps 16 "
        "--steps 40 --guidance 4,3 --shift 12 --set boundary_ratio=0.875 --set solver=unipc"
    )
    few = resolve(SINGLE, "-v is a flag", seed=7, timesteps=[1000, 750.5], guidance_scale=1)
    assert few.replay_line("models/wan", "a.mp4") == (
        "ascendit generate --seed 7 --size 1280x720 --frames 81 --fps 16 --timesteps 1000,750.5 "
        "--guidance 1 --shift 5 --set solver=unipc -o a.mp4 -- models/wan '-v is a flag'"
    )


def test_the_load_options_of_a_python_call_are_words() -> None:
    given = {
        "device": "npu:1",
        "model": "elsewhere",
        "dtype": torch.bfloat16,
        "vae_dtype": torch.float32,
        "keep": ("blocks.0.*", "proj_out"),
        "step_policy": StepPolicy.parse("0:w4a8,1:w4a8"),
        "emulate": True,
        "recipe": Path("my recipes/a.toml"),
        "ops": "auto",
        "nz": False,
        "scheme": None,
        "force": True,
    }
    record = load_record(given)
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "device": "npu:1",
        "recipe": "my recipes/a.toml",
        "step_policy": "0-1:w4a8",
        "emulate": "decode-on-use",
        "keep": ["blocks.0.*", "proj_out"],
        "dtype": "bfloat16",
        "vae_dtype": "float32",
        "force": True,
    }
    line = replay_line(resolve(SINGLE, "a cat", seed=7), "models/wan", record)
    assert line.startswith(
        "ascendit generate --device npu:1 --recipe 'my recipes/a.toml' --step-policy 0-1:w4a8 "
        "--emulate decode-on-use --set 'keep=blocks.0.*;proj_out' --set dtype=bfloat16 "
        "--set vae_dtype=float32 --set force=true models/wan 'a cat' --seed 7 "
    )


def test_defaults_of_load_are_recorded_but_no_words_of_the_line() -> None:
    record = load_record({"device": "cpu", "text_on": "device"})
    request = resolve(SINGLE, "a cat", seed=7)
    assert record == {"device": "cpu", "text_on": "device"}
    assert replay_line(request, "demo", record) == request.replay_line("demo")


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("{", "request is no JSON: "),
        ("[1]", "request has unknown fields: list"),
        ("null", "request has unknown fields: NoneType"),
        ('{"steps": 4, "size": 1}', "request has unknown fields: ['size', 'steps']"),
        ('{"prompt": "a"}', "request is incomplete or of a wrong type: "),
        ('{"timesteps": ["x"]}', "timesteps is ['x']"),
    ],
)
def test_from_json_refuses_what_to_json_never_wrote(text: str, got: str) -> None:
    with pytest.raises(UsageError) as error:
        GenerateRequest.from_json(text)
    assert error.value.got.startswith(got)
    assert error.value.code in ("E-USE-01", "E-REQ-03")


@given(st.sampled_from(sorted(FIELDS - {"image", "prompt"})), st.sampled_from([[], {}, "x\ny"]))
def test_from_json_refuses_a_wrong_type_in_any_field(name: str, value: Any) -> None:
    if (name, value) == ("negative_prompt", "x\ny"):
        return
    data = json.loads(resolve(CASCADE, "a", seed=1).to_json()) | {name: value}
    with pytest.raises(UsageError) as error:
        GenerateRequest.from_json(json.dumps(data))
    assert name in error.value.got


def test_from_json_checks_values() -> None:
    data = json.loads(resolve(CASCADE, "a", seed=1).to_json()) | {"guidance_scale": math.nan}
    with pytest.raises(RequestError, match="guidance_scale is nan"):
        GenerateRequest.from_json(json.dumps(data))
