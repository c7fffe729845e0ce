"""GenerateRequest: filled from a model's defaults, and checked against it field by field."""

from __future__ import annotations

import json
import math
import re
import shlex
from typing import Any, get_args

import numpy as np
import pytest
import shell
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from wan_defaults import CASCADE, I2V, I2V_21, SINGLE, TI2V, defaults_of

from ascendit.errors import UNSAFE, RequestError, UsageError
from ascendit.family import NEGATIVE_PROMPT, PRESETS, SPECS, Solver
from ascendit.option_text import command_line
from ascendit.pipeline.defaults import Defaults
from ascendit.pipeline.request import MAX_SEED, GenerateRequest, resolve

SOLVERS = get_args(Solver)
FIELDS = set(GenerateRequest.model_fields)
RATE_RULE = "frames per second from 1 to 240: a number as 24 or 23.976, or a fraction as 24000/1001"


def text_of(error: pytest.ExceptionInfo[UsageError]) -> tuple[str, str, str, str]:
    with command_line():
        return error.value.got, error.value.needs, error.value.fix, error.value.code


# --- filling


def test_defaults_fill_every_field() -> None:
    request = resolve(CASCADE, "a cat", seed=3)
    assert request.model_dump() == {
        "prompt": "a cat",
        "negative_prompt": NEGATIVE_PROMPT,
        "image": None,
        "last_image": None,
        "fit": "crop",
        "width": 1280,
        "height": 720,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 40,
        "timesteps": None,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "flow_shift": 12.0,
        "boundary_ratio": 0.875,
        "solver": "unipc",
        "schedule": "diffusers",
        "seed": 3,
        "max_sequence_length": 512,
    }


def test_arguments_win_and_none_means_default() -> None:
    request = resolve(
        CASCADE, "a", seed=1, width=832, height=480, num_frames=17, flow_shift=7.5, fps=None, solver="euler"
    )
    assert (request.width, request.height, request.num_frames) == (832, 480, 17)
    assert (request.flow_shift, request.fps, request.solver) == (7.5, 16, "euler")


def test_shift_follows_the_size() -> None:
    assert resolve(I2V_21, "a", image="x.png").flow_shift == 5.0
    assert resolve(I2V_21, "a", image="x.png", width=832, height=480).flow_shift == 3.0
    assert resolve(I2V_21, "a", image="x.png", width=832, height=480, flow_shift=4.0).flow_shift == 4.0
    unknown = defaults_of("Wan2.1-T2V-14B", spec=None, flow_shift=9.0)
    assert resolve(unknown, "a", width=832, height=480).flow_shift == 9.0


def test_a_seed_is_drawn_by_default() -> None:
    seeds = {resolve(CASCADE, "a").seed for _ in range(8)}
    assert len(seeds) > 1 and all(0 <= s < 2**31 for s in seeds)


def test_numpy_numbers_become_python_numbers() -> None:
    request = resolve(
        CASCADE, "a", seed=np.int64(3), width=np.int32(832), height=480, flow_shift=np.float32(2.5)
    )
    assert request == resolve(CASCADE, "a", seed=3, width=832, height=480, flow_shift=2.5)
    assert json.loads(request.to_json())["seed"] == 3


def test_an_unknown_argument_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError) as error:
        resolve(CASCADE, "a", steps=4, guidance=2)
    got, needs, _, code = text_of(error)
    assert got == "unknown argument: guidance, steps" and code == "E-USE-01"
    assert needs == "one of " + ", ".join(sorted(FIELDS - {"prompt"} | {"on_progress", "preset"}))


def test_an_option_of_the_model_and_a_fit_without_an_image_are_refused() -> None:
    with pytest.raises(UsageError) as error:
        resolve(CASCADE, "a", scheme="mxfp8")
    assert text_of(error)[2] == 'ascendit.load(model, scheme="mxfp8")'
    with pytest.raises(UsageError, match="fit pad without an image"):
        resolve(CASCADE, "a", fit="pad")
    assert resolve(CASCADE, "a", fit="crop").fit == "crop"  # as in the JSON beside a video


