"""Read one transformer in any layout and describe it with Diffusers names, from headers and JSON files only.

`read_expert` reads the formats of several tools and returns one `Expert`. The scheme of a layer is declared
by the manifest, else by `quantization_config` in config.json, else by the dtypes of its tensors; a
contradiction is an error that names both sources.

Without a Diffusers config, the config is derived from the shapes: original configs lack `text_dim`,
`patch_size` and the image layers, msModelSlim writes none for a cascade, single files have none. The shapes
determine everything except the number of heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ascendit.checkpoint.component import TRANSFORMER, Part
from ascendit.checkpoint.layer_format import FLOAT_DTYPES, Layer, read_layers
from ascendit.checkpoint.part_configs import TransformerConfig
from ascendit.checkpoint.part_names import other_model
from ascendit.checkpoint.quant_metadata import (
    CONFIG_KEY,
    Manifest,
    QuantizationConfig,
    find_manifest,
    read_manifest,
    read_quantization_config,
)
from ascendit.checkpoint.stored_kinds import interpret, kinds_text, method_text, naming_kind
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.weight_files import Shards
from ascendit.errors import CheckpointError
from ascendit.family import WanConfig
from ascendit.names import (
    IGNORED_PARTS,
    MAX_LAYERS,
    Naming,
    Shapes,
    bad_value,
    canonical,
    expected_tensors,
    listed,
    naming_of,
    on_disk,
    whole_number,
)
from ascendit.quant.schemes import FP8_TILES
from ascendit.report import shell_line

Origin = Literal["float", "msmodelslim", "vllm-omni", "sglang", "ascendit", "fp8-block", "turbodiffusion"]
ATTENTION_TENSOR = re.compile(r"(blocks\.[0-9]+\.attn[12]\.)(?:[qk]_rot|fa3?_[qkv]\.(?:scale|offset))")
"""Tensors of a quantized attention that the config does not imply: rotations and static scales."""

HEAD_DIM = WanConfig.attention_head_dim
"""Head size of every published Wan model."""


@dataclass(frozen=True)
class Expert:
    """One transformer. `tensors` and `layers` have Diffusers names; `TensorInfo.name` is the stored name."""

    name: str
    """`transformer` or `transformer_2`."""
    path: Path
    """Its folder, or its single file."""
    config: dict[str, Any]
    """Config of a WanTransformer3DModel, without `quantization_config`."""
    config_problem: str | None
    """Why a value, such as the number of heads, could not be determined; it is null in `config`."""
    naming: Naming
    tensors: dict[str, TensorInfo]
    """All tensors in the order of the files, except those that Diffusers ignores."""
    layers: dict[str, Layer]
    """The quantized and smoothed layers; the other linear layers are floating point."""
    manifest: dict[str, str] | None
    """Entries of tensors, of attentions and of the file, in this order."""
    attention: dict[str, str]
    """`<attn>.quant_type` -> its value."""
    quantization_config: dict[str, Any] | None
    """`quantization_config` of config.json, as stored."""
    origin: Origin
    kinds: tuple[str, ...] = ()
    """The kinds of its file, keys of `kind_table.KINDS`."""
    notes: tuple[str, ...] = ()
    """Tensors of the file that are not used."""

    @property
    def smoothed(self) -> tuple[str, ...]:
        """The layers with a `mul_scale`."""
        return tuple(name for name, layer in self.layers.items() if "mul_scale" in layer.tensors)


class TensorMismatch(CheckpointError):
    """The error E-CKP-04 for tensors that do not match the config. `checks` has all their names."""

    def __init__(self, got: str, *, needs: str, checks: Mapping[str, tuple[str, ...]]) -> None:
        fix = "download the weights and config.json again, both from the same revision"
        if [name for names in checks.values() for name in names] == ["patch_embedding.weight"]:
            fix = "download a GGUF file with this tensor; ComfyUI-GGUF adds it with tools/fix_5d_tensors.py"
        super().__init__(got, needs=needs, fix=fix, code="E-CKP-04")
        self.checks = checks
        """missing, unexpected, misshapen, mistyped -> stored names."""


def read_expert(part: Part, shards: Shards | None = None) -> Expert:
    """Read the headers and JSON files of one transformer, and check that they are consistent.

    `shards`: its headers, if they have been read. Raises CheckpointError: E-CKP-02, -03, -04 and -06 for
    damaged files, as in `Shards.open`; E-CKP-01 for tensors of another model; E-CKP-09 if two tensors map to
    one name; E-CKP-08 for unpaired weights and scales; E-CKP-07 if manifest, quantization_config and dtypes
    contradict each other; E-CKP-04 for tensors that are missing, unexpected, of the wrong shape or dtype, or
    not listed in the manifest; and the errors of `stored_kinds.interpret`.
    """
    # A manifest next to a single file may belong to other weights.
    path = None if part.files == (part.path,) else find_manifest(part.folder)
    shards = shards or Shards.from_part(part)
    read = interpret(shards.tensors, part.config, part=part.name, described=path is not None)
    stored = read.tensors
    stored_as = kinds_text(read.kinds) or method_text(part.config)
    label = f"{part.path} ({stored_as})" if stored_as else f"{part.path}"
    if (naming := naming_of(stored)) is None:
        raise CheckpointError(
            f"{label} is {other_model(stored) or 'not a Wan transformer'}; it has {len(stored)} tensors: "
            + listed(stored, 3),
            needs="tensors such as patch_embedding.weight and blocks.0.self_attn.q.weight",
            fix="pass the file or folder of the diffusion transformer",
            code="E-CKP-01",
        )
    tensors = _canonical(stored, naming)
    manifest = read_manifest(path, naming) if path else None
    quantization = read_quantization_config(part.config, tolerant=manifest is not None)
    declared = manifest.declared_schemes() if manifest else {}
    declared |= read.declared({name: canonical(name, naming) for name in stored} if read.schemes else {})
    with naming_kind(stored_as):
        schemes = quantization.declared_schemes(tensors) if quantization else {}
        layers = read_layers(tensors, schemes | declared)
    config, problem = _config(part, tensors, layers, label)
    expected = expected_tensors(_config_with_heads(config, tensors))
    layers = {name: _with_odd_columns(layer, expected) for name, layer in layers.items()}
    _check_tensors(label, config, expected, naming, tensors, layers)
    if manifest:
        manifest.check(tensors, layers)
    if quantization:
        quantization.check(tensors, layers, declared)
    return Expert(
        name=part.name,
        path=part.path,
        config=config,
        config_problem=problem,
        naming=naming,
        tensors=tensors,
        layers=layers,
        manifest=manifest.entries() if manifest else None,
        attention=manifest.attention if manifest else {},
        quantization_config=part.config.get(CONFIG_KEY),
        origin="turbodiffusion" if read.schemes else _origin(part, naming, layers, manifest, quantization),
        kinds=read.kinds,
        notes=read.notes,
    )


def model_config(expert: Expert) -> WanConfig:
    """The config to build the transformer with.

    Raises CheckpointError (E-CKP-06) if the number of heads is unknown, and the errors of
    `WanConfig.from_dict`.
    """
    if expert.config.get("num_attention_heads", 1) is None:
        raise CheckpointError(
            f"{expert.path}: {expert.config_problem or 'config.json lacks the number of heads'}",
            needs="the config.json of the model",
            fix="copy config.json next to the weights, or add it: "
            f"{shell_line(['ascendit', 'repack', str(expert.path)])} --base MODEL -o DST",
            code="E-CKP-06",
        )
    return WanConfig.from_dict(expert.config)


def _canonical(stored: Mapping[str, TensorInfo], naming: Naming) -> dict[str, TensorInfo]:
    """The tensors by Diffusers name, without those that Diffusers ignores because the model lacks them."""
    tensors: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        new = canonical(name, naming)
        if any(f".{word}." in new for word in IGNORED_PARTS):
            continue
        if new in tensors:
            raise CheckpointError(
                f"{tensors[new].name} and {name} both map to {new}",
                needs="each tensor once, under one name",
                fix="remove one of the two; they are from different tools or versions",
                code="E-CKP-09",
            )
        tensors[new] = info
    return tensors


def _config(
    part: Part, tensors: Mapping[str, TensorInfo], layers: Mapping[str, Layer], label: str
) -> tuple[dict[str, Any], str | None]:
    """(Diffusers config, problem). A stored Diffusers config is checked, and used unchanged."""
    original = not part.config or part.config.get("_class_name", TRANSFORMER) != TRANSFORMER
    if not original:
        config = {key: value for key, value in part.config.items() if key != CONFIG_KEY}
        TransformerConfig.read(part.folder / "config.json", config)
        WanConfig.from_dict(config)
        return config, None
    _check_patch(label, tensors)
    return diffusers_config(part.config, _decoded_shapes(tensors, layers))


def _check_patch(label: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise TensorMismatch for a patch embedding that does not fit its bias and the output layer, because a
    config that is derived from it would be wrong. The metadata of a GGUF file may have another shape of it.
    """
    patch, *others = (
        tensors.get(name) for name in ("patch_embedding.weight", "patch_embedding.bias", "proj_out.weight")
    )
    bias, out = others
    if patch is None or len(patch.shape) != 5:
        return
    volume = math.prod(patch.shape[2:])
    fits = bias is None or bias.shape == patch.shape[:1]
    if fits and (out is None or not out.shape or (volume and out.shape[0] % volume == 0)):
        return
    beside = ", ".join(f"{info.name} {list(info.shape)}" for info in others if info)
    raise TensorMismatch(
        f"{label}: {patch.name} has the shape {list(patch.shape)}, which does not fit {beside}",
        needs="a patch embedding [N, C, T, H, W] with a bias [N], and T * H * W rows per output channel",
        checks={"misshapen": (patch.name,)},
    )


