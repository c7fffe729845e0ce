"""Names of text encoders, VAEs and image encoders in the authors' code, to write files as they publish them.

They follow from the config alone, in another way than in `checkpoint.part_names`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
HALF = {
    "conv_in": "conv1",
    "mid_block.resnets.0": "middle.0",
    "mid_block.resnets.1": "middle.2",
    "mid_block.attentions.0": "middle.1",
    "norm_out": "head.0",
    "conv_out": "head.2",
}


def vae_name(name: str, config: Mapping[str, Any]) -> str:
    """The name in `wan/modules/vae.py` (Wan2.1) or `vae2_2.py` of a tensor of an AutoencoderKLWan."""
    if name.startswith(("quant_conv", "post_quant_conv")):
        return name.replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")
    half, _, inner = name.partition(".")
    side, count = (
        ("down", config["num_res_blocks"]) if half == "encoder" else ("up", config["num_res_blocks"] + 1)
    )
    for old, new in RESIDUAL.items():
        inner = re.sub(rf"(?<=\d\.){old}\.", f"{new}.", inner)
    for old, new in HALF.items():
        if inner.startswith(old):
            return f"{half}.{new}{inner.removeprefix(old)}"
    if config["is_residual"]:
        inner = re.sub(rf"{side}_blocks\.(\d+)\.resnets", rf"{side}samples.\1.{side}samples", inner)
        inner = re.sub(
            rf"{side}_blocks\.(\d+)\.{side}sampler", rf"{side}samples.\1.{side}samples.{count}", inner
        )
    elif half == "encoder":
        inner = inner.replace("down_blocks", "downsamples")
    else:
        match = re.match(r"up_blocks\.(\d+)\.(?:resnets|(upsamplers))\.(\d+)", inner)
        assert match, inner
        index = int(match[1]) * (count + 1) + (count if match[2] else int(match[3]))
        inner = f"upsamples.{index}{inner[match.end() :]}"
    return f"{half}.{inner}"


UMT5 = {
    "shared": "token_embedding",
    "encoder.final_layer_norm": "norm",
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
    "encoder.block": "blocks",
}


def umt5_name(name: str) -> str:
    """The name in `wan/modules/t5.py` of a tensor of a UMT5EncoderModel."""
    for old, new in UMT5.items():
        name = name.replace(old, new)
    return name


CLIP = {
    "vision_model.": "",
    "embeddings.class_embedding": "cls_embedding",
    "embeddings.patch_embedding": "patch_embedding",
    "embeddings.position_embedding.weight": "pos_embedding",
    "encoder.layers": "transformer",
    "pre_layrnorm": "pre_norm",
    "post_layernorm": "post_norm",
    "layer_norm": "norm",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}


def clip_state(state: Mapping[str, Tensor], *, head: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of `wan/modules/clip.py` of a CLIPVisionModel, beside a small text model."""
    files: dict[str, Tensor] = {"log_scale": torch.tensor(2.0), "textual.norm.weight": torch.ones(2)}
    for old, tensor in state.items():
        name = old
        if "self_attn" in name and ".out_proj" not in name:
            layer, _, role = name.rpartition(".")
            stem = layer.rpartition(".")[0]
            if layer.endswith("q_proj"):
                parts = [state[f"{stem}.{x}_proj.{role}"] for x in "qkv"]
                name = f"{stem.replace('self_attn', 'attn')}.to_qkv.{role}"
                tensor = torch.cat(parts)
            else:
                continue
        for a, b in CLIP.items():
            name = name.replace(a, b)
        if name == "cls_embedding":
            tensor = tensor[None, None]
        if name == "pos_embedding":
            tensor = tensor[None]
        files[f"visual.{name}"] = tensor
    return files | ({} if head is None else {"visual.head": head})
