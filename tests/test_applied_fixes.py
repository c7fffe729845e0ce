"""The `try` line of an error, applied to the call as it says, removes the error."""

from __future__ import annotations

import ast
import os
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ascendit
from ascendit.checkpoint.hub import DEMO as DEMO_FOLDER
from ascendit.cli import main as cli
from ascendit.errors import AscenditError, EnvironmentProblem
from ascendit.option_text import command_line
from ascendit.pipeline.job import prepare
from ascendit.pipeline.options import LoadOptions

DEMO = ("generate", "--demo", "a red circle", "--dry-run")
CASES = """
generate --scheme w8a8
generate --scheme MXFP8
generate --scheme mxpf4
generate --scheme W4A4_MXFP4
generate --size 480p
generate --size 65x64
generate --frames 16
generate --seconds 0
generate --guidance x
generate --guidance 1,2,3
generate --guidance -1
generate --seed -1
generate --steps 0
generate --steps 5000
generate --solver eulr
generate --solver uni_pc
generate --set solver=dpm
generate --set steps=3
generate --set cfg=3
generate --set torch_dtype=bf16
generate --set dtype=bf16
generate --set dtype=int8
generate --set vae_dtype=fp16
generate --set vae_dtype=bf16
generate --set boundary_ratio=2
generate --set boundary_ratio=x
generate --set guidance_scale_2=x
generate --set schedule=oficial
generate --set ops=fast
generate --set attention=flash
generate --attention laser
generate --attention self=laser --device twin:a2
generate --attention self=laser,cross=sdpa --device twin:a5
generate --attention fp8 --device twin:a2
generate --attention self=sdpaa
generate --attention both=sdpa
generate --attention cpu --set dtype=float32
generate --attention self=sdpa --set ops=reference
generate --sub-head 2
generate --sub-head x
generate --set attention_probabilities=one --set ops=reference
generate --set attention_probabilities=three
generate --set nz=perhaps
generate --set width=x
generate --set num_frames=x
generate --set sampler
generate --set nosuch=3
generate --set activation_rule=x
generate --set keep=nosuch --scheme mxfp8
generate --set keep=blocks.0.*
generate --set max_sequence_length=9000
generate --preset lightnin
generate --preset lightning
generate --device gpu
generate --device cuda:99
generate --device npu:0
generate --device twin:a9
generate --device twin:a2 --scheme mxfp8
generate --emulate yes
generate --text-on gpu
generate --defaults mine
generate --max-memory much
generate --step-policy 0:w4a4
generate --step-policy garbage
generate --step-policy 0:attention=garbage
generate --step-policy 0:attention=laser --device twin:a3
generate --step-policy 0:w4a4 --scheme int8
generate --step-policy 99:w4a4 --scheme mxfp4
generate --image IMAGE
generate --last-image IMAGE
generate --fit pad
generate --timesteps x
generate --timesteps 1000,500 --steps 4
generate --timesteps 500,1000
generate --fps 0
generate --shift 0
generate --recipe nosuch
generate --recipe recommended-fp5
generate --scheme int8 --recipe ascend-w8a8f8
generate --frames 17 --seconds 2
generate -o out.xyz
generate -o EXISTING.mp4
generate -o out.gif --fps 60
generate --num_inference_steps 8
generate --width 64 --height 64
generate --dtype bf16 --cfg 5
generate --task t2v-A14B --offload_model True
generate --stepz 3
generate --steps x
quantize demo -o DST
quantize demo -o DST --scheme w8a8
quantize demo -o DST --scheme W8A8_MXFP8
quantize demo -o DST --scheme mxfp88
quantize demo -o DST --recipe nosuch
quantize demo -o DST --recipe ascend-w8a8
quantize demo -o DST --scheme mxfp8 --scale-rule bad
quantize demo -o DST --scheme mxfp8 --keep nosuch.*
quantize demo -o DST --scheme mxfp8 --keep blocks.0.atn1.*
quantize demo -o DST --scheme mxfp8 --for tensorrt
quantize demo -o DST --scheme int8_block --for sglang
quantize demo -o DST --scheme mxfp8 --alpha 0.5
quantize demo -o DST --scheme mxfp8 --device cuda
quantize demo -o DST --scheme mxfp8 --calibrate 2 --alpha 3
quantize demo -o DST --scheme mxfp8 --calibrate 0
quantize demo -o DST --scheme mxfp8 --calibrate 2 --set metadata=false
quantize demo -o DST --quant_type w8a8
quantize demo --scheme mxfp8
repack demo -o DST --to comfy
repack demo -o DST --to wan --for sglang
repack demo -o DST --for nosuch
inspect demo --values
inspect demo --layers --diff demo
run demo hello
info demo
""".strip().splitlines()
FILES = """
generate --lora LORA.safetensors:strong
generate --lora LORA.safetensors --lora-skip text
generate --lora_path LORA.safetensors --lora_scale 0.5
generate --part vae=HIGH.safetensors
generate --part wan.safetensors
generate --part TRAIN_high.safetensors
generate --vae_path VAE.safetensors
generate --prompts PROMPTS.txt
generate --seed 1,2 --num-videos 2
generate --set batch_size=4
repack vae=HIGH.safetensors -o DST --base demo
repack wan.safetensors LOW.safetensors -o DST --base demo
repack TRAIN_high.safetensors -o DST --base demo
quantize demo -o DST --scheme mxfp8 --lora LORA.safetensors:x
quantize demo -o DST --lora LORA.safetensors
""".strip().splitlines()
"""Calls with the files of the fixture `weights`."""
QUICK = [*CASES[::9], *FILES]
"""These run in every test run; the others, which are as fast but many, with the slow tests."""
PROSE = ("correct the", "copy ", "download", "check ", "convert it", "pip install")
"""Fixes that are work outside a command line."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the components of the demo model as single files, a LoRA and a training checkpoint."""
    folder = tmp_path_factory.mktemp("weights")
    components = {"HIGH": "transformer", "LOW": "transformer_2", "wan": "transformer", "VAE": "vae"}
    for name, component in components.items():
        file = DEMO_FOLDER / component / "diffusion_pytorch_model.safetensors"
        (folder / f"{name}.safetensors").symlink_to(file)
    tensors = load_file(folder / "HIGH.safetensors")
    saved = {f"model.{name}": tensor for name, tensor in tensors.items()} | {"optimizer.step": torch.ones(1)}
    save_file(saved, folder / "TRAIN_high.safetensors")
    rows, columns = tensors["blocks.0.attn1.to_q.weight"].shape
    lora = {"lora_A.weight": torch.ones(2, columns), "lora_B.weight": torch.ones(rows, 2)}
    save_file({f"blocks.0.attn1.to_q.{k}": x for k, x in lora.items()}, folder / "LORA.safetensors")
    (folder / "PROMPTS.txt").write_text("a red circle")
    return folder


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> Callable[[list[str]], AscenditError | None]:
    """Run a command that writes nothing; return its error."""
    monkeypatch.chdir(tmp_path)
    for file in weights.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "EXISTING").mkdir()
    (tmp_path / "EXISTING" / "x").touch()
    (tmp_path / "EXISTING.mp4").touch()
    Image.new("RGB", (64, 64)).save(tmp_path / "IMAGE", "png")
    errors: list[BaseException] = []

    def report(error: BaseException, output: Any, args: Any = ()) -> int:
        error = cli._usage(error, args) if hasattr(error, "format_message") else error
        errors.append(error)
        return 1

    monkeypatch.setattr(cli, "report_error", report)

    def call(args: list[str]) -> AscenditError | None:
        errors.clear()
        cli.main(args)
        if not errors:
            return None
        assert isinstance(errors[0], AscenditError), errors
        return errors[0]

    return call