def _check_tensors(
    label: str,
    config: Mapping[str, Any],
    expected: Shapes,
    naming: Naming,
    tensors: Mapping[str, TensorInfo],
    layers: Mapping[str, Layer],
) -> None:
    """Raise TensorMismatch unless the decoded tensors are the expected ones."""
    shapes = _decoded_shapes(tensors, layers)
    head_dim = config.get("attention_head_dim")
    own = {f"{layer.name}.{role}" for layer in layers.values() for role in layer.tensors}
    extra = [name for name in tensors if name not in expected and name not in own]
    rotations = {
        name: tensors[name]
        for name in extra
        if (match := ATTENTION_TENSOR.fullmatch(name)) and f"{match[1]}to_q.weight" in expected
    }
    common = [name for name in tensors if name in expected]
    problems = {
        "missing": [on_disk(name, naming) for name in expected if name not in tensors],
        "unexpected": [tensors[name].name for name in extra if name not in rotations],
        "misshapen": [
            f"{tensors[name].name} {list(shapes[name])}, not {list(expected[name])}"
            for name in common
            if shapes[name] != expected[name]
        ]
        + _rotation_problems(rotations, head_dim),
        "mistyped": [
            f"{tensors[name].name} {tensors[name].dtype}"
            for name in (*common, *(n for n in rotations if n.endswith("_rot")))
            if name not in own and tensors[name].dtype not in FLOAT_DTYPES
        ],
    }
    if wrong := [f"{len(names)} {kind} ({listed(names)})" for kind, names in problems.items() if names]:
        raise TensorMismatch(
            f"{label} does not match the {TRANSFORMER} of its config: {'; '.join(wrong)}",
            needs=f"exactly the {len(expected)} tensors of this {TRANSFORMER}, floating point or quantized",
            checks={kind: tuple(names) for kind, names in problems.items()},
        )


