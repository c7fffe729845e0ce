"""Quantized layers of a Diffusers folder: which there are, and each of its tensors when they have arrived.

Only what `ascendit quantize`, `ascendit repack` and `save_pretrained` write is taken; other layouts go
through `ascendit repack` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ascendit.checkpoint.component import TRANSFORMER, Part, read_json
from ascendit.checkpoint.layer_format import (
    STORED_ROLES,
    Layer,
    check_float_scale,
    check_positive,
    check_scale_bytes,
    check_zero,
    possible,
)
from ascendit.checkpoint.reader import TORCH_DTYPES, Shards, TensorInfo, as_bytes
from ascendit.checkpoint.transformer import ATTENTION_TENSOR, Expert, read_expert
from ascendit.errors import CheckpointError
from ascendit.model.linear import QuantLinear, SmoothLinear, fused_linears
from ascendit.names import listed
from ascendit.ops.operators import Schemes
from ascendit.quant.recipe import say_attention
from ascendit.quant.schemes import FP8_TILES
from ascendit.weights.engine_formats import layer_specs

# ---- which layers are quantized: headers and JSON only ------------------------------------------


def read_stored_layers(model: nn.Module, files: Sequence[Path]) -> dict[str, Layer]:
    """Layer -> what lies on disk, of those that are codes or smoothed; {} where all are plain floats.

    Headers and JSON only. CheckpointError: as `read_expert` for a Wan transformer; E-CKP-04 for layers that
    lie in another layout, and for codes of what is no linear layer of `model`.
    """
    if not files or any(file.suffix != ".safetensors" for file in files):
        return {}
    if type(model).__name__ == TRANSFORMER:
        expert = read_stored_expert(files)
        found = expert.layers
    else:
        found = _by_dtype(model, Shards.of_files(files).tensors)
    for layer in found.values():
        _check_canonical(layer)
    return dict(found)


def read_stored_expert(files: Sequence[Path]) -> Expert:
    """A Wan transformer by its files: manifest, config and headers must agree."""
    folder = files[0].parent
    config = read_json(folder / "config.json")
    part = Part("transformer", folder, "diffusers", TRANSFORMER, config, files=tuple(files))
    expert = read_expert(part)
    say_attention(expert.name, expert.attention.values(), expert.path)
    return expert


def left_out(names: Iterable[str]) -> set[str]:
    """Tensors that only the attention of an NPU uses, and no model of Diffusers has."""
    return {name for name in names if ATTENTION_TENSOR.fullmatch(name)}


def _by_dtype(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> dict[str, Layer]:
    """The layers of a model of any class: its shapes and the dtypes on disk tell what they are."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    marks = [name.rpartition(".") for name in tensors if name.endswith((".weight_scale", ".mul_scale"))]
    found: dict[str, Layer] = {}
    for name in dict.fromkeys(name for name, _, _ in marks):
        roles = {role: info for role in STORED_ROLES if (info := tensors.get(f"{name}.{role}")) is not None}
        options = possible(roles) if "weight" in roles else {}
        if name not in linears or not options:
            raise _foreign(name, "which is no linear layer of the model, or of no scheme that is known")
        scheme = next(iter(options))
        shape = (linears[name].out_features, linears[name].in_features)
        found[name] = Layer(name, scheme, shape, options[scheme], roles)
    return found


def _check_canonical(layer: Layer) -> None:
    """E-CKP-04 unless every tensor lies as `engine_formats.layer_specs` says."""
    if layer.scheme == FP8_TILES:
        raise _foreign(layer.name, "FP8 in tiles of 128 x 128")
    have = {role: (info.dtype, info.shape) for role, info in layer.tensors.items()}
    float_dtype = layer.tensors["weight"].dtype
    specs = layer_specs(
        layer.name,
        layer.scheme,
        layer.shape,
        bias="bias" in have,
        mul_scale="mul_scale" in have,
        float_dtype=float_dtype,
    )
    wanted = {spec.name.rpartition(".")[2]: (spec.dtype, spec.shape) for spec in specs}
    have.setdefault("weight_offset", wanted.get("weight_offset", ("", ())))
    wrong = [
        f"{role} {have.get(role)}, not {want}" for role, want in wanted.items() if have.get(role) != want
    ]
    if wrong or any(info.name != f"{layer.name}.{role}" for role, info in layer.tensors.items()):
        raise _foreign(layer.name, listed(wrong) or "under other names")


def _foreign(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {what}",
        needs="layers on codes as ascendit writes them",
        fix="ascendit repack SRC -o DST, and load DST",
        code="E-CKP-04",
    )


# ---- a layer while its tensors arrive -----------------------------------------------------------


class Awaited(nn.Module):
    """In place of a quantized layer until its tensors are there: parameters on the meta device."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        super().__init__()
        for role, info in tensors.items():
            dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
            empty = torch.empty(info.shape, dtype=dtype, device="meta")
            self.register_parameter(role, nn.Parameter(empty, requires_grad=False))


def layer_from(
    scheme: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], schemes: Schemes, dtype: torch.dtype
) -> QuantLinear | SmoothLinear:
    """The layer of its stored tensors, for an activation of `dtype`."""
    place = schemes.device.torch_name
    smooth = tensors["mul_scale"].to(place) if "mul_scale" in tensors else None
    if scheme == "bf16":
        assert smooth is not None
        bias = tensors["bias"].to(place, dtype) if "bias" in tensors else None
        return SmoothLinear(tensors["weight"].to(place, dtype), bias, smooth)
    n, k = shape
    return fused_linears(tensors, [n], scheme, schemes, width=k, compute_dtype=dtype, mul_scale=smooth)[0]


def check_values(name: str, tensor: Tensor) -> None:
    """CheckpointError E-CKP-08 for scales, offsets and factors that cannot be."""
    role = name.rpartition(".")[2]
    if role not in ("weight_scale", "weight_dual_scale", "weight_offset", "mul_scale"):
        return
    data = as_bytes(tensor.contiguous())
    if tensor.dtype == torch.uint8:
        check_scale_bytes(data, name)
    elif role == "weight_offset":
        check_zero(data, "F32", name)
    elif role == "mul_scale":
        check_positive(data, "F32", name)
    else:
        check_float_scale(data, "F32", name)
