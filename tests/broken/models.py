"""Small complete models for `make` to break, written byte by byte, without torch or safetensors.

One transformer of width 64 with two blocks, in every layout and quantization scheme. The numbers are
random, of ordinary magnitude, and the same on every run.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.headers import BYTES, PIPELINE, library_tensors

from ascendit.names import block_linears, expected_tensors, to_wan

Tensor = tuple[str, tuple[int, ...], bytes]
"""dtype as safetensors names it, shape, bytes."""
Tensors = dict[str, Tensor]

CONFIG: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.42.1",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}
WAN_CONFIG = {
    "_class_name": "WanModel",
    "dim": 64,
    "num_heads": 2,
    "ffn_dim": 96,
    "freq_dim": 32,
    "num_layers": 2,
}
WAN_CONFIG |= {"in_dim": 16, "out_dim": 16, "text_len": 512, "model_type": "t2v", "eps": 1e-6}
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
MANIFEST = "quant_model_description.json"
TYPES = {"mxfp8": "W8A8_MXFP8", "int8": "W8A8_DYNAMIC", "mxfp4_dualscale": "W4A4_MXFP4_DUALSCALE"}
"""Scheme -> its type in a manifest."""
Q = "blocks.0.attn1.to_q"
"""The layer that is damaged."""
NORM = "blocks.0.attn1.norm_q.weight"
"""The float tensor that is damaged."""


# ---- files ----------------------------------------------------------------------------------------


def header(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header of a safetensors file with the tensors in this order, without gaps."""
    entries, position = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + len(data)],
        }
        position += len(data)
    return entries


