"""The quantized and smoothed layers of a Diffusers folder, from headers and JSON only.

Reads only the layout of `ascendit quantize`, `ascendit repack` and `save_pretrained`; run `ascendit repack`
on other layouts first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from ascendit.checkpoint.component import TRANSFORMER, Part, read_json
from ascendit.checkpoint.layer_format import STORED_ROLES, Layer, possible_schemes
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.transformer import read_expert
from ascendit.checkpoint.weight_files import Shards
from ascendit.errors import CheckpointError
from ascendit.names import listed
from ascendit.quant.attention_schemes import warn_about_bf16
from ascendit.quant.schemes import FP8_TILES, SCHEMES
from ascendit.weights.applied_recipe import attention_schemes


def read_stored_layers(model: nn.Module, files: Sequence[Path]) -> dict[str, Layer]:
    """The quantized and smoothed layers by name; {} if all weights are floats.

    Raises the errors of `read_expert` for a Wan transformer; CheckpointError (E-CKP-04) for layers in another
    layout, and for quantized weights that do not belong to a linear layer of `model`.
    """
    if not files or any(file.suffix != ".safetensors" for file in files):
        return {}
    if type(model).__name__ == TRANSFORMER:
        folder = files[0].parent  # manifest, config and headers must agree
        config = read_json(folder / "config.json")
        expert = read_expert(
            Part("transformer", folder, "diffusers", TRANSFORMER, config, files=tuple(files))
        )
        warn_about_bf16(expert.name, attention_schemes(expert, None).values())
        layers = expert.layers
    else:
        layers = _by_dtype(model, Shards.from_files(files).tensors)
    for layer in layers.values():
        _check_canonical(layer)
    return dict(layers)


def _by_dtype(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> dict[str, Layer]:
    """The layers of a model of any class, identified by its shapes and the stored dtypes."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    scales = [name.rpartition(".") for name in tensors if name.endswith((".weight_scale", ".mul_scale"))]
    layers: dict[str, Layer] = {}
    for name in dict.fromkeys(name for name, _, _ in scales):
        roles = {role: info for role in STORED_ROLES if (info := tensors.get(f"{name}.{role}")) is not None}
        options = possible_schemes(roles) if "weight" in roles else {}
        if name not in linears or not options:
            raise _unsupported(name, "not a linear layer of the model, or of an unknown scheme")
        scheme = next(iter(options))
        shape = (linears[name].out_features, linears[name].in_features)
        layers[name] = Layer(name, scheme, shape, options[scheme], roles)
    return layers


def _check_canonical(layer: Layer) -> None:
    """Raise CheckpointError (E-CKP-04) unless all tensors have the names, shapes and dtypes of a canonical
    folder.
    """
    if layer.scheme == FP8_TILES:
        raise _unsupported(layer.name, "FP8 in tiles of 128 x 128")
    (n, k), floats = layer.shape, layer.tensors["weight"].dtype
    expected = SCHEMES[layer.scheme].tensors(n, k) or {"weight": (floats, (n, k)), "bias": (floats, (n,))}
    expected = {"bias": ("F32", (n,)), "mul_scale": ("F32", (k,))} | expected
    stored = {role: (info.dtype, info.shape) for role, info in layer.tensors.items()}
    problems = [f"{r} {stored[r]}, not {expected.get(r)}" for r in stored if stored[r] != expected.get(r)]
    if problems or any(info.name != f"{layer.name}.{role}" for role, info in layer.tensors.items()):
        raise _unsupported(layer.name, listed(problems) or "its tensors have other names")


def _unsupported(name: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {problem}",
        needs="quantized layers in ascendit's own layout",
        fix="run ascendit repack SRC -o DST, and load DST",
        code="E-CKP-04",
    )
