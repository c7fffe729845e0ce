"""Read and write the JSON metadata of quantized weights: the manifest, and `quantization_config`.

The manifest, `quant_model_description*.json`, is a flat JSON object. Tensor names map to a type (`FLOAT`,
`W8A8_MXFP8`, ...); `<attn>.quant_type` is the type of an attention; all other keys (`model_quant_type`,
`version`, `group_size`, ...) describe the file.

The `quantization_config` of config.json, as in vLLM-Omni and FP8 checkpoints, sets one scheme for all linear
layers of the blocks except `ignored_layers`. It is ignored unless it states that the weights on disk are
already quantized.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendit.checkpoint.component import read_json
from ascendit.checkpoint.layer_format import DeclaredScheme, Layer, disagreement
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.errors import CheckpointError
from ascendit.names import (
    QUANTIZED_ROLES,
    ROLES,
    Naming,
    canonical,
    is_block_linear,
    listed,
    problem_counts,
    sort_names,
    to_wan,
)
from ascendit.quant.fusion import layers_of_module
from ascendit.quant.schemes import FP8_TILES, MANIFEST_SCHEMES, QUANTIZED, SCHEMES

# ---- the manifest -------------------------------------------------------------------------------

MANIFEST_FILE = "quant_model_description.json"
MANIFEST_GLOB = "quant_model_description*.json"
"""msModelSlim appends the type: `quant_model_description_w8a8_mxfp8.json`."""
FLOAT = SCHEMES["bf16"].manifest
STATIC_ATTENTION = "FAQuant"
"""The type of the static scales of an attention, such as `fa3_q.scale`."""
QUANT_TYPE = ".quant_type"


@dataclass(frozen=True)
class Manifest:
    """A manifest with Diffusers names."""

    path: Path
    tensors: dict[str, str]
    """Tensor -> type, as written."""
    attention: dict[str, str]
    """`<attn>.quant_type` -> its value."""
    metadata: dict[str, str]
    """Keys that describe the file; values that are not strings, as JSON."""

    def entries(self) -> dict[str, str]:
        """All entries in one dict, as in the file."""
        return {**self.tensors, **self.attention, **self.metadata}

    def declared_schemes(self) -> dict[str, DeclaredScheme]:
        """Layer -> the scheme of its weight."""
        suffix = ".weight"
        return {
            name.removesuffix(suffix): DeclaredScheme(MANIFEST_SCHEMES[kind], f"{self.path.name} says {kind}")
            for name, kind in self.tensors.items()
            if name.endswith(suffix) and kind in MANIFEST_SCHEMES
        }

    def check(self, tensors: Mapping[str, TensorInfo], layers: Mapping[str, Layer]) -> None:
        """Raise CheckpointError unless the manifest lists exactly `tensors` (E-CKP-04), with their types
        (E-CKP-07).
        """
        unlisted = [name for name in tensors if name not in self.tensors]
        absent = [name for name in self.tensors if name not in tensors]
        parents = _parents(tensors)
        attentions = {name for name in parents if name.endswith((".attn1", ".attn2"))}
        absent += [name for name in self.attention if name.removesuffix(QUANT_TYPE) not in attentions]
        kinds = {"tensors that it does not list": unlisted, "entries without a tensor": absent}
        if problems := problem_counts(kinds):
            raise CheckpointError(
                f"{self.path} does not match the weights: {problems}",
                needs="a manifest that lists every tensor and nothing else",
                fix="use the manifest and the weights of the same export, or export again",
                code="E-CKP-04",
            )
        if wrong := [
            text for name, kind in self.tensors.items() if (text := self._mismatch(name, kind, layers))
        ]:
            raise disagreement(wrong)

    def _mismatch(self, name: str, kind: str, layers: Mapping[str, Layer]) -> str:
        """Describe the problem with one entry; "" if it is valid."""
        owner, _, role = name.rpartition(".")
        layer = layers.get(owner)
        scheme = layer.scheme if layer else "bf16"
        declared = MANIFEST_SCHEMES.get(kind, "bf16")
        if declared == scheme and (role in QUANTIZED_ROLES or declared == "bf16"):
            return ""
        if role not in QUANTIZED_ROLES and declared in (
            "bf16",
            scheme,
        ):  # AscendV1: biases with the layer's type
            return ""
        return f"{name}: {self.path.name} says {kind}, but the layer is {scheme}"


def _parents(tensors: Iterable[str]) -> set[str]:
    """All parent modules of the tensors: `blocks`, `blocks.0`, `blocks.0.attn1`, ..."""
    return {name[:i] for name in tensors for i, char in enumerate(name) if char == "."}


def find_manifest(folder: Path) -> Path | None:
    """The manifest in `folder`, if any. Raises CheckpointError (E-CKP-07) if there are several."""
    manifests = sorted(p for p in folder.glob(MANIFEST_GLOB) if p.is_file())
    if len(manifests) > 1:
        raise CheckpointError(
            f"{folder} has {len(manifests)} manifests: {', '.join(p.name for p in manifests)}",
            needs="one manifest, for the weights in the folder",
            fix="move the manifests of other exports to separate folders",
            code="E-CKP-07",
        )
    return manifests[0] if manifests else None


def read_manifest(path: Path, naming: Naming) -> Manifest:
    """Read a manifest.

    Raises CheckpointError: E-CKP-06 if it is damaged, E-CKP-04, which names the layers, for unknown types,
    E-CKP-09 if two entries map to the same tensor.
    """
    tensors: dict[str, str] = {}
    attention: dict[str, str] = {}
    metadata: dict[str, str] = {}
    written: dict[str, str] = {}
    for key, value in read_json(path).items():
        name = canonical(key, naming)
        if "." not in key and to_wan(name) is None:
            metadata[key] = value if isinstance(value, str) else json.dumps(value)
            continue
        if not isinstance(value, str):
            needs = "a string such as FLOAT or W8A8_MXFP8 for each tensor"
            raise _damaged_manifest(f"{path} gives {key} the type {value!r:.60}", needs, "E-CKP-06")
        first = written.setdefault(name, key)
        if key == f"{name.removesuffix('.mul_scale')}.div.mul_scale" and first == name:
            continue  # SGLang looks for this second name of a mul_scale
        if first != key:
            got = f"{path} has the entries {first} and {key}, which both map to {name}"
            raise _damaged_manifest(got, "one entry per tensor", "E-CKP-09")
        (attention if name.endswith(QUANT_TYPE) else tensors)[name] = value
    supported = {STATIC_ATTENTION, *MANIFEST_SCHEMES}
    if unknown := {written[name]: kind for name, kind in tensors.items() if kind not in supported}:
        raise CheckpointError(
            f"{path} has {len(unknown)} tensors of unknown types: "
            + listed(f"{name} is {kind}" for name, kind in unknown.items()),
            needs=", ".join(MANIFEST_SCHEMES),
            fix="export the model with one of these types",
            code="E-CKP-04",
        )
    return Manifest(path, tensors, attention, metadata)


def _damaged_manifest(got: str, needs: str, code: str) -> CheckpointError:
    fix = "restore the manifest from the source of the model, or export again"
    return CheckpointError(got, needs=needs, fix=fix, code=code)


def manifest_for(
    layers: Mapping[str, str],
    names: Sequence[str],
    attention: Mapping[str, str],
    source_entries: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the content of `quant_model_description.json`: one entry per tensor, in the order of `names`.

    `layers`: layer -> scheme. Quantized weights and their scales get msModelSlim's type of the scheme, all
    other tensors, biases and `mul_scale` included, FLOAT. Then follow `attention` (`<attn>.quant_type` ->
    value) and the `model_quant_type`. `source_entries`: entries of the source's manifest for other tensors,
    and for keys that are not tensors (`fa_quant_type`, FAQuant).
    """
    extra = dict(source_entries or {})
    manifest = {}
    for name in names:
        layer, _, role = name.rpartition(".")
        if layer in layers and role in ROLES:
            manifest[name] = SCHEMES[layers[layer]].manifest if role in QUANTIZED_ROLES else FLOAT
        else:
            manifest[name] = extra.get(name, FLOAT)
    manifest |= attention
    manifest |= {key: value for key, value in extra.items() if key not in manifest}
    manifest.pop("model_quant_type", None)
    manifest["model_quant_type"] = model_quant_type(layers)
    return manifest