def texts(error: AscenditError, command: str) -> tuple[str, str]:
    with command_line(command):
        return error.got, error.fix


def applied(args: list[str], fix: str) -> list[str] | None:
    """The call with its fix; None for a fix that is not a change of the call."""
    if match := re.match(r"write one: python -c (.*)", fix):
        return with_new_file(args, shlex.split(match[1]))
    if match := re.match(r"pass it as (\w+=([^\s,]+))", fix):
        name = Path(match[2]).name
        return [match[1] if arg.rpartition("=")[2] == name else arg for arg in args]
    if fix.startswith("write FILE[:WEIGHT]"):
        return [re.sub(r"(\.safetensors):\w+$", r"\1", arg) for arg in args]
    fix = re.split(
        r";? correct|; |,? or (?=(?:--|-o|omit|add|ascendit|another|remove|use|exclude|an? ))", fix
    )[0]
    fix = re.sub(r",? (?:which|so that|where|with the).*", "", fix)
    if fix.startswith(PROSE):
        return None
    if match := re.search(r"(?:^|: )(ascendit .*)", fix):
        call = shlex.split(match[1].replace("MODEL", "demo"))[1:]
        return [*call, *({*args} & {"--dry-run"} - {*call})]
    words, call = re.findall(r"\"[^\"]*\"|\S+", fix), list(args)
    if match := re.search(r" instead of ([^\s,]+)", fix):
        drop(call, *((match[1], "") if match[1].startswith("--") else ("--set", match[1])))
        words = words[: words.index("instead")]
    omit = False
    for n, word in enumerate(words):
        omit = omit or word in ("omit", "without")
        omit = omit and word not in ("add", "use")
        following = words[n + 1] if n + 1 < len(words) else ""
        word = word.rstrip(";,:")
        if not re.match(r"--[a-z]|-o$", word):
            continue
        if omit:
            drop(call, word, following if word == "--set" else "")
        else:
            drop(call, word, following.partition("=")[0] if word == "--set" else "")
            value = following.rstrip(",:").strip('"').replace("OTHER", "demo").replace("DST", "out")
            call += [word] if not value or value.startswith("-") else [word, value]
    return call


