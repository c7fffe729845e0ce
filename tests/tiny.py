"""Tiny random Wan folders in Diffusers' layout; Diffusers' pipelines load and run them in about a second.

`build_*` writes a complete folder from a seed; `shard` splits an expert's weights; `damage` breaks a copy.
All parameters are redrawn, including norms and biases, so that the result changes if a model drops one.
"""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 64  # 2 heads of 32: RoPE splits them 12 + 10 + 10 over time, height and width
TEXT_DIM = 32
IMAGE_DIM = 32
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"


def redraw(module: torch.nn.Module, seed: int) -> None:
    """Draw all parameters again: matrices of size 1/sqrt(fan in), norms around 1, others around 0."""
    module.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim < 2 or name.endswith("scale_shift_table"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, so all prompts differ; ends with `</s>` like UMT5's."""
    vocabulary = ["<pad>", "</s>", "<unk>", *sorted(set(string.printable) - set(string.ascii_uppercase))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def text_encoder(seed: int, vocab_size: int) -> UMT5EncoderModel:
    """Two layers of UMT5."""
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    model = UMT5EncoderModel(config)
    redraw(model, seed)
    return model


def vae(seed: int, *, wan22: bool = False) -> AutoencoderKLWan:
    """Wan2.1's VAE (16 channels, 8x) or Wan2.2's residual one (48 channels, 16x), with few inner channels."""
    channels = 48 if wan22 else 16
    generator = torch.Generator().manual_seed(seed + 1)
    new = {
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "decoder_base_dim": 6,
        "scale_factor_spatial": 16,
    }
    model = AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=(0.5 * torch.randn(channels, generator=generator)).tolist(),
        latents_std=(0.5 + torch.rand(channels, generator=generator)).tolist(),
        **(new if wan22 else {}),
    )
    redraw(model, seed)
    with torch.no_grad():  # avoids clamping of the frames at -1 and 1
        model.decoder.conv_out.weight.mul_(0.3)
    return model


def transformer(
    seed: int, in_channels: int = 16, out_channels: int = 16, **extra: Any
) -> WanTransformer3DModel:
    """Two Wan blocks of width 64 and ffn_dim 80."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=80,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        **extra,
    )
    redraw(model, seed)
    return model


def _write(
    folder: Path,
    pipeline: type,
    experts: list[WanTransformer3DModel],
    seed: int,
    dtype: torch.dtype,
    **parts: Any,
) -> Path:
    """Save a pipeline with `experts`. The VAE is in float32, as in the published folders."""
    text_tokenizer = tokenizer()
    encoder = text_encoder(seed + 10, len(text_tokenizer))
    modules: list[torch.nn.Module] = [encoder, *experts]
    for module in modules:
        for parameter in module.parameters():  # `module.to` would log about layers kept in float32
            parameter.data = parameter.data.to(dtype)
    pipeline(
        tokenizer=text_tokenizer,
        text_encoder=encoder,
        vae=parts.pop("vae", None) or vae(seed + 20),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=parts.pop("flow_shift", 3.0)
        ),
        transformer=experts[0],
        transformer_2=experts[1] if experts[1:] else None,
        **parts,
    ).save_pretrained(folder)
    return folder


def build_t2v_cascade(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Small Wan2.2 T2V-A14B: two experts, boundary 0.875."""
    experts = [transformer(seed), transformer(seed + 1)]
    return _write(folder, WanPipeline, experts, seed, dtype, boundary_ratio=0.875)


def build_t2v_single(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Small Wan2.1 T2V: one expert, no boundary."""
    return _write(folder, WanPipeline, [transformer(seed)], seed, dtype)


def build_ti2v(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, pipeline: type = WanPipeline
) -> Path:
    """Small Wan2.2 TI2V-5B: one expert, a timestep per token, 48 channels, sizes in multiples of 32."""
    parts = {"vae": vae(seed + 20, wan22=True), "expand_timesteps": True, "flow_shift": 5.0}
    return _write(folder, pipeline, [transformer(seed, 48, 48)], seed, dtype, **parts)


def build_ti2v_image(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """The weights of `build_ti2v` with the image-to-video pipeline."""
    return build_ti2v(folder, seed=seed, dtype=dtype, pipeline=WanImageToVideoPipeline)


def build_i2v_cascade(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Small Wan2.2 I2V-A14B: two experts of 36 input channels, boundary 0.9, no image encoder."""
    experts = [transformer(seed, 36), transformer(seed + 1, 36)]
    return _write(folder, WanImageToVideoPipeline, experts, seed, dtype, boundary_ratio=0.9)


def build_i2v_21(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **extra: Any) -> Path:
    """Small Wan2.1 I2V: 36 input channels and CLIP image tokens in the cross-attention."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        hidden_act="gelu",
    )
    encoder = CLIPVisionModel(config)
    redraw(encoder, seed + 30)
    _write(
        folder,
        WanImageToVideoPipeline,
        [transformer(seed, 36, image_dim=IMAGE_DIM, added_kv_proj_dim=WIDTH, **extra)],
        seed,
        dtype,
        image_encoder=encoder.to(dtype),
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    )
    index = json.loads((folder / "model_index.json").read_text())
    index["image_processor"] = ["transformers", "CLIPImageProcessor"]  # the name in the published folders
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def build_flf2v(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Small Wan2.1 FLF2V: `build_i2v_21` with position embeddings for 17 tokens of each of two images."""
    return build_i2v_21(folder, seed=seed, dtype=dtype, pos_embed_seq_len=34)


BUILDERS: dict[str, Callable[..., Path]] = {
    "t2v_cascade": build_t2v_cascade,
    "t2v_single": build_t2v_single,
    "ti2v": build_ti2v,
    "ti2v_image": build_ti2v_image,
    "i2v_cascade": build_i2v_cascade,
    "i2v_21": build_i2v_21,
    "flf2v": build_flf2v,
}


def shard(folder: Path, expert: str = "transformer", count: int = 3) -> Path:
    """Split an expert's one weight file into `count` shards and an index, in place."""
    weights = load_file(folder / expert / WEIGHTS)
    (folder / expert / WEIGHTS).unlink()
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for i in range(count):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors"
        shard_weights = {n: weights[n] for n in names[i::count]}
        save_file(shard_weights, folder / expert / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard_weights, file)
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / expert / INDEX).write_text(json.dumps(index, indent=2))
    return folder


DAMAGED = "blocks.1.ffn.net.0.proj.weight"  # the tensor that `damage` changes


def copy(folder: Path, to: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(folder, to)


def damage(folder: Path, kind: str, expert: str = "transformer") -> Path:
    """Break one thing in `folder`, which must be a copy; `kind` is a key of `DAMAGES`."""
    if kind.startswith("index_") and not (folder / expert / INDEX).exists():
        shard(folder, expert)
    DAMAGES[kind](folder / expert)
    return folder


def _truncate(expert_folder: Path) -> None:
    file = max(expert_folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _no_weights(expert_folder: Path) -> None:
    for file in expert_folder.glob("*.safetensors"):
        file.unlink()


def _edit_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(expert_folder: Path) -> None:
        for file in expert_folder.glob("*.safetensors"):
            weights = load_file(file)
            if DAMAGED in weights:
                edit(weights)
                save_file(weights, file, metadata={"format": "pt"})

    return apply


def _edit_json(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(expert_folder: Path) -> None:
        data = json.loads((expert_folder / name).read_text())
        edit(data)
        (expert_folder / name).write_text(json.dumps(data, indent=2))

    return apply


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncate_shard": _truncate,
    "not_safetensors": lambda expert_folder: max(expert_folder.glob("*.safetensors")).write_text(
        "<html>not found</html>"
    ),
    "no_weights": _no_weights,
    "drop_tensor": _edit_tensors(lambda w: w.pop(DAMAGED)),
    "extra_tensor": _edit_tensors(lambda w: w.update({"blocks.9.extra.weight": torch.zeros(2)})),
    "wrong_shape": _edit_tensors(lambda w: w.update({DAMAGED: w[DAMAGED][:-1].clone()})),
    "wrong_dtype": _edit_tensors(lambda w: w.update({DAMAGED: w[DAMAGED].to(torch.int64)})),
    "nan_weights": _edit_tensors(lambda w: w[DAMAGED].fill_(torch.nan)),
    "index_missing_file": _edit_json(
        INDEX,
        lambda d: d["weight_map"].update({DAMAGED: "diffusion_pytorch_model-00009-of-00003.safetensors"}),
    ),
    "index_outside": _edit_json(
        INDEX, lambda d: d["weight_map"].update({DAMAGED: "../../outside.safetensors"})
    ),
    "other_class": _edit_json("config.json", lambda d: d.update(_class_name="FluxTransformer2DModel")),
    "no_config": lambda expert_folder: (expert_folder / "config.json").unlink(),
    "config_no_json": lambda expert_folder: (expert_folder / "config.json").write_text("{"),
}