def model_quant_type(layers: Mapping[str, str]) -> str:
    """Type of the last quantized layer, preferably of the blocks, as in msModelSlim; FLOAT if none is
    quantized.
    """
    quantized = [name for name, scheme in layers.items() if scheme in QUANTIZED]
    last = sort_names([name for name in quantized if is_block_linear(name)] or quantized)[-1:]
    return SCHEMES[layers[last[0]]].manifest if last else FLOAT


# ---- quantization_config ------------------------------------------------------------------------

CONFIG_KEY = "quantization_config"
_SERIALIZED = re.compile(r"is_checkpoint_(?:\w+_)?serialized")


@dataclass(frozen=True)
class QuantizationConfig:
    """A `quantization_config` of weights that are quantized on disk."""

    scheme: str
    method: str
    ignored: frozenset[str]
    """`ignored_layers`: layers by their Diffusers names, other names unchanged."""

    def declared_schemes(self, tensors: Iterable[str]) -> dict[str, DeclaredScheme]:
        """Layer -> scheme of each linear layer of the blocks among `tensors`."""
        label = f"config.json says {self.method}"
        return {
            layer: DeclaredScheme("bf16", f"{label} and ignores it")
            if layer in self.ignored
            else DeclaredScheme(self.scheme, label)
            for name in tensors
            if name.endswith(".weight") and is_block_linear(layer := name.removesuffix(".weight"))
        }

    def check(
        self, tensors: Iterable[str], layers: Mapping[str, Layer], others: Mapping[str, DeclaredScheme]
    ) -> None:
        """Raise CheckpointError (E-CKP-07) unless the layers have these schemes and the ignored layers exist.

        `others`: schemes declared by the manifest, for the message.
        """
        tensors = list(tensors)
        wrong = []
        for name, declared in self.declared_schemes(tensors).items():
            scheme = layers[name].scheme if name in layers else "bf16"
            if scheme != declared.scheme:
                other = others[name].label if name in others else f"its tensors are {scheme}"
                wrong.append(f"{name}: {declared.label}, but {other}")
        if wrong:
            raise disagreement(wrong)
        parents = _parents(tensors)
        if missing := [name for name in self.ignored if name not in parents]:
            raise CheckpointError(
                f"ignored_layers of config.json lists {len(missing)} layers that do not exist: "
                + listed(missing),
                needs="names of layers of this transformer, such as blocks.0.attn1.to_qkv",
                fix="correct the names in config.json, or merge the checkpoint again",
                code="E-CKP-07",
            )


