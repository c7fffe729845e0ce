"""Minimal loaders of three engines, written from their published code without ascendit.

Each `*_problems` acts as the engine's loader: it goes through the layers that the engine builds and looks up
its names, shapes and dtypes. An empty list means that every layer has all its tensors, and that every tensor
of the files is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from convert.exports import E2M1, tensors
from torch import Tensor

Params = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]
"""Name -> dtype (None: any float) and shape."""


def linears(config: dict[str, Any], loaded: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Diffusers names of the linears of one block and their (N, K)."""
    dim, ffn = loaded["patch_embedding.weight"].shape[0], config["ffn_dim"]
    square = [f"attn{a}.{x}" for a in (1, 2) for x in ("to_q", "to_k", "to_v", "to_out.0")]
    return dict.fromkeys(square, (dim, dim)) | {"ffn.net.0.proj": (ffn, dim), "ffn.net.2": (dim, ffn)}


def missing_and_unread(expected: Params, loaded: dict[str, Tensor], optional: set[str]) -> Iterator[str]:
    for name, (dtype, shape) in expected.items():
        if name not in loaded:
            if name not in optional:
                yield f"{name} is missing"
        elif tuple(loaded[name].shape) != shape:
            yield f"{name} is {list(loaded[name].shape)}, not {list(shape)}"
        elif (
            dtype is None and not loaded[name].is_floating_point() or dtype not in (None, loaded[name].dtype)
        ):
            yield f"{name} is {loaded[name].dtype}, not {dtype}"
    yield from (f"{name} is not read" for name in loaded if name not in expected)


# ---- vLLM-Omni 0.30.0 ---------------------------------------------------------------------------

OMNI_KEYS = {
    "int8": {"is_checkpoint_int8_serialized", "activation_scheme", "ignored_layers"},
    "mxfp8": {"is_checkpoint_mxfp8_serialized", "ignored_layers"},
    "mxfp4": {
        "is_checkpoint_mxfp4_serialized",
        "ignored_layers",
        "w4a8_fallback_steps",
        "require_smooth_scale",
        "w4a8_fallback_layers",
        "mxfp4_scale_alg",
    },
    "mxfp4_dualscale": {
        "is_checkpoint_serialized",
        "ignored_layers",
        "num_bf16_fallback_layers",
        "w4a8_fallback_steps",
        "w4a8_fallback_layers",
    },
}
"""Method -> the arguments of its config class; another argument is a TypeError."""


def omni_problems(expert: Path) -> list[str]:
    """For one transformer folder."""
    config = json.loads((expert / "config.json").read_bytes())
    method_config = config.get("quantization_config") or {}
    method = method_config.pop("quant_method", None)
    problems = [
        f"{key} is not an argument of {method}" for key in method_config.keys() - OMNI_KEYS.get(method, set())
    ]
    serialized = [key for key in method_config if key.startswith("is_checkpoint_")]
    if method and not (len(serialized) == 1 and method_config[serialized[0]] is True):
        problems.append("it does not declare that it is quantized already")
    ignored = set(method_config.get("ignored_layers") or [])
    loaded: dict[str, Tensor] = {}
    smooth: dict[str, Tensor] = {}
    for name, tensor in tensors(expert).items():
        new = re.sub(r"\.attn1\.to_([qkv])\.", r".attn1.to_qkv/\1.", name)
        new = new.replace(".ffn.net.0.", ".ffn.net_0.").replace(".ffn.net.2.", ".ffn.net_2.")
        new = new.replace(".to_out.0.", ".to_out.")
        loaded[new] = tensor
        if new.endswith(".mul_scale") and "to_qkv/" in new:
            first = smooth.setdefault(new.partition("/")[0], tensor)
            if not torch.equal(first, tensor):
                problems.append(f"{name}: Q, K and V must share one mul_scale")
    expected: Params = {}
    optional: set[str] = set()
    for block in range(config["num_layers"]):
        for name, (n, k) in linears(config, loaded).items():
            runtime = re.sub(r"attn1\.to_([qkv])", r"attn1.to_qkv/\1", name)
            runtime = (
                runtime.replace("net.0", "net_0").replace("net.2", "net_2").replace("to_out.0", "to_out")
            )
            layer = f"blocks.{block}.{runtime}"
            excluded = method is None or layer.partition("/")[0] in ignored
            expected |= omni_layer(layer, None if excluded else method, n, k)
            if method == "mxfp4" and not method_config.get("require_smooth_scale"):
                optional.add(f"{layer}.mul_scale")
            if not excluded and method in ("mxfp4", "mxfp4_dualscale") and f"{layer}.weight" in loaded:
                numbers = loaded[f"{layer}.weight"].float()
                if not bool(torch.isin(numbers, E2M1).all()):
                    problems.append(f"{layer}.weight has values that FP4 cannot represent")
    modules = {
        name.partition("/")[0].rpartition(".")[0] if "/" not in name else name.partition("/")[0]
        for name in expected
    }
    problems += [f"{name} in ignored_layers is not a layer" for name in ignored - modules]
    # It skips rotations with a warning: they cancel out in an attention that is not quantized.
    plain = {
        name: x
        for name, x in loaded.items()
        if not re.match(r"blocks\.\d+\.(attn\d\.(to_|[qk]_rot)|ffn)", name)
    }
    loaded = {name: x for name, x in loaded.items() if not name.endswith("_rot")}
    expected |= {
        name: (None, tuple(x.shape))
        for name, x in plain.items()
        if name.rpartition(".")[2] in ("weight", "bias")
    }
    expected |= {
        name: (None, tuple(x.shape)) for name, x in plain.items() if name.endswith("scale_shift_table")
    }
    return problems + list(missing_and_unread(expected, loaded, optional))