def test_a_request_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        resolve(CASCADE, "a").seed = 4


# --- guidance


def test_one_guidance_scale_applies_to_both_experts() -> None:
    request = resolve(CASCADE, "a", guidance_scale=6.0)
    assert (request.guidance_for(high=True), request.guidance_for(high=False)) == (6.0, 6.0)
    request = resolve(CASCADE, "a", guidance_scale=6.0, guidance_scale_2=2.0)
    assert (request.guidance_for(high=True), request.guidance_for(high=False)) == (6.0, 2.0)
    request = resolve(CASCADE, "a", guidance_scale_2=2.0)
    assert (request.guidance_for(high=True), request.guidance_for(high=False)) == (4.0, 2.0)


def test_one_expert_has_one_guidance() -> None:
    request = resolve(SINGLE, "a", guidance_scale=6.0)
    assert request.guidance_scale_2 is None
    assert request.guidance_for(high=True) == request.guidance_for(high=False) == 6.0


@pytest.mark.parametrize(
    ("scales", "unconditional"),
    [((1, 1), False), ((1.0, 3), True), ((4, 1), True), ((4, 3), True), ((0.5, 0), False)],
)
def test_guidance_up_to_1_needs_no_unconditional_pass(
    scales: tuple[float, float], unconditional: bool
) -> None:
    request = resolve(CASCADE, "a", guidance_scale=scales[0], guidance_scale_2=scales[1])
    assert request.do_classifier_free_guidance is unconditional
    assert resolve(SINGLE, "a", guidance_scale=1).do_classifier_free_guidance is False


# --- validation, field by field

WHOLE = "a whole number, "
NUMBER = "a number of at least 0"
DECREASING = "decreasing numbers above 0, at most 1000, for example 1000,750,500,250"
BAD: list[tuple[str, Any, str]] = [
    ("num_inference_steps", 0, WHOLE + "1 to 1000"),
    ("num_inference_steps", 1001, WHOLE + "1 to 1000"),
    ("num_inference_steps", 2.5, WHOLE + "1 to 1000"),
    ("flow_shift", 0.0, "a number above 0"),
    ("flow_shift", math.inf, "a number above 0"),
    ("flow_shift", "5", "a number above 0"),
    ("guidance_scale", -0.5, NUMBER),
    ("guidance_scale", math.nan, NUMBER),
    ("guidance_scale", True, NUMBER),
    ("guidance_scale_2", -1, NUMBER),
    ("guidance_scale_2", math.inf, NUMBER),
    ("boundary_ratio", 0.0, "a number between 0 and 1"),
    ("boundary_ratio", 1.0, "a number between 0 and 1"),
    ("boundary_ratio", 875, "a number between 0 and 1"),
    ("solver", "ddim", "unipc, dpm++, euler or renoise"),
    ("schedule", "wan", "diffusers or official"),
    ("seed", -1, f"{WHOLE}0 to {MAX_SEED}"),
    ("seed", MAX_SEED + 1, f"{WHOLE}0 to {MAX_SEED}"),
    ("seed", 1.0, f"{WHOLE}0 to {MAX_SEED}"),
    ("seed", "7", f"{WHOLE}0 to {MAX_SEED}"),
    ("fps", 0, RATE_RULE),
    ("fps", "24000/0", RATE_RULE),
    ("width", 0, WHOLE + "at least 1"),
    ("width", 832.0, WHOLE + "at least 1"),
    ("height", -480, WHOLE + "at least 1"),
    ("num_frames", 0, WHOLE + "at least 1"),
    ("num_frames", "81", WHOLE + "at least 1"),
    ("max_sequence_length", 0, WHOLE + "1 to 512"),
    ("max_sequence_length", 513, WHOLE + "1 to 512"),
    ("negative_prompt", 3, "text"),
    ("image", 3, "the path of an image"),
    ("last_image", 3, "the path of an image"),
    ("fit", "zoom", "crop, pad or stretch"),
    ("timesteps", (1000, 1000), DECREASING),
    ("timesteps", (500, 750), DECREASING),
    ("timesteps", (1001, 500), DECREASING),
    ("timesteps", (500, 0), DECREASING),
    ("timesteps", (math.nan,), DECREASING),
    ("timesteps", (), DECREASING),
    ("timesteps", "1000,500", DECREASING),
    ("timesteps", 500, DECREASING),
]


