"""Detect quantized linear layers from the dtypes and shapes of their tensors, and check the values of scales.

Tools store the same number format differently: FP4 packed two per byte, or one value per e4m3 or BF16
element; int8 scales as float32 [N, 1], or as BF16 [N, 1] or [1] by older tools. Shapes are checked from the
headers, values from the bytes. Imports neither torch nor numpy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ascendit.checkpoint.tensor_info import DTYPE_BITS, Buffer, TensorInfo
from ascendit.errors import CheckpointError
from ascendit.names import is_linear, listed
from ascendit.quant.schemes import STORED_SCHEMES

Packing = Literal["plain", "packed", "e4m3", "bf16"]
"""Storage of quantized weights: as the format defines; FP4 two per byte; FP4 one per e4m3 or BF16 element."""

FLOAT_DTYPES = frozenset({"BF16", "F16", "F32", "F64"})
BYTE_SCALES = frozenset({"U8", "F8_E8M0"})
"""One E8M0 byte per block; both dtypes have the same bytes."""
SCALE_ROLES = ("weight_scale", "weight_scale_inv", "weight_offset", "weight_dual_scale")
STORED_ROLES = ("weight", *SCALE_ROLES, "mul_scale", "bias")
_QUANTIZED_DTYPES = frozenset({"I8", "U8", "F8_E4M3", "F8_E5M2"})
"""Dtypes of weights that need a scale. Any other dtype that is not a float means a damaged file."""
_FP4: dict[str, Packing] = {"U8": "packed", "F8_E4M3": "e4m3", "BF16": "bf16"}


@dataclass(frozen=True)
class Layer:
    """A linear layer that is quantized, or whose input is smoothed."""

    name: str
    """Diffusers name, for example `blocks.0.attn1.to_q`."""
    scheme: str
    """A key of `STORED_SCHEMES`; `bf16` if smoothed but not quantized."""
    shape: tuple[int, int]
    """(N, K) of the decoded weight."""
    packing: Packing
    tensors: dict[str, TensorInfo]
    """Role (`weight`, `weight_scale`, `mul_scale`, `bias`, ...) -> where it is stored."""


@dataclass(frozen=True)
class DeclaredScheme:
    """The scheme of a layer according to a manifest or config."""

    scheme: str
    label: str
    """Text for messages, for example `quant_model_description.json says W8A8_MXFP8`."""


def read_layers(
    tensors: Mapping[str, TensorInfo], declared: Mapping[str, DeclaredScheme]
) -> dict[str, Layer]:
    """Return the quantized and smoothed layers among `tensors`, in the order of `tensors`.

    Raises CheckpointError: E-CKP-08 for a weight without scales or the reverse, E-CKP-07 if a declared scheme
    does not match the dtypes, E-CKP-04 for inconsistent shapes.
    """
    groups = _groups(tensors)
    if unpaired := [problem for name, roles in groups.items() for problem in _unpaired_tensors(name, roles)]:
        raise _unpaired(unpaired)
    layers: dict[str, Layer] = {}
    missing: list[str] = []
    mismatched: list[str] = []
    for name, roles in groups.items():
        if "weight" not in roles:  # a bias alone: `read_expert` reports the missing weight
            continue
        if (
            roles["weight"].dtype not in FLOAT_DTYPES | _QUANTIZED_DTYPES
            and not set(SCALE_ROLES) & roles.keys()
        ):
            continue  # `read_expert` reports the dtype
        declaration = declared.get(name)
        options = possible_schemes(roles)
        scheme = declaration.scheme if declaration else next(iter(options), "")
        label = declaration.label if declaration else "no file declares its scheme"
        if scheme == "mxfp4_dualscale" and "mxfp4" in options:
            missing.append(f"{name}.weight_dual_scale is missing ({label})")
        elif scheme not in options:
            mismatched.append(f"{name}: {label}, but its tensors are {_dtypes(roles)}")
        elif scheme != "bf16" or "mul_scale" in roles:
            packing = options[scheme]
            layers[name] = Layer(name, scheme, _decoded(roles, packing), packing, roles)
    if missing:
        raise _unpaired(missing)
    if mismatched:
        raise disagreement(mismatched)
    if wrong := [
        text for x in layers.values() for text in _misshapen(x.name, x.scheme, x.packing, x.tensors)
    ]:
        raise CheckpointError(
            f"{len(wrong)} tensors of quantized layers have the wrong shape: {listed(wrong)}",
            needs="scales and biases that match the shape of their weight",
            fix="download or export the model again",
            code="E-CKP-04",
        )
    return layers


def possible_schemes(roles: Mapping[str, TensorInfo]) -> dict[str, Packing]:
    """Return scheme -> packing for each scheme that matches the dtypes of one layer.

    Schemes that match the shapes too come first.
    """
    weight, scale = roles["weight"].dtype, roles.get("weight_scale")
    scales = _scales(roles)
    if not scales:
        return {"bf16": "plain"} if weight in FLOAT_DTYPES else {}
    packings: dict[str, Packing] = {}
    for scheme in STORED_SCHEMES.values():
        if _scales(scheme.roles) != scales:
            continue
        if scale is not None and scale.dtype not in (BYTE_SCALES if scheme.block else FLOAT_DTYPES):
            continue
        if scheme.packed and weight in _FP4:
            packings[scheme.name] = _FP4[weight]
        elif weight == scheme.qdata_dtype:
            packings[scheme.name] = "plain"
    return dict(sorted(packings.items(), key=lambda item: any(_misshapen("", item[0], item[1], roles))))


def _scales(roles: Iterable[str]) -> set[str]:
    """The roles that distinguish schemes; the offset of int8 is optional."""
    return {"weight_scale", "weight_scale_inv", "weight_dual_scale"} & set(roles)


def _groups(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Layer -> role -> tensor of every linear layer."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        layer, _, role = name.rpartition(".")
        if role in STORED_ROLES and is_linear(layer):
            groups.setdefault(layer, {})[role] = info
    return groups


def _unpaired_tensors(name: str, roles: Mapping[str, TensorInfo]) -> list[str]:
    """Problems with weights that lack scales and scales that lack a weight, for any scheme."""
    scales = [role for role in (*SCALE_ROLES, "mul_scale") if role in roles]
    if "weight" not in roles:
        return [f"{name}.{role} has no weight" for role in scales]
    weight = roles["weight"].dtype
    if "mul_scale" not in roles and roles["weight"].name.endswith(".linear.weight"):
        return [f"{roles['weight'].name} belongs to a smoothed layer, but {name} has no mul_scale"]
    if "weight_scale" in roles and "weight_scale_inv" in roles:
        return [f"{name} has both weight_scale and weight_scale_inv"]
    if not {"weight_scale", "weight_scale_inv"} & roles.keys():
        lone = [role for role in ("weight_offset", "weight_dual_scale") if role in roles]
        if lone:
            return [f"{name}.{role} has no weight_scale" for role in lone]
        if weight in _QUANTIZED_DTYPES:
            return [f"{name}.weight ({weight}) has no scale"]
    return []


def _decoded(roles: Mapping[str, TensorInfo], packing: Packing) -> tuple[int, int]:
    """(N, K); (0, 0) for a weight that is not a matrix. Only `mul_scale` reveals that a packed K is odd."""
    shape = roles["weight"].shape
    rows, columns = shape if len(shape) == 2 else (0, 0)
    if packing == "packed":
        columns *= 2
        columns -= "mul_scale" in roles and roles["mul_scale"].shape == (columns - 1,)
    return rows, columns


def _misshapen(name: str, scheme: str, packing: Packing, roles: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Problems with tensors of a layer whose shape or dtype does not follow from its weight."""
    if len(roles["weight"].shape) != 2:
        yield f"{name}.weight is {list(roles['weight'].shape)}, not a matrix"
        return
    for role in [role for role in roles if role != "weight"]:
        info = roles[role]
        shapes, dtypes = _allowed(scheme, role, *_decoded(roles, packing))
        if info.shape not in shapes or info.dtype not in dtypes:
            expected = f"{' or '.join(sorted(dtypes))} {list(shapes[0])}" if shapes else "part of its scheme"
            yield f"{name}.{role} is {info.dtype} {list(info.shape)}, not {expected}"


