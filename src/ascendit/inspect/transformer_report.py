"""The summary of one transformer: schemes, bits, layers excluded from quantization."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ascendit.checkpoint.layer_format import STORED_ROLES
from ascendit.checkpoint.quant_metadata import FLOAT, QUANT_TYPE
from ascendit.checkpoint.stored_kinds import kinds_text
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.transformer import ATTENTION_TENSOR, Expert, shapes_of
from ascendit.mx.stored_floats import TYPES
from ascendit.names import grouped, sort_names
from ascendit.quant.attention_schemes import QUANT_TYPES
from ascendit.quant.schemes import STORED_SCHEMES
from ascendit.report import counted, group_by, selected

_ATTENTION = re.compile(r".*\.attn[12]")
PACKINGS = {
    "plain": "",
    "packed": "packed two per byte",
    "e4m3": "unpacked to FP8, one per byte",
    "bf16": "unpacked to BF16, one per two bytes",
}
ORIGINS = {
    "msmodelslim": "msModelSlim",
    "vllm-omni": "vLLM-Omni's merge tool",
    "sglang": "SGLang's repack tool",
    "ascendit": "ascendit",
    "fp8-block": "FP8 in 128 x 128 tiles",
    "turbodiffusion": "TurboDiffusion",
    "float": "",
}
DTYPE_NAMES = {
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
    """The layers with one scheme and packing."""

    scheme: str
    container: str
    layers: int
    values: int
    """Decoded weights."""
    nbytes: int
    """Bytes of quantized weights and scales, without biases."""

    @property
    def bits(self) -> float:
        """Bits on disk per weight, with scales."""
        return 8 * self.nbytes / self.values if self.values else 0.0

    @property
    def manifest(self) -> str | None:
        """Name of the scheme in a manifest."""
        return STORED_SCHEMES[self.scheme].manifest or None

    def text(self) -> str:
        storage = STORED_SCHEMES[self.scheme].text
        if packing := PACKINGS[self.container]:
            storage = storage.replace(" values", f" values {packing}", 1)
        name = f"   (manifest: {self.manifest})" if self.manifest not in (None, FLOAT) else ""
        return f"{self.scheme}   {counted(self.layers, 'layer')}   {storage}   {self.bits:.2f} bits{name}"

    def as_dict(self) -> dict[str, Any]:
        return selected(self, "scheme", "container", "layers", "values", "nbytes", "bits", "manifest")


@dataclass(frozen=True, kw_only=True)
class StoredRow:
    """One tensor, or one layer with its scales."""

    name: str
    scheme: str
    """The scheme of a quantized or smoothed layer; `float` for every other tensor."""
    container: str
    shape: tuple[int, ...]
    """Decoded shape."""
    tensors: tuple[tuple[str, TensorInfo], ...]
    """(role, location on disk); the role of a single tensor is ""."""

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for _, info in self.tensors)

    @property
    def format(self) -> str:
        """The scheme, or the dtype of a float tensor."""
        dtype = self.tensors[0][1].stored_dtype
        return dtype_name(dtype) if self.scheme in ("float", "bf16") else self.scheme

    def stored(self) -> str:
        """Dtypes and scales as text, for example `e4m3, weight_scale uint8 [5120, 160]`."""
        texts = []
        for role, info in self.tensors:
            dtype = dtype_name(info.stored_dtype)
            dtype += f", read as {dtype_name(info.dtype)}" if info.encoding else ""
            texts.append(dtype if role in ("", "weight") else f"{role} {dtype} {list(info.shape)}")
        return ", ".join(texts)

    def as_dict(self) -> dict[str, Any]:
        tensors = [
            {"name": info.name, "role": role, "dtype": info.stored_dtype, **selected(info, "shape", "nbytes")}
            for role, info in self.tensors
        ]
        return {**selected(self, "name", "scheme", "container", "shape", "nbytes"), "tensors": tensors}


def dtype_name(dtype: str) -> str:
    """safetensors' dtype name -> the name in reports: `BF16` -> `bf16`; block types keep theirs."""
    return DTYPE_NAMES.get(dtype, dtype if dtype in TYPES else dtype.lower())


def tensor_row(name: str, info: TensorInfo) -> StoredRow:
    """The row of a tensor outside the layers with a scheme."""
    return StoredRow(name=name, scheme="float", container="plain", shape=info.shape, tensors=(("", info),))