@pytest.mark.parametrize(("name", "value", "needs"), BAD, ids=[f"{n}={v}" for n, v, _ in BAD])
def test_a_bad_value_is_named_with_its_rule(name: str, value: Any, needs: str) -> None:
    with pytest.raises(RequestError) as error:
        resolve(CASCADE, "a", **{name: value})
    got, rule, _, code = text_of(error)
    assert (rule, code) == (f"{name}: {needs}", "E-REQ-03")
    assert got.startswith(f"{name} is ") and name in error.value.fix
    if name != "timesteps":
        assert got == f"{name} is {value!r}"


def test_every_field_with_a_rule_is_tested() -> None:
    assert {name for name, _, _ in BAD} == FIELDS - {"prompt"}


def test_the_prompt_is_text() -> None:
    with pytest.raises(RequestError, match="prompt is 5"):
        resolve(CASCADE, 5)  # type: ignore[arg-type]
    assert resolve(CASCADE, "").prompt == ""


@pytest.mark.parametrize(
    "limit", [("num_inference_steps", 1000), ("seed", MAX_SEED), ("fps", 240), ("seed", 0)]
)
def test_limits_themselves_are_legal(limit: tuple[str, Any]) -> None:
    assert getattr(resolve(CASCADE, "a", **dict([limit])), limit[0]) == limit[1]


# --- timesteps


def test_timesteps_set_the_number_of_steps() -> None:
    request = resolve(CASCADE, "a", timesteps=[1000, 750, 500, 250])
    assert request.timesteps == (1000.0, 750.0, 500.0, 250.0)
    assert request.num_inference_steps == 4
    assert resolve(CASCADE, "a", timesteps=[700], num_inference_steps=1).num_inference_steps == 1


def test_timesteps_and_another_number_of_steps_are_refused() -> None:
    with pytest.raises(RequestError) as error:
        resolve(CASCADE, "a", timesteps=[1000, 500], num_inference_steps=4)
    got, needs, fix, code = text_of(error)
    assert (got, needs) == ("2 timesteps and 4 steps", "as many steps as timesteps")
    assert (fix, code) == ("omit --steps, or --timesteps", "E-REQ-03")


# --- against the model


@pytest.mark.parametrize(("frames", "low", "high"), [(80, 77, 81), (2, 1, 5), (120, 117, 121), (16, 13, 17)])
def test_an_invalid_number_of_frames_names_the_two_nearest(frames: int, low: int, high: int) -> None:
    with pytest.raises(RequestError) as error:
        resolve(CASCADE, "a", num_frames=frames)
    assert text_of(error) == (
        f"{frames} frames",
        "4n+1 frames (Wan2.2-T2V-A14B)",
        f"--frames {low} or --frames {high}",
        "E-REQ-01",
    )


@given(st.integers(2, 2000).filter(lambda n: n % 4 != 1))
def test_both_frames_in_the_message_are_legal_and_nearest(frames: int) -> None:
    with pytest.raises(RequestError) as error:
        resolve(CASCADE, "a", num_frames=frames)
    low, high = map(int, re.findall(r"num_frames=(\d+)", error.value.fix))
    assert low < frames < high == low + 4
    assert [resolve(CASCADE, "a", num_frames=n).num_frames for n in (low, high)] == [low, high]