def _allowed(scheme: str, role: str, rows: int, columns: int) -> tuple[list[tuple[int, ...]], frozenset[str]]:
    """Allowed shapes and dtypes of a tensor of a layer with the weight [rows, columns]."""
    if role == "bias":
        return [(rows,)], FLOAT_DTYPES
    if role == "mul_scale":
        return [(columns,)], FLOAT_DTYPES
    written = STORED_SCHEMES[scheme].tensors(rows, columns)
    if role not in written:
        return [], FLOAT_DTYPES
    dtype, shape = written[role]
    if dtype == "U8":
        return [shape], BYTE_SCALES
    if role == "weight_dual_scale":
        return [shape, shape[:2]], FLOAT_DTYPES
    if shape == (rows, 1) and role != "weight_scale_inv":  # older tools drop the axis, or store one value
        dtypes = FLOAT_DTYPES | {"I8", "I32"} if role == "weight_offset" else FLOAT_DTYPES
        return [shape, (rows,), (1,), (1, 1), ()], dtypes
    return [shape], FLOAT_DTYPES


def _dtypes(roles: Mapping[str, TensorInfo]) -> str:
    """Dtypes and shapes as text, for example `weight I8 [64, 64], weight_scale F32 [64, 1]`."""
    shown = [role for role in STORED_ROLES if role in roles and role != "bias"]
    return ", ".join(f"{role} {roles[role].dtype} {list(roles[role].shape)}" for role in shown)