def omni_layer(layer: str, method: str | None, n: int, k: int) -> Params:
    """The parameters of one linear layer; q, k and v of self-attention are shards of one."""
    params: Params = {f"{layer}.weight": (None, (n, k)), f"{layer}.bias": (None, (n,))}
    if method == "int8":
        params[f"{layer}.weight"] = (torch.int8, (n, k))
        params[f"{layer}.weight_scale"] = (torch.float32, (n, 1))
    elif method is not None:
        params[f"{layer}.weight_scale"] = (torch.uint8, (n, math.ceil(k / 32)))
    if method in ("mxfp4", "mxfp4_dualscale"):
        params[f"{layer}.mul_scale"] = (torch.float32, (k,))
    if method == "mxfp4_dualscale":
        params[f"{layer}.weight_dual_scale"] = (torch.float32, (n, math.ceil(k / 512), 1))
    return params


# ---- SGLang 0.5.23 ------------------------------------------------------------------------------

SGLANG = {
    "attn1.to_q": "to_q",
    "attn1.to_k": "to_k",
    "attn1.to_v": "to_v",
    "attn1.to_out.0": "to_out",
    "attn2.to_out.0": "attn2.to_out",
    "ffn.net.0.proj": "ffn.fc_in",
    "ffn.net.2": "ffn.fc_out",
}
"""Diffusers name in a block -> SGLang's; other names are equal."""


