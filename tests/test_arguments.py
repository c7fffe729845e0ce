"""Wrong calls of the Python interface: the hint is a call that works."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import ascendit
from ascendit.arguments import CALLS, EXAMPLES, KEYWORDS_OF, NAMES, POSITIONAL, unknown_arguments
from ascendit.errors import RequestError, UsageError
from ascendit.pipeline.generate import Pipeline
from ascendit.pipeline.options import LoadOptions
from ascendit.pipeline.request import GenerateRequest
from ascendit.pipeline.sheet import contact_sheet
from ascendit.pipeline.video import Video

PIPE: Any = object.__new__(Pipeline)
VIDEO: Any = Video(frames=np.zeros((1, 16, 16, 3), np.uint8), fps=8)
REQUEST: dict[str, Any] = {"prompt": "a", "width": 16, "height": 16, "num_frames": 1, "fps": 8, "seed": 1}
REQUEST |= {"num_inference_steps": 1, "guidance_scale": 1.0, "flow_shift": 1.0}
options: Any = LoadOptions
FUNCTIONS: dict[str, Any] = {
    "load": ascendit.load,
    "generate": Pipeline.generate,
    "save": Video.save,
    "quantize": ascendit.quantize,
    "repack": ascendit.repack,
    "contact_sheet": contact_sheet,
}


class UniPCMultistepScheduler:
    """A scheduler of another library."""


def test_the_tables_name_the_keywords_of_the_functions() -> None:
    for name, keywords in KEYWORDS_OF.items():
        parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
        names = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        if name == "generate":
            names |= {*GenerateRequest.model_fields, "preset"} - {"prompt"}
        if name == "load":
            names |= {*LoadOptions.model_fields} - {"model"}
        assert {*keywords.split()} == names - {"self", "path", "src", "dst"}, name
    assert {*CALLS} == {*KEYWORDS_OF} and {*EXAMPLES} == {*POSITIONAL} > {*CALLS}
    assert not {*NAMES} & {key for keys in KEYWORDS_OF.values() for key in keys.split()}


@pytest.mark.parametrize(
    ("function", "arguments", "fix"),
    [
        ("quantize", {"lora": "a"}, 'loras=["a"]'),
        ("quantize", {"lora": ["a b", "c"]}, 'loras=["a b", "c"]'),
        ("quantize", {"exclude": "x"}, 'keep=["x"]'),
        ("quantize", {"ignore": ("x", "y")}, 'keep=["x", "y"]'),
        ("repack", {"base_model": "demo"}, 'base="demo"'),
        ("load", {"torch_dtype": torch.bfloat16}, 'dtype="bfloat16"'),
        ("load", {"torch_dtype": "auto"}, "omit torch_dtype"),
        ("load", {"attn_implementation": "flash_attention_2"}, 'attention="flash"'),
        ("load", {"attn_implementation": "eager"}, 'attention="reference"'),
        ("generate", {"attention": "self=fp8"}, 'ascendit.load(model, attention="self=fp8")'),
        ("generate", {"attention_backend": "int8"}, 'ascendit.load(model, attention="int8")'),
        ("load", {"use_sage_attention": True}, 'attention="qk_int8"'),
        ("load", {"kv_cache_dtype": "fp8"}, 'attention="self=fp8"'),
        ("load", {"scheduler": UniPCMultistepScheduler()}, 'pipe.generate(prompt, solver="unipc")'),
        ("load", {"for": "vllm"}, 'ascendit.quantize(src, dst, engine="vllm-omni")'),
        ("load", {"transformer": "a.safetensors"}, 'parts=["transformer=a.safetensors"]'),
        ("load", {"prompt": "a cat"}, 'pipe.generate("a cat")'),
        ("load", {"size": "64x32"}, "pipe.generate(prompt, width=64, height=32)"),
        ("generate", {"size": "832*480"}, "width=832, height=480"),
        ("generate", {"resolution": "720p"}, "width=1280, height=720"),
        ("generate", {"duration": 2.5}, "num_frames=41: 2.5 s at 16 fps"),
        ("generate", {"output": "a.mp4"}, 'video.save("a.mp4")'),
        ("generate", {"save_path": "videos"}, 'video.save("videos/out.mp4")'),
        ("generate", {"sheet": "s.png"}, 'omit sheet: ascendit.contact_sheet([video]).save("s.png")'),
        ("generate", {"seeds": [1, 2]}, "omit seeds: [pipe.generate(prompt, seed=seed) for seed in [1, 2]] "),
        (
            "generate",
            {"num_videos": 4},
            "omit num_videos: [pipe.generate(prompt, seed=seed) for seed in range(4)] ",
        ),
        ("generate", {"image_path": object()}, "image instead of image_path"),
        ("generate", {"weight": 1}, "omit weight"),
        ("generate", {"sede": 1}, "seed=1"),
        ("save", {"fps": 24}, "pipe.generate(prompt, fps=24)"),
        ("save", {"quality": 5}, "crf=18"),
        ("quantize", {"seed": 1}, "pipe.generate(prompt, seed=1)"),
        ("quantize", {"output": "o"}, 'ascendit.quantize(src, "o")'),
        ("quantize", {"device": "npu"}, 'ascendit.load(model, device="npu")'),
        ("quantize", {"calib_data": "p.txt"}, 'calibrate=Calibrator("p.txt"), '),
    ],
)
def test_a_wrong_keyword(function: str, arguments: dict[str, Any], fix: str) -> None:
    error = unknown_arguments(function, arguments, KEYWORDS_OF[function].split())
    assert error.code == "E-USE-01"
    assert error.fix == fix or (fix.endswith(" ") and error.fix.startswith(fix)), error.fix


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda: FUNCTIONS["load"](), 'ascendit.load("demo")'),
        (lambda: FUNCTIONS["load"](ckpt_dir="m"), 'ascendit.load("m")'),
        (lambda: FUNCTIONS["load"]("demo", "cuda"), 'device="cuda"'),
        (lambda: FUNCTIONS["load"]("demo", "mxfp8"), 'scheme="mxfp8"'),
        (lambda: FUNCTIONS["load"]("demo", model="m"), 'omit model="m"'),
        (lambda: PIPE.generate(), EXAMPLES["generate"]),
        (lambda: PIPE.generate("a", "blur"), 'negative_prompt="blur"'),
        (lambda: PIPE.generate(text="a"), 'pipe.generate("a")'),
        (lambda: FUNCTIONS["quantize"](PIPE, "o", scheme="int8"), EXAMPLES["quantize"]),
        (lambda: FUNCTIONS["quantize"]("demo", 5, scheme="int8"), EXAMPLES["quantize"]),
        (lambda: FUNCTIONS["quantize"]("demo", "o", scheme="int8", keep="a.*"), 'keep=["a.*"]'),
        (lambda: FUNCTIONS["quantize"]("demo", "o", scheme="int8", keep=5), 'keep=["blocks.0.*"]'),
        (lambda: FUNCTIONS["quantize"]("demo", "o", 8), EXAMPLES["quantize"]),
        (lambda: FUNCTIONS["repack"](PIPE, "o"), EXAMPLES["repack"]),
        (lambda: FUNCTIONS["load"]("demo", ["cpu"]), EXAMPLES["load"]),
        (lambda: FUNCTIONS["contact_sheet"](), EXAMPLES["contact_sheet"]),
        (lambda: PIPE.generate("a", 17), "num_inference_steps=17"),
        (lambda: FUNCTIONS["contact_sheet"](["a.mp4"]), "contact_sheet([video], columns=6)"),
        (lambda: options(model=5), 'model="demo"'),
        (lambda: options(model="demo", parts={"vae": "v.pth"}), 'parts=["vae=v.pth"]'),
        (lambda: options(model="demo", parts=[5]), 'parts=["vae=FILE"]'),
        (lambda: options(model="demo", loras=[("a.pth", 0.5)]), 'loras=["a.pth:0.5"]'),
        (lambda: options(model="demo", loras={"a": 0.5, "b": 1}), 'loras=["a:0.5", "b:1"]'),
        (lambda: options(model="demo", device=0), 'device="cuda"'),
        (lambda: PIPE("a"), 'pipe.generate("a")'),
        (lambda: VIDEO.save(), 'video.save("out.mp4")'),
        (lambda: VIDEO.save(None), 'video.save("out.mp4")'),
        (lambda: VIDEO.save("a.mp4", 24), "pipe.generate(prompt, fps=24)"),
        (lambda: FUNCTIONS["quantize"]("demo", "o", "int8"), 'scheme="int8"'),
        (lambda: FUNCTIONS["quantize"]("demo"), EXAMPLES["quantize"]),
    ],
)
def test_a_call_that_python_would_refuse(call: Any, fix: str) -> None:
    with pytest.raises(UsageError) as error:
        call()
    assert error.value.code == "E-USE-01" and error.value.fix == fix


@pytest.mark.parametrize(
    ("owner", "name", "fix"),
    [
        (PIPE, "to", 'ascendit.load(model, device="cuda") or device="npu"'),
        (PIPE, "enable_model_cpu_offload", "omit enable_model_cpu_offload: weights stay on the device; "),
        (PIPE, "enable_group_offload", "omit enable_group_offload: weights stay on the device; "),
        (PIPE, "load_lora_weights", 'ascendit.load(model, loras=["FILE"])'),
        (PIPE, "save", 'video.save("out.mp4")'),
        (PIPE, "config", "pipe.defaults"),
        (VIDEO, "write", 'video.save("out.mp4")'),
        (VIDEO, "images", "video.frames"),
        (PIPE, "genrate", "generate instead of genrate"),
        (ascendit, "from_pretrained", "ascendit.load(model)"),
        (ascendit, "WanPipeline", "ascendit.load(model)"),
        (ascendit, "generate", "ascendit.load(model).generate(prompt)"),
        (ascendit, "laod", "load instead of laod"),
    ],
)
def test_an_attribute_of_another_tool(owner: Any, name: str, fix: str) -> None:
    assert not hasattr(owner, name)
    with pytest.raises(UsageError) as error:
        getattr(owner, name)
    assert error.value.fix == fix or (fix.endswith(" ") and error.value.fix.startswith(fix))


def test_an_empty_name_of_a_model_is_no_folder() -> None:
    with pytest.raises(UsageError, match="an empty name of a model"):
        FUNCTIONS["load"]("")


def test_a_part_that_nothing_reads_is_not_set() -> None:
    """As `pipe.scheduler = ...` of Diffusers: no run would use it."""
    with pytest.raises(UsageError) as error:
        PIPE.scheduler = object()
    assert error.value.fix == 'pipe.generate(prompt, solver="unipc")'


@pytest.mark.parametrize(
    ("fields", "fix"),
    [
        ({"num_frames": "17"}, "num_frames=17"),
        ({"num_frames": 17.0}, "num_frames=17"),
        ({"num_frames": [17]}, "num_frames=17"),
        ({"num_frames": "many"}, "omit num_frames for the model's default"),
        ({"guidance_scale": "3.5"}, "guidance_scale=3.5"),
        ({"guidance_scale": [4, 3]}, "guidance_scale=4, guidance_scale_2=3"),
        ({"solver": "eulr"}, 'solver="euler"'),
        ({"seed": "3"}, "seed=3"),
        ({"seed": float("nan")}, "omit seed for a random one"),
        ({"seed": [1, 2]}, "[pipe.generate(prompt, seed=seed) for seed in [1, 2]]"),
        ({"negative_prompt": ["blur"]}, 'negative_prompt="blur"'),
        (
            {"prompt": ["a", "b"]},
            "[pipe.generate(prompt) for prompt in prompts] makes one video for each prompt",
        ),
    ],
)
def test_a_value_of_another_type(fields: dict[str, Any], fix: str) -> None:
    with pytest.raises(RequestError) as error:
        GenerateRequest(**REQUEST | fields)
    assert error.value.fix == fix


def test_other_attributes_are_refused_as_python_does() -> None:
    for name in ("nothing_like_it", "__deepcopy__"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'") as error:
            getattr(PIPE, name)
        assert not isinstance(error.value, UsageError)
    assert isinstance(pickle.loads(pickle.dumps(PIPE)), Pipeline)