@dataclass(frozen=True)
class ExpertSummary:
    """An expert in counts and grouped names, computed lazily and cached."""

    expert: Expert

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Every layer with a weight matrix, in model order; norms have none."""
        names: dict[str, None] = {}
        for name, info in self.expert.tensors.items():
            layer, _, role = name.rpartition(".")
            if layer in self.expert.layers or (role == "weight" and len(info.shape) > 1):
                names[layer] = None
        return tuple(sort_names(names))

    @cached_property
    def rows(self) -> tuple[StoredRow, ...]:
        """One row per layer with a scheme (scales included) and per other tensor, in model order."""
        layers = self.expert.layers.values()
        layer_of = {info.name: layer for layer in layers for info in layer.tensors.values()}
        rows: dict[str, StoredRow] = {}
        for name in sort_names(self.expert.tensors):
            info = self.expert.tensors[name]
            layer = layer_of.get(info.name)
            if layer is None:
                rows[name] = tensor_row(name, info)
            elif layer.name not in rows:
                rows[layer.name] = StoredRow(
                    name=layer.name,
                    scheme=layer.scheme,
                    container=layer.packing,
                    shape=layer.shape,
                    tensors=tuple((r, layer.tensors[r]) for r in STORED_ROLES if r in layer.tensors),
                )
        return tuple(rows.values())

    @cached_property
    def schemes(self) -> tuple[SchemeCount, ...]:
        """The schemes with their layer counts, most layers first."""
        groups = group_by(self.expert.layers.values(), lambda layer: (layer.scheme, layer.packing))
        counts = [
            SchemeCount(
                scheme=scheme,
                container=container,
                layers=len(layers),
                values=sum(math.prod(layer.shape) for layer in layers),
                nbytes=sum(info.nbytes for x in layers for role, info in x.tensors.items() if role != "bias"),
            )
            for (scheme, container), layers in groups.items()
        ]
        return tuple(sorted(counts, key=lambda c: -c.layers))

    @property
    def is_quantized(self) -> bool:
        return any(count.scheme != "bf16" for count in self.schemes)

    @cached_property
    def values(self) -> int:
        """Number of decoded values, without scales, offsets and rotations."""
        shapes = shapes_of(self.expert).items()
        return sum(math.prod(shape) for name, shape in shapes if not ATTENTION_TENSOR.fullmatch(name))

    @cached_property
    def kept_layers(self) -> tuple[str, ...]:
        """The linear layers and the patch embedding, if stored as floats."""
        layers = self.expert.layers
        return tuple(n for n in self.linears if n not in layers or layers[n].scheme == "bf16")

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """`kept_layers`, with grouped names."""
        return grouped(self.kept_layers, self.linears)

    @cached_property
    def kept_dtypes(self) -> tuple[str, ...]:
        """The dtypes of `kept_layers`."""
        weights = (self.expert.tensors[f"{n}.weight"] for n in self.kept_layers)
        return tuple(sorted({dtype_name(info.stored_dtype) for info in weights}))

    @cached_property
    def smoothed(self) -> tuple[str, ...]:
        """The layers with a `mul_scale`, which multiplies their input."""
        return grouped(self.expert.smoothed, self.linears)

    @cached_property
    def attentions(self) -> tuple[str, ...]:
        """All attention modules."""
        matches = (_ATTENTION.match(name) for name in self.linears)
        return tuple(dict.fromkeys(match[0] for match in matches if match))

    @cached_property
    def attention(self) -> dict[str, tuple[str, ...]]:
        """Attention quantization: value of `quant_type` -> the attention modules with it."""
        by_value = group_by(self.expert.attention, self.expert.attention.__getitem__)
        return {
            value: grouped((key.removesuffix(QUANT_TYPE) for key in keys), self.attentions)
            for value, keys in by_value.items()
        }

    @cached_property
    def rotated(self) -> tuple[str, ...]:
        """The attention modules with rotation matrices."""
        names = {n.rpartition(".")[0] for n in self.expert.tensors if n.endswith((".q_rot", ".k_rot"))}
        return grouped(names, self.attentions)

    def texts(self) -> dict[str, list[str]]:
        """Title of a block -> its lines for a terminal."""
        expert = self.expert
        attention = [
            f"{QUANT_TYPES.get(value, 'no kernel')}: {', '.join(names)}   (manifest: {value})"
            for value, names in self.attention.items()
        ]
        attention += [f"rotated: {', '.join(self.rotated)}"] if self.rotated else []
        excluded = f"{'+'.join(self.kept_dtypes)}: {', '.join(self.kept)}"
        origin: list[str] = []
        if expert.origin != "float" or expert.naming != "diffusers":
            facts = [ORIGINS[expert.origin]] if ORIGINS[expert.origin] else []
            facts.append("original Wan names" if expert.naming == "wan" else "Diffusers names")
            facts += ["manifest"] if expert.manifest is not None else []
            facts += ["quantization_config"] if expert.quantization_config is not None else []
            origin = [", ".join(facts)]
            origin += [f"uncertain: {expert.config_problem}"] if expert.config_problem else []
        return {
            "Format": self.stored_as() + [count.text() for count in self.schemes],
            "Excluded": [excluded] if self.is_quantized and self.kept else [],
            "Smoothed": [f"{', '.join(self.smoothed)} (mul_scale)"] if self.smoothed else [],
            "Attention": attention,
            "Origin": origin,
        }

    def stored_as(self) -> list[str]:
        """The kind of file, and its tensors that are not used, for a terminal."""
        kinds = kinds_text(self.expert.kinds)
        return [*([f"stored as {kinds}"] if kinds else []), *self.expert.notes]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            **selected(self.expert, "origin", "naming"),
            "stored_as": list(self.expert.kinds),
            "notes": list(self.expert.notes),
            "manifest": self.expert.manifest is not None,
            "marker": self.expert.quantization_config,
            **selected(self, "schemes", "kept"),
            "kept_layers": len(self.kept_layers),
            **selected(self, "kept_dtypes", "smoothed", "attention", "rotated"),
            "config_problem": self.expert.config_problem,
        }
