"""The names of other tools: each hint names an option that exists, with a value that it accepts."""

from __future__ import annotations

from typing import Any, get_args

import fix_lines
import pytest

import ascendit
from ascendit import foreign
from ascendit.cli.generate_options import FLAG_ONLY, KEYS, SWITCHES, parse_settings, typed_layer
from ascendit.cli.main import COMMANDS, COMPLETED, completion, values_of
from ascendit.errors import UsageError
from ascendit.option_text import command_line, option, python_text
from ascendit.pipeline.fit import Fit
from ascendit.pipeline.job import prepare_model
from ascendit.pipeline.options import LoadOptions
from ascendit.pipeline.request import GenerateRequest, check_names
from ascendit.quant.schemes import SCHEMES

# Other name and value -> the setting of ascendit; written from the documentation of each tool.
SETTINGS = """
steps=8 num_inference_steps=8 | sample_steps=8 num_inference_steps=8
infer_steps=8 num_inference_steps=8 | frame_num=17 num_frames=17 | video_length=17 num_frames=17
target_video_length=17 num_frames=17 | shift=3 flow_shift=3 | sample_shift=3 flow_shift=3
time_shift=3 flow_shift=3 | cfg=4 guidance_scale=4 | cfg_scale=4 guidance_scale=4
guide_scale=4 guidance_scale=4 | sample_guide_scale=4 guidance_scale=4 | sampler_name=uni_pc solver=unipc
sampler=euler solver=euler | scheduler=UniPCMultistepScheduler solver=unipc
sample_solver=dpm++ solver=dpm++ | scheduler=FlowMatchEulerDiscreteScheduler solver=euler
sampler_name=dpmpp_2m solver=dpm++ | n_prompt=blur negative_prompt=blur
neg_prompt=blur negative_prompt=blur | base_seed=3 seed=3 | noise_seed=3 seed=3 | manual_seed=3 seed=3
boundary=0.9 boundary_ratio=0.9 | frame_rate=8 fps=8 | framerate=8 fps=8
max_seq_len=128 max_sequence_length=128 | image_path=a.png image=a.png
input_reference=a.png image=a.png | last_frame=a.png last_image=a.png | end_image=a.png last_image=a.png
torch_dtype=torch.bfloat16 dtype=bfloat16 | torch_dtype=bf16 dtype=bfloat16
dit_precision=fp16 dtype=float16 | weight_dtype=fp32 dtype=float32 | precision=half dtype=float16
vae_precision=bf16 vae_dtype=bfloat16 | device_map=cuda device=cuda | torch_device=npu device=npu
quantization=fp8 scheme=fp8 | quant_type=w8a8 scheme=int8 | quant_type=W8A8_MXFP8 scheme=mxfp8
quant_type=W4A4_MXFP4 scheme=mxfp4 | quant_type=w8a8f8 scheme=mxfp8 | quant_type=w4a4f4 scheme=mxfp4
quant_type=w8a8_dynamic scheme=int8 | dit_quant_scheme=int8-vllm scheme=int8
quant_type=W4A4_MXFP4_DUALSCALE scheme=mxfp4_dualscale | disable_names=a.* keep=a.*
attention_backend=fusion attention=fusion | resize_mode=letterbox fit=pad | t5_cpu=True text_on=cpu
text_encoder_cpu_offload=true text_on=cpu | model_path=demo model=demo | ckpt_dir=demo model=demo
positive_prompt=cat prompt=cat
vae_path=v.pth parts=vae=v.pth | text_encoder=u.gguf parts=text_encoder=u.gguf
high_noise_model=h parts=transformer=h | low_noise_model=l parts=transformer_2=l
clip_path=c parts=c | lora_scale=0.5 loras=FILE:0.5 | lora_multiplier=0.5 loras=FILE:0.5
"""
PAIRS = [tuple(pair.split()) for line in SETTINGS.strip().splitlines() for pair in line.split(" | ")]
MEANINGLESS = """
task offload_model convert_model_dtype ulysses_size ring_size dit_fsdp t5_fsdp use_prompt_extend num_gpus
sp_degree tp_size cfg_parallel_size output_type return_dict tokenizer generator
denoise clip_skip prompt_embeds sigmas enable_teacache cache_dit vae_tiling trust_remote_code cache_dir
revision token safety_checker enforce_eager use_safetensors lowvram group_size local_files_only
model_type host dit_cpu_offload vae_cpu_offload
""".split()


