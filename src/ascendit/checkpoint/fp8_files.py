"""FP8 and int8 weights that are read as BF16 floats: plain casts, and scaled files of ComfyUI and others.

Plain: the numbers are the weights. Scaled: `<layer>.scale_weight` or `<layer>.weight_scale` is one factor, or
one per row; scales of activations and markers are not used. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ascendit.checkpoint.component import loads
from ascendit.checkpoint.headers import read_metadata
from ascendit.checkpoint.layer_format import FLOAT_DTYPES
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.tensor_info import Encoding, TensorInfo
from ascendit.errors import CheckpointError
from ascendit.names import listed, without_prefix

Tensors = Mapping[str, TensorInfo]

FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
COMFY_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
"""`format` of a layer in ComfyUI's files that is read -> safetensors dtype of its weight."""
MARKER = "scaled_fp8"
LAYER_MARKER = "comfy_quant"
METADATA = "_quantization_metadata"
WEIGHT_SCALES = ("scale_weight", "weight_scale")
INPUT_SCALES = ("scale_input", "input_scale")
_ROLES = ("weight", LAYER_MARKER, *WEIGHT_SCALES, *INPUT_SCALES)
_MAX_MARKER = 1 << 16  # bytes
_SCALED = FP8 | {"I8"}
"""Dtypes of weights that need a scale, if another layer of their file has one."""
_READ = (*sorted(_SCALED), "BF16", "F16", "F32")
_EMBEDDING = re.compile(r"(?:.*\.)?(?:shared|embed_tokens|token_embedding|relative_attention_bias|embedding)")
"""Tables of a text encoder, which scaled files may store as plain FP8."""


def decoded(
    info: TensorInfo, scale: TensorInfo | None = None, dtype: str = "", label: str = ""
) -> TensorInfo:
    """`info`, to be read as BF16 numbers x `scale`. `dtype`: that of its bytes, if the header has another."""
    return replace(info, dtype="BF16", encoding=Encoding(dtype or info.dtype, scale, label=label))


def plain(tensors: Tensors) -> dict[str, TensorInfo]:
    """All FP8 tensors as BF16, others unchanged."""
    return {name: decoded(info) if info.dtype in FP8 else info for name, info in tensors.items()}


def scaled(
    tensors: Tensors, label: str, formats: Mapping[str, str], *, required: bool
) -> dict[str, TensorInfo]:
    """Weights with a scale and all FP8 tensors as BF16, without scales and markers; others unchanged.

    `formats`: layer -> safetensors dtype of its weight, for layers with a declared format. `required`: a file
    without any scale is an error. Raises CheckpointError (E-CKP-08) for weights and scales that do not match.
    """
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        layer, _, role = name.rpartition(".")
        if role in _ROLES:
            groups.setdefault(layer, {})[role] = info
    problems = [text for layer, roles in groups.items() if (text := _problem(layer, roles, formats))]
    scales = {layer: _scale(roles) for layer, roles in groups.items()}
    if required and not any(scales.values()):
        problems = [f"it has the marker {MARKER}, but no layer has a scale"]
    if problems:
        raise CheckpointError(
            f"{_file(tensors)} is {label}, with {len(problems)} weights or scales that do not match: "
            + listed(problems),
            needs="for each scaled weight one float, or one per row, and for each scale a weight",
            fix="download the file again and compare its sha256, or use the BF16 file of the model",
            code="E-CKP-08",
        )
    result = {}
    for name, info in tensors.items():
        layer, _, role = name.rpartition(".")
        scale = scales.get(layer) if role == "weight" else None
        if scale is not None or (role == "weight" and layer in formats):
            result[name] = decoded(info, scale, formats.get(layer, ""), label)
        elif role in _ROLES and role != "weight" and layer in groups:
            continue
        elif without_prefix(name) != MARKER:
            result[name] = decoded(info) if info.dtype in FP8 else info
    return result


def _scale(roles: Tensors) -> TensorInfo | None:
    return next((roles[role] for role in WEIGHT_SCALES if role in roles), None)


