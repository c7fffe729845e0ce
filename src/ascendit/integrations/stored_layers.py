"""Which layers of a Diffusers folder are codes. Headers and JSON only.

Only what `ascendit quantize`, `ascendit repack` and `save_pretrained` write is taken; other layouts go
through `ascendit repack` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from ascendit.checkpoint.expert import ATTENTION_TENSOR, Expert, Layer, read_expert
from ascendit.checkpoint.layers import ROLES, possible
from ascendit.checkpoint.part import TRANSFORMER, Part, read_json
from ascendit.checkpoint.store import Shards, TensorInfo, listed
from ascendit.convert.canonical import layer_specs
from ascendit.errors import CheckpointError
from ascendit.model.load import say_attention
from ascendit.quant.schemes import FP8_TILES


def stored_layers(model: nn.Module, files: Sequence[Path]) -> dict[str, Layer]:
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
    say_attention(expert)
    return expert


def left_out(names: Iterable[str]) -> set[str]:
    """Tensors that only the attention of an NPU uses, and no model of Diffusers has."""
    return {name for name in names if ATTENTION_TENSOR.fullmatch(name)}


# ---- parts --------------------------------------------------------------------------------------


def _by_dtype(model: nn.Module, tensors: Mapping[str, TensorInfo]) -> dict[str, Layer]:
    """The layers of a model of any class: its shapes and the dtypes on disk tell what they are."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    marks = [name.rpartition(".") for name in tensors if name.endswith((".weight_scale", ".mul_scale"))]
    found: dict[str, Layer] = {}
    for name in dict.fromkeys(name for name, _, _ in marks):
        roles = {role: info for role in ROLES if (info := tensors.get(f"{name}.{role}")) is not None}
        options = possible(roles) if "weight" in roles else {}
        if name not in linears or not options:
            raise _foreign(name, "which is no linear layer of the model, or of no scheme that is known")
        scheme = next(iter(options))
        shape = (linears[name].out_features, linears[name].in_features)
        found[name] = Layer(name, scheme, shape, options[scheme], roles)
    return found


def _check_canonical(layer: Layer) -> None:
    """E-CKP-04 unless every tensor lies as `canonical.layer_specs` says."""
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
