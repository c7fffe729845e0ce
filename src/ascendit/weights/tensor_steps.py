"""From a stored expert to the tensors of a repacked one: one step for each tensor of the output.

Tensors that change on the way get another container, wider floats, or one row made many. Values never change.
Each way is a generator of bytes, some rows at a time, so that no tensor is ever complete in memory. No torch
at import: numpy is imported by the calls, torch only for FP8 in tiles.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ascendit.checkpoint.layer_format import (
    Layer,
    check_float_scale,
    check_positive,
    check_scale_bytes,
    check_zero,
)
from ascendit.checkpoint.reader import DTYPE_BITS, RowReader, TensorInfo, as_bytes, as_tensor, float_bytes
from ascendit.checkpoint.transformer import Expert
from ascendit.checkpoint.writer import TensorSpec
from ascendit.errors import CheckpointError
from ascendit.mx.formats import FORMATS
from ascendit.names import is_block_linear, sort_names
from ascendit.quant.fusion import fused_with
from ascendit.quant.schemes import FP8_TILES, scheme_after_reading
from ascendit.weights.engine_formats import Dialect

if TYPE_CHECKING:
    import numpy as np
    import torch

    Table = np.ndarray[Any, Any]

How = Literal["move", "copy", "widen", "repeat", "recode", "untile", "fill"]
ScaleCheck = Literal["", "scale_bytes", "scale", "zero", "positive"]


@dataclass(frozen=True, kw_only=True)
class TensorStep:
    """One tensor of the output: what it is, and the way from the source to it."""

    spec: TensorSpec
    """By the name that it gets in the file."""
    name: str
    """By its Diffusers name."""
    how: How
    """move: by the kernel; copy: as it is, but seen; widen: to float32; repeat: one number for all rows;
    recode: FP4 in another container; untile: FP8 in tiles to bfloat16; fill: a constant without a source."""
    sources: tuple[TensorInfo, ...] = ()
    check: ScaleCheck = ""
    containers: tuple[str, str] = ("", "")
    """Of `recode`: from, to."""
    value: float = 0.0
    """Of `fill`."""

    @property
    def rewritten(self) -> bool:
        """Whether the bytes of the output are others than those of the source."""
        return self.how not in ("move", "copy")


@dataclass(frozen=True)
class TensorSteps:
    """All steps of one expert."""

    written: tuple[TensorStep, ...]
    """One for each tensor of the output, in the order it is written."""
    dropped: tuple[TensorStep, ...]
    """Zeros that the reader does without; they are checked, and not written."""

    @property
    def specs(self) -> list[TensorSpec]:
        return [step.spec for step in self.written]

    @property
    def smoothed(self) -> set[str]:
        """Layers that have a `mul_scale` in the output."""
        return {step.name.removesuffix(".mul_scale") for step in self.written if _is_smoothing(step.name)}

    @property
    def names(self) -> list[str]:
        """Diffusers names, in the order they are written."""
        return [step.name for step in self.written]


# ---- the steps of an expert ---------------------------------------------------------------------

_CHECKS: dict[str, ScaleCheck] = {
    "weight_scale": "scale",
    "weight_dual_scale": "scale",
    "weight_offset": "zero",
    "mul_scale": "positive",
}


def steps_for(expert: Expert, dialect: Dialect) -> TensorSteps:
    """Every tensor of the source has its place in one step; names were checked when it was read."""
    steps = {step.name: step for layer in expert.layers.values() for step in _layer(layer, dialect)}
    dropped = () if dialect.offset else tuple(_offsets(expert))
    used = {info for step in (*steps.values(), *dropped) for info in step.sources}
    for name, info in expert.tensors.items():
        if info not in used:
            assert name not in steps, name
            steps[name] = _moved(name, info)
    ordered = TensorSteps(tuple(steps[name] for name in sort_names(steps)), dropped)
    smoothed = ordered.smoothed
    written = tuple(
        replace(step, spec=replace(step.spec, name=dialect.on_disk(step.name, smoothed)))
        for step in ordered.written
    )
    return TensorSteps(written, dropped)


def _is_smoothing(name: str) -> bool:
    return name.endswith(".mul_scale")


def _moved(name: str, info: TensorInfo) -> TensorStep:
    spec = TensorSpec(name, info.dtype, info.shape, info.start)
    return TensorStep(spec=spec, name=name, how="move", sources=(info,))


def _offsets(expert: Expert) -> Iterator[TensorStep]:
    for layer in expert.layers.values():
        if (info := layer.tensors.get("weight_offset")) is not None:
            name = f"{layer.name}.weight_offset"
            spec = TensorSpec(name, info.dtype, info.shape)
            yield TensorStep(spec=spec, name=name, how="copy", sources=(info,), check="zero")


def _layer(layer: Layer, dialect: Dialect) -> Iterator[TensorStep]:
    """The tensors of one linear layer."""
    scheme = scheme_after_reading(layer.scheme)
    weight, bias = layer.tensors["weight"], layer.tensors.get("bias")
    specs = dialect.layer_specs(
        layer.name,
        scheme,
        layer.shape,
        bias=bias is not None,
        mul_scale="mul_scale" in layer.tensors,
        float_dtype=weight.dtype if layer.scheme == "bf16" else "BF16",
    )
    for spec in specs:
        role = spec.name.rpartition(".")[2]
        info = layer.tensors.get(role)
        if role == "weight":
            yield _weight(layer, spec, weight, dialect)
        elif info is None:
            yield TensorStep(spec=spec, name=spec.name, how="fill", value=1.0 if role == "mul_scale" else 0.0)
        elif role == "bias" and scheme == "bf16":
            yield _moved(spec.name, info)
        else:
            yield _scale(spec, info, role)


def _weight(layer: Layer, spec: TensorSpec, info: TensorInfo, dialect: Dialect) -> TensorStep:
    if layer.scheme == FP8_TILES:
        sources = (info, layer.tensors["weight_scale_inv"])
        return TensorStep(spec=spec, name=spec.name, how="untile", sources=sources)
    target = dialect.container(layer.scheme)
    if layer.container == target:
        return TensorStep(
            spec=replace(spec, source_start=info.start), name=spec.name, how="move", sources=(info,)
        )
    return TensorStep(
        spec=spec, name=spec.name, how="recode", sources=(info,), containers=(layer.container, target)
    )


def _scale(spec: TensorSpec, info: TensorInfo, role: str) -> TensorStep:
    """A scale, offset, smoothing factor, or the bias of a quantized layer."""
    check = _CHECKS.get(role, "")
    if spec.dtype == "U8":
        return TensorStep(spec=spec, name=spec.name, how="copy", sources=(info,), check="scale_bytes")
    if math.prod(info.shape) == 1 != math.prod(spec.shape):
        return TensorStep(spec=spec, name=spec.name, how="repeat", sources=(info,), check=check)
    assert math.prod(info.shape) == math.prod(spec.shape), info
    how: How = "widen" if info.dtype != spec.dtype else "copy" if check else "move"
    return TensorStep(spec=spec, name=spec.name, how=how, sources=(info,), check=check)


def schemes_of(expert: Expert) -> dict[str, str]:
    """Every linear of the blocks, and every other layer that is quantized or smoothed -> scheme, in order.

    FP8 in tiles is `bf16` here: that is what becomes of it.
    """
    found = {name.removesuffix(".weight"): "bf16" for name in expert.tensors if name.endswith(".weight")}
    layers = {name: scheme for name, scheme in found.items() if is_block_linear(name)}
    layers |= {name: scheme_after_reading(x.scheme) for name, x in expert.layers.items()}
    return {name: layers[name] for name in sort_names(layers)}


def unlike_qkv(expert: Expert) -> bool:
    """Whether the `mul_scale` of a Q, K and V of one self-attention differ, or are not on all three."""
    with RowReader() as reader:
        for name in expert.smoothed:
            group = [expert.layers.get(other) for other in fused_with(name)]
            if len(group) == 1:
                continue
            scales = [layer.tensors.get("mul_scale") if layer else None for layer in group]
            data = {None if x is None else to_float32(reader.whole(x), x.dtype, x.name) for x in scales}
            if len(data) > 1:
                return True
    return False


# ---- the bytes of a step ------------------------------------------------------------------------


def produce(step: TensorStep, reader: RowReader) -> Iterator[Any]:
    """The bytes of the tensor, in order. Each buffer is valid until the next is asked for.

    Raises CheckpointError E-CKP-08 for an invalid scale, offset or smoothing factor, E-CKP-04 for a
    number in a wide container that is no FP4 number.
    """
    return _WAYS[step.how](step, reader)


def _copy(step: TensorStep, reader: RowReader) -> Iterator[Any]:
    (info,) = step.sources
    for _, view in reader.blocks(info):
        _examine(step, info, view)
        yield view


def _widen(step: TensorStep, reader: RowReader) -> Iterator[Any]:
    (info,) = step.sources
    for _, view in reader.blocks(info):
        _examine(step, info, view)
        yield _floats(step, info, view)


def _repeat(step: TensorStep, reader: RowReader) -> Iterator[Any]:
    (info,) = step.sources
    data = reader.whole(info)
    _examine(step, info, data)
    yield _floats(step, info, data) * math.prod(step.spec.shape)


def _floats(step: TensorStep, info: TensorInfo, data: bytes | memoryview) -> bytes:
    """The numbers as float32. Offsets, which are zeros by now, may be of any type."""
    if step.check == "zero":
        return bytes(4 * len(data) * 8 // DTYPE_BITS[info.dtype])
    return to_float32(data, info.dtype, info.name)


def to_float32(data: bytes | memoryview, dtype: str, name: str) -> bytes:
    """Float numbers as float32, exact. CheckpointError E-CKP-04 for float64 that float32 cannot hold."""
    if dtype != "F64":
        return float_bytes(bytes(data), dtype)
    import numpy as np

    wide = np.frombuffer(data, np.float64)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if not np.array_equal(narrow.astype(np.float64), wide, equal_nan=True):
        raise CheckpointError(
            f"{name} holds float64 numbers that float32 cannot hold",
            needs="scales and biases in float32, or in a type that fits into it",
            fix="export the model again; no known tool writes float64",
            code="E-CKP-04",
        )
    return narrow.tobytes()


def _fill(step: TensorStep, reader: RowReader) -> Iterator[Any]:
    assert step.spec.dtype == "F32"
    yield struct.pack("<f", step.value) * (step.spec.nbytes // 4)


def _examine(step: TensorStep, info: TensorInfo, data: bytes | memoryview) -> None:
    if step.check == "scale_bytes":
        check_scale_bytes(data, info.name)
    elif step.check == "scale":
        check_float_scale(data, info.dtype, info.name)
    elif step.check == "zero":
        check_zero(data, info.dtype, info.name)
    elif step.check == "positive":
        check_positive(data, info.dtype, info.name)


# ---- FP4 ----------------------------------------------------------------------------------------

_E4M3 = (0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C)
_BF16 = (0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0)
"""0, 0.5, 1, 1.5, 2, 3, 4, 6: the numbers of E2M1 in the order of their codes."""
_NO_CODE, _NO_BYTE = 0xFF, 0xFFFF


def _recode(step: TensorStep, reader: RowReader) -> Iterator[Any]:
    (info,) = step.sources
    source, target = step.containers
    length = (step.spec if source == "packed" else info).shape[-1]
    for _, view in reader.blocks(info):
        yield recode(view, length, source, target, info.name)


def recode(rows: bytes | memoryview, length: int, source: str, target: str, name: str = "") -> bytes:
    """FP4 rows of `length` numbers from one container to another: `packed`, `e4m3`, `bf16` (source only).

    Packed: two codes in a byte, the even index in the low nibble; an odd row ends with code 0.
    """
    import numpy as np

    if source == "packed":
        assert target == "e4m3", target
        pairs = _pairs_of_e4m3()[np.frombuffer(rows, np.uint8)].view(np.uint8)
        return bytes(pairs.reshape(-1, length + length % 2)[:, :length].tobytes())
    wide = np.frombuffer(rows, np.uint8 if source == "e4m3" else np.uint16).reshape(-1, length)
    if (source, target) == ("e4m3", "packed") and not length % 2:
        packed = _bytes_of_pairs()[wide.reshape(-1).view(np.uint16)]
        if int(packed.max(initial=0)) < _NO_BYTE:
            return bytes(packed.astype(np.uint8).tobytes())
    codes = _codes_of(source)[wide]
    if (bad := int((codes == _NO_CODE).sum())) > 0:
        raise _not_fp4(name, bad)
    if target == "e4m3":
        return bytes(_e4m3_of_codes()[codes].tobytes())
    codes = np.pad(codes, ((0, 0), (0, length % 2)))
    return bytes((codes[:, 0::2] | codes[:, 1::2] << 4).tobytes())


@functools.cache
def _codes_of(container: str) -> Table:
    """Bit pattern of a number -> its code, or `_NO_CODE`."""
    import numpy as np

    patterns, bits = (_E4M3, 8) if container == "e4m3" else (_BF16, 16)
    table = np.full(1 << bits, _NO_CODE, np.uint8)
    for code, pattern in enumerate(patterns):
        table[pattern], table[pattern | 1 << (bits - 1)] = code, code | 8
    return table


@functools.cache
def _e4m3_of_codes() -> Table:
    import numpy as np

    return np.asarray([*_E4M3, *(0x80 | x for x in _E4M3)], np.uint8)


@functools.cache
def _pairs_of_e4m3() -> Table:
    """Byte of two codes -> two e4m3 numbers, the first in the low byte."""
    import numpy as np

    codes = np.arange(256)
    numbers = _e4m3_of_codes().astype(np.uint16)
    return np.asarray(numbers[codes & 15] | numbers[codes >> 4] << 8, "<u2")


@functools.cache
def _bytes_of_pairs() -> Table:
    """Two e4m3 numbers, the first in the low byte -> byte of two codes, or `_NO_BYTE`."""
    import numpy as np

    codes = _codes_of("e4m3").astype(np.uint16)
    low, high = codes[None, :], codes[:, None]
    return np.where((low == _NO_CODE) | (high == _NO_CODE), _NO_BYTE, low | high << 4).reshape(-1)


def _not_fp4(name: str, count: int) -> CheckpointError:
    return CheckpointError(
        f"{name} holds {count} numbers that are not in FP4",
        needs="0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, in a layer that the manifest calls FP4",
        fix="export the model again; this file and its manifest do not belong together",
        code="E-CKP-04",
    )


# ---- FP8 in tiles -------------------------------------------------------------------------------

FP8_TILE = FORMATS[FP8_TILES].block
"""Rows and columns of a tile: 128."""


def _untile(step: TensorStep, reader: RowReader) -> Iterator[Any]:
    """Code x scale of its tile in float32, rounded once to bfloat16."""
    import torch

    weight, inverse = step.sources
    found = reader.whole(inverse)
    check_float_scale(found, inverse.dtype, inverse.name)
    rows = bytearray(to_float32(found, inverse.dtype, inverse.name))
    scale = torch.frombuffer(rows, dtype=torch.float32).view(inverse.shape)
    for start, view in reader.blocks(weight, multiple=FP8_TILE):
        codes = as_tensor(view, weight)
        yield as_bytes(tile_values(codes, scale, start).to(torch.bfloat16))


def tile_values(codes: torch.Tensor, scale: torch.Tensor, start: int, tile: int = FP8_TILE) -> torch.Tensor:
    """FP8 rows [n, K] beginning at row `start` (a multiple of `tile`) -> float32 code x scale of its tile.

    `scale`: float32 [ceil(N / tile), ceil(K / tile)], the `weight_scale_inv` of the whole weight. Equal to
    `mx.decode` of fp8_128x128 on those rows, in a third of the memory.
    """
    import torch

    values = codes.to(torch.float32)
    for row in range(0, values.shape[0], tile):
        factors = scale[(start + row) // tile].repeat_interleave(tile)[: values.shape[1]]
        values[row : row + tile] *= factors
    return values


_WAYS: dict[str, Callable[[TensorStep, RowReader], Iterator[Any]]] = {
    "copy": _copy,
    "widen": _widen,
    "repeat": _repeat,
    "recode": _recode,
    "untile": _untile,
    "fill": _fill,
}
