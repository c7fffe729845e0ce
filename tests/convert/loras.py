"""A small Wan transformer and the LoRA files that the tests make for it, in each tool's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ascendit.names import Shapes, expected_tensors
from ascendit.weights.lora.fold import Folds, LoraSource

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 200,
    "num_layers": 2,
}
IMAGE = {"in_channels": 12, "image_dim": 14, "added_kv_proj_dim": 24}
"""Additional layers of a Wan2.1 image-to-video model."""
LAYERS = {
    **{f"attn{i}.to_{x}": f"{kind}_attn.{x}" for i, kind in ((1, "self"), (2, "cross")) for x in "qkv"},
    **{f"attn{i}.to_out.0": f"{kind}_attn.o" for i, kind in ((1, "self"), (2, "cross"))},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
"""Diffusers -> original Wan, within a block; written by hand, as Wan's `model.py` has them."""
IMAGE_LAYERS = {"attn2.add_k_proj": "cross_attn.k_img", "attn2.add_v_proj": "cross_attn.v_img"}

Matrices = dict[str, tuple[Tensor, Tensor]]
"""Layer -> (down [r, K], up [N, r])."""


def shapes(**extra: Any) -> Shapes:
    return expected_tensors(CONFIG | extra)


def weights(shapes: Shapes, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def block_layers(names: Mapping[str, str], num_blocks: int = 2) -> dict[str, str]:
    """Diffusers -> original Wan, with the block."""
    return {f"blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(num_blocks) for a, b in names.items()}


def matrices(shapes: Shapes, layers: Mapping[str, str], rank: int = 4, seed: int = 1) -> Matrices:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in layers:
        fan_out, fan_in = shapes[f"{layer}.weight"]
        down = torch.randn((rank, fan_in), generator=generator)
        factors[layer] = (down, torch.randn((fan_out, rank), generator=generator))
    return factors


def write(
    factors: Matrices, key: Callable[[str], str], down: str, up: str, alpha: float | None = None
) -> dict[str, Tensor]:
    """The tensors of a file: each key is `key(layer)` plus the suffix of its matrix."""
    tensors: dict[str, Tensor] = {}
    for layer, (a, b) in factors.items():
        tensors |= {f"{key(layer)}{down}": a, f"{key(layer)}{up}": b}
        if alpha is not None:
            tensors[f"{key(layer)}.alpha"] = torch.tensor(alpha)
    return tensors


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> LoraSource:
    """Write a LoRA file."""
    own = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(own, path, metadata=metadata)
    return LoraSource(path)


def fold_all(folds: Folds, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold each tensor in one piece."""
    return {name: folds.fold(name, tensor, 0) for name, tensor in tensors.items()}


def merged(tensor: Tensor, *products: tuple[float, Tensor, Tensor]) -> Tensor:
    """W + sum of scale * up @ down, in NumPy's float64, rounded once: the oracle."""
    total = tensor.to(torch.float64).numpy().copy()
    for scale, down, up in products:
        a, b = down.to(torch.float64).numpy(), up.to(torch.float64).numpy()
        total += (scale * np.tensordot(b.reshape(len(b), -1), a, 1)).reshape(total.shape)
    return torch.from_numpy(total).to(tensor.dtype)


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