def fix_of(error: UsageError) -> str:
    """The fix as the command line shows it."""
    with command_line():
        return error.fix


@pytest.mark.parametrize(("other", "setting"), PAIRS, ids=[pair[0] for pair in PAIRS])
def test_a_key_of_set_is_translated_with_its_value(other: str, setting: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_settings([other])
    key, _, value = setting.partition("=")
    fix = fix_of(error.value).partition(" instead of")[0]
    assert fix in (f"--set {setting}", option(key, value))
    assert list(fix_lines.problems(fix)) == []
    layer = parse_settings([setting])
    assert [*layer] == [key]
    if key in LoadOptions.model_fields and key != "model":
        LoadOptions(model="demo", **layer)


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ("num_videos_per_prompt=4", "--num-videos 4 instead of num_videos_per_prompt"),
        ("batch_size=4", "--num-videos 4 instead of batch_size"),
        ("prompt_file=a b.txt", "--prompts 'a b.txt' instead of prompt_file"),
        ("num_videos=3", "--num-videos 3 instead of num_videos"),
        ("sheet=a.png", "--sheet a.png instead of sheet"),
        ("seed=1,2", "--seed 1,2"),
        ("seed=0-7", "--seed 0-7"),
        ("seeds=1,2", "--seed 1,2 instead of seeds"),
        ("size=64x64", "--size 64x64 instead of size"),
        ("guidance=4,3", "--guidance 4,3 instead of guidance"),
        ("output=a b.mp4", "-o 'a b.mp4' instead of output"),
        ("save_path=a.mp4", "-o a.mp4 instead of save_path"),
        ("overwrite=true", "--overwrite instead of overwrite"),
        ("overwrite=false", "omit overwrite"),
        ("t5_cpu=false", "omit t5_cpu"),
        ("video_quality=8", "omit video_quality: --crf 18 sets the quality of a file, and lower is better"),
        ("n_prompt=a b", "--set 'negative_prompt=a b' instead of n_prompt"),
        ("sampler=normal", "solver instead of sampler"),
        ("qwertz=1", "ascendit generate --help"),
    ],
)
def test_a_flag_that_is_no_key_is_named(setting: str, fix: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_settings([setting])
    assert fix_of(error.value) == fix
    assert list(fix_lines.problems(fix)) == []


@pytest.mark.parametrize(
    ("source", "fix"),
    [
        ("--config a.toml", 'guidance_scale = 3 instead of cfg, solver = "euler" instead of sampler'),
        ("line 1 of p.jsonl", '"guidance_scale": 3 instead of cfg, "solver": "euler" instead of sampler'),
        ("--set", "--set guidance_scale=3 instead of cfg, --set solver=euler instead of sampler"),
    ],
)
def test_each_unknown_key_gets_a_fix_as_its_source_writes_it(source: str, fix: str) -> None:
    with pytest.raises(UsageError) as error:
        typed_layer({"cfg": 3, "sampler": "euler"}, source=source)
    assert fix_of(error.value) == fix


def test_the_flags_that_are_no_keys_exist() -> None:
    options = {flag for param in fix_lines.command("generate").params for flag in param.opts}
    assert {*FLAG_ONLY.values(), *SWITCHES.values()} <= options
    assert not {*FLAG_ONLY, *SWITCHES} & {*KEYS}
    every = fix_lines.flags()
    assert {*foreign.FLAG_FOR.values()} <= {*every}
    names = {flag.removeprefix("--").replace("-", "_") for flag in every}
    known = {*foreign.KEYWORD_OF, *foreign.SETTINGS, *foreign.PATTERN_OF}
    assert not {*foreign.COMMAND_ADVICE} & (known | {*foreign.ADVICE_FOR}) and not {*foreign.FLAG_FOR} & names


@pytest.mark.parametrize("name", MEANINGLESS)
def test_a_name_without_a_counterpart_gets_advice(name: str) -> None:
    fix = foreign.hint(name, None, KEYS)
    assert fix and (fix.startswith(f"omit {name}") or "seed" in fix)
    assert list(fix_lines.problems(fix)) == []
    with pytest.raises(UsageError) as error:
        parse_settings([f"{name}=1"])
    assert fix_of(error.value) == fix


def test_the_tables_are_consistent() -> None:
    others = [name for names in foreign.RENAMED.values() for name in names.split()]
    others += [*foreign.SETTINGS, *{**foreign.ADVICE_FOR, **foreign.PATTERN_OF}]
    assert sorted(others) == sorted({*others}) and len(others) > 300
    assert not {*others} & {*KEYS} - {"scheduler"}
    assert all(name == foreign.normal(name) for name in others)
    flags = {flag.removeprefix("--").replace("-", "_") for flag in fix_lines.flags()}
    assert flags & {*foreign.SETTINGS, *foreign.ADVICE_FOR} == set(), "offered: not advice"
    assert {*foreign.NO_VALUE} <= {*others}
    assert all(command.split()[0] in COMMANDS for command in foreign.COMMANDS)
    assert not {*foreign.COMMAND_OF} & {*COMMANDS}


def test_values_are_those_of_the_options() -> None:
    for keyword, values in foreign.VALUES.items():
        for value in values:
            if keyword in KEYS:
                parse_settings([f"{keyword}={value}"])
        names = [name for others in values.values() for name in others.split()]
        assert len(names) == len({*names}) and all(name == name.lower() for name in names), keyword
    assert {*foreign.VALUES["scheme"]} == {*SCHEMES}
    for name, scheme in SCHEMES.items():
        for value in (scheme.manifest, scheme.manifest_alias):
            if value and name in ("int8", "mxfp8", "mxfp4", "mxfp4_dualscale"):
                assert foreign.value_for("scheme", value) == name


# ---- in Python ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "arguments", "fix"),
    [
        ("generate", {"num_videos_per_prompt": 2}, "omit num_videos_per_prompt: "),
        ("generate", {"generator": object()}, "seed=42 instead of a generator"),
        ("generate", {"output_type": "np"}, "omit output_type: "),
        ("generate", {"callback_on_step_end": print}, "on_progress=print"),
        ("generate", {"steps": 8}, "num_inference_steps=8"),
        ("generate", {"cfg": 4.5}, "guidance_scale=4.5"),
        ("generate", {"sampler_name": "dpmpp_2m"}, 'solver="dpm++"'),
        ("generate", {"scheme": "w8a8"}, 'ascendit.load(model, scheme="int8")'),
        ("generate", {"overwrite": True}, "video.save(path, overwrite=True)"),
        ("generate", {"crf": 20}, "video.save(path, crf=20)"),
        ("load", {"crf": 20}, "video.save(path, crf=20)"),
        ("generate", {"num_frame": 17}, "num_frames=17"),
        ("generate", {"nothing_like_it": 1}, "omit nothing_like_it"),
        ("load", {"torch_dtype": "bf16"}, 'dtype="bfloat16"'),
        ("load", {"device_map": "auto"}, 'device="cpu"'),
        ("load", {"cpu_offload": True}, "omit cpu_offload: "),
        ("load", {"quantization": "W8A8_MXFP8"}, 'scheme="mxfp8"'),
        ("load", {"num_inference_steps": 8}, "pipe.generate(prompt, num_inference_steps=8)"),
        ("load", {"trust_remote_code": True}, "omit trust_remote_code: "),
        ("load", {"vae_path": "v.pth"}, 'parts=["vae=v.pth"]'),
        ("load", {"lora_scale": 0.5}, 'loras=["FILE:0.5"]'),
        ("generate", {"vae": object()}, "ascendit.load(model, parts="),
        ("quantize", {"vae_path": "v.pth"}, "omit vae_path: "),
        ("load", {"shceme": "int8"}, 'scheme="int8"'),
        ("quantize", {"lora": "a"}, 'loras=["a"]'),
        ("quantize", {"for_": "sglang"}, 'engine="sglang"'),
        ("quantize", {"quant_type": "w8a8f8"}, 'scheme="mxfp8"'),
        ("quantize", {"disable_names": "a.*"}, 'keep=["a.*"]'),
        ("repack", {"target": "vllm"}, 'engine="vllm-omni"'),
        ("repack", {"dryrun": True}, "dry_run=True"),
        ("inspect", {"chek": True}, "check=True"),
        ("quantize_", {"exclude": "a.*"}, 'keep=["a.*"]'),
        ("save", {"overwite": True}, "overwrite=True"),
        ("save", {"exist_ok": True}, "overwrite=True"),
    ],
)
def test_a_wrong_keyword_is_a_usage_error_with_a_hint(call: str, arguments: dict[str, Any], fix: str) -> None:
    functions: dict[str, Any] = {
        "generate": lambda **kwargs: check_names(kwargs),
        "load": lambda **kwargs: ascendit.load("demo", **kwargs),
        "quantize": lambda **kwargs: ascendit.quantize("demo", "out", **kwargs),
        "repack": lambda **kwargs: ascendit.repack("demo", "out", **kwargs),
        "inspect": lambda **kwargs: ascendit.inspect("demo", **kwargs),
        "quantize_": lambda **kwargs: ascendit.quantize_(None, "int8", **kwargs),  # type: ignore[arg-type]
        "save": lambda **kwargs: ascendit.Video.save(None, "a.mp4", **kwargs),  # type: ignore[arg-type]
    }
    with pytest.raises(UsageError, match="unknown argument") as error:
        functions[call](**arguments)
    assert error.value.code == "E-USE-01" and error.value.fix.startswith(fix), error.value.fix
    assert python_text(error.value.fix) == error.value.fix and "--" not in error.value.fix