def _problem(layer: str, roles: Tensors, formats: Mapping[str, str]) -> str:
    """The first problem of one layer, or "". `roles`: its weight, scales and marker."""
    weight, scale = roles.get("weight"), _scale(roles)
    others = sorted(roles.keys() - {"weight"})
    if weight is None:
        return f"{layer}.{others[0]} has no weight"
    if not others and layer not in formats:
        unscaled = weight.dtype in _SCALED and len(weight.shape) == 2 and not _EMBEDDING.fullmatch(layer)
        return f"{layer}.weight ({weight.dtype}) has no scale" if unscaled else ""
    if scale is None:
        return f"{layer}.weight ({weight.dtype}) has no scale"
    if all(role in roles for role in WEIGHT_SCALES):
        return f"{layer} has both {' and '.join(WEIGHT_SCALES)}"
    stored = formats.get(layer, weight.dtype)
    if stored not in _READ or weight.dtype not in (stored, "U8"):
        declared = f", and its format is {stored}" if layer in formats else ""
        return f"{layer}.weight is {weight.dtype}{declared}"
    rows = weight.shape[:1]
    if scale.dtype not in FLOAT_DTYPES or scale.shape not in {(), (1,), (1, 1), rows, (*rows, 1)}:
        needed = f"one float, or one for each of {rows[0] if rows else 1} rows"
        return f"{scale.name} is {scale.dtype} {list(scale.shape)}, not {needed}"
    return ""


# ---- formats of layers in ComfyUI's files ---------------------------------------------------------


def comfy_layers(tensors: Tensors, *, metadata: bool) -> dict[str, dict[str, Any]]:
    """Layer -> its entry, such as `{"format": "float8_e4m3fn"}`, from its `comfy_quant` or the header.

    `metadata`: read the header's `_quantization_metadata` too. Raises CheckpointError (E-CKP-06) for entries
    that are not JSON objects with a format.
    """
    layers = _from_header(tensors) if metadata else {}
    markers = {n.rpartition(".")[0]: info for n, info in tensors.items() if n.endswith(f".{LAYER_MARKER}")}
    with RowReader() as reader:
        for layer, info in markers.items():
            valid = info.dtype in ("U8", "I8") and info.nbytes <= _MAX_MARKER
            layers[layer] = _entry(info.name, reader.read_all(info) if valid else b"")
    return layers


def _from_header(tensors: Tensors) -> dict[str, dict[str, Any]]:
    """The layers in `_quantization_metadata`, whose names may lack the prefix of the tensors."""
    layers: dict[str, Any] = {}
    for file in dict.fromkeys(info.file for info in tensors.values()):
        if (text := read_metadata(file).get(METADATA)) is None:
            continue
        entries = _json(f"{METADATA} of {file}", text).get("layers")
        if not isinstance(entries, dict):
            raise _invalid(f"{METADATA} of {file}")
        layers |= {without_prefix(f"{layer}.weight"): entry for layer, entry in entries.items()}
    stored = {without_prefix(name): name for name in tensors} if layers else {}
    return {
        stored.get(name, name).removesuffix(".weight"): _entry(
            f"{METADATA}: {name}", json.dumps(entry).encode()
        )
        for name, entry in layers.items()
    }


def _entry(name: str, data: bytes) -> dict[str, Any]:
    entry = _json(name, data)
    if not isinstance(entry.get("format"), str):
        raise _invalid(name)
    return entry


def _json(name: str, text: str | bytes) -> dict[str, Any]:
    try:
        data = loads(text if isinstance(text, str) else text.rstrip(b"\0").decode())
    except (ValueError, RecursionError) as e:
        raise _invalid(name) from e
    if not isinstance(data, dict):
        raise _invalid(name)
    return data


def _invalid(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} does not describe a layer",
        needs='a JSON object such as {"format": "float8_e4m3fn"}, as ComfyUI writes it',
        fix="download the file again and compare its sha256 with the source",
        code="E-CKP-06",
    )


def _file(tensors: Tensors) -> str:
    """The first file of these tensors, for messages."""
    return str(next(iter(tensors.values())).file)
