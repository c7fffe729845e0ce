"""Which linear layers are quantized, by the dtypes and shapes of their tensors; and whether scales are valid.

Tools store one format in different ways: FP4 two to a byte, or as numbers in e4m3 or BF16; int8 scales as
float32 [N, 1], or as BF16 [N, 1] or [1] from older tools. The headers say that a scale has the right shape;
only its bytes say whether it is one. Neither torch nor numpy is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ascendit.checkpoint.reader import DTYPE_BITS, Buffer, TensorInfo
from ascendit.errors import CheckpointError
from ascendit.names import is_linear, listed
from ascendit.quant.schemes import STORED_SCHEMES

Container = Literal["plain", "packed", "e4m3", "bf16"]
"""How codes are stored: as the format says; FP4 two to a byte; FP4 numbers, each in a wider element."""

FLOAT_DTYPES = frozenset({"BF16", "F16", "F32", "F64"})
BYTE_SCALES = frozenset({"U8", "F8_E8M0"})
"""One E8M0 byte to a block; both spellings are the same bytes."""
SCALE_ROLES = ("weight_scale", "weight_scale_inv", "weight_offset", "weight_dual_scale")
STORED_ROLES = ("weight", *SCALE_ROLES, "mul_scale", "bias")
_CODES = frozenset({"I8", "U8", "F8_E4M3", "F8_E5M2"})
"""A weight of one of these wants a scale; any other type but a float is a damaged file."""
_FP4: dict[str, Container] = {"U8": "packed", "F8_E4M3": "e4m3", "BF16": "bf16"}


@dataclass(frozen=True)
class Layer:
    """A linear layer that is stored as codes and scales, or whose input is smoothed."""

    name: str
    """`blocks.0.attn1.to_q`."""
    scheme: str
    """A key of `STORED_SCHEMES`; `bf16`: smoothed, not quantized."""
    shape: tuple[int, int]
    """(N, K) of the decoded weight."""
    container: Container
    tensors: dict[str, TensorInfo]
    """Role (`weight`, `weight_scale`, `mul_scale`, `bias`, ...) -> where it is stored."""


@dataclass(frozen=True)
class Claim:
    """What a manifest or config says about a layer."""

    scheme: str
    words: str
    """`quant_model_description.json says W8A8_MXFP8`."""


def read_layers(tensors: Mapping[str, TensorInfo], claims: Mapping[str, Claim]) -> dict[str, Layer]:
    """The layers among `tensors` that are not plain floating point, in the order of `tensors`.

    Raises CheckpointError E-CKP-08 for half of a pair, E-CKP-07 where a claim does not fit the dtypes,
    E-CKP-04 for shapes that do not belong together.
    """
    groups = _groups(tensors)
    if halves := [problem for name, roles in groups.items() for problem in _halves(name, roles)]:
        raise _unpaired(halves)
    layers: dict[str, Layer] = {}
    missing: list[str] = []
    disagree: list[str] = []
    for name, roles in groups.items():
        if "weight" not in roles:  # a bias alone: `read_expert` reports the missing weight
            continue
        if roles["weight"].dtype not in FLOAT_DTYPES | _CODES and not set(SCALE_ROLES) & roles.keys():
            continue  # `read_expert` reports the type
        claim = claims.get(name)
        options = possible(roles)
        scheme = claim.scheme if claim else next(iter(options), "")
        words = claim.words if claim else "nothing says how it is quantized"
        if scheme == "mxfp4_dualscale" and "mxfp4" in options:
            missing.append(f"{name}.weight_dual_scale is missing ({words})")
        elif scheme not in options:
            disagree.append(f"{name}: {words}, and its tensors are {_dtypes(roles)}")
        elif scheme != "bf16" or "mul_scale" in roles:
            container = options[scheme]
            layers[name] = Layer(name, scheme, _decoded(roles, container), container, roles)
    if missing:
        raise _unpaired(missing)
    if disagree:
        raise disagreement(disagree)
    if wrong := [
        text for x in layers.values() for text in _misshapen(x.name, x.scheme, x.container, x.tensors)
    ]:
        raise CheckpointError(
            f"{len(wrong)} tensors of quantized layers are misshapen: {listed(wrong)}",
            needs="scales and biases of the shape that their weight asks for",
            fix="download or export the model again",
            code="E-CKP-04",
        )
    return layers


def possible(roles: Mapping[str, TensorInfo]) -> dict[str, Container]:
    """Scheme -> container of all that the dtypes of one layer can be; those with the right shapes first."""
    weight, scale = roles["weight"].dtype, roles.get("weight_scale")
    scales = _scales(roles)
    if not scales:
        return {"bf16": "plain"} if weight in FLOAT_DTYPES else {}
    found: dict[str, Container] = {}
    for scheme in STORED_SCHEMES.values():
        if _scales(scheme.roles) != scales:
            continue
        if scale is not None and scale.dtype not in (BYTE_SCALES if scheme.block else FLOAT_DTYPES):
            continue
        if scheme.packed and weight in _FP4:
            found[scheme.name] = _FP4[weight]
        elif weight == scheme.qdata_dtype:
            found[scheme.name] = "plain"
    return dict(sorted(found.items(), key=lambda item: any(_misshapen("", item[0], item[1], roles))))


def _scales(roles: Iterable[str]) -> set[str]:
    """Those that tell one scheme from another: the offset of int8 may be left out."""
    return {"weight_scale", "weight_scale_inv", "weight_dual_scale"} & set(roles)


def _groups(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Layer -> role -> tensor, of the linear layers that are not plain weight and bias."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        layer, _, role = name.rpartition(".")
        if role in STORED_ROLES and is_linear(layer):
            groups.setdefault(layer, {})[role] = info
    return groups


def _halves(name: str, roles: Mapping[str, TensorInfo]) -> list[str]:
    """What lacks its other half, whatever the scheme."""
    scales = [role for role in (*SCALE_ROLES, "mul_scale") if role in roles]
    if "weight" not in roles:
        return [f"{name}.{role} has no weight" for role in scales]
    weight = roles["weight"].dtype
    if "mul_scale" not in roles and roles["weight"].name.endswith(".linear.weight"):
        return [f"{roles['weight'].name} is that of a smoothed layer, and {name} has no mul_scale"]
    if "weight_scale" in roles and "weight_scale_inv" in roles:
        return [f"{name} has both weight_scale and weight_scale_inv"]
    if not {"weight_scale", "weight_scale_inv"} & roles.keys():
        lone = [role for role in ("weight_offset", "weight_dual_scale") if role in roles]
        if lone:
            return [f"{name}.{role} has no weight_scale" for role in lone]
        if weight in _CODES:
            return [f"{name}.weight ({weight}) has no scale"]
    return []


def _decoded(roles: Mapping[str, TensorInfo], container: Container) -> tuple[int, int]:
    """(N, K); of a weight that is no matrix one that fits nothing. An odd K is known by `mul_scale` only."""
    shape = roles["weight"].shape
    rows, columns = shape if len(shape) == 2 else (0, 0)
    if container == "packed":
        columns *= 2
        columns -= "mul_scale" in roles and roles["mul_scale"].shape == (columns - 1,)
    return rows, columns


def _misshapen(
    name: str, scheme: str, container: Container, roles: Mapping[str, TensorInfo]
) -> Iterator[str]:
    """The tensors of a layer whose shape or dtype does not follow from its weight."""
    if len(roles["weight"].shape) != 2:
        yield f"{name}.weight is {list(roles['weight'].shape)}, not a matrix"
        return
    for role in [role for role in roles if role != "weight"]:
        info = roles[role]
        shapes, dtypes = _allowed(scheme, role, *_decoded(roles, container))
        if info.shape not in shapes or info.dtype not in dtypes:
            wanted = f"{' or '.join(sorted(dtypes))} {list(shapes[0])}" if shapes else "of this scheme"
            yield f"{name}.{role} is {info.dtype} {list(info.shape)}, not {wanted}"


def _allowed(scheme: str, role: str, rows: int, columns: int) -> tuple[list[tuple[int, ...]], frozenset[str]]:
    """The shapes and dtypes that a tensor beside a weight [rows, columns] may have."""
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
    if shape == (rows, 1) and role != "weight_scale_inv":  # older tools drop the axis, or have one for all
        dtypes = FLOAT_DTYPES | {"I8", "I32"} if role == "weight_offset" else FLOAT_DTYPES
        return [shape, (rows,), (1,), (1, 1), ()], dtypes
    return [shape], FLOAT_DTYPES


def _dtypes(roles: Mapping[str, TensorInfo]) -> str:
    """`weight I8 [64, 64], weight_scale F32 [64, 1]`."""
    shown = [role for role in STORED_ROLES if role in roles and role != "bias"]
    return ", ".join(f"{role} {roles[role].dtype} {list(roles[role].shape)}" for role in shown)


def disagreement(problems: list[str]) -> CheckpointError:
    """E-CKP-07: two sources contradict each other about a layer."""
    return CheckpointError(
        f"{len(problems)} layers are described in two ways: {listed(problems, 3)}",
        needs="manifest, quantization_config and the dtypes of the tensors to say the same",
        fix="put the JSON files and the weights of one export together, or export again",
        code="E-CKP-07",
    )


def _unpaired(problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{len(problems)} weights and scales do not pair: {listed(problems)}",
        needs="each quantized weight with its scales, and each scale with its weight",
        fix="copy the missing files, or download or export the model again",
        code="E-CKP-08",
    )


# ---- the bytes of scales ------------------------------------------------------------------------


_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}
"""Bits of +inf. Positive finite numbers are the patterns 1 to this - 1, read as unsigned."""
_UNSIGNED: dict[str, Literal["H", "I", "Q"]] = {"BF16": "H", "F16": "H", "F32": "I", "F64": "Q"}
_BYTES = {dtype: DTYPE_BITS[dtype] // 8 for dtype in FLOAT_DTYPES}
_NAN_SCALE = re.compile(rb"\xff")
_NOT_ZERO = re.compile(rb"[^\x00]")


def check_scale_bytes(data: Buffer, name: str) -> None:
    """E8M0 scales: no byte may be 255, which is NaN. Raises CheckpointError E-CKP-08."""
    if found := _NAN_SCALE.search(data):
        count = bytes(data).count(255)
        raise _invalid(
            f"{name} has {count} scales of NaN (byte 255), the first at byte {found.start()}",
            "E8M0 bytes 0 to 254: 2^(byte - 127)",
        )


def check_zero(data: Buffer, dtype: str, name: str) -> None:
    """Offsets of a symmetric format: every one 0, or -0. `dtype` in safetensors' spelling.

    Raises CheckpointError E-CKP-08.
    """
    if not _NOT_ZERO.search(data):
        return
    raw = bytearray(data)
    if (size := _BYTES.get(dtype)) is not None:
        signs = raw[size - 1 :: size]
        raw[size - 1 :: size] = signs.replace(b"\x80", b"\x00")
    if found := _NOT_ZERO.search(raw):
        place = found.start() // _BYTES.get(dtype, 1)
        raise _invalid(
            f"{name} is not zero (element {place})",
            "symmetric quantization: offsets of 0; ascendit has no asymmetric int8",
        )


def check_positive(data: Buffer, dtype: str, name: str) -> None:
    """Floating-point scales: every one finite and above 0. `dtype`: BF16, F16, F32 or F64.

    Raises CheckpointError E-CKP-08.
    """
    values = memoryview(data).cast("B").cast(_UNSIGNED[dtype])
    if not values or 0 < min(values) and max(values) < _INFINITY[dtype]:
        return
    bad = [place for place, bits in enumerate(values) if not 0 < bits < _INFINITY[dtype]]
    raise _invalid(
        f"{name} has {len(bad)} values that are zero, negative or not finite, the first at element {bad[0]}",
        "finite scales above 0",
    )


def check_float_scale(data: Buffer, dtype: str, name: str) -> None:
    """Floating-point scales of rows, groups or tiles: finite, and 0 at least, for a row of zeros.

    `dtype`: BF16, F16, F32 or F64. Raises CheckpointError E-CKP-08.
    """
    limit, minus_zero = _INFINITY[dtype], 1 << (8 * _BYTES[dtype] - 1)
    values = memoryview(data).cast("B").cast(_UNSIGNED[dtype])
    if not values or max(values) < limit:
        return
    bad = [place for place, bits in enumerate(values) if bits >= limit and bits != minus_zero]
    if bad:
        raise _invalid(
            f"{name} has {len(bad)} scales that are negative or not finite, the first at element {bad[0]}",
            "finite scales; msModelSlim writes NaN for 512 zeros in a row, which no engine can run",
        )


def _invalid(got: str, needs: str) -> CheckpointError:
    return CheckpointError(
        got,
        needs=needs,
        fix="download or export the model again; if the source is like this, its quantization went wrong",
        code="E-CKP-08",
    )
