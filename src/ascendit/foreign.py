"""The names that other tools use, and ascendit's, for the hints of errors. No name here is accepted.

Sources: Diffusers' WanPipeline; `generate.py` of Wan2.1 and Wan2.2; the command lines and request fields of
SGLang, vLLM-Omni, LightX2V and FastVideo; nodes of ComfyUI; msModelSlim; mlx-video.
Names are compared in lower case, with `_` for `-`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import get_close_matches

from ascendit.option_text import option, option_name

# ---- names of options ---------------------------------------------------------------------------

RENAMED = {
    "num_inference_steps": "steps sample_steps infer_steps num_steps inference_steps n_steps",
    "num_frames": "frames frame_num video_length target_video_length frame_count n_frames length",
    "flow_shift": "shift sample_shift sigma_shift time_shift timestep_shift",
    "guidance_scale": "guidance cfg cfg_scale guide_scale sample_guide_scale guidance_scale_1",
    "guidance_scale_2": "cfg_scale_2 guidance_2 sample_guide_scale_low guidance_scale_low",
    "solver": "sampler sampler_name sample_solver scheduler scheduler_name noise_scheduler sampling_method",
    "negative_prompt": "negative n_prompt neg_prompt negative_text sample_neg_prompt uncond_prompt"
    " negative_prompts",
    "seed": "base_seed noise_seed random_seed manual_seed rng_seed",
    "boundary_ratio": "boundary moe_boundary",
    "fps": "frame_rate framerate sample_fps video_fps target_fps frames_per_second",
    "max_sequence_length": "max_seq_len max_seq_length text_len t5_max_length",
    "image": "image_path input_image start_image first_frame input_reference img src_image init_image"
    " first_image first_frame_image i",
    "last_image": "end_image last_frame last_image_path tail_image final_frame last_frame_path",
    "timesteps": "denoising_step_list sample_timesteps",
    "size": "resolution video_size image_size aspect_ratio",
    "width": "target_width w",
    "height": "target_height h",
    "seconds": "duration video_duration",
    "model": "ckpt_dir model_path model_dir model_id pretrained_model_name_or_path checkpoint ckpt model_name"
    " pretrained_model_path model_class_path repo_id unet_name diffusion_model checkpoint_path m",
    "prompt": "text positive positive_prompt p",
    "device": "device_type backend torch_device device_name device_map",
    "dtype": "torch_dtype weight_dtype precision dit_precision transformer_dtype param_dtype compute_dtype"
    " dit_dtype data_type",
    "vae_dtype": "vae_precision",
    "scheme": "quantization quant_type quant_mode dit_quant_scheme quantize quant q_mode quant_algo"
    " quantization_method quantization_config dit_quantized quant_scheme fmt format transformer_quant",
    "output": "save_file save_result_path output_path output_file_name"
    " output_dir save_dir out outfile output_file filename"
    " filename_prefix save_path out_dir o output_video_path save_directory",
    "config": "config_json config_file config_path",
    "keep": "disable_names exclude ignore ignored_layers modules_to_not_convert fallback disable_level skip",
    "loras": "lora lora_path lora_paths lora_name lora_dir lora_configs lora_weights adapters"
    " lora_file lora_weights_path lora_weight",
    "calibrate": "calib_file calib_dataset calib_data anti_dataset calib_prompts",
    "engine": "for target framework runtime",
    "base": "base_model original_model",
    "dst": "output_directory mlx_path save_folder target_dir",
    "attention": "attention_backend attn_impl attn_mode attn_type attention_type diffusion_attention_backend"
    " self_attn_1_type",
    "sub_head": "use_sub_head sub_heads",
    "step_policy": "step_quant timestep_quant",
    "fit": "resize_mode crop_mode",
    "max_memory": "vram_limit memory_limit gpu_memory_limit",
    "emulate": "emulation",
    "preset": "distill step_distill",
    "overwrite": "force_overwrite exist_ok yes y f",
    "dry_run": "plan print_config",
    "resume": "resume_from",
    "on_progress": "callback_on_step_end callback callback_steps progress_callback",
}
"""Keyword of ascendit -> its names in other tools."""
KEYWORD_OF = {other: keyword for keyword, others in RENAMED.items() for other in others.split()}
"""Name in another tool -> keyword of ascendit."""

SETTINGS = {
    "t5_cpu": "text_on=cpu",
    "text_encoder_cpu_offload": "text_on=cpu",
    "t5_offload": "text_on=cpu",
    "clip_cpu_offload": "text_on=cpu",
    "text_encoder_offload": "text_on=cpu",
    "drop_text_encoder": "text_on=drop",
    "unload_text_encoder": "text_on=drop",
    "no_metadata": "metadata=false",
    "disable_metadata": "metadata=false",
    "fp8_e4m3fn_unet": "scheme=fp8",
    "bf16_unet": "dtype=bfloat16",
    "fp16_unet": "dtype=float16",
    "fp32_unet": "dtype=float32",
    "cuda": "device=cuda",
    "npu": "device=npu",
    "cpu": "device=cpu",
    "no_cfg": "guidance_scale=1",
    "load_in_8bit": "scheme=int8",
    "load_in_4bit": "scheme=mxfp4",
    "sage_attention": "attention=qk_int8",
    "use_sage_attention": "attention=qk_int8",
    "flash_attn": "attention=flash",
    "use_flash_attention": "attention=flash",
}
"""Switch of another tool -> the setting of ascendit with its effect."""
ON = ("", "true", "1", "yes", "on")
"""Values of a switch that is set, in lower case."""

PATTERNS = {
    "parts": {
        "vae={FILE}": "vae vae_path vae_name vae_file",
        "text_encoder={FILE}": "text_encoder text_encoder_path t5 t5_path t5_file t5_checkpoint umt5_path",
        "transformer={FILE}": "transformer_path high_noise_model high_noise_ckpt high_noise_model_path"
        " transformer dit_high_noise quant_dit_path dit_quantized_ckpt unet unet_path",
        "transformer_2={FILE}": "transformer_2 transformer_2_path low_noise_model low_noise_ckpt"
        " low_noise_model_path dit_low_noise",
        "{FILE}": "clip_path clip_name dit_path image_encoder image_encoder_path",
    },
    "attention": {"self={SCHEME}": "kv_cache_dtype diffusion_kv_cache_dtype"},
    "loras": {"FILE:{WEIGHT}": "lora_scale lora_scales lora_strength lora_multiplier"},
}
"""Keyword of ascendit -> its value, with {FILE} and so on from the other tool -> names in other tools."""
PATTERN_OF = {
    name: (keyword, pattern)
    for keyword, patterns in PATTERNS.items()
    for pattern, names in patterns.items()
    for name in names.split()
}

_VIDEOS = (
    "num_videos_per_prompt num_images_per_prompt num_outputs_per_prompt num_samples batch_size batch n_iter"
    " samples repeat n n_samples count num_outputs batch_count"
)
MANY = {
    **dict.fromkeys(_VIDEOS.split(), "--num-videos"),
    **dict.fromkeys(
        "prompt_file prompt_path prompts_file from_file prompt_txt input_file file".split(), "--prompts"
    ),
}
"""Name in another tool -> the flag of `generate`, which Python does not have."""
FLAG_FOR = MANY | {"compare": "--diff", "tensors": "--layers", "list": "--layers"}
"""Name in another tool -> a flag that Python has no keyword for."""
BITS = {"w_bit": "w", "w_bits": "w", "bits": "w", "q_bits": "w", "nbits": "w", "a_bit": "a", "a_bits": "a"}
"""Name of a number of bits in another tool -> `w` for weights or `a` for activations, as in w8a8."""
COMMAND_ADVICE = {
    **dict.fromkeys(
        "quality video_quality output_quality output_compression".split(),
        "--crf 18 sets the quality of a file, and lower is better",
    ),
    **dict.fromkeys(
        "log_level loglevel logging_level debug".split(), "-v prints decisions, -q only the result"
    ),
}
"""Name in another tool -> advice for the command line only."""

ADVICE = {
    "omit it: the task is read from the model": "task model_cls pipeline_class pipeline_class_name"
    " model_type workload_type model_class architecture pipeline",
    "omit it: weights stay on the device; --text-on drop frees the text encoder after use": "offload_model"
    " cpu_offload dit_cpu_offload enable_model_cpu_offload enable_sequential_cpu_offload offload low_vram"
    " lowvram medvram novram enable_cpu_offload offload_granularity blocks_to_swap block_swap"
    " dit_layerwise_offload performance_mode unload_models vae_cpu_offload image_encoder_cpu_offload"
    " pin_cpu_memory use_fsdp_inference layerwise_offload lazy_load low_cpu_mem_usage offload_folder tiled"
    " gpu_only highvram",
    "omit it: a model runs on one device": "ulysses_size ring_size dit_fsdp t5_fsdp num_gpus sp_degree"
    " tp_size"
    " tensor_parallel_size ulysses_degree ring_degree dp_size data_parallel_size nproc_per_node sp_size"
    " cfg_parallel enable_cfg_parallel cfg_parallel_size cfg_size parallel world_size dp_degree vae_parallel"
    " use_usp parallelism hsdp_shard_dim hsdp_replicate_dim vae_parallel_size vae_patch_parallel_size"
    " pipefusion_parallel_degree use_cfg_parallel num_nodes tp parallel_attn_type vae_fsdp",
    "omit it: weights keep their dtype; --set dtype=bfloat16 changes it": "convert_model_dtype half bf16"
    " all_in_bf16 force_fp16 fp16 variant",
    "omit it, and write the longer prompt yourself": "use_prompt_extend prompt_extend_method"
    " prompt_extend_model prompt_extend_target_lang prompt_extend use_prompt_enhancer enhance_prompt"
    " prompt_upsampling",
    "omit it: prompts are encoded as plain text": "prompt_embeds negative_prompt_embeds clip_skip"
    " prompt_weighting attention_kwargs cross_attention_kwargs",
    "omit it: every run starts from noise; --image FILE sets the first frame": "denoise strength"
    " denoising_strength add_noise latent latent_image start_at_step end_at_step video_path"
    " input_video src_video return_with_leftover_noise noise_aug noise_aug_strength",
    "omit it: the solver sets its own sigmas; --timesteps 1000,750,500,250 sets the steps": "sigmas eta"
    " karras use_karras_sigmas simple beta_schedule denoise_schedule",
    "omit it: one call of generate makes one video, of one seed": _VIDEOS,
    "--seed 42 instead of a generator": "generator rng",
    "omit it: the result is a Video; its frames are an array, video.frames": "output_type return_dict"
    " return_frames",
    "omit it: each video is saved": "save_output save_video",
    "omit it: no cache over steps is offered yet": "enable_teacache teacache use_teacache teacache_thresh"
    " cache_dit enable_cache_dit cache_backend cache_config feature_caching use_ret_steps magcache easycache"
    " use_attentioncache enable_cache",
    "omit it: an attention kernel is chosen for the device": "xformers enable_xformers",
    "omit it: --attention self=NAME,cross=NAME chooses the kernels": "component_attention_backends"
    " attention_backend_config attention_config diffusion_attention_config",
    "omit it: --step-policy 0-9:attention=bf16 excludes steps": "kv_cache_skip_steps"
    " diffusion_kv_cache_skip_steps",
    "omit it: a recipe excludes the attention of some layers": "kv_cache_skip_layers"
    " diffusion_kv_cache_skip_layers",
    "omit it: nothing has to be compiled": "compile enable_torch_compile torch_compile enforce_eager"
    " use_compile compilation_config cuda_graph",
    "omit it: a model runs on one device, which --device names": "gpu gpus gpu_id gpu_ids device_id"
    " device_ids visible_devices cuda_visible_devices devices",
    "omit it: Wan has no embedded guidance; --guidance sets its scale": "embedded_cfg_scale"
    " embedded_guidance_scale",
    "omit it: guidance is classifier-free guidance on all layers": "slg slg_layers slg_start slg_end"
    " slg_scale skip_layer_guidance cfg_zero_star enable_cfg_zero_star use_cfg_zero_star",
    "omit it: positions are encoded as the model does": "riflex riflex_freq_index enable_riflex use_riflex",
    "omit it: the scheme of a quantized model is read from its files": "quant_config quant_desc_path"
    " quantization_config_file",
    "omit it: a model takes a text and images only": "audio audio_path pose_video src_root_path refer_path"
    " src_pose_path src_ref_images",
    "omit it: shards have at most 5 GB": "max_shard_size max_shard_bytes shard_size",
    "omit it: code of a checkpoint is never run": "trust_remote_code",
    "omit it: the VAE decodes without tiles": "vae_slicing vae_tiling enable_vae_slicing enable_vae_tiling"
    " vae_tile_size tile_size vae_use_tiling use_tiling_vae tile_overlap"
    " tiling",
    "omit it: parts of the model are in the folder of MODEL": "tokenizer scheduler_config component_paths "
    + " ".join(PATTERNS["parts"].values()),
    "omit it: each video is checked, and there is no content filter": "safety_checker enable_safety_checker"
    " requires_safety_checker",
    "omit it: files are downloaded to the cache of the hub; set HF_HOME to move it": "cache_dir local_dir"
    " download_dir",
    "omit it: append @revision to the name of the model": "revision model_revision",
    "omit it: log in once with `hf auth login`": "token use_auth_token hf_token api_key",
    "omit it: a repository without network is read from the cache": "local_files_only offline"
    " force_download resume_download",
    "omit it: the scheme sets bits and blocks": "q_bits q_group_size w_bit a_bit bits"
    " group_size w_bits a_bits block_size nbits",
    "omit it: weights are quantized row by row on the CPU": "dev_type max_workers",
    "omit it: there is no server yet": "host port serve server_port base_url webui served_model_name",
    "omit it: the format is recognised from the files": "use_safetensors safetensors from_tf"
    " ignore_mismatched_sizes from_flax subfolder",
    "omit it: the name of the file selects the codec, as out.mp4, out.webm or out.gif": "codec"
    " bitrate video_codec pix_fmt video_format save_format",
}
"""Advice -> names in other tools of options that ascendit does not have, or does not need."""
ADVICE_FOR = {name: text for text, names in ADVICE.items() for name in names.split()}

NO_VALUE = frozenset(
    "t5_cpu dit_fsdp t5_fsdp convert_model_dtype use_prompt_extend use_usp enforce_eager trust_remote_code"
    " low_vram lowvram medvram novram half force_fp16 bf16 fp16 use_ret_steps vae_slicing enable_vae_slicing"
    " enable_vae_tiling vae_use_tiling enable_teacache teacache compile webui cfg_parallel offline"
    " enable_cfg_parallel dit_cpu_offload text_encoder_cpu_offload vae_cpu_offload enable_torch_compile yes"
    " exist_ok force_overwrite no_metadata disable_metadata plan print_config cache_dit enable_cache_dit"
    " image_encoder_cpu_offload pin_cpu_memory tiled layerwise_offload dit_layerwise_offload quantize"
    " save_output y f gpu_only highvram fp8_e4m3fn_unet bf16_unet fp16_unet fp32_unet vae_fsdp tiling"
    " cuda npu cpu no_cfg load_in_8bit load_in_4bit"
    " xformers enable_xformers use_flash_attention flash_attn sage_attention use_sage_attention"
    " cfg_zero_star enable_cfg_zero_star use_cfg_zero_star enable_riflex".split()
)
"""Flags of other tools without a value; True, False, 0 or 1 after one of them is its value."""

COMMANDS = {
    "generate": "run t2v i2v ti2v flf2v txt2vid img2vid sample infer inference predict create make",
    "quantize": "quant quantise convert_quant ptq calibrate compress",
    "repack": "convert export merge conversion pack import transform",
    "inspect": "info show list-layers ls dump summary describe stat",
    "verify": "evaluate eval test metrics compare",
    "bench": "benchmark perf profile",
    "doctor": "env collect-env check diagnose system status devices",
    "models": "list supported families catalog",
    "generate --dry-run": "plan estimate",
}
"""Command of ascendit -> names in other tools."""
COMMAND_OF = {other: command for command, others in COMMANDS.items() for other in others.split()}

# ---- names of values ----------------------------------------------------------------------------

_DTYPES = {
    "float32": "fp32 f32 float single torch.float32 torch.float full 32",
    "bfloat16": "bf16 torch.bfloat16 brain 16",
    "float16": "fp16 f16 half torch.float16 torch.half",
}
_SCHEMES = {
    "w8a8 i8 8bit w8a8_int8 int8wo "
    "int8_w8a8 int8dq int8-vllm int8-sgl q8 q8_0 int8_per_channel w8a8s": "int8",
    "int8_block128 turbo int8-block w8a8_block": "int8_block",
    "fp8_e4m3fn fp8_e4m3 e4m3 float8 fp8_scaled fp8_e4m3fn_fast fp8-vllm fp8-sgl fp8dq "
    "w8a8_fp8 float8_e4m3fn fp8_e5m2 fp8-torchao fp8_per_token": "fp8",
    "w8a8_mxfp8 w8a8f8 mx8 mxfp8_e4m3 mxfp8_npu w8a8f8_mx mx-fp8 mx_fp8": "mxfp8",
    "w4a4_mxfp4 w4a4 w4a4f4 mx4 mxfp4_e2m1 mxfp4_npu nvfp4 fp4 mx-fp4 mx_fp4 q4 q4_0 q4_k "
    "int4 w4a8 w4a8_mxfp nf4 q4_k_m q4_k_s q4_1 4bit": "mxfp4",
    "w4a4_mxfp4_dualscale w4a4_dualscale dualscale w4a4f4_dual mxfp4_dual": "mxfp4_dualscale",
    "none bfloat16 no float16 fp16 w16a16": "bf16",
}
"""Names in other tools -> scheme."""
VALUES = {
    "dtype": _DTYPES,
    "vae_dtype": {
        "float32": _DTYPES["float32"],
        "bfloat16": f"{_DTYPES['bfloat16']} {_DTYPES['float16']} float16",
    },
    "scheme": {ours: others for others, ours in _SCHEMES.items()},
    "solver": {
        "unipc": "uni_pc unipcmultistepscheduler uni_pc_bh2 unipcmultistep default",
        "dpm++": "dpmpp dpm dpmpp_2m dpm++_2m dpmsolver dpmsolver++ dpmsolvermultistepscheduler dpmpp_sde"
        " dpmpp_2m_sde dpm_2",
        "euler": "flow_match_euler flowmatcheulerdiscretescheduler flowmatch_euler flow_euler euler_discrete"
        " simple flowmatch",
        "renoise": "lcm stochastic euler_ancestral euler_a flowmatch_causvid sde causvid",
    },
    "device": {
        "cuda": "gpu nvidia 0",
        "npu": "ascend ascend910 910b davinci",
        "cpu": "auto balanced host x86 mps metal xpu",
    },
    "fit": {
        "crop": "center_crop centre cover fill resize_and_crop",
        "pad": "letterbox contain black_bars keep_aspect",
        "stretch": "resize squash exact distort",
    },
    "engine": {
        "vllm-omni": "vllm vllm_omni omni",
        "sglang": "sgl sglang-diffusion",
        "mindie": "mindie-sd mindiesd",
    },
    "to": {"diffusers": "hf huggingface", "wan": "original wan2.2 official native comfy comfyui"},
    "preset": {
        "lightning": "wan2.2-lightning 4steps 4-step 4step wan22-lightning",
        "lightx2v": "lightx2v_4step self-forcing distill step_distill",
        "fastwan": "dmd fastwan2.1 fastwan2.2 fastvideo",
        "causvid": "causal",
    },
    "text_on": {"cpu": "host", "device": "gpu cuda npu", "drop": "free unload none"},
    "emulate": {"decode-on-use": "true yes on slow", "decode-once": "once fast"},
    "attention": {
        "sdpa": "torch pytorch torch_sdpa sdpa_attention math",
        "flash": "fa flash_attn flash_attention flash_attention_2 flash_attn2",
        "qk_int8": "sage sage_attn sage_attention sageattn",
        "fusion": "ascend ascend_fa npu_flash_attn npu_fusion_attention fused_attn_score _native_npu",
        "fused_infer": "fia infer npu_fused_infer_attention_score",
        "self=laser": "laser laser_attn ascend_laser_attention la",
        "reference": "eager vanilla naive",
    },
    "schedule": {"diffusers": "hf", "official": "wan original"},
    "metadata": {"true": "yes on 1", "false": "no off 0"},
}
"""Keyword -> value of ascendit -> its names in other tools, in lower case."""


def normal(name: str) -> str:
    """A name as the tables write it: `--Num-Frames` is `num_frames`."""
    return name.lstrip("-").lower().replace("-", "_")


def value_for(keyword: str, value: object, choices: Collection[str] = ()) -> str | None:
    """The value of ascendit for that of another tool, or for another spelling of its own; None if unknown.

    `choices`: the values of this option, for a typing error.
    """
    text = str(value).strip().lower().removesuffix("_dynamic")
    for ours, others in VALUES.get(keyword, {}).items():
        if (text == ours or text in others.split()) and (not choices or ours in choices):
            return ours
    lower = {choice.lower(): choice for choice in choices}
    return lower.get(text) or next((lower[x] for x in get_close_matches(text, lower, n=1)), None)


def translated(name: str, value: object = None) -> tuple[str, str | None]:
    """(keyword of ascendit, its value or None) for an option of another tool; unknown names are unchanged."""
    other = normal(name)
    if other in PATTERN_OF:
        keyword, pattern = PATTERN_OF[other]
        return keyword, re.sub(r"\{(\w+)\}", lambda match: match[1] if value is None else str(value), pattern)
    if other in SETTINGS:
        keyword, _, text = SETTINGS[other].partition("=")
        return keyword, text
    keyword = KEYWORD_OF.get(other, other)
    return keyword, _text(keyword, value)


def _text(keyword: str, value: object) -> str | None:
    return None if value is None else value_for(keyword, value) or str(value).removeprefix("torch.")


# ---- hints --------------------------------------------------------------------------------------


def hint(name: str, value: object = None, allowed: Collection[str] = ()) -> str | None:
    """The fix for an option that does not exist, as the command line writes it; None without one.

    `allowed`: the keywords that exist. `value`: the value of the option, if it has one.
    """
    other = normal(name)
    if other in SETTINGS and value is not None and str(value).lower() not in ON:
        return f"omit {name}"
    keyword, text = (other, _text(other, value)) if other in allowed else translated(name, value)
    if keyword in allowed:
        return option_name(keyword) if text is None else option(keyword, text)
    advice = ADVICE_FOR.get(other)
    return advice and advice.replace("omit it", f"omit {name}")
