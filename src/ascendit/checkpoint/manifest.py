"""The manifest of a quantized transformer: `quant_model_description*.json`, the type of every tensor.

A flat JSON object. Tensor names map to a type (`FLOAT`, `W8A8_MXFP8`, ...); `<attn>.quant_type` tells how an
attention is quantized; everything else (`model_quant_type`, `version`, `group_size`, ...) is about the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendit.checkpoint.layers import Claim, Layer, disagreement
from ascendit.checkpoint.names import CODED_ROLES, to_wan
from ascendit.checkpoint.part import read_json
from ascendit.checkpoint.spelling import Naming, canonical
from ascendit.checkpoint.store import TensorInfo, listed
from ascendit.errors import CheckpointError
from ascendit.quant.schemes import MANIFEST_SCHEMES

NAME = "quant_model_description.json"
FLOAT = "FLOAT"
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
        parents = {name[:i] for name in tensors for i, char in enumerate(name) if char == "."}
        absent += [name for name in self.attention if name.removesuffix(QUANT_TYPE) not in parents]
        problems = []
        if unnamed:
            problems.append(f"{len(unnamed)} tensors that it does not name: {listed(unnamed)}")
        if absent:
            problems.append(f"{len(absent)} names of no tensor: {listed(absent)}")
        if problems:
            raise CheckpointError(
                f"{self.path} does not fit the weights: {'; '.join(problems)}",
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
        if said == scheme and (role in CODED_ROLES or said == "bf16"):
            return ""
        if role not in CODED_ROLES and said in ("bf16", scheme):  # AscendV1: biases with the layer's type
            return ""
        return f"{name}: {self.path.name} says {kind}, and the layer is {scheme}"


def find_manifest(folder: Path) -> Path | None:
    """The one manifest in `folder`. Several are E-CKP-07: nothing says which one is meant."""
    found = sorted(p for p in folder.glob("quant_model_description*.json") if p.is_file())
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
            raise _no_type(path, key, value)
        first = written.setdefault(name, key)
        if key == f"{name.removesuffix('.mul_scale')}.div.mul_scale" and first == name:
            continue  # SGLang looks for this second name of a mul_scale
        if first != key:
            raise _twice(path, first, key, name)
        (attention if name.endswith(QUANT_TYPE) else tensors)[name] = value
    known = {STATIC_ATTENTION, *MANIFEST_SCHEMES}
    if strange := {written[name]: kind for name, kind in tensors.items() if kind not in known}:
        raise _unknown(path, strange)
    return Manifest(path, tensors, attention, metadata)


def _no_type(path: Path, key: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"{path} gives {key} the type {value!r:.60}",
        needs="a text such as FLOAT or W8A8_MXFP8 for each tensor",
        fix="restore the manifest from where the model came from, or export again",
        code="E-CKP-06",
    )


def _twice(path: Path, first: str, second: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} names {first} and {second}, which are both {name}",
        needs="one entry for each tensor",
        fix="restore the manifest from where the model came from, or export again",
        code="E-CKP-09",
    )


def _unknown(path: Path, strange: Mapping[str, str]) -> CheckpointError:
    return CheckpointError(
        f"{path} has {len(strange)} tensors of types unknown here: "
        + listed(f"{name} is {kind}" for name, kind in strange.items()),
        needs=", ".join(MANIFEST_SCHEMES),
        fix="export the model with one of these types",
        code="E-CKP-04",
    )
