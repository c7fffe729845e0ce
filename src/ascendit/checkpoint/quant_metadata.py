"""What the JSON files say about the quantization of weights: the manifest, and `quantization_config`.

The manifest, `quant_model_description*.json`, is a flat JSON object. Tensor names map to a type (`FLOAT`,
`W8A8_MXFP8`, ...); `<attn>.quant_type` tells how an attention is quantized; everything else
(`model_quant_type`, `version`, `group_size`, ...) is about the file.

The `quantization_config` of config.json, as vLLM-Omni and FP8 checkpoints have it, speaks about the linear
layers of the blocks: all of them have its scheme, but for `ignored_layers`. It binds only if it says that the
weights on disk are quantized already.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendit.checkpoint.component import read_json
from ascendit.checkpoint.layer_format import Claim, Layer, disagreement
from ascendit.checkpoint.reader import TensorInfo
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
"""msModelSlim adds the type: `quant_model_description_w8a8_mxfp8.json`."""
FLOAT = SCHEMES["bf16"].manifest
STATIC_ATTENTION = "FAQuant"
"""The type of `fa3_q.scale` and its like."""
QUANT_TYPE = ".quant_type"


@dataclass(frozen=True)
class Manifest:
    """A manifest under Diffusers names."""

    path: Path
    tensors: dict[str, str]
    """Tensor -> type, as written."""
    attention: dict[str, str]
    """`<attn>.quant_type` -> its value."""
    metadata: dict[str, str]
    """What is said about the whole file; values that are no text, as JSON."""

    def entries(self) -> dict[str, str]:
        """All of it in one dict."""
        return {**self.tensors, **self.attention, **self.metadata}

    def claims(self) -> dict[str, Claim]:
        """What is said of each layer's weight."""
        suffix = ".weight"
        return {
            name.removesuffix(suffix): Claim(MANIFEST_SCHEMES[kind], f"{self.path.name} says {kind}")
            for name, kind in self.tensors.items()
            if name.endswith(suffix) and kind in MANIFEST_SCHEMES
        }

    def check(self, tensors: Mapping[str, TensorInfo], layers: Mapping[str, Layer]) -> None:
        """Raise unless this names exactly `tensors` (E-CKP-04), each by the type of its layer (E-CKP-07)."""
        unnamed = [name for name in tensors if name not in self.tensors]
        absent = [name for name in self.tensors if name not in tensors]
        parents = _parents(tensors)
        absent += [name for name in self.attention if name.removesuffix(QUANT_TYPE) not in parents]
        kinds = {"tensors that it does not name": unnamed, "names of no tensor": absent}
        if problems := problem_counts(kinds):
            raise CheckpointError(
                f"{self.path} does not fit the weights: {problems}",
                needs="a manifest that names every tensor and nothing else",
                fix="put the manifest and the weights of one export together, or export again",
                code="E-CKP-04",
            )
        if wrong := [
            text for name, kind in self.tensors.items() if (text := self._mistaken(name, kind, layers))
        ]:
            raise disagreement(wrong)

    def _mistaken(self, name: str, kind: str, layers: Mapping[str, Layer]) -> str:
        """What is wrong with one entry, if anything."""
        owner, _, role = name.rpartition(".")
        layer = layers.get(owner)
        scheme = layer.scheme if layer else "bf16"
        said = MANIFEST_SCHEMES.get(kind, "bf16")
        if said == scheme and (role in QUANTIZED_ROLES or said == "bf16"):
            return ""
        if role not in QUANTIZED_ROLES and said in ("bf16", scheme):  # AscendV1: biases with the layer's type
            return ""
        return f"{name}: {self.path.name} says {kind}, and the layer is {scheme}"


def _parents(tensors: Iterable[str]) -> set[str]:
    """Every module that a tensor is in: `blocks`, `blocks.0`, `blocks.0.attn1`, ..."""
    return {name[:i] for name in tensors for i, char in enumerate(name) if char == "."}


def find_manifest(folder: Path) -> Path | None:
    """The one manifest in `folder`. Several are E-CKP-07: nothing says which one is meant."""
    found = sorted(p for p in folder.glob(MANIFEST_GLOB) if p.is_file())
    if len(found) > 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} manifests: {', '.join(p.name for p in found)}",
            needs="one, that of the weights beside it",
            fix="move those of other exports to folders of their own",
            code="E-CKP-07",
        )
    return found[0] if found else None