def raw(head: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with exactly this header, valid or not; `length`: the header length it declares."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a valid safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw(header(tensors), b"".join(data for _, _, data in tensors.values())))


def load(path: Path) -> Tensors:
    """Read a valid safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8:start]).items():
        first, last = entry["data_offsets"]
        tensors[name] = (entry["dtype"], tuple(entry["shape"]), content[start + first : start + last])
    return tensors


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2))


# ---- tensors --------------------------------------------------------------------------------------


def floats(rng: random.Random, shape: Sequence[int], dtype: str = "BF16") -> Tensor:
    """BF16: magnitudes from 2^-7 to 2, of either sign; float32: from 0.01 to 2."""
    count = math.prod(shape)
    if dtype == "BF16":
        data = b"".join(
            bytes((rng.randrange(256), rng.choice(b"\x3c\x3d\x3e\x3f\xbc\xbe"))) for _ in range(count)
        )
    else:
        data = struct.pack(f"<{count}f", *(rng.uniform(0.01, 2) for _ in range(count)))
    return dtype, tuple(shape), data


def small_bytes(rng: random.Random, shape: Sequence[int], dtype: str, low: int, high: int) -> Tensor:
    """Bytes from `low` to `high`."""
    return dtype, tuple(shape), bytes(rng.randint(low, high) for _ in range(math.prod(shape)))


def float_model(seed: int = 0) -> Tensors:
    """All tensors in BF16."""
    rng = random.Random(seed)
    return {name: floats(rng, shape) for name, shape in expected_tensors(CONFIG).items()}


def quantized_layer(rng: random.Random, scheme: str, rows: int, columns: int) -> dict[str, Tensor]:
    """The tensors of one quantized layer by role, for dual-scale with `mul_scale`."""
    if scheme == "int8":
        return {
            "weight": small_bytes(rng, (rows, columns), "I8", 0, 127),
            "weight_scale": floats(rng, (rows, 1), "F32"),
            "weight_offset": ("F32", (rows, 1), bytes(4 * rows)),
        }
    if scheme == "tiles":
        return {
            "weight": small_bytes(rng, (rows, columns), "F8_E4M3", 0, 0x70),
            "weight_scale_inv": floats(rng, (math.ceil(rows / 128), math.ceil(columns / 128)), "F32"),
        }
    scale = small_bytes(rng, (rows, math.ceil(columns / 32)), "U8", 118, 124)
    if scheme == "mxfp8":
        return {"weight": small_bytes(rng, (rows, columns), "F8_E4M3", 0, 0x70), "weight_scale": scale}
    return {
        "weight": small_bytes(rng, (rows, columns // 2), "U8", 0, 255),
        "weight_scale": scale,
        "weight_dual_scale": floats(rng, (rows, math.ceil(columns / 512), 1), "F32"),
        "mul_scale": floats(rng, (columns,), "F32"),
    }


def quantized_model(scheme: str, seed: int = 0) -> Tensors:
    """Block linears quantized, their biases in float32; all other tensors in BF16."""
    rng = random.Random(seed)
    tensors: Tensors = {}
    linears = set(block_linears(CONFIG))
    for name, tensor in float_model(seed).items():
        layer, _, role = name.rpartition(".")
        if layer not in linears:
            tensors[name] = tensor
        elif role == "weight":
            rows, columns = tensor[1]
            tensors |= {f"{layer}.{r}": t for r, t in quantized_layer(rng, scheme, rows, columns).items()}
        else:
            tensors[name] = floats(rng, tensor[1], "F32")
    return tensors


def manifest(tensors: Mapping[str, Tensor], scheme: str) -> dict[str, str]:
    """The manifest of the tensors, as msModelSlim writes it."""
    linears = set(block_linears(CONFIG))
    quantized_roles = {"weight", "weight_scale", "weight_offset", "weight_dual_scale"}
    types = {}
    for name in tensors:
        layer, _, role = name.rpartition(".")
        types[name] = TYPES[scheme] if layer in linears and role in quantized_roles else "FLOAT"
    return types | {"model_quant_type": TYPES[scheme]}


# ---- models ---------------------------------------------------------------------------------------


def single(folder: Path) -> None:
    """A standalone Diffusers transformer."""
    write_json(folder / "config.json", CONFIG)
    save(folder / WEIGHTS, float_model())


def sharded(folder: Path) -> None:
    """The same in two shards with an index."""
    write_json(folder / "config.json", CONFIG)
    tensors = float_model()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(2):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors"
        save(folder / file, {name: tensors[name] for name in names[i::2]})
        weight_map |= dict.fromkeys(names[i::2], file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def quantized(scheme: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = quantized_model(scheme)
        config: dict[str, Any] = dict(CONFIG)
        if scheme == "tiles":
            config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        else:
            serialized = {f"is_checkpoint_{scheme}_serialized": True}
            config["quantization_config"] = {"quant_method": scheme, **serialized}
            write_json(folder / MANIFEST, manifest(tensors, scheme))
        write_json(folder / "config.json", config)
        save(folder / WEIGHTS, tensors)

    return write


def export(folder: Path) -> None:
    """An msModelSlim export, in Wan names."""
    tensors = {to_wan(name) or name: tensor for name, tensor in quantized_model("mxfp8").items()}
    types = {to_wan(n) or n: t for n, t in manifest(quantized_model("mxfp8"), "mxfp8").items()}
    write_json(folder / "config.json", WAN_CONFIG)
    write_json(folder / "quant_model_description_w8a8_mxfp8.json", types)
    save(folder / "quant_model_weight_w8a8_mxfp8.safetensors", tensors)


def cascade(folder: Path) -> None:
    """Two experts in Wan's original layout."""
    for seed, name in enumerate(("high_noise_model", "low_noise_model")):
        write_json(folder / name / "config.json", WAN_CONFIG)
        save(folder / name / WEIGHTS, {to_wan(n) or n: t for n, t in float_model(seed).items()})


def pipeline(folder: Path) -> None:
    """A Diffusers pipeline of two experts; the other parts are tiny, of zeros."""
    index: dict[str, Any] = {"_class_name": "WanPipeline", "boundary_ratio": 0.875}
    for seed, name in enumerate(("transformer", "transformer_2")):
        index[name] = ["diffusers", "WanTransformer3DModel"]
        write_json(folder / name / "config.json", CONFIG)
        save(folder / name / WEIGHTS, float_model(seed))
    index |= {"vae": ["diffusers", "AutoencoderKLWan"], "scheduler": ["diffusers", "UniPCMultistepScheduler"]}
    index |= {
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
    }
    for file in ("vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json"):
        write_json(folder / file, PIPELINE[file])
    for file, tensors in library_tensors().items():
        sizes = {name: math.prod(shape) * BYTES[dtype] for name, (dtype, shape) in tensors.items()}
        save(folder / file, {name: (*stored, bytes(sizes[name])) for name, stored in tensors.items()})
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    write_json(folder / "scheduler/scheduler_config.json", flow)
    write_json(folder / "tokenizer/tokenizer_config.json", {})
    write_json(folder / "model_index.json", index)


MODELS: dict[str, Callable[[Path], None]] = {
    "single": single,
    "sharded": sharded,
    "mxfp8": quantized("mxfp8"),
    "int8": quantized("int8"),
    "dualscale": quantized("mxfp4_dualscale"),
    "tiles": quantized("tiles"),
    "export": export,
    "cascade": cascade,
    "pipeline": pipeline,
}
"""Name -> function that writes the model into a folder."""