def sglang_problems(expert: Path) -> list[str]:
    """For one transformer folder."""
    config = json.loads((expert / "config.json").read_bytes())
    types = json.loads((expert / "quant_model_description.json").read_bytes())
    loaded = tensors(expert)
    problems: list[str] = []
    expected: Params = {}
    for block in range(config["num_layers"]):
        for name, (n, k) in linears(config, loaded).items():
            layer = f"blocks.{block}.{name}"
            quant_type = types.get(f"{layer}.weight", "")
            expected |= {f"{layer}.weight": (None, (n, k)), f"{layer}.bias": (None, (n,))}
            if types.get(f"blocks.{block}.{SGLANG.get(name, name)}.weight") == "FLOAT":
                continue
            if quant_type == "W8A8_DYNAMIC":
                expected[f"{layer}.weight"] = (torch.int8, (n, k))
                expected |= {f"{layer}.weight_{x}": (None, (n, 1)) for x in ("scale", "offset")}
            elif quant_type == "W8A8_MXFP8" and k // 32 % 2 == 0:
                expected[f"{layer}.weight"] = (torch.float8_e4m3fn, (n, k))
                expected[f"{layer}.weight_scale"] = (torch.uint8, (n, k // 32))
            elif quant_type == "W4A4_MXFP4" and k // 32 % 2 == 0:
                expected[f"{layer}.weight"] = (torch.uint8, (n, k // 2))
                expected[f"{layer}.weight_scale"] = (torch.uint8, (n, k // 32))
                if f"{layer}.div.mul_scale" in types and f"{layer}.mul_scale" in types:
                    expected[f"{layer}.mul_scale"] = (torch.float32, (k,))
            else:
                problems.append(f"no scheme matches {layer}: {quant_type}, K = {k}")
    plain = {name for name in loaded if not re.match(r"blocks\.\d+\.(attn\d\.to_|ffn)", name)}
    expected |= {name: (None, tuple(loaded[name].shape)) for name in plain}
    problems += [f"{name} is not described" for name in loaded if name not in types]
    return problems + list(missing_and_unread(expected, loaded, set()))


# ---- MindIE-SD 3.1.0 ----------------------------------------------------------------------------

MINDIE = {
    "W8A8_DYNAMIC": {"weight": torch.int8, "weight_scale": torch.float32, "weight_offset": torch.float32},
    "W8A8_MXFP8": {"weight": torch.float8_e4m3fn, "weight_scale": torch.uint8},
    "W4A4_MXFP4": {"weight": torch.uint8, "weight_scale": torch.uint8},
    "W4A4_MXFP4_DUALSCALE": {
        "weight": torch.uint8,
        "weight_scale": torch.uint8,
        "weight_dual_scale": torch.float32,
    },
}
WAN = (
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "cross_attn.q",
    "cross_attn.k",
    "cross_attn.v",
)
WAN_LINEARS = (*WAN, "cross_attn.o", "ffn.0", "ffn.2")
OUTSIDE = (
    "text_embedding.0",
    "text_embedding.2",
    "time_embedding.0",
    "time_embedding.2",
    "time_projection.1",
)


def mindie_problems(folder: Path, blocks: int) -> list[str]:
    """For the folder of one expert."""
    (described,) = folder.glob("quant_model_description_*.json")
    types = json.loads(described.read_bytes())
    quant_type = types["model_quant_type"]
    weights = folder / f"quant_model_weight_{quant_type.lower()}.safetensors"
    problems = [] if quant_type in MINDIE else [f"{quant_type} is not an algorithm"]
    for file in (described, weights):
        if not file.is_file() or file.is_symlink():
            return [*problems, f"{file.name} is missing or a symlink"]
        if stat.S_IMODE(os.stat(file).st_mode) & ~0o640:
            problems.append(f"{file.name} has too many permissions")
    loaded, read = tensors(folder), set()
    names = [f"blocks.{b}.{x}" for b in range(blocks) for x in WAN_LINEARS] + [*OUTSIDE, "head.head"]
    for name in names:
        patterns = (f"{name}.linear.weight", f"{name}.weight", name, f"{name}.quant_type")
        value = next((types[p] for p in patterns if p in types), None)
        prefix = f"{name}.linear" if f"{name}.div.mul_scale" in loaded else name
        read |= {f"{name}.div.mul_scale", f"{prefix}.weight", f"{prefix}.bias"}
        if value == "FLOAT":
            continue
        for role, dtype in MINDIE.get(value or "", {}).items():
            read.add(f"{prefix}.{role}")
            if f"{prefix}.{role}" not in loaded or loaded[f"{prefix}.{role}"].dtype != dtype:
                problems.append(f"{prefix}.{role} is missing or of another dtype")
        if value not in MINDIE or loaded[f"{prefix}.bias"].dtype != torch.float32:
            problems.append(f"{name} is {value}")
    for block in range(blocks):
        attention = f"blocks.{block}.self_attn"
        read |= {f"{attention}.q_rot", f"{attention}.k_rot"}
    plain = re.compile(r"(.*\.)?(norm\w*|patch_embedding)\.(weight|bias)|(.*\.)?modulation")
    return problems + [f"{n} is not read" for n in loaded.keys() - read if not plain.fullmatch(n)]