def _with_odd_columns(layer: Layer, expected: Shapes) -> Layer:
    """The layer with its odd K, if the model has one: the last packed byte of each row then holds one
    element.
    """
    rows, columns = layer.shape
    if layer.packing == "packed" and expected.get(f"{layer.name}.weight") == (rows, columns - 1):
        return replace(layer, shape=(rows, columns - 1))
    return layer


def _config_with_heads(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """`config`, with one head of the width of the model if the number of heads is unknown."""
    if config.get("num_attention_heads", 1) is not None:
        return dict(config)
    patch = tensors.get("patch_embedding.weight")
    width = (*(patch.shape if patch else ()), HEAD_DIM)[0]
    return {**config, "num_attention_heads": 1, "attention_head_dim": width}


def _rotation_problems(rotations: Mapping[str, TensorInfo], head_dim: object) -> list[str]:
    """Problems with rotation matrices: not [D, D] for head size D, or missing for Q or K."""
    wrong = []
    for name, info in rotations.items():
        if not name.endswith("_rot"):
            continue
        size = head_dim if isinstance(head_dim, int) else (info.shape[0] if info.shape else 0)
        if info.shape != (size, size):
            wrong.append(f"{info.name} {list(info.shape)}, not {[size, size]}")
        other = name[: -len("q_rot")] + ("k_rot" if name.endswith("q_rot") else "q_rot")
        if other not in rotations:
            wrong.append(f"{info.name} without its {other.rpartition('.')[2]}")
    return wrong


def _origin(
    part: Part,
    naming: Naming,
    layers: Mapping[str, Layer],
    manifest: Manifest | None,
    quantization: QuantizationConfig | None,
) -> Origin:
    """The tool that wrote the checkpoint."""
    if not layers and manifest is None:
        return "float"
    if part.files != (part.path,) and any(
        (folder / "ascendit.json").is_file() for folder in (part.folder, part.folder.parent)
    ):
        return "ascendit"
    if any(layer.scheme == FP8_TILES for layer in layers.values()):
        return "fp8-block"
    if quantization:
        return "vllm-omni"
    return "sglang" if naming == "diffusers" and manifest else "msmodelslim"


# ---- decoded shapes -----------------------------------------------------------------------------


def shapes_of(expert: Expert) -> dict[str, tuple[int, ...]]:
    """Diffusers name -> decoded shape of every weight, bias and table."""
    return _decoded_shapes(expert.tensors, expert.layers)


def _decoded_shapes(
    tensors: Mapping[str, TensorInfo], layers: Mapping[str, Layer]
) -> dict[str, tuple[int, ...]]:
    scales = {f"{name}.{role}" for name, layer in layers.items() for role in layer.tensors}
    scales -= {f"{name}.{role}" for name in layers for role in ("weight", "bias")}
    shapes: dict[str, tuple[int, ...]] = {n: info.shape for n, info in tensors.items() if n not in scales}
    return shapes | {f"{name}.weight": layer.shape for name, layer in layers.items()}


def num_weights(expert: Expert) -> int:
    """Number of parameters of the model, without scales."""
    return sum(math.prod(shape) for shape in shapes_of(expert).values())


# ---- a Diffusers config from an original one, and from shapes -----------------------------------

_SAME = ("qk_norm", "rope_max_seq_len", "added_kv_proj_dim", "image_dim", "pos_embed_seq_len")
_FIXED: dict[str, Any] = {"_class_name": TRANSFORMER, **{key: getattr(WanConfig, key) for key in _SAME}}
"""Values of every Wan model, and null for optional layers."""


def diffusers_config(raw: Mapping[str, Any], shapes: Shapes) -> tuple[dict[str, Any], str | None]:
    """Return (config of a WanTransformer3DModel, reason why a value could not be determined).

    `raw`: an original Wan config, or empty. `shapes`: decoded shapes by Diffusers name. Raises
    CheckpointError: E-CKP-04 if the two contradict each other, E-CKP-06 for a value that is not a number.
    """
    derived = _from_shapes(shapes)
    stored = _from_wan(raw)
    if wrong := [
        f"{key} = {value} in config.json, {derived[key]} from the shapes"
        for key, value in stored.items()
        if derived.get(key) is not None and derived[key] != value
    ]:
        raise CheckpointError(
            f"config.json and the tensors contradict each other: {listed(wrong)}",
            needs="a config.json of the same model as the weights",
            fix="download the weights and config.json again, both from the same revision",
            code="E-CKP-04",
        )
    sizes = {**stored, **{key: value for key, value in derived.items() if value is not None}}
    heads, head_dim, problem = _heads(raw, sizes.pop("dim", None), shapes)
    config = {**_FIXED, **sizes, "eps": _eps(raw)}
    config |= {"num_attention_heads": heads, "attention_head_dim": head_dim}
    return dict(sorted(config.items())), problem


def _from_wan(raw: Mapping[str, Any]) -> dict[str, int]:
    """The dimensions in an original config, by their Diffusers keys."""
    keys = {"dim": "dim", "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "num_layers": "num_layers"}
    keys |= {"in_dim": "in_channels", "out_dim": "out_channels", "text_dim": "text_dim"}
    return {new: whole_number(old, raw[old]) for old, new in keys.items() if old in raw}


def _from_shapes(shapes: Shapes) -> dict[str, Any]:
    """The values that follow from the shapes; None if unknown."""

    def size(name: str, axis: int, rank: int = 2) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] if len(shape) == rank else None

    embedder, block = "condition_embedder", "blocks.0"
    patch = shapes.get("patch_embedding.weight", ())
    patch_size = list(patch[2:]) if len(patch) == 5 else list(WanConfig.patch_size)
    out, volume = size("proj_out.weight", 0), math.prod(patch_size)
    numbers = [
        int(name.split(".", 2)[1]) for name in shapes if name.startswith("blocks.") and _numbered(name)
    ]
    return {
        "dim": size("patch_embedding.weight", 0, 5) or size("patch_embedding.bias", 0, 1),
        "in_channels": size("patch_embedding.weight", 1, 5),
        "out_channels": out // volume if out and volume else None,
        "patch_size": patch_size,
        "freq_dim": size(f"{embedder}.time_embedder.linear_1.weight", 1),
        "text_dim": size(f"{embedder}.text_embedder.linear_1.weight", 1),
        "ffn_dim": size(f"{block}.ffn.net.0.proj.weight", 0),
        "num_layers": max(numbers) + 1 if numbers else None,
        "cross_attn_norm": f"{block}.norm2.weight" in shapes,
        "image_dim": size(f"{embedder}.image_embedder.norm1.weight", 0, 1),
        "added_kv_proj_dim": size(f"{block}.attn2.add_k_proj.weight", 1),
        "pos_embed_seq_len": size(f"{embedder}.image_embedder.pos_embed", 1, 3),
    }


def _numbered(name: str) -> bool:
    number = name.split(".", 2)[1]
    return number.isascii() and number.isdigit() and len(number) <= len(str(MAX_LAYERS))


def _heads(
    raw: Mapping[str, Any], dim: int | None, shapes: Shapes
) -> tuple[int | None, int | None, str | None]:
    """(heads, head size, problem), from the config, a rotation matrix, or the head size of all Wan models."""
    if dim is None:
        return None, None, "the number of attention heads is unknown"
    if "num_heads" in raw:
        heads = whole_number("num_heads", raw["num_heads"])
        if dim % heads:
            raise bad_value("num_heads", heads, f"a divisor of the width {dim}")
        return heads, dim // heads, None
    rotations = (shape[0] for name, shape in shapes.items() if name.endswith((".q_rot", ".k_rot")) and shape)
    head_dim = next((size for size in rotations if size and dim % size == 0), HEAD_DIM)
    if dim % head_dim == 0:
        return dim // head_dim, head_dim, None
    problem = (
        f"the number of attention heads is unknown: it is in no config.json, and the width {dim} is not a "
        f"multiple of {HEAD_DIM}, the head size of every published Wan model"
    )
    return None, None, problem


def _eps(raw: Mapping[str, Any]) -> float:
    value = raw.get("eps", WanConfig.eps)
    if type(value) not in (int, float) or not 0 < value < 1:
        raise bad_value("eps", value, "a small number above 0")
    return float(value)