@pytest.mark.parametrize(
    ("defaults", "size", "low", "high"),
    [
        (CASCADE, (850, 480), "848x480", "864x480"),
        (CASCADE, (832, 490), "832x480", "832x496"),
        (CASCADE, (850, 490), "848x480", "864x496"),
        (TI2V, (1280, 720), "1280x704", "1280x736"),
        (TI2V, (1270, 720), "1248x704", "1280x736"),
        (CASCADE, (7, 480), "16x480", "32x480"),
    ],
)
def test_an_invalid_size_names_the_two_nearest(
    defaults: Defaults, size: tuple[int, int], low: str, high: str
) -> None:
    with pytest.raises(RequestError) as error:
        resolve(defaults, "a", width=size[0], height=size[1])
    assert text_of(error) == (
        f"size {size[0]}x{size[1]}",
        f"width and height in multiples of {defaults.size_multiple} ({defaults.model})",
        f"--size {low} or --size {high}",
        "E-REQ-02",
    )


@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([CASCADE, TI2V]))
def test_both_sizes_in_the_message_are_legal(width: int, height: int, defaults: Defaults) -> None:
    m = defaults.size_multiple
    if width % m == height % m == 0:
        return
    with pytest.raises(RequestError) as error:
        resolve(defaults, "a", width=width, height=height)
    for w, h in re.findall(r"width=(\d+), height=(\d+)", error.value.fix) or [(0, 0)]:
        w, h = int(w), int(h)
        assert resolve(defaults, "a", width=w, height=h).width == w
        assert (abs(w - width) < m or w <= 2 * m) and (abs(h - height) < m or h <= 2 * m)


def test_image_rules() -> None:
    with pytest.raises(RequestError) as error:
        resolve(I2V, "a")
    assert text_of(error) == (
        "no image",
        "Wan2.2-I2V-A14B starts from an image",
        "--image FILE, or a text-to-video model",
        "E-REQ-04",
    )
    with pytest.raises(RequestError) as error:
        resolve(CASCADE, "a", image="x.png")
    assert text_of(error) == (
        "image x.png",
        "Wan2.2-T2V-A14B is text-to-video and takes no image",
        "omit --image, or use an I2V or TI2V model",
        "E-REQ-04",
    )
    assert resolve(I2V, "a", image="x.png").image == "x.png"
    assert resolve(TI2V, "a").image is None
    assert resolve(TI2V, "a", image="x.png").image == "x.png"