def test_a_value_of_another_tool_is_translated_in_python() -> None:
    for name, value, fix in (("scheme", "W8A8", 'scheme="int8"'), ("dtype", "bf16", 'dtype="bfloat16"')):
        with pytest.raises(UsageError) as error:
            prepare_model(LoadOptions.model_validate({"model": "demo", name: value}))
        assert error.value.fix == fix
    with pytest.raises(UsageError) as error:
        GenerateRequest(**{**_request(), "seed": -1})
    assert error.value.fix == "omit seed for a random one"


def _request() -> dict[str, Any]:
    request = {"prompt": "a", "width": 16, "height": 16, "num_frames": 1, "fps": 8, "seed": 1}
    return request | {"num_inference_steps": 1, "guidance_scale": 1.0, "flow_shift": 1.0}


# ---- completion ---------------------------------------------------------------------------------


def test_completed_values_are_accepted() -> None:
    for flag in ("--scheme", "--preset", "--solver", "--fit", "--emulate", "--text-on", "--defaults"):
        for value in values_of(flag):
            assert list(fix_lines.value_problems(flag, value)) == []
    assert values_of("--device") == ["cpu", "cuda", "npu", "twin:a2", "twin:a3", "twin:a5"]
    assert values_of("--fit") == [*get_args(Fit)] and values_of("--to") == ["diffusers", "wan"]
    assert values_of("--emulate") == ["decode-on-use", "decode-once"]
    assert all(values_of(flag) for flag in COMPLETED)
    complete = completion("--scheme")
    assert complete is not None and complete("mx") == ["mxfp8", "mxfp4", "mxfp4_dualscale"]
    assert completion("--negative") is None and "demo" in values_of("MODEL")
