"""Which layers of a Diffusers folder are quantized or smoothed, by headers and JSON only.

Only what `ascendit quantize`, `ascendit repack` and `save_pretrained` write is taken; other layouts go
through `ascendit repack` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from ascendit.checkpoint.component import TRANSFORMER, Part, read_json
from ascendit.checkpoint.layer_format import STORED_ROLES, Layer, possible
from ascendit.checkpoint.reader import Shards, TensorInfo
from ascendit.checkpoint.transformer import read_expert
from ascendit.errors import CheckpointError
from ascendit.names import listed
from ascendit.quant.layer_rules import warn_about_attention
from ascendit.quant.schemes import FP8_TILES, SCHEMES


def read_stored_layers(model: nn.Module, files: Sequence[Path]) -> dict[str, Layer]:
    """Layer -> its tensors on disk, of those that are quantized or smoothed; {} if all are plain floats.

    CheckpointError: as `read_expert` for a Wan transformer; E-CKP-04 for layers in another layout, and for
    codes of what is no linear layer of `model`.
    """
    if not files or any(file.suffix != ".safetensors" for file in files):
        return {}
    if type(model).__name__ == TRANSFORMER:
        folder = files[0].parent  # manifest, config and headers must agree
        config = read_json(folder / "config.json")
        expert = read_expert(
            Part("transformer", folder, "diffusers", TRANSFORMER, config, files=tuple(files))
        )
        warn_about_attention(expert.name, expert.attention.values(), expert.path)
        found = expert.layers
    else:
        found = _by_dtype(model, Shards.of_files(files).tensors)
    for layer in found.values():
        _check_canonical(layer)
    return dict(found)


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
    """E-CKP-04 unless every tensor is named, shaped and stored as in a canonical folder."""
    if layer.scheme == FP8_TILES:
        raise _foreign(layer.name, "FP8 in tiles of 128 x 128")
    (n, k), floats = layer.shape, layer.tensors["weight"].dtype
    wanted = SCHEMES[layer.scheme].tensors(n, k) or {"weight": (floats, (n, k)), "bias": (floats, (n,))}
    wanted = {"bias": ("F32", (n,)), "mul_scale": ("F32", (k,))} | wanted
    have = {role: (info.dtype, info.shape) for role, info in layer.tensors.items()}
    wrong = [f"{r} {have[r]}, not {wanted.get(r)}" for r in have if have[r] != wanted.get(r)]
    if wrong or any(info.name != f"{layer.name}.{role}" for role, info in layer.tensors.items()):
        raise _foreign(layer.name, listed(wrong) or "under other names")


def _foreign(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: {what}",
        needs="layers on codes as ascendit writes them",
        fix="ascendit repack SRC -o DST, and load DST",
        code="E-CKP-04",
    )