def read_manifest(path: Path, naming: Naming) -> Manifest:
    """Read a manifest. Raises CheckpointError E-CKP-06 when it is damaged, E-CKP-04 for a type that ascendit
    does not know, which it names with the layer, E-CKP-09 for two entries that come to one name.
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
            needs = "a text such as FLOAT or W8A8_MXFP8 for each tensor"
            raise _damaged_manifest(f"{path} gives {key} the type {value!r:.60}", needs, "E-CKP-06")
        first = written.setdefault(name, key)
        if key == f"{name.removesuffix('.mul_scale')}.div.mul_scale" and first == name:
            continue  # SGLang looks for this second name of a mul_scale
        if first != key:
            got = f"{path} names {first} and {key}, which are both {name}"
            raise _damaged_manifest(got, "one entry for each tensor", "E-CKP-09")
        (attention if name.endswith(QUANT_TYPE) else tensors)[name] = value
    known = {STATIC_ATTENTION, *MANIFEST_SCHEMES}
    if strange := {written[name]: kind for name, kind in tensors.items() if kind not in known}:
        raise CheckpointError(
            f"{path} has {len(strange)} tensors of types unknown here: "
            + listed(f"{name} is {kind}" for name, kind in strange.items()),
            needs=", ".join(MANIFEST_SCHEMES),
            fix="export the model with one of these types",
            code="E-CKP-04",
        )
    return Manifest(path, tensors, attention, metadata)


def _damaged_manifest(got: str, needs: str, code: str) -> CheckpointError:
    fix = "restore the manifest from where the model came from, or export again"
    return CheckpointError(got, needs=needs, fix=fix, code=code)


def manifest_for(
    layers: Mapping[str, str],
    names: Sequence[str],
    attention: Mapping[str, str],
    found: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """`quant_model_description.json`: one entry for each of `names`, in their order, the write order.

    `layers`: layer -> scheme. Codes and their scales have msModelSlim's word for the scheme, every other
    tensor is FLOAT, its bias and `mul_scale` too. Then come `attention` (`<attn>.quant_type` -> value), and
    last `model_quant_type`: the word of the last quantized linear of the blocks, as msModelSlim writes it
    (mixed recipes go by their last block), or FLOAT. `found`: values of other tensors, and of keys that name
    no tensor, as the source has them (`fa_quant_type`, FAQuant).
    """
    found = dict(found or {})
    manifest = {}
    for name in names:
        layer, _, role = name.rpartition(".")
        if layer in layers and role in ROLES:
            manifest[name] = SCHEMES[layers[layer]].manifest if role in QUANTIZED_ROLES else FLOAT
        else:
            manifest[name] = found.get(name, FLOAT)
    manifest |= attention
    manifest |= {key: value for key, value in found.items() if key not in manifest}
    manifest.pop("model_quant_type", None)
    manifest["model_quant_type"] = model_quant_type(layers)
    return manifest


def model_quant_type(layers: Mapping[str, str]) -> str:
    """The word of the last quantized linear: of the blocks, else (nothing there is quantized) of any."""
    coded = [name for name, scheme in layers.items() if scheme in QUANTIZED]
    last = sort_names([name for name in coded if is_block_linear(name)] or coded)[-1:]
    return SCHEMES[layers[last[0]]].manifest if last else FLOAT


# ---- quantization_config ------------------------------------------------------------------------

CONFIG_KEY = "quantization_config"
_SERIALIZED = re.compile(r"is_checkpoint_(?:\w+_)?serialized")


@dataclass(frozen=True)
class Marker:
    """A `quantization_config` that binds."""

    scheme: str
    method: str
    ignored: frozenset[str]
    """Diffusers names, of layers and of whatever else it lists."""

    def claims(self, tensors: Iterable[str]) -> dict[str, Claim]:
        """What it says of each block linear among `tensors`."""
        words = f"config.json says {self.method}"
        return {
            layer: Claim("bf16", f"{words} and ignores it")
            if layer in self.ignored
            else Claim(self.scheme, words)
            for name in tensors
            if name.endswith(".weight") and is_block_linear(layer := name.removesuffix(".weight"))
        }

    def check(self, tensors: Iterable[str], layers: Mapping[str, Layer], others: Mapping[str, Claim]) -> None:
        """Raise CheckpointError E-CKP-07 unless the layers are what this says, and what it ignores exists.

        `others`: what the manifest says, for the message.
        """
        tensors = list(tensors)
        wrong = []
        for name, claim in self.claims(tensors).items():
            found = layers[name].scheme if name in layers else "bf16"
            if found != claim.scheme:
                said = others[name].words if name in others else f"its tensors are {found}"
                wrong.append(f"{name}: {claim.words}, and {said}")
        if wrong:
            raise disagreement(wrong)
        parents = _parents(tensors)
        if strange := [name for name in self.ignored if name not in parents]:
            raise CheckpointError(
                f"ignored_layers of config.json names {len(strange)} layers that do not exist: "
                + listed(strange),
                needs="names of layers of this transformer, such as blocks.0.attn1.to_qkv",
                fix="correct the names in config.json, or merge the checkpoint again",
                code="E-CKP-07",
            )


def read_marker(config: Mapping[str, Any], *, tolerant: bool) -> Marker | None:
    """The marker of a config; None when there is none, or one that says nothing about the weights.

    `tolerant`: a manifest is there, so that a method which ascendit does not know may be passed over.
    Raises CheckpointError E-CKP-06 for one that is damaged, E-CKP-04 for an unknown method.
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
        raise _damaged("ignored_layers is no list of names")
    ignored = frozenset(layer for name in names for layer in layers_of_module(name))
    if method == "fp8" and (tiles := raw.get("weight_block_size")) is not None:
        if tiles != [128, 128]:
            raise _unknown_method(f"fp8 in tiles of {tiles!r:.40}")
        return Marker(FP8_TILES, "fp8 in tiles of 128 x 128", ignored)
    if not any(_SERIALIZED.fullmatch(key) and value is True for key, value in raw.items()):
        return None
    if method not in QUANTIZED:
        if tolerant:
            return None
        raise _unknown_method(method)
    return Marker(method, method, ignored)


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(
        f"config.json of a transformer: {what}",
        needs=f'{CONFIG_KEY} such as {{"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": true}}'
        ", or none",
        fix="restore config.json from where the model came from",
        code="E-CKP-06",
    )


def _unknown_method(method: str) -> CheckpointError:
    return CheckpointError(
        f"config.json says that the weights are quantized by {method:.60}",
        needs=f"one of {', '.join(QUANTIZED)}, or {FP8_TILES}",
        fix="start from the BF16 weights of this model",
        code="E-CKP-04",
    )