@pytest.mark.parametrize("extra", [{"guidance_scale_2": 3.0}, {"boundary_ratio": 0.9}])
def test_one_expert_refuses_fields_of_a_second(extra: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as error:
        resolve(SINGLE, "a", **extra)
    got, needs, fix, code = text_of(error)
    assert (got, needs) == ("a second guidance scale or a boundary", "Wan2.1-T2V-14B has one expert")
    assert (fix, code) == ("--guidance 5, without --set boundary_ratio", "E-REQ-03")


def test_two_experts_need_a_boundary() -> None:
    defaults = defaults_of("Wan2.2-T2V-A14B", boundary_ratio=None)
    with pytest.raises(RequestError) as error:
        resolve(defaults, "a")
    assert error.value.got == "no boundary between the two experts"
    assert (error.value.fix, error.value.code) == ("boundary_ratio=0.875", "E-REQ-03")
    assert resolve(defaults, "a", boundary_ratio=0.9).boundary_ratio == 0.9


# ---- negative prompt -----------------------------------------------------------------------------


def pictures(name: str) -> dict[str, str]:
    """The images that a model needs."""
    last = {"last_image": "b.png"} if SPECS[name].last_frame == "required" else {}
    return {"image": "a.png", **last} if SPECS[name].task == "i2v" else {}


@pytest.mark.parametrize("name", SPECS)
def test_the_negative_prompt_is_that_of_the_authors_unless_set(name: str) -> None:
    image = pictures(name)
    text = resolve(defaults_of(name), "a cat", **image).negative_prompt
    prefixes = {"Wan2.1-I2V": "镜头晃动，", "Wan2.1-FLF": "镜头切换，镜头晃动，"}
    prefix = prefixes.get(name[:10], "")
    assert text == ("" if name == "ascendit-demo" else prefix + NEGATIVE_PROMPT)
    for mine in ("", "blurry"):
        assert resolve(defaults_of(name), "a cat", negative_prompt=mine, **image).negative_prompt == mine
    assert resolve(defaults_of(name), "a cat", negative_prompt=None, **image).negative_prompt == text


# ---- presets -------------------------------------------------------------------------------------

FITS = [(name, model) for name, p in PRESETS.items() for model in p.models]


def with_preset(model: str, name: str, **fields: Any) -> GenerateRequest:
    return resolve(defaults_of(model), "a cat", preset=name, seed=1, **pictures(model), **fields)


@pytest.mark.parametrize(("name", "model"), FITS)
def test_a_preset_sets_steps_shift_guidance_and_solver(name: str, model: str) -> None:
    request, spec = with_preset(model, name), SPECS[model]
    four = name in ("lightning", "lightx2v")
    timesteps = (1000, 937.5, 833.3333, 625) if four else (1000, 756.757, 521.739)
    assert request.denoising_schedule.timesteps == pytest.approx(timesteps, abs=1e-3)
    assert request.num_inference_steps == len(timesteps)
    assert (request.flow_shift, request.solver) == ((5.0, "euler") if four else (8.0, "renoise"))
    assert not request.do_classifier_free_guidance and request.guidance_scale == 1
    assert request.boundary_ratio == spec.boundary_ratio
    if spec.boundary_ratio is not None:  # two steps for each expert
        assert [t >= 1000 * spec.boundary_ratio for t in timesteps] == [True, True, False, False]
    assert (request.width, request.height) == spec.sizes[0] and request.fps == spec.fps


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("model", SPECS)
def test_a_preset_of_another_model_is_refused(name: str, model: str) -> None:
    if (name, model) in FITS:
        return
    with pytest.raises(RequestError) as error:
        with_preset(model, name)
    got, needs, fix, code = text_of(error)
    assert (got, code) == (f"preset {name} with {model}", "E-REQ-03")
    assert all(m in needs for m in PRESETS[name].models)
    flags = shlex.split(fix.partition(" instead of ")[0])
    positional, fields = parse_replay(shlex.join(["ascendit", "generate", *flags]))
    own = resolve(defaults_of(model), "a", **pictures(model), **fields)
    assert {k: getattr(own, k) for k in fields} == {
        k: v for k, v in PRESETS[name].fields.items() if k in fields
    }
    assert own.denoising_schedule == with_preset(*reversed(FITS[0])).denoising_schedule or "renoise" in fix


def test_an_unknown_preset_and_one_without_a_row_are_refused() -> None:
    with pytest.raises(UsageError) as error:
        with_preset("Wan2.2-T2V-A14B", "turbo")
    assert error.value.needs == "one of lightning, lightx2v, fastwan, causvid"
    assert (error.value.fix, error.value.code) == ('preset="lightning"', "E-USE-01")
    for other in ("", 5, ["lightning"]):
        with pytest.raises(UsageError, match="preset "):
            with_preset("Wan2.2-T2V-A14B", other)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="preset lightning with mine"):
        resolve(defaults_of("Wan2.1-T2V-14B", spec=None, model="mine"), "a", preset="lightning")


