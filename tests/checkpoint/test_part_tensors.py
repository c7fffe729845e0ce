"""Tensor lists equal `state_dict()` of the libraries' classes: published configs, and random small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
)

from ascendit.checkpoint.part_configs import AutoencoderConfig, ImageEncoderConfig, TextEncoderConfig
from ascendit.checkpoint.part_names import VISION_PREFIX
from ascendit.checkpoint.part_tensors import (
    EMBEDDINGS,
    autoencoder_tensors,
    image_encoder_tensors,
    image_projection,
    text_encoder_tensors,
)
from ascendit.errors import CheckpointError
from ascendit.names import Shapes

FILE = Path("config.json")

WAN21_VAE: dict[str, Any] = {  # of Wan2.1 and of Wan2.2's A14B models, as published
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}
WAN22_VAE: dict[str, Any] = {  # of Wan2.2-TI2V-5B; means and deviations shortened to their number
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "clip_output": False,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "latents_mean": [-0.2289] * 48,
    "latents_std": [0.4765] * 48,
}
UMT5_XXL: dict[str, Any] = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "umt5",
    "num_heads": 64,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "relative_attention_max_distance": 128,
    "vocab_size": 256384,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "tokenizer_class": "T5Tokenizer",
    "scalable_attention": True,
    "output_past": True,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
CLIP_H: dict[str, Any] = {  # of Wan2.1-I2V
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "image_size": 224,
    "intermediate_size": 5120,
    "layer_norm_eps": 1e-05,
    "num_channels": 3,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
    "projection_dim": 1024,
    "torch_dtype": "float32",
}


def shapes_of(model: torch.nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def check_vae(values: dict[str, Any]) -> None:
    config = AutoencoderConfig.read(FILE, values)
    with torch.device("meta"):
        model = AutoencoderKLWan(**config.model_dump())
    assert autoencoder_tensors(config) == shapes_of(model)


def check_text_encoder(values: dict[str, Any]) -> None:
    config = TextEncoderConfig.read(FILE, values)
    with torch.device("meta"):
        expected = shapes_of(UMT5EncoderModel(UMT5Config(**config.model_dump())))
    assert expected[EMBEDDINGS[0]] == expected.pop(EMBEDDINGS[1])
    assert text_encoder_tensors(config) == expected


def check_image_encoder(values: dict[str, Any]) -> None:
    config = ImageEncoderConfig.read(FILE, values)
    with torch.device("meta"):
        plain = CLIPVisionModel(CLIPVisionConfig(**config.model_dump()))
        projected = CLIPVisionModelWithProjection(CLIPVisionConfig(**config.model_dump()))
    shapes = image_encoder_tensors(config)
    prefixed = {f"{VISION_PREFIX}{name}": shape for name, shape in shapes.items()}
    assert shapes_of(plain) in (shapes, prefixed)  # of transformers 5, and of earlier versions
    assert shapes_of(projected) == prefixed | image_projection(config)


def test_published_models() -> None:
    check_vae(WAN21_VAE)
    check_vae(WAN22_VAE)
    check_text_encoder(UMT5_XXL)
    check_image_encoder(CLIP_H)


@st.composite
def vaes(draw: Any) -> dict[str, Any]:
    multiples = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    temporal = draw(st.lists(st.booleans(), min_size=len(multiples) - 1, max_size=len(multiples) - 1))
    patch = draw(st.sampled_from([None, 1, 2]))
    z = draw(st.integers(1, 3))
    return {
        "base_dim": draw(st.integers(2, 8)),
        "decoder_base_dim": draw(st.one_of(st.none(), st.integers(2, 8))),
        "z_dim": z,
        "dim_mult": multiples,
        "num_res_blocks": draw(st.integers(1, 3)),
        "temperal_downsample": temporal,
        "latents_mean": [0.0] * z,
        "latents_std": [1.0] * z,
        "is_residual": draw(st.booleans()),
        "in_channels": 3 * (patch or 1) ** 2,
        "out_channels": 3 * (patch or 1) ** 2,
        "patch_size": patch,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** (len(multiples) - 1) * (patch or 1),
    }


@settings(max_examples=12)
@given(values=vaes())
def test_random_vaes(values: dict[str, Any]) -> None:
    """Channels that the library cannot group are refused by both."""
    try:
        AutoencoderConfig.read(FILE, values)
    except CheckpointError as e:
        assert values["is_residual"] and "base_dim" in e.got
        with pytest.raises((ValueError, AssertionError)), torch.device("meta"):
            AutoencoderKLWan(**values)
        return
    check_vae(values)


@settings(max_examples=6)
@given(data=st.data())
def test_random_text_encoders(data: st.DataObject) -> None:
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    values: dict[str, Any] = {key: data.draw(st.integers(1, 6), key) for key in sizes}
    values["relative_attention_num_buckets"] = data.draw(st.integers(4, 40))
    values["feed_forward_proj"] = data.draw(st.sampled_from(["gated-gelu", "gated-silu", "relu", "gelu"]))
    check_text_encoder(values)


@settings(max_examples=6)
@given(data=st.data())
def test_random_image_encoders(data: st.DataObject) -> None:
    sizes = ("intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads")
    values: dict[str, Any] = {key: data.draw(st.integers(1, 5), key) for key in sizes}
    values["hidden_size"] = values["num_attention_heads"] * data.draw(st.integers(1, 4))
    values |= {"image_size": data.draw(st.integers(1, 40)), "patch_size": data.draw(st.integers(1, 40))}
    assume(values["patch_size"] <= values["image_size"])
    check_image_encoder(values)
