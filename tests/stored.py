"""Wan transformers on disk with valid headers and zero bytes, for tests of code that only reads headers.

`floats` lists the tensors of a config, `quantized` stores some layers in a scheme, `write` makes the file
(sparse: a 14B model takes no disk space), `folder` a transformer's folder with config and manifest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendit.checkpoint.component import Part
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.tensor_info import DTYPE_BITS
from ascendit.checkpoint.transformer import Expert, read_expert
from ascendit.checkpoint.weight_files import Shards
from ascendit.errors import CheckpointError
from ascendit.model.loader import load_expert
from ascendit.model.quantize_on_load import Online
from ascendit.model.wan import WanTransformer
from ascendit.names import all_linears, expected_tensors, to_wan
from ascendit.ops.operators import Ops
from ascendit.quant.schemes import SCHEMES

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype as safetensors names it, shape)."""

CONFIG: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 48,
    "freq_dim": 16,
    "ffn_dim": 80,
    "num_layers": 2,
}
IMAGE = CONFIG | {"in_channels": 36, "image_dim": 40, "added_kv_proj_dim": 64, "pos_embed_seq_len": 6}
WEIGHTS = "diffusion_pytorch_model.safetensors"
MANIFEST = "quant_model_description.json"


def floats(config: dict[str, Any] = CONFIG, dtype: str = "BF16") -> Tensors:
    """The tensors of a model that is not quantized."""
    return {name: (dtype, shape) for name, shape in expected_tensors(config).items()}


def wan(tensors: Tensors) -> Tensors:
    """The same under Wan names."""
    return {to_wan(name) or name: tensor for name, tensor in tensors.items()}


def roles(scheme: str, shape: tuple[int, int], packing: str = "") -> Tensors:
    """Role -> tensor of a layer in this scheme; `packing` of FP4: packed, e4m3 or bf16."""
    n, k = shape
    blocks = ("U8", (n, math.ceil(k / 32)))
    fp4 = {"e4m3": ("F8_E4M3", shape), "bf16": ("BF16", shape)}.get(packing, ("U8", (n, math.ceil(k / 2))))
    table: dict[str, Tensors] = {
        "int8": {"weight": ("I8", shape), "weight_scale": ("F32", (n, 1)), "weight_offset": ("F32", (n, 1))},
        "int8_block": {
            "weight": ("I8", shape),
            "weight_scale": ("F32", (math.ceil(n / 128), math.ceil(k / 128))),
        },
        "fp8": {"weight": ("F8_E4M3", shape), "weight_scale": ("F32", (n, 1))},
        "mxfp8": {"weight": ("F8_E4M3", shape), "weight_scale": blocks},
        "mxfp4": {"weight": fp4, "weight_scale": blocks},
        "mxfp4_dualscale": {
            "weight": fp4,
            "weight_scale": blocks,
            "weight_dual_scale": ("F32", (n, math.ceil(k / 512), 1)),
        },
        "fp8_128x128": {
            "weight": ("F8_E4M3", shape),
            "weight_scale_inv": ("F32", (math.ceil(n / 128), math.ceil(k / 128))),
        },
    }
    return table[scheme]


def quantized(tensors: Tensors, layers: Iterable[str], scheme: str, packing: str = "") -> Tensors:
    """`tensors` with `layers` stored in `scheme`, their bias in float32."""
    converted = dict(tensors)
    for layer in layers:
        n, k = converted.pop(f"{layer}.weight")[1]
        converted |= {f"{layer}.{role}": t for role, t in roles(scheme, (n, k), packing).items()}
        converted[f"{layer}.bias"] = ("F32", (n,))
    return converted


def types(tensors: Tensors, layers: dict[str, str], config: dict[str, Any] = CONFIG) -> dict[str, str]:
    """A manifest: the type of each layer's scheme for its weight and scales, FLOAT for other tensors."""
    linears = set(all_linears(config))
    manifest = {}
    for name in tensors:
        layer, _, role = name.rpartition(".")
        in_scheme = layer in linears and layer in layers and role.startswith("weight")
        manifest[name] = SCHEMES[layers[layer]].manifest if in_scheme else "FLOAT"
    return manifest


def write(path: Path, tensors: Tensors) -> Path:
    """A safetensors file of these tensors, all zero."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + offset)
    return path


def write_json(path: Path, data: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=4))
    return path


def folder(
    path: Path,
    tensors: Tensors,
    *,
    config: dict[str, Any] | None = CONFIG,
    manifest: dict[str, Any] | None = None,
    weights: str = WEIGHTS,
) -> Path:
    """The folder of one transformer."""
    write(path / weights, tensors)
    if config is not None:
        write_json(path / "config.json", config)
    if manifest is not None:
        write_json(path / MANIFEST, manifest)
    return path


def read(path: Path) -> Expert:
    """The first expert of the model at `path`."""
    return read_expert(recognise(path).experts[0])


def refused(path: Path, code: str) -> str:
    """Check that the transformer is refused with this code; return the `got` text."""
    with pytest.raises(CheckpointError) as e:
        read(path)
    assert e.value.code == code, str(e.value)
    return e.value.got


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a component, read with `RowReader`."""
    with RowReader() as reader:
        return {name: reader.read_tensor(info) for name, info in Shards.open(folder).tensors.items()}


def load_transformer(part: Part, ops: Ops, *, online: Online | None = None, **options: Any) -> WanTransformer:
    """The transformer in `part`, as stored or quantized during loading."""
    expert = read_expert(part)
    return load_expert(expert, online.apply(expert) if online else None, ops, **options)
