"""What one transformer is made of, in counts and words: schemes, bits, what stayed float. No torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ascendit.checkpoint.layer_format import STORED_ROLES, Layer
from ascendit.checkpoint.quant_metadata import FLOAT, QUANT_TYPE
from ascendit.checkpoint.reader import TensorInfo
from ascendit.checkpoint.transformer import ATTENTION_TENSOR, Expert
from ascendit.names import grouped, sort_names
from ascendit.quant.schemes import STORED_SCHEMES

_ATTENTION = re.compile(r".*\.attn[12]")
CONTAINERS = {
    "plain": "",
    "packed": "two in a byte",
    "e4m3": "in an FP8 container, one in a byte",
    "bf16": "in a BF16 container, one in two bytes",
}
SPELLING = {
    "BF16": "bf16",
    "F16": "fp16",
    "F32": "fp32",
    "F64": "fp64",
    "F8_E4M3": "e4m3",
    "F8_E5M2": "e5m2",
    "F8_E8M0": "e8m0",
    "I8": "int8",
    "U8": "uint8",
}


@dataclass(frozen=True, kw_only=True)
class SchemeCount:
    """The layers of one scheme in one kind of container."""

    scheme: str
    container: str
    layers: int
    values: int
    """Decoded weights."""
    nbytes: int
    """Of codes and scales, biases left out."""

    @property
    def bits(self) -> float:
        """Bits on disk for one weight, scales included."""
        return 8 * self.nbytes / self.values if self.values else 0.0

    @property
    def manifest(self) -> str | None:
        """msModelSlim's word for the scheme."""
        return STORED_SCHEMES[self.scheme].manifest or None

    def text(self) -> str:
        how = STORED_SCHEMES[self.scheme].text
        if where := CONTAINERS[self.container]:
            how = how.replace(" values", f" values {where}", 1)
        name = f"   (msModelSlim: {self.manifest})" if self.manifest not in (None, FLOAT) else ""
        layers = f"{self.layers} layer{'' if self.layers == 1 else 's'}"
        return f"{self.scheme}   {layers}   {how}   {self.bits:.2f} bits{name}"

    def as_dict(self) -> dict[str, Any]:
        names = "scheme container layers values nbytes bits manifest".split()
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class StoredRow:
    """One tensor, or one layer with its scales."""

    name: str
    scheme: str
    """A scheme for a layer of codes or a smoothed one; `float` for every other tensor."""
    container: str
    shape: tuple[int, ...]
    """Decoded."""
    tensors: tuple[tuple[str, TensorInfo], ...]
    """(role, where it is stored); the role of a tensor on its own is ""."""

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for _, info in self.tensors)

    def stored(self) -> str:
        """`e4m3, weight_scale uint8 [5120, 160]`."""
        words = []
        for role, info in self.tensors:
            dtype = dtype_name(info.dtype)
            words.append(dtype if role in ("", "weight") else f"{role} {dtype} {list(info.shape)}")
        return ", ".join(words)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "scheme": self.scheme,
            "container": self.container,
            "shape": list(self.shape),
            "nbytes": self.nbytes,
            "tensors": [
                {"name": i.name, "role": role, "dtype": i.dtype, "shape": list(i.shape), "nbytes": i.nbytes}
                for role, i in self.tensors
            ],
        }


def dtype_name(dtype: str) -> str:
    """safetensors' spelling of a dtype -> ours: `BF16` is bf16."""
    return SPELLING.get(dtype, dtype.lower())


def tensor_row(name: str, info: TensorInfo) -> StoredRow:
    """The row of a tensor that belongs to no layer."""
    return StoredRow(name=name, scheme="float", container="plain", shape=info.shape, tensors=(("", info),))