def read_quantization_config(config: Mapping[str, Any], *, tolerant: bool) -> QuantizationConfig | None:
    """Read the `quantization_config`; None if absent, or if the weights on disk are not quantized.

    `tolerant`: ignore an unknown method, because a manifest exists. Raises CheckpointError: E-CKP-06 if it is
    damaged, E-CKP-04 for an unknown method.
    """
    raw = config.get(CONFIG_KEY)
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise _damaged(f"{CONFIG_KEY} is a JSON {type(raw).__name__}, not an object")
    method = raw.get("quant_method", raw.get("method"))
    if not isinstance(method, str):
        raise _damaged(f"{CONFIG_KEY} names no quant_method")
    names = raw.get("ignored_layers", raw.get("modules_to_not_convert")) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _damaged("ignored_layers is not a list of names")
    ignored = frozenset(layer for name in names for layer in layers_of_module(name))
    if method == "fp8" and (tiles := raw.get("weight_block_size")) is not None:
        if tiles != [128, 128]:
            raise _unknown_method(f"fp8 in tiles of {tiles!r:.40}")
        return QuantizationConfig(FP8_TILES, "fp8 in tiles of 128 x 128", ignored)
    if not any(_SERIALIZED.fullmatch(key) and value is True for key, value in raw.items()):
        return None
    if method not in QUANTIZED:
        if tolerant:
            return None
        raise _unknown_method(method)
    return QuantizationConfig(method, method, ignored)


def _damaged(problem: str) -> CheckpointError:
    return CheckpointError(
        f"config.json of a transformer: {problem}",
        needs=f'{CONFIG_KEY} such as {{"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": true}}'
        ", or none",
        fix="restore config.json from the source of the model",
        code="E-CKP-06",
    )


def _unknown_method(method: str) -> CheckpointError:
    return CheckpointError(
        f"config.json says that the weights are quantized with {method:.60}",
        needs=f"one of {', '.join(QUANTIZED)}, or {FP8_TILES}",
        fix="start from the BF16 weights of this model",
        code="E-CKP-04",
    )