def disagreement(problems: list[str]) -> CheckpointError:
    """The error E-CKP-07 for sources that contradict each other about the scheme of a layer."""
    return CheckpointError(
        f"contradictory schemes for {len(problems)} layers: {listed(problems, 3)}",
        needs="manifest, quantization_config and tensor dtypes that agree",
        fix="use the JSON files and the weights of the same export, or export again",
        code="E-CKP-07",
    )


def _unpaired(problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{len(problems)} unpaired weights or scales: {listed(problems)}",
        needs="all scales of each quantized weight, and the weight of each scale",
        fix="copy the missing files, or download or export the model again",
        code="E-CKP-08",
    )


# ---- values of scales ---------------------------------------------------------------------------


_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}
"""Bit pattern of +inf. As unsigned integers, positive finite numbers are 1 to this - 1."""
_UNSIGNED: dict[str, Literal["H", "I", "Q"]] = {"BF16": "H", "F16": "H", "F32": "I", "F64": "Q"}
_BYTES = {dtype: DTYPE_BITS[dtype] // 8 for dtype in FLOAT_DTYPES}
_NAN_SCALE = re.compile(rb"\xff")
_NOT_ZERO = re.compile(rb"[^\x00]")


def check_scale_bytes(data: Buffer, name: str) -> None:
    """Raise CheckpointError (E-CKP-08) if a byte of E8M0 scales is 255, which is NaN."""
    if match := _NAN_SCALE.search(data):
        count = bytes(data).count(255)
        raise _invalid(
            f"{name} has {count} NaN scales (byte 255), the first at byte {match.start()}",
            "E8M0 bytes 0 to 254: 2^(byte - 127)",
        )


def check_zero(data: Buffer, dtype: str, name: str) -> None:
    """Raise CheckpointError (E-CKP-08) unless all offsets are 0 or -0. `dtype`: safetensors name."""
    if not _NOT_ZERO.search(data):
        return
    raw = bytearray(data)
    if (size := _BYTES.get(dtype)) is not None:
        signs = raw[size - 1 :: size]
        raw[size - 1 :: size] = signs.replace(b"\x80", b"\x00")
    if match := _NOT_ZERO.search(raw):
        index = match.start() // _BYTES.get(dtype, 1)
        raise _invalid(
            f"{name} is not zero (element {index})",
            "symmetric quantization, with offsets of 0; ascendit does not support asymmetric int8",
        )


def check_positive(data: Buffer, dtype: str, name: str) -> None:
    """Raise CheckpointError (E-CKP-08) unless all values are finite and above 0. `dtype`: a float dtype."""
    values = memoryview(data).cast("B").cast(_UNSIGNED[dtype])
    if not values or 0 < min(values) and max(values) < _INFINITY[dtype]:
        return
    bad = [index for index, bits in enumerate(values) if not 0 < bits < _INFINITY[dtype]]
    raise _invalid(
        f"{name} has {len(bad)} values that are zero, negative or not finite, the first at element {bad[0]}",
        "finite scales above 0",
    )


def check_float_scale(data: Buffer, dtype: str, name: str) -> None:
    """Raise CheckpointError (E-CKP-08) unless all scales are finite and at least 0 (0: a row of zeros).

    `dtype`: BF16, F16, F32 or F64.
    """
    limit, minus_zero = _INFINITY[dtype], 1 << (8 * _BYTES[dtype] - 1)
    values = memoryview(data).cast("B").cast(_UNSIGNED[dtype])
    if not values or max(values) < limit:
        return
    bad = [index for index, bits in enumerate(values) if bits >= limit and bits != minus_zero]
    if bad:
        raise _invalid(
            f"{name} has {len(bad)} scales that are negative or not finite, the first at element {bad[0]}",
            "finite scales; msModelSlim writes NaN for a group of 512 zeros, which no engine can run",
        )


def _invalid(got: str, needs: str) -> CheckpointError:
    return CheckpointError(
        got,
        needs=needs,
        fix="download the model again; if the published file is damaged too, quantize it again",
        code="E-CKP-08",
    )
