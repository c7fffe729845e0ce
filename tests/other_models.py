"""Tiny transformers of other Diffusers models, and one call of each. All parameters are redrawn."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import tiny
import torch
from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel, QwenImageTransformer2DModel
from torch import Tensor

Call = dict[str, Any]
HEADS: dict[str, Any] = {"attention_head_dim": 32, "num_attention_heads": 2, "num_layers": 2}
AXES = (8, 12, 12)  # RoPE axes of a head of 32


def flux(dtype: torch.dtype) -> tuple[Any, Call]:
    """Two double blocks, two single ones, 64 wide."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_single_layers=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=AXES,
        **HEADS,
    )
    call: Call = _text(dtype) | {
        "hidden_states": torch.randn(2, 24, 64, dtype=dtype),
        "pooled_projections": torch.randn(2, 64, dtype=dtype),
        "timestep": torch.tensor([0.5, 0.5], dtype=dtype),
        "img_ids": torch.zeros(24, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    return model, call


def qwen_image(dtype: torch.dtype) -> tuple[Any, Call]:
    """Two blocks, 64 wide."""
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, joint_attention_dim=64, axes_dims_rope=AXES, **HEADS
    )
    call: Call = _text(dtype) | {
        "hidden_states": torch.randn(2, 24, 64, dtype=dtype),
        "encoder_hidden_states_mask": torch.ones(2, 8, dtype=torch.bool),
        "timestep": torch.tensor([0.5, 0.5], dtype=dtype),
        "img_shapes": [(1, 4, 6)] * 2,
    }
    return model, call


def hunyuan_video(dtype: torch.dtype) -> tuple[Any, Call]:
    """Two double blocks, two single ones and a text refiner, 64 wide."""
    model = HunyuanVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=64,
        pooled_projection_dim=64,
        rope_axes_dim=AXES,
        **HEADS,
    )
    call: Call = _text(dtype) | {
        "hidden_states": torch.randn(2, 16, 2, 8, 8, dtype=dtype),
        "encoder_attention_mask": torch.ones(2, 8, dtype=torch.bool),
        "pooled_projections": torch.randn(2, 64, dtype=dtype),
        "timestep": torch.tensor([500, 500]),
        "guidance": torch.tensor([1000.0, 1000.0], dtype=dtype),
    }
    return model, call


BUILDERS: dict[str, Callable[[torch.dtype], tuple[Any, Call]]] = {
    "flux": flux,
    "qwen_image": qwen_image,
    "hunyuan_video": hunyuan_video,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Call]:
    """A model in `dtype` and the arguments of one call."""
    model, call = copy.deepcopy(_built(name, dtype))
    return model, call


@functools.cache
def _built(name: str, dtype: torch.dtype) -> tuple[Any, Call]:
    torch.manual_seed(1)
    model, call = BUILDERS[name](dtype)
    tiny.redraw(model, 1)
    return model.to(dtype).eval().requires_grad_(False), call


def output(model: Any, call: Call) -> Tensor:
    """The output of one call."""
    with torch.no_grad():
        out: Tensor = model(**call, return_dict=False)[0]
    return out


def _text(dtype: torch.dtype) -> Call:
    return {"encoder_hidden_states": torch.randn(2, 8, 64, dtype=dtype)}