def test_fields_override_a_preset() -> None:
    make, t2v = with_preset, "Wan2.2-T2V-A14B"
    eight = make(t2v, "lightning", num_inference_steps=8)
    assert (eight.timesteps, eight.flow_shift, eight.solver) == (None, 5.0, "euler")
    assert eight.denoising_schedule.timesteps[:3] == pytest.approx((1000, 972.222, 937.5), abs=1e-3)
    two = make(t2v, "lightning", timesteps=(1000, 500))
    assert (two.num_inference_steps, two.flow_shift) == (2, 5.0)
    assert make(t2v, "lightning", flow_shift=7.0, solver="unipc").solver == "unipc"
    guided = make(t2v, "lightning", guidance_scale=3)
    assert (guided.guidance_scale, guided.guidance_scale_2) == (3, 3)
    assert make(t2v, "lightning", guidance_scale_2=2).guidance_scale == 1
    assert resolve(CASCADE, "a", preset=None, seed=1) == resolve(CASCADE, "a", seed=1)
    with pytest.raises(RequestError, match="4 timesteps and 5 steps"):
        make(t2v, "lightning", timesteps=(1000, 750, 500, 250), num_inference_steps=5)


# ---- replay --------------------------------------------------------------------------------------

some_text = st.text(max_size=30).filter(lambda text: not UNSAFE.search(text))  # test_report.py tests those


@st.composite
def requests(draw: st.DrawFn) -> tuple[Defaults, GenerateRequest]:
    """A model and a valid request for it."""
    defaults = draw(st.sampled_from([CASCADE, SINGLE, TI2V, I2V]))
    m = defaults.size_multiple
    fields: dict[str, Any] = {
        "negative_prompt": draw(some_text),
        "width": m * draw(st.integers(1, 100)),
        "height": m * draw(st.integers(1, 100)),
        "num_frames": 4 * draw(st.integers(0, 50)) + 1,
        "fps": draw(st.integers(1, 240) | st.sampled_from([23.976, "29.97", "24000/1001", 12.5])),
        "guidance_scale": draw(st.floats(0, 1e6) | st.integers(0, 20)),
        "flow_shift": draw(st.floats(0.01, 100)),
        "solver": draw(st.sampled_from(SOLVERS)),
        "schedule": draw(st.sampled_from(["diffusers", "official"])),
        "seed": draw(st.integers(0, MAX_SEED)),
        "max_sequence_length": draw(st.integers(1, 512)),
    }
    steps = st.lists(st.integers(1, 4000).map(lambda n: n / 4), min_size=1, max_size=6, unique=True)
    if draw(st.booleans()):
        fields["timesteps"] = sorted(draw(steps), reverse=True)
    else:
        fields["num_inference_steps"] = draw(st.integers(1, 1000))
    if defaults.num_experts == 2:
        fields["guidance_scale_2"] = draw(st.none() | st.floats(0, 1e6))
        fields["boundary_ratio"] = draw(st.floats(0.001, 0.999))
    if defaults.task != "t2v":
        fields["image"] = draw(st.sampled_from(["x.png", "my pictures/a b's.jpg"]))
        fields["fit"] = draw(st.sampled_from(["crop", "pad", "stretch"]))
    if defaults.last_frame == "optional" and fields["num_frames"] > 1:
        fields["last_image"] = draw(st.none() | st.just("my pictures/z.png"))
    return defaults, resolve(defaults, draw(some_text), **fields)


@given(requests())
def test_json_round_trip(case: tuple[Defaults, GenerateRequest]) -> None:
    request = case[1]
    text = request.to_json()
    assert GenerateRequest.from_json(text) == request
    assert set(json.loads(text)) == FIELDS
    assert GenerateRequest.from_json(text).to_json() == text