def with_new_file(args: list[str], script: list[str]) -> list[str]:
    """Run `[code, *arguments]`, which writes a file, and replace the training checkpoint by it."""
    before = {*os.listdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["-c", *script[1:]])
        exec(script[0], {})
    (new,) = {*os.listdir()} - before
    return [new if arg.startswith("TRAIN") else arg for arg in args]


def drop(args: list[str], flag: str, key: str = "") -> None:
    while flag in args:
        n = next((i for i, arg in enumerate(args) if arg == flag and args[i + 1].startswith(key)), None)
        if n is None:
            return
        has_value = n + 1 < len(args) and not re.match(r"--?[a-z]", args[n + 1])
        del args[n : n + 2 if has_value else n + 1]
        if key:
            return


def full(case: str) -> list[str]:
    command, *flags = shlex.split(case)
    if command == "generate":
        return [*DEMO, *flags]
    return [command, *flags, *(["--dry-run"] if command in ("quantize", "repack", "run") else [])]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in [*CASES, *FILES]]
)
def test_the_fix_removes_the_error(case: str, run: Callable[[list[str]], AscenditError | None]) -> None:
    args = full(case)
    error = run(args)
    assert error is not None, "no error"
    got, fix = texts(error, args[0])
    call = applied(args, fix)
    if call is None and isinstance(error, EnvironmentProblem):
        return  # a library to install
    assert call is not None and call != args, f"{got} | {fix}"
    again = run(call)
    if again is not None and not isinstance(again, EnvironmentProblem):
        raise AssertionError(f"{got} | {fix} | {shlex.join(call)} | {texts(again, call[0])}")


# ---- in Python ----------------------------------------------------------------------------------

CALLS: list[dict[str, Any]] = [
    {"scheme": "w8a8"},
    {"dtype": "bf16"},
    {"vae_dtype": "fp16"},
    {"device": "gpu"},
    {"emulate": "yes"},
    {"text_on": "gpu"},
    {"max_memory": "much"},
    {"nz": "perhaps"},
    {"keep": 5},
    {"num_frames": 16},
    {"width": 65, "height": 64},
    {"seed": -1},
    {"num_inference_steps": 0},
    {"solver": "eulr"},
    {"guidance_scale": -1},
    {"timesteps": [1000, 500], "num_inference_steps": 4},
    {"torch_dtype": "bf16"},
    {"steps": 3},
    {"cfg": 3.5},
    {"num_videos_per_prompt": 2},
    {"step_policy": "0:w4a4"},
    {"attention": "self=fusion"},
    {"attention": "text=sdap"},
    {"sub_head": 2},
]


@pytest.mark.parametrize("arguments", CALLS, ids=lambda arguments: next(iter(arguments)))
def test_the_fix_of_a_python_call_removes_the_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(AscenditError) as error:
        prepared(arguments)
    fix = error.value.fix
    assert "--" not in fix
    first = re.split(r"; |,? or ", fix)[0].partition(":")[0]
    changed = {k: v for k, v in arguments.items() if k not in re.findall(r"\w+", first) or f"{k}=" in first}
    for name, value in re.findall(r"(\w+)=(\[[^]]*\]|\"[^\"]*\"|[^\s,)]+)", first):
        changed[name] = ast.literal_eval(value)
    if "unknown argument" in error.value.got:
        changed = {name: value for name, value in changed.items() if name not in arguments}
    assert changed != arguments, fix
    with suppress(EnvironmentProblem):  # this machine has no GPU
        prepared(changed)


def prepared(arguments: dict[str, Any]) -> object:
    options = {name: value for name, value in arguments.items() if name in LoadOptions.model_fields}
    fields = {name: value for name, value in arguments.items() if name not in options}
    if unknown := {"torch_dtype"} & {*fields}:
        return ascendit.load("demo", **{name: fields[name] for name in unknown})
    return prepare(LoadOptions(model="demo", **options), "a red circle", **fields)