@dataclass(frozen=True)
class ExpertSummary:
    """An expert in counts and grouped names. Everything is computed once, when it is first asked for."""

    expert: Expert

    @cached_property
    def of_layer(self) -> dict[str, Layer]:
        """Name on disk of every tensor that belongs to a layer of codes, or a smoothed one -> that layer."""
        layers = self.expert.layers.values()
        return {info.name: layer for layer in layers for info in layer.tensors.values()}

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Every layer with a matrix, in the order of the model. Norms have vectors and are none."""
        names: dict[str, None] = {}
        for name, info in self.expert.tensors.items():
            layer, _, role = name.rpartition(".")
            if layer in self.expert.layers or (role == "weight" and len(info.shape) > 1):
                names[layer] = None
        return tuple(sort_names(names))

    @cached_property
    def rows(self) -> tuple[StoredRow, ...]:
        """Every layer of codes with its scales, and every other tensor, in the order of the model."""
        found: dict[str, StoredRow] = {}
        for name in sort_names(self.expert.tensors):
            info = self.expert.tensors[name]
            layer = self.of_layer.get(info.name)
            if layer is None:
                found[name] = tensor_row(name, info)
            elif layer.name not in found:
                found[layer.name] = StoredRow(
                    name=layer.name,
                    scheme=layer.scheme,
                    container=layer.container,
                    shape=layer.shape,
                    tensors=tuple(
                        (role, layer.tensors[role]) for role in STORED_ROLES if role in layer.tensors
                    ),
                )
        return tuple(found.values())

    @cached_property
    def schemes(self) -> tuple[SchemeCount, ...]:
        """Its schemes, most layers first."""
        kinds: dict[tuple[str, str], list[Layer]] = {}
        for layer in self.expert.layers.values():
            kinds.setdefault((layer.scheme, layer.container), []).append(layer)
        counts = [
            SchemeCount(
                scheme=scheme,
                container=container,
                layers=len(found),
                values=sum(math.prod(layer.shape) for layer in found),
                nbytes=sum(
                    i.nbytes for layer in found for role, i in layer.tensors.items() if role != "bias"
                ),
            )
            for (scheme, container), found in kinds.items()
        ]
        return tuple(sorted(counts, key=lambda c: -c.layers))

    @property
    def is_quantized(self) -> bool:
        return any(count.scheme != "bf16" for count in self.schemes)

    @cached_property
    def values(self) -> int:
        """Number of weights of the model: codes and floats; scales, offsets and rotations are not counted."""
        total = sum(
            math.prod(info.shape)
            for name, info in self.expert.tensors.items()
            if info.name not in self.of_layer and not ATTENTION_TENSOR.fullmatch(name)
        )
        for layer in self.expert.layers.values():
            bias = layer.tensors.get("bias")
            total += math.prod(layer.shape) + (math.prod(bias.shape) if bias else 0)
        return total

    @cached_property
    def kept_layers(self) -> tuple[str, ...]:
        """The linear layers (and the patch embedding) that are stored as floats."""
        layers = self.expert.layers
        return tuple(n for n in self.linears if n not in layers or layers[n].scheme == "bf16")

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """The same, grouped."""
        return grouped(self.kept_layers, self.linears)

    @property
    def kept_dtypes(self) -> tuple[str, ...]:
        """What they are stored in."""
        return tuple(sorted({dtype_name(self.expert.tensors[f"{n}.weight"].dtype) for n in self.kept_layers}))

    @cached_property
    def smoothed(self) -> tuple[str, ...]:
        """The layers whose input is multiplied by a stored `mul_scale`."""
        return grouped(self.expert.smoothed, self.linears)

    @cached_property
    def attentions(self) -> tuple[str, ...]:
        """Every attention of the model, however it is stored."""
        found = (_ATTENTION.match(name) for name in self.linears)
        return tuple(dict.fromkeys(match[0] for match in found if match))

    @cached_property
    def attention(self) -> dict[str, tuple[str, ...]]:
        """How attention is quantized: value of `quant_type` -> the attentions that have it."""
        by_value: dict[str, list[str]] = {}
        for key, value in self.expert.attention.items():
            by_value.setdefault(value, []).append(key.removesuffix(QUANT_TYPE))
        return {value: grouped(names, self.attentions) for value, names in by_value.items()}

    @cached_property
    def rotated(self) -> tuple[str, ...]:
        """The attentions that come with rotation matrices."""
        names = {n.rpartition(".")[0] for n in self.expert.tensors if n.endswith((".q_rot", ".k_rot"))}
        return grouped(names, self.attentions)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "origin": self.expert.origin,
            "naming": self.expert.naming,
            "manifest": self.expert.manifest is not None,
            "marker": self.expert.marker,
            "schemes": [count.as_dict() for count in self.schemes],
            "kept": list(self.kept),
            "kept_layers": len(self.kept_layers),
            "kept_dtypes": list(self.kept_dtypes),
            "smoothed": list(self.smoothed),
            "attention": {value: list(names) for value, names in self.attention.items()},
            "rotated": list(self.rotated),
            "config_problem": self.expert.config_problem,
        }