def parse_replay(line: str) -> tuple[list[str], dict[str, Any]]:
    """Read a replay line the way bash and a command-line parser do: positional arguments, fields."""
    args = shell.split(line)
    assert args[:2] == ["ascendit", "generate"]
    remaining = args[2:]
    positional: list[str] = []
    fields: dict[str, Any] = {}
    flags: dict[str, Any] = {
        "--seed": ("seed", int),
        "--frames": ("num_frames", int),
        "--fps": ("fps", str),
        "--steps": ("num_inference_steps", int),
        "--shift": ("flow_shift", float),
        "--negative": ("negative_prompt", str),
        "--image": ("image", str),
        "--last-image": ("last_image", str),
        "--fit": ("fit", str),
        "-o": ("output", str),
    }
    typed = {"boundary_ratio": float, "max_sequence_length": int, "solver": str, "schedule": str}
    while remaining:
        word = remaining.pop(0)
        if word == "--":
            positional, remaining = positional + remaining, []
        elif word == "--demo":
            fields["demo"] = True
        elif not word.startswith("-"):
            positional.append(word)
        elif word in flags:
            name, type_ = flags[word]
            fields[name] = type_(remaining.pop(0))
        elif word == "--size":
            fields["width"], fields["height"] = map(int, remaining.pop(0).split("x"))
        elif word == "--timesteps":
            fields["timesteps"] = [float(t) for t in remaining.pop(0).split(",")]
        elif word == "--guidance":
            scales = [float(g) for g in remaining.pop(0).split(",")]
            fields |= dict(zip(("guidance_scale", "guidance_scale_2"), scales, strict=False))
        elif word == "--set":
            name, value = remaining.pop(0).split("=", 1)
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
    request = resolve(CASCADE, "a cat's hat", seed=7, width=832, height=480, negative_prompt="blurry")
    assert request.replay_line("demo") == (
        "ascendit generate --demo 'a cat'\"'\"'s hat' --seed 7 --size 832x480 --frames 81 --fps 16 "
        "--steps 40 --guidance 4,3 --shift 12 --negative blurry --set boundary_ratio=0.875 --set solver=unipc"
    )
    fields: dict[str, Any] = {"timesteps": [1000, 750.5], "guidance_scale": 1, "negative_prompt": ""}
    few = resolve(SINGLE, "-v is a flag", seed=7, **fields)
    assert few.replay_line("models/wan", "a.mp4") == (
        "ascendit generate --seed 7 --size 1280x720 --frames 81 --fps 16 --timesteps 1000,750.5 "
        "--guidance 1 --shift 5 --negative '' --set solver=unipc -o a.mp4 -- models/wan '-v is a flag'"
    )


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("{", "request is not JSON: "),
        ("[1]", "request has unknown fields: list"),
        ("null", "request has unknown fields: NoneType"),
        ('{"steps": 4, "size": 1}', "request has unknown fields: ['size', 'steps']"),
        ('{"prompt": "a"}', "request is incomplete or of a wrong type: "),
        ('{"timesteps": ["x"]}', "timesteps is ['x']"),
    ],
)
def test_from_json_refuses_invalid_json(text: str, got: str) -> None:
    with pytest.raises(UsageError) as error:
        GenerateRequest.from_json(text)
    assert error.value.got.startswith(got)
    assert error.value.code in ("E-USE-01", "E-REQ-03")


@given(st.sampled_from(sorted(FIELDS - {"image", "last_image", "prompt"})), st.sampled_from([[], {}, "x\ny"]))
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


def test_timesteps_may_be_an_iterator() -> None:
    request = resolve(SINGLE, "a", timesteps=map(float, ["1000", "750", "500"]))
    assert request.timesteps == (1000, 750, 500) and request.num_inference_steps == 3


def test_direct_construction_raises_the_same_errors() -> None:
    fields = json.loads(resolve(CASCADE, "a", seed=1).to_json())
    with pytest.raises(RequestError, match="fps is 0"):
        GenerateRequest(**fields | {"fps": 0})
    with pytest.raises(UsageError, match=r"request has unknown fields: \['size'\]"):
        GenerateRequest(**fields | {"size": 4})
    with pytest.raises(UsageError, match="seed missing"):
        GenerateRequest(**{k: v for k, v in fields.items() if k != "seed"})
