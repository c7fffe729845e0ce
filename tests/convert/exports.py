"""Exports for tests: real ones of msModelSlim, read by hand, and others built as published.

This module does not use ascendit: it replaces names as SGLang's wan_repack.py does, and decodes by tables.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

EXPORTS = Path(__file__).resolve().parents[1] / "fixtures" / "msmodelslim" / "exports"
CASCADE, SINGLE = "t2v_d64_l6", "ti2v_d128_l1"
ALL = sorted(folder for kind in EXPORTS.iterdir() for folder in kind.iterdir())
BY_NAME = {folder.name: folder for folder in ALL}
MXFP4 = BY_NAME[f"{SINGLE}__minmax"]
MXFP8 = BY_NAME[f"{SINGLE}__official_w8a8f8"]
DUAL = BY_NAME[f"{CASCADE}__dualscale_bf16fallback"]
SMOOTH = BY_NAME[f"{CASCADE}__dualscale_smooth_bf16fallback"]
INT8 = BY_NAME[f"{CASCADE}__int8"]
LEGACY = BY_NAME[f"{CASCADE}__legacy_calibrator"]
SHARDED = BY_NAME[f"{SINGLE}__int8_part_file_size1"]
FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}

REPLACED = (
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("norm2", "norm__placeholder"),
    ("norm3", "norm2"),
    ("norm__placeholder", "norm3"),
    ("self_attn.q", "attn1.to_q"),
    ("self_attn.k", "attn1.to_k"),
    ("self_attn.v", "attn1.to_v"),
    ("self_attn.o", "attn1.to_out.0"),
    ("self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "attn1.norm_k"),
    ("cross_attn.q", "attn2.to_q"),
    ("cross_attn.k", "attn2.to_k"),
    ("cross_attn.v", "attn2.to_v"),
    ("cross_attn.o", "attn2.to_out.0"),
    ("cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "attn2.norm_k"),
    (".linear.", "."),
    (".div.", "."),
)
"""Replaced in this order, anywhere in a name: `self_attn.q_rot` becomes `attn1.to_q_rot`."""


def merged_name(name: str) -> str:
    """The Diffusers name that SGLang's and vLLM-Omni's tools derive from a Wan name."""
    for old, new in REPLACED:
        name = name.replace(old, new)
    return name


def diffusers_name(name: str) -> str:
    """`merged_name`, except for `self_attn.q_rot`, `self_attn.quant_type`, which belong to no projection."""
    new = merged_name(name)
    for role in ("q_rot", "k_rot", "quant_type"):
        new = new.replace(f"to_{role}", role)
    return new


# ---- reading ------------------------------------------------------------------------------------


def experts(folder: Path) -> dict[str, Path]:
    """Expert -> its folder in an export."""
    if (folder / FOLDERS["transformer"]).is_dir():
        return {name: folder / sub for name, sub in FOLDERS.items()}
    return {"transformer": folder}


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors files of one folder, by name."""
    loaded: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded |= load_file(file)
    return loaded


def without_padding(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Contents of a folder, without the padding of safetensors headers."""
    loaded = dict(files)
    for name, data in files.items():
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(data[:8], "little")
            loaded[name] = data[8:end].rstrip() + data[end:]
    return loaded


def manifest(folder: Path) -> dict[str, str]:
    """The manifest of one expert."""
    (file,) = folder.glob("quant_model_description*.json")
    return dict(json.loads(file.read_bytes()))


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def unpacked(qdata: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> float32 [N, K]; the even index is in the low nibble."""
    pairs = torch.stack((qdata & 15, qdata >> 4), -1).flatten(-2)
    return E2M1[pairs.long()]


def decoded(layer: Mapping[str, Tensor]) -> Tensor:
    """The weight of a layer from its tensors by role, float32."""
    weight = layer["weight"]
    if "weight_scale" not in layer:
        return weight.float()
    values = unpacked(weight) if weight.dtype == torch.uint8 else weight.float()
    scale = layer["weight_scale"]
    if scale.dtype != torch.uint8:
        return values * scale.float()
    values = values * torch.exp2(scale.double() - 127).float().repeat_interleave(32, 1)[:, : values.shape[1]]
    if "weight_dual_scale" in layer:
        dual = layer["weight_dual_scale"].flatten(1)
        values = values * dual.repeat_interleave(512, 1)[:, : values.shape[1]]
    return values


def by_layer(named: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Layer -> role -> tensor, for layers whose weight is a matrix."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        layer, _, role = name.rpartition(".")
        layers.setdefault(layer, {})[role] = tensor
    return {name: roles for name, roles in layers.items() if roles.get("weight", E2M1).ndim == 2}


# ---- building -----------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def changed(source: Path, target: Path, change: Change) -> Path:
    """A copy of an export in which `change(tensors, manifest)` was applied to each expert."""
    shutil.copytree(source, target)
    for folder in experts(target).values():
        (described,) = folder.glob("quant_model_description*.json")
        weights, types = tensors(folder), manifest(folder)
        change(weights, types)
        for file in folder.glob("*.safetensors"):
            file.unlink()
        for file in folder.glob("*.index.json"):
            file.unlink()
        save_file(
            weights, folder / described.name.replace("description", "weight").replace(".json", ".safetensors")
        )
        described.write_text(json.dumps(types))
    return target


def merged(
    source: Path, target: Path, config: Mapping[str, Any], quantization_config: Mapping[str, Any] | None
) -> Path:
    """A folder as SGLang's tool writes it, or, with `marker`, as vLLM-Omni's does (FP4 in e4m3)."""
    for name, folder in experts(source).items():
        expert = target / name
        expert.mkdir(parents=True)
        types = {merged_name(key): value for key, value in manifest(folder).items()}
        weights = {merged_name(key): tensor for key, tensor in tensors(folder).items()}
        if quantization_config is not None:
            for key, tensor in weights.items():
                if key.endswith(".weight") and tensor.dtype == torch.uint8:
                    weights[key] = unpacked(tensor).to(torch.float8_e4m3fn)
        save_file(weights, expert / "diffusion_pytorch_model.safetensors")
        (expert / "quant_model_description.json").write_text(json.dumps(types))
        written = dict(config) | (
            {"quantization_config": dict(quantization_config)} if quantization_config else {}
        )
        (expert / "config.json").write_text(json.dumps(written))
    return target


def pipeline(target: Path, configs: Mapping[str, Mapping[str, Any]]) -> Path:
    """A Diffusers folder with these transformer configs and no weights: enough for `--base`."""
    index: dict[str, Any] = {"_class_name": "WanPipeline", "_diffusers_version": "0.35.0"}
    parts = {
        "scheduler": ("UniPCMultistepScheduler", "scheduler_config.json"),
        "text_encoder": ("UMT5EncoderModel", "config.json"),
        "tokenizer": ("T5TokenizerFast", "tokenizer_config.json"),
        "vae": ("AutoencoderKLWan", "config.json"),
    }
    for name, (class_name, file) in parts.items():
        library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
        index[name] = [library, class_name]
        (target / name).mkdir(parents=True)
        (target / name / file).write_text(json.dumps({"_class_name": class_name}))
    for name, config in configs.items():
        index[name] = ["diffusers", "WanTransformer3DModel"]
        (target / name).mkdir()
        (target / name / "config.json").write_text(json.dumps(config))
    if "transformer_2" not in configs:
        index["transformer_2"] = [None, None]
    (target / "model_index.json").write_text(json.dumps(index))
    (target / "LICENSE.txt").write_text("Apache-2.0")
    return target
