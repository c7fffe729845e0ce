"""Tiny Wan models for the tests of `convert`: random weights under the names and shapes of a config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ascendit.names import expected_tensors

CONFIG: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.42.1",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 160,
    "num_layers": 2,
}
TI2V: dict[str, Any] = {"in_channels": 48, "out_channels": 48}
I2V: dict[str, Any] = {"in_channels": 36, "out_channels": 16}
OTHERS = {
    "scheduler/scheduler_config.json": '{"_class_name": "UniPCMultistepScheduler"}',
    "text_encoder/config.json": '{"architectures": ["UMT5EncoderModel"]}',
    "text_encoder/model.safetensors": "weights of the text encoder",
    "vae/config.json": '{"_class_name": "AutoencoderKLWan"}',
    "vae/diffusion_pytorch_model.safetensors": "weights of the VAE",
    "LICENSE.txt": "Apache-2.0",
    "README.md": "---\nlicense: apache-2.0\nbase_model: x\n---\n# Wan\n",
    "other_model.bin": "no part of it",
    ".gitattributes": "*.safetensors filter=lfs",
}
"""Other files of the folder."""
Edit = Callable[[dict[str, Tensor]], None]


def tensors(
    config: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """All tensors of a transformer; weights have the usual size, about 1 / sqrt(K)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, shape in expected_tensors(dict(config)).items():
        noise = torch.randn(shape, generator=generator)
        drawn[name] = (noise / shape[-1] ** 0.5 if len(shape) > 1 else 0.1 * noise).to(dtype)
    return drawn


def write_transformer(
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    edit: Edit | None = None,
    **config: Any,
) -> Path:
    """A standalone transformer folder. `edit` changes the tensors before they are written."""
    folder.mkdir(parents=True)
    values = tensors(CONFIG | config, seed, dtype)
    if edit is not None:
        edit(values)
    save_file(values, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config, indent=2))
    return folder


def write_model(folder: Path, experts: int = 2, **options: Any) -> Path:
    """A Diffusers folder; its other components are text files."""
    names = ["transformer", "transformer_2"][:experts]
    for seed, name in enumerate(names):
        write_transformer(folder / name, seed, **options)
    index: dict[str, Any] = {"_class_name": "WanPipeline", "_diffusers_version": "0.42.1"}
    index |= {"boundary_ratio": 0.875} if experts > 1 else {}
    index |= {name: ["diffusers", "WanTransformer3DModel"] for name in names}
    index |= {"scheduler": ["diffusers", "UniPCMultistepScheduler"], "vae": ["diffusers", "AutoencoderKLWan"]}
    index |= {"text_encoder": ["transformers", "UMT5EncoderModel"], "image_encoder": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    for name, text in OTHERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of one expert, from all of its files."""
    loaded: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded |= load_file(file)
    return loaded


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
