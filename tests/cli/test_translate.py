"""Command lines of other tools: the correction that is shown parses, and means the same."""

from __future__ import annotations

import shlex

import fix_lines
import pytest

from ascendit.cli import main as cli
from ascendit.cli.translate import options_of, translate

LINES = [
    (  # generate.py of Wan2.2
        "generate --task t2v-A14B --size 1280*720 --ckpt_dir ./Wan2.2-T2V-A14B --offload_model True "
        '--convert_model_dtype --prompt "Two cats" --base_seed 42 --sample_steps 8 --sample_shift 12 '
        "--sample_solver "
        "unipc --frame_num 81 --t5_cpu --save_file a.mp4 --sample_guide_scale 4 --ulysses_size 8 "
        "--dit_fsdp",
        "ascendit generate ./Wan2.2-T2V-A14B 'Two cats' --size 1280x720 --seed 42 --steps 8 --shift "
        "12 --solver unipc "
        "--frames 81 --text-on cpu -o a.mp4 --guidance 4",
    ),
    (  # SGLang
        "generate --model-path Wan-AI/x --prompt 'A cat' --num-inference-steps 8 --guidance-scale 4 "
        "--seed 1024 "
        "--num-frames 17 --text-encoder-cpu-offload --pin-cpu-memory --num-gpus 4 --ulysses-degree=4 "
        "--save-output "
        "--output-path out/ --width 832 --height 480 --negative-prompt blur --flow-shift 3 "
        "--enable-teacache",
        "ascendit generate Wan-AI/x 'A cat' --steps 8 --guidance 4 --seed 1024 --frames 17 --text-on "
        "cpu -o out/ "
        "--negative blur --shift 3 --size 832x480",
    ),
    (  # Diffusers' names, LightX2V's
        "generate --demo 'a cat' --num_inference_steps=8 --torch_dtype bf16 --infer_steps 4 --dtype "
        "torch.float16",
        "ascendit generate 'a cat' --demo --steps 8 --set dtype=bfloat16 --steps 4 --set dtype=float16",
    ),
    (  # ComfyUI's names
        "generate --demo 'a cat' --cfg 5 --sampler_name dpmpp_2m --noise_seed 3 --denoise 1.0 --batch_size 2",
        "ascendit generate 'a cat' --demo --guidance 5 --solver dpm++ --seed 3 --num-videos 2",
    ),
    (
        "generate --demo --prompt_file p.txt --num_videos_per_prompt 2",
        "ascendit generate --demo --prompts p.txt --num-videos 2",
    ),
    (  # parts in single files, as LightX2V and ComfyUI name them
        "generate --demo cat --vae_path v.pth --text_encoder=u.gguf --high_noise_model h.gguf "
        "--low_noise_ckpt l.gguf --clip_name c.safetensors --lora_path a.safetensors --lora_scale 0.5",
        "ascendit generate cat --demo --part vae=v.pth --part text_encoder=u.gguf --part transformer=h.gguf "
        "--part transformer_2=l.gguf --part c.safetensors --lora a.safetensors:0.5",
    ),
    ("generate --demo cat --lora-strength 0.5", "ascendit generate cat --demo --lora FILE:0.5"),
    (
        "repack w.gguf --text_encoder_path u.gguf -o out --base demo",
        "ascendit repack w.gguf text_encoder=u.gguf -o out --base demo",
    ),
    ("quantize demo -o out --scheme mxfp8 --vae_path v.pth", "ascendit quantize demo -o out --scheme mxfp8"),
    (  # vLLM-Omni
        "generate --model demo --prompt cat --boundary-ratio 0.9 --fps 8 --vae-use-tiling "
        "--cfg-parallel-size 2",
        "ascendit generate demo cat --set boundary_ratio=0.9 --fps 8",
    ),
    (  # msModelSlim
        "quantize --model_path demo --save_path out --quant_type w8a8_mxfp8 --model_type Wan2.2 "
        "--trust_remote_code True --device_type npu",
        "ascendit quantize demo -o out --scheme mxfp8 --device npu",
    ),
    (
        "quantize demo --mlx-path out --q-mode mxfp8 --q-bits 8",
        "ascendit quantize demo -o out --scheme mxfp8",
    ),
    ("convert demo -o out", "ascendit repack demo -o out"),
    ("info demo --json", "ascendit inspect demo --json"),
    ("run demo 'a cat' --steps 3", "ascendit generate demo 'a cat' --steps 3"),
    ("plan demo cat", "ascendit generate demo cat --dry-run"),
    ("env", "ascendit doctor"),
    ("generate --demo '-a cat' --seed 3", "ascendit generate --demo --seed 3 -- '-a cat'"),
    ("generate --demo cat --stepz 3", "ascendit generate cat --demo --steps 3"),
    ("generate --prompt cat --seed 3 --task t2v", "ascendit generate MODEL cat --seed 3"),
    ("inspect demo --layer", "ascendit inspect demo --layers"),
    # several values of one flag
    ("generate --demo cat --sample_guide_scale 4 3.5", "ascendit generate cat --demo --guidance 4,3.5"),
    ("generate --demo cat --video_size 64 48", "ascendit generate cat --demo --size 64x48"),
    ("generate --demo cat --seeds 1 2", "ascendit generate cat --demo --seed 1,2"),
    (
        "generate --demo --lora_paths a.safetensors b.safetensors --prompt cat",
        "ascendit generate cat --demo --lora a.safetensors --lora b.safetensors",
    ),
    (
        "quantize demo --ignore a.* b.* --save_path o --quant_type w8a8",
        "ascendit quantize demo --keep 'a.*' --keep 'b.*' -o o --scheme int8",
    ),
    # one side of the size, the model and the prompt
    ("generate --demo cat --height=64", "ascendit generate cat --demo --size 64x64"),
    ("generate --demo cat --width 48", "ascendit generate cat --demo --size 48x64"),
    ("generate -m DIR -p x", "ascendit generate DIR x"),
    ("generate -m DIR -p x --width 64", "ascendit generate DIR x"),
    ("generate --demo cat --ckpt_dir demo", "ascendit generate demo cat"),
    ("generate --ckpt_dir demo", "ascendit generate demo PROMPT"),
    ("generate --demo cat -p dog", "ascendit generate dog --demo"),
    ("generate demo cat -p dog", "ascendit generate demo dog"),
    ("generate demo cat --prompt-file p.txt", "ascendit generate demo --prompts p.txt"),
    ("generate --demo -p cat --prompt-file p.txt", "ascendit generate --demo --prompts p.txt"),
    # a flag with a value is no switch, and one letter is no prefix
    ("generate --demo cat -i x.png", "ascendit generate cat --demo --image x.png"),
    ("generate --demo cat -s 7", "ascendit generate --help"),
    ("generate --demo cat --quality 8", "ascendit generate cat --demo"),
    ("generate --demo cat --quieter 8", "ascendit generate --help"),
    ("generate --demo cat -n 3 -y", "ascendit generate cat --demo --num-videos 3 --overwrite"),
    # values that the flag refuses
    ("generate --demo cat --scheduler normal", "ascendit generate cat --demo"),
    ("generate --demo cat --num_frames x", "ascendit generate cat --demo"),
    ("generate --demo cat --attention_backend SAGE_ATTN", "ascendit generate cat --demo --attention qk_int8"),
    ("generate --demo cat --attention_backend fa", "ascendit generate cat --demo"),
    ("generate --demo cat --use-sage-attention", "ascendit generate cat --demo --attention qk_int8"),
    ("generate --demo cat --use-sage-attention false", "ascendit generate cat --demo"),
    (
        "generate --demo cat --diffusion-attention-backend TORCH_SDPA",
        "ascendit generate cat --demo --attention sdpa",
    ),
    (
        "generate --demo cat --diffusion-kv-cache-dtype fp8 --diffusion-kv-cache-skip-steps 0-9",
        "ascendit generate cat --demo --attention self=fp8",
    ),
    (
        "generate --demo cat --attention_backend laser_attn --device_type npu",
        "ascendit generate cat --demo --attention self=laser --device npu",
    ),
    ("generate --demo cat --precision fp8", "ascendit generate cat --demo --scheme fp8"),
    ("generate --demo cat --data-type video", "ascendit generate cat --demo"),
    ("generate --demo cat --device_ids 0,1", "ascendit generate cat --demo"),
    ("generate --demo cat --output_dir out", "ascendit generate cat --demo -o out/"),
    ("generate --demo cat --save_file out", "ascendit generate cat --demo -o out.mp4"),
    ("generate --demo cat --base_seed -1", "ascendit generate cat --demo"),
    ("generate --demo cat --lora_weight 0.5", "ascendit generate cat --demo"),
    ("repack demo -o x --format gguf", "ascendit repack demo -o x"),
    ("repack demo -o x --format original", "ascendit repack demo -o x --to wan"),
    # what the command requires
    ("convert demo", "ascendit repack demo -o DST"),
    ("generate --demo a cat --frame_num 17", "ascendit generate --help"),
    ("quantize demo -o x --w_bit 4 --a_bit 8", "ascendit quantize demo -o x --scheme mxfp4"),
    ("quantize demo -o x --dtype fp8", "ascendit quantize demo -o x --scheme fp8"),
    ("quantize demo -o x --group_size 32", "ascendit quantize demo -o x --scheme mxfp8"),
    ("quantize demo -o x --scheme int8 --to wan", "ascendit quantize demo -o x --scheme int8"),
    (
        "quantize demo -o x --scheme int8 --report --num-gpus 2",
        "ascendit quantize demo -o x --scheme int8 --report",
    ),
    ("verify --model_path demo", "ascendit verify demo --quality"),
    ("inspect demo --compare x", "ascendit inspect demo --diff x"),
    ("inspect demo --tensors", "ascendit inspect demo --layers"),
]
OTHERS = {
    "--embedded-cfg-scale 6": "",
    "--slg_layers 9": "",
    "--riflex_freq_index 6": "",
    "--video-quality 8": "",
    "--log-level debug": "",
    "--gpu 0": "",
    "--tiling": "",
    "--vae_fsdp": "",
    "--gpu-only": "",
    "--audio a.wav": "",
    "--quant_config q.json": "",
    "--max-shard-size 5GB": "",
    "--first_frame_image a.png": " --image a.png",
    "--moe_boundary 0.9": " --set boundary_ratio=0.9",
    "--negative_prompts blur": " --negative blur",
    "--frames-per-second 16": " --fps 16",
    "--count 3": " --num-videos 3",
    "--n_samples 3": " --num-videos 3",
    "--quant-dit-path x.safetensors": " --part transformer=x.safetensors",
    "--lora_weight s.safetensors": " --lora s.safetensors",
    "--fp8_e4m3fn-unet": " --scheme fp8",
}
"""Flag of another tool -> its translation after `ascendit generate cat --demo`; empty: advice only."""
LINES += [
    (f"generate --demo cat {flag}", f"ascendit generate cat --demo{new}") for flag, new in OTHERS.items()
]


