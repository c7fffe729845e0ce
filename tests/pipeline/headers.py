"""Checkpoints without real weights: valid names, shapes, dtypes and JSON files; the data are sparse zeros."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ascendit.checkpoint.part_configs import AutoencoderConfig, TextEncoderConfig
from ascendit.checkpoint.part_tensors import autoencoder_tensors, text_encoder_tensors
from ascendit.names import expected_tensors, to_wan
from ascendit.quant.schemes import SCHEMES

BYTES = {"F32": 4, "BF16": 2, "I64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1}
WEIGHTS = "diffusion_pytorch_model.safetensors"
Stored = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> (safetensors dtype, shape)."""

CONFIG: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "num_layers": 4,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 256,
}


def write_weights(file: Path, tensors: Stored) -> None:
    """A safetensors file of zeros, sparse on disk."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def floats(config: Mapping[str, Any] = CONFIG) -> Stored:
    """The tensors of a transformer in BF16."""
    return {name: ("BF16", shape) for name, shape in expected_tensors(dict(config)).items()}


def quantized(
    schemes: Mapping[str, str],
    config: Mapping[str, Any] = CONFIG,
    *,
    packing: str = "packed",
    smoothed: Iterable[str] = (),
) -> Stored:
    """The same with the layers of `schemes` quantized; written out here, not with `convert`."""
    tensors = floats(config)
    for layer, scheme in schemes.items():
        n, k = tensors[f"{layer}.weight"][1]
        fp4 = ("U8", (n, k // 2)) if packing == "packed" else (packing, (n, k))
        int8 = dict.fromkeys(("int8", "int8_block"), ("I8", (n, k)))
        qdata = {**int8, "mxfp4": fp4, "mxfp4_dualscale": fp4}.get(scheme, ("F8_E4M3", (n, k)))
        tensors[f"{layer}.weight"] = qdata
        tiles = ("F32", (math.ceil(n / 128), math.ceil(k / 128)))
        if scheme == "fp8_128x128":
            tensors[f"{layer}.weight_scale_inv"] = tiles
            continue
        rows = dict.fromkeys(("int8", "fp8"), ("F32", (n, 1))) | {"int8_block": tiles}
        tensors[f"{layer}.weight_scale"] = rows.get(scheme, ("U8", (n, math.ceil(k / 32))))
        if scheme == "int8":
            tensors[f"{layer}.weight_offset"] = ("F32", (n, 1))
        if scheme == "mxfp4_dualscale":
            tensors[f"{layer}.weight_dual_scale"] = ("F32", (n, math.ceil(k / 512), 1))
        tensors[f"{layer}.bias"] = ("F32", (n,))
    for layer in smoothed:
        tensors[f"{layer}.mul_scale"] = ("F32", (expected_tensors(dict(config))[f"{layer}.weight"][1],))
    return tensors


def manifest(
    tensors: Stored, schemes: Mapping[str, str], attention: Mapping[str, str] | None = None
) -> dict[str, str]:
    """`quant_model_description.json` for `quantized(schemes)`."""
    entries = {}
    for name in tensors:
        layer, _, role = name.rpartition(".")
        is_quantized = layer in schemes and role not in ("bias", "mul_scale")
        entries[name] = SCHEMES[schemes[layer]].manifest if is_quantized else "FLOAT"
    types = [SCHEMES[s].manifest for s in schemes.values()] or ["FLOAT"]
    return {**entries, **(attention or {}), "model_quant_type": types[-1]}


def write_expert(folder: Path, tensors: Stored, config: Mapping[str, Any] = CONFIG, **files: object) -> Path:
    """One transformer: weights, config.json and, by keyword, `manifest`."""
    write_weights(folder / WEIGHTS, tensors)
    write_json(folder / "config.json", config)
    if "manifest" in files:
        write_json(folder / "quant_model_description.json", files["manifest"])
    return folder


def write_export(folder: Path, tensors: Stored, described: Mapping[str, str]) -> Path:
    """An msModelSlim export: original names, one file named after the type, smoothed layers wrapped."""

    def wan(name: str) -> str:
        layer, _, role = name.rpartition(".")
        if f"{layer}.mul_scale" not in tensors:
            return to_wan(name) or name
        return f"{to_wan(layer)}.{'div' if role == 'mul_scale' else 'linear'}.{role}"

    suffix = described["model_quant_type"].lower()
    weights = folder / f"quant_model_weight_{suffix}.safetensors"
    write_weights(weights, {wan(name): stored for name, stored in tensors.items()})
    description = folder / f"quant_model_description_{suffix}.json"
    write_json(description, {wan(name) if "." in name else name: v for name, v in described.items()})
    for file in (weights, description):
        file.chmod(0o640)
    return folder


PIPELINE: dict[str, Any] = {
    "scheduler/scheduler_config.json": {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 4.0,
    },
    "text_encoder/config.json": {"vocab_size": 10, "d_model": 64, "d_kv": 2, "d_ff": 3, "num_layers": 1},
    "tokenizer/tokenizer_config.json": {},
    "tokenizer/tokenizer.json": {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"<pad>": 0, "</s>": 1, "<unk>": 2}, "unk_token": "<unk>"},
    },
    "vae/config.json": {"_class_name": "AutoencoderKLWan", "base_dim": 2, "num_res_blocks": 1},
}
CLASSES = {
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def write_pipeline(root: Path, experts: int = 1, config: Mapping[str, Any] = CONFIG) -> Path:
    """A Diffusers folder for transformers of this config, without them."""
    classes = {name: entry for name, entry in CLASSES.items() if experts == 2 or name != "transformer_2"}
    boundary = {"boundary_ratio": 0.875} if experts == 2 else {}
    write_json(root / "model_index.json", {"_class_name": "WanPipeline", **boundary, **classes})
    for name, values in (PIPELINE | library_configs(config)).items():
        write_json(root / name, values)
    for name, tensors in library_tensors(config).items():
        write_weights(root / name, tensors)
    return root


def library_configs(config: Mapping[str, Any] = CONFIG) -> dict[str, dict[str, Any]]:
    """The configs of a VAE and a text encoder that fit the transformer `config`."""
    z = config["out_channels"]
    latents = {"z_dim": z, "latents_mean": [0.0] * z, "latents_std": [1.0] * z}
    fitting = {"vae/config.json": latents, "text_encoder/config.json": {"d_model": config["text_dim"]}}
    return {name: PIPELINE[name] | values for name, values in fitting.items()}


def library_tensors(config: Mapping[str, Any] = CONFIG) -> dict[str, Stored]:
    """Weight file -> tensors of the parts of `library_configs`."""
    file, (vae, text) = Path("config.json"), library_configs(config).values()
    shapes = autoencoder_tensors(AutoencoderConfig.read(file, vae))
    encoder = text_encoder_tensors(TextEncoderConfig.read(file, text))
    return {
        f"vae/{WEIGHTS}": {name: ("F32", shape) for name, shape in shapes.items()},
        "text_encoder/model.safetensors": {name: ("BF16", shape) for name, shape in encoder.items()},
    }