@pytest.mark.parametrize(("line", "corrected"), LINES, ids=[line.split()[0] for line, _ in LINES])
def test_a_line_of_another_tool_is_corrected(run, line, corrected):
    ended = run(*shlex.split(line))
    fix = ended.json["error"]["try"] if "--json" in line else ended.err.partition("  try    ")[2].strip()
    assert (ended.code, fix) == (2, corrected)
    assert list(fix_lines.problems(fix)) == []


def test_each_note_says_what_a_flag_is(run):
    ended = run("generate", "--demo", "x", "--num_inference_steps", "8", "--width=64", "--task", "t2v")
    needs = ended.err.splitlines()[1]
    assert "--num_inference_steps 8 is --steps 8 here" in needs and "part of --size" in needs
    assert "--task: the task is read from the model" in needs


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("generate --demo x --scheduler normal", "--solver needs unipc or dpm++ or euler or renoise"),
        ("generate --demo x --attn_impl la", "--attention needs cpu or sdpa"),
        ("generate --demo x --quality 8", "--crf 18 sets the quality"),
        ("generate --demo x -p y", "the argument x is replaced"),
        ("generate -p x --width 64", "--size needs both, as --size 832x480"),
        ("quantize demo -o x --to wan", "--to is a flag of ascendit repack"),
    ],
)
def test_a_note_says_why_a_flag_is_left_out(run, line, note):
    ended = run(*shlex.split(line))
    needs = ended.err.splitlines()[1] if ended.code == 2 else ""
    assert note in needs


def test_an_unknown_flag_without_a_translation_gets_the_help(run):
    ended = run("generate", "--demo", "x", "--qwertz", "8")
    assert ended.err.splitlines()[-1] == "  try    ascendit generate --help"


def test_a_seed_of_minus_one_is_omitted(run):
    ended = run("generate", "--demo", "x", "--seed", "-1")
    assert ended.code == 2 and ended.err.endswith("try    omit --seed for a random one\n")


def test_a_dash_is_no_output(run):
    assert run("generate", "--demo", "x", "-o", "-", "--dry-run").err.endswith("try    -o out.mp4\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_flags_of_ascendit_stay_as_they_are(name):
    options = options_of(fix_lines.command(name))
    for flag, has_value in options.items():
        args = [flag, *(["1"] if has_value else [])]
        assert translate(["a", *args], name, options).args() == ["a", *args]
