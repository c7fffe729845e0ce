"""One transformer as a stream of canonical tensors: a plan is a list of `TensorStep`.

`stored_steps` plans an expert without changing its numbers: it changes the packing, converts floats to
float32 and repeats single scales. `weights.recipe_steps` plans an expert that is quantized. `run_steps`
passes the tensors to a `Sink`: a folder, a model or a checker. A step processes a few rows at a time, so no
tensor is ever complete in memory. Functions import numpy, and torch only for FP8 in tiles.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ascendit.checkpoint.layer_format import (
    Layer,
    check_float_scale,
    check_positive,
    check_scale_bytes,
    check_zero,
)
from ascendit.checkpoint.reader import WHOLE, RowReader, ShardSpec, as_bytes, as_tensor, float_bytes
from ascendit.checkpoint.tensor_info import DTYPE_BITS, TensorInfo
from ascendit.checkpoint.transformer import Expert
from ascendit.checkpoint.writer import Data, TensorSpec
from ascendit.errors import CheckpointError
from ascendit.mx.formats import FORMATS
from ascendit.names import is_block_linear, sort_names
from ascendit.progress import Advance
from ascendit.quant.schemes import FP8_TILES, scheme_after_reading
from ascendit.weights.engine_formats import CANONICAL, TargetFormat, layer_specs

if TYPE_CHECKING:
    import numpy as np
    import torch

    Table = np.ndarray[Any, Any]

How = Literal["move", "copy", "decode", "widen", "repeat", "recode", "untile", "fill", "rows", "encode"]
Check = Callable[[Any, str, str], None]
"""(bytes, dtype, name): raises for scales, offsets or factors that are invalid."""
Piece = tuple[str, Data]
"""(name of a tensor, its next bytes)."""
Make = Callable[["TensorStep", RowReader], Iterator[Piece]]
WAITING = 2
"""Maximum number of pieces that a sink still uses after `append` returns; a ring buffer needs one more."""


@dataclass(frozen=True, kw_only=True)
class TensorStep:
    """How one tensor, or all tensors of one quantized layer, are produced from the source."""

    name: str
    """Diffusers name of the first tensor."""
    how: How
    """move: unchanged, copied by a system call if possible; copy: unchanged, but checked; decode: to the
    dtype after reading; widen: to float32; repeat: one value for all rows; recode: FP4 in another packing;
    untile: FP8 in tiles to bfloat16; fill:
    without a source; rows: folded, rounded or smoothed; encode: quantized weight and scales."""
    specs: tuple[TensorSpec, ...]
    """The tensors in the order they are produced; empty: the source is only checked."""
    sources: tuple[TensorInfo, ...] = ()
    shard: ShardSpec = WHOLE
    """The shard of the first source that is read."""
    check: Check | None = None
    make: Make | None = None
    """Produces the bytes; None: the bytes of the source, checked, and converted for `widen`."""

    def output_bytes(self) -> int:
        """Bytes of all tensors that it produces."""
        return sum(spec.nbytes for spec in self.specs)

    def source_bytes(self) -> int:
        """Bytes of all source tensors, including bytes outside the shard."""
        return sum(info.nbytes for info in self.sources)

    def produce(self, reader: RowReader) -> Iterator[Piece]:
        """Yield the bytes of its tensors in order.

        A piece of `encode` is valid until WAITING more are produced, other pieces until the next one. Raises
        CheckpointError: E-CKP-08 for an invalid scale, offset or smoothing factor, E-CKP-04 for an element
        that is not an FP4 value.
        """
        return (self.make or _copy)(self, reader)


def smoothed_in(steps: Iterable[TensorStep]) -> set[str]:
    """The layers that get a `mul_scale`."""
    names = (spec.name for step in steps for spec in step.specs)
    return {name.removesuffix(".mul_scale") for name in names if name.endswith(".mul_scale")}


# ---- the receiver of the tensors ----------------------------------------------------------------


class Sink:
    """Receives tensors with Diffusers names, in the order of the plan."""

    def done(self, name: str) -> bool:
        """Whether an earlier run has completed the tensor."""
        return False

    def append(self, name: str, data: Data) -> None:
        """Receive the next bytes of a tensor. They are valid until WAITING more calls, or `flush`."""
        raise NotImplementedError

    def move(self, step: TensorStep) -> None:
        """Receive the tensor of a `move` step, which is unchanged."""
        raise NotImplementedError

    def flush(self) -> None:
        """Wait until no received piece is in use."""


def no_progress(name: str, count: int, skipped: bool = False) -> None:
    """No-op progress callback."""


def run_steps(
    steps: Iterable[TensorStep],
    reader: RowReader,
    sink: Sink,
    *,
    advance: Advance = no_progress,
    encode_all: bool = False,
) -> None:
    """Produce every tensor that the sink does not have yet.

    `advance`: receives the number of source bytes processed. `encode_all`: also encode layers that an
    earlier run has written, to measure them. Raises CheckpointError: E-CKP-08 for invalid scales, E-CKP-04
    for values that FP4 cannot represent, E-CKP-02 for truncated files, E-QNT-01 for weights that are not
    finite.
    """
    for step in steps:
        done = bool(step.specs) and all(sink.done(spec.name) for spec in step.specs)
        if done and not (encode_all and step.how == "encode"):
            advance(step.name, step.source_bytes(), True)
        elif step.how == "move":
            sink.move(step)
            advance(step.name, step.source_bytes())
        else:
            _make(step, reader, sink, advance)


def _make(step: TensorStep, reader: RowReader, sink: Sink, advance: Advance) -> None:
    """Pass the pieces of one step to the sink; progress is in source bytes, in proportion to the output."""
    produced, reported, total, weight = 0, 0, step.output_bytes(), step.source_bytes()
    for name, data in step.produce(reader):
        if not sink.done(name):
            sink.append(name, data)
            if step.how != "encode":
                sink.flush()
        produced += memoryview(data).nbytes
        done = min(weight, weight * produced // max(total, 1))
        advance(name, done - reported)
        reported = done
    if reported < weight:
        advance(step.name, weight - reported)


# ---- the steps of a stored expert ---------------------------------------------------------------

CHECKS: dict[str, Check] = {
    "weight_scale": check_float_scale,
    "weight_dual_scale": check_float_scale,
    "weight_offset": check_zero,
    "mul_scale": check_positive,
}


def stored_steps(expert: Expert, target: TargetFormat = CANONICAL) -> list[TensorStep]:
    """Plan all tensors of a stored expert; each tensor of the source is used by one step.

    `target`: determines the tensors of a layer and their packing.
    """
    steps = [step for layer in expert.layers.values() for step in _layer(layer, target)]
    used = {info for step in steps for info in step.sources}
    steps += [moved(name, info) for name, info in expert.tensors.items() if info not in used]
    by_name = {step.name: step for step in steps}
    return [by_name[name] for name in sort_names(by_name)]


def moved(name: str, info: TensorInfo) -> TensorStep:
    """Plan a tensor that does not change, or is only decoded."""
    spec = TensorSpec(name, info.dtype, info.shape)
    how: How = "move" if info.is_plain else "decode"
    return TensorStep(name=name, how=how, specs=(spec,), sources=(info,))


def _layer(layer: Layer, target: TargetFormat) -> Iterator[TensorStep]:
    """The steps of one linear layer. A stored offset is checked even if the target has none."""
    scheme = scheme_after_reading(layer.scheme)
    specs = layer_specs(
        layer.name,
        scheme,
        layer.shape,
        bias="bias" in layer.tensors,
        mul_scale="mul_scale" in layer.tensors,
        float_dtype=layer.tensors["weight"].dtype if layer.scheme == "bf16" else "BF16",
        target=target,
    )
    for spec in specs:
        role = spec.name.rpartition(".")[2]
        info = layer.tensors.get(role)
        if info is None:
            value = 1.0 if role == "mul_scale" else 0.0
            yield TensorStep(name=spec.name, how="fill", specs=(spec,), make=functools.partial(_fill, value))
        elif role == "weight":
            yield _weight(layer, spec, info, target.packing(layer.scheme))
        elif role == "bias" and scheme == "bf16":
            yield moved(spec.name, info)
        else:
            yield _scale(role, spec, info)
    if (info := layer.tensors.get("weight_offset")) is not None and not target.offset:
        name = f"{layer.name}.weight_offset"
        yield TensorStep(name=name, how="copy", specs=(), sources=(info,), check=check_zero)


def _weight(layer: Layer, spec: TensorSpec, info: TensorInfo, packing: str) -> TensorStep:
    if layer.scheme == FP8_TILES:
        sources = (info, layer.tensors["weight_scale_inv"])
        return TensorStep(name=spec.name, how="untile", specs=(spec,), sources=sources, make=_untile)
    if layer.packing == packing:
        return replace(moved(spec.name, info), specs=(spec,))
    make = functools.partial(_recode, layer.packing, packing)
    return TensorStep(name=spec.name, how="recode", specs=(spec,), sources=(info,), make=make)


def _scale(role: str, spec: TensorSpec, info: TensorInfo) -> TensorStep:
    """A scale, offset, smoothing factor, or the bias of a quantized layer."""
    name, specs, sources, check = spec.name, (spec,), (info,), CHECKS.get(role)
    if spec.dtype == "U8":
        return TensorStep(name=name, how="copy", specs=specs, sources=sources, check=_check_e8m0)
    if math.prod(info.shape) == 1 != math.prod(spec.shape):
        return TensorStep(name=name, how="repeat", specs=specs, sources=sources, check=check, make=_repeat)
    if info.dtype != spec.dtype:
        return TensorStep(name=name, how="widen", specs=specs, sources=sources, check=check)
    if check is None:
        return replace(moved(name, info), specs=specs)
    return TensorStep(name=name, how="copy", specs=specs, sources=sources, check=check)


def schemes_of(expert: Expert) -> dict[str, str]:
    """All linear layers of the blocks, and other quantized or smoothed layers -> scheme, in model order.

    FP8 in tiles is `bf16`, its scheme after reading.
    """
    named = [name.removesuffix(".weight") for name in expert.tensors if name.endswith(".weight")]
    layers = {name: "bf16" for name in named if is_block_linear(name)}
    layers |= {name: scheme_after_reading(x.scheme) for name, x in expert.layers.items()}
    return {name: layers[name] for name in sort_names(layers)}


def smoothing_of(expert: Expert) -> dict[str, bytes]:
    """Layer -> the bytes of its stored `mul_scale`, as float32 [K]. Raises the errors of `to_float32`."""
    infos = {name: expert.layers[name].tensors["mul_scale"] for name in expert.smoothed}
    with RowReader() as reader:
        return {n: to_float32(reader.read_all(x), x.dtype, x.name) for n, x in infos.items()}


# ---- the bytes of a step ------------------------------------------------------------------------


def _copy(step: TensorStep, reader: RowReader) -> Iterator[Piece]:
    (info,) = step.sources
    for _, view in reader.read_blocks(info, shard=step.shard):
        data = _checked(step, info, view)
        if step.specs:
            yield step.name, data


def _repeat(step: TensorStep, reader: RowReader) -> Iterator[Piece]:
    (info,) = step.sources
    yield step.name, _checked(step, info, reader.read_all(info)) * math.prod(step.specs[0].shape)


def _fill(value: float, step: TensorStep, reader: RowReader) -> Iterator[Piece]:
    yield step.name, struct.pack("<f", value) * (step.specs[0].nbytes // 4)


def _checked(step: TensorStep, info: TensorInfo, data: Any) -> Any:
    """The checked bytes, as float32 for `widen` and `repeat`. Offsets may have any dtype: they are zeros."""
    if step.check is not None:
        step.check(data, info.dtype, info.name)
    if step.how not in ("widen", "repeat"):
        return data
    if step.check is check_zero:
        return bytes(4 * len(data) * 8 // DTYPE_BITS[info.dtype])
    return to_float32(data, info.dtype, info.name)


def _check_e8m0(data: Any, dtype: str, name: str) -> None:
    check_scale_bytes(data, name)


def to_float32(data: bytes | memoryview, dtype: str, name: str) -> bytes:
    """Convert float bytes to float32.

    Raises CheckpointError (E-CKP-04) for float64 that float32 cannot represent.
    """
    if dtype != "F64":
        return float_bytes(bytes(data), dtype)
    import numpy as np

    float64 = np.frombuffer(data, np.float64)
    with np.errstate(over="ignore"):
        float32 = float64.astype(np.float32)
    if not np.array_equal(float32.astype(np.float64), float64, equal_nan=True):
        raise CheckpointError(
            f"{name} has float64 values that float32 cannot represent",
            needs="scales and biases with values that fit into float32",
            fix="export the model again; no known tool writes float64",
            code="E-CKP-04",
        )
    return float32.tobytes()


# ---- FP4 ----------------------------------------------------------------------------------------

_E4M3 = [sign | x for sign in (0, 0x80) for x in (0x00, 0x30, 0x38, 0x3C, 0x40, 0x44, 0x48, 0x4C)]
_BF16 = [s | x for s in (0, 0x8000) for x in (0, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0)]
"""0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives: the E2M1 values in the order of their bit patterns."""
_NAN, _NO_BYTE = 0x7F, 0xFFFF


def _recode(source: str, target: str, step: TensorStep, reader: RowReader) -> Iterator[Piece]:
    (info,) = step.sources
    length = step.specs[0].shape[-1] if source == "packed" else step.shard.shape_of(info.shape)[-1]
    for _, view in reader.read_blocks(info, shard=step.shard):
        yield step.name, recode(view, length, source, target, info.name)


def recode(rows: bytes | memoryview, length: int, source: str, target: str, name: str = "") -> bytes:
    """Convert FP4 rows of `length` values between packings: `packed`, `e4m3`, `bf16` (source only).

    Packed: two elements per byte, the even index in the low nibble; a row of odd length ends with a zero
    nibble. Raises CheckpointError (E-CKP-04) for values that FP4 cannot represent.
    """
    import numpy as np

    if source == "packed":
        assert target == "e4m3", target
        pairs = _e4m3_of_bytes()[np.frombuffer(rows, np.uint8)].view(np.uint8)
        return bytes(pairs.reshape(-1, length + length % 2)[:, :length].tobytes())
    numbers = np.frombuffer(rows, np.uint8)
    if source == "bf16":
        numbers = _e4m3_of_bf16()[numbers.view(np.uint16)]
    if target == "e4m3":
        recoded, bad = numbers, bool((numbers == _NAN).any())
    else:
        even = np.pad(numbers.reshape(-1, length), ((0, 0), (0, 1))) if length % 2 else numbers
        recoded = _bytes_of_e4m3()[even.reshape(-1).view(np.uint16)]
        bad = int(recoded.max(initial=0)) == _NO_BYTE
    if bad:
        count = int((~np.isin(numbers, _E4M3)).sum())
        raise CheckpointError(
            f"{name} has {count} values that FP4 cannot represent",
            needs="0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, because the manifest says FP4",
            fix="export the model again; this file and its manifest are from different exports",
            code="E-CKP-04",
        )
    return bytes(recoded.astype(np.uint8, copy=False).tobytes())


@functools.cache
def _e4m3_of_bf16() -> Table:
    """Bit pattern of a bfloat16 value -> e4m3; NaN for values that are not in E2M1."""
    import numpy as np

    table = np.full(1 << 16, _NAN, np.uint8)
    table[_BF16] = _E4M3
    return table


@functools.cache
def _e4m3_of_bytes() -> Table:
    """Byte of two FP4 elements -> two e4m3 values, the first in the low byte."""
    import numpy as np

    qdata, numbers = np.arange(256), np.asarray(_E4M3, np.uint16)
    return np.asarray(numbers[qdata & 15] | numbers[qdata >> 4] << 8, "<u2")


@functools.cache
def _bytes_of_e4m3() -> Table:
    """Two e4m3 values, the first in the low byte -> byte of two FP4 elements, or `_NO_BYTE`."""
    import numpy as np

    table = np.full(1 << 16, _NO_BYTE, np.uint16)
    table[_e4m3_of_bytes()] = np.arange(256)
    return table


# ---- FP8 in tiles -------------------------------------------------------------------------------

FP8_TILE = FORMATS[FP8_TILES].block
"""128 rows and columns per tile."""


def _untile(step: TensorStep, reader: RowReader) -> Iterator[Piece]:
    """Element x tile scale in float32, rounded once to bfloat16."""
    import torch

    weight, inverse = step.sources
    scale, column = tile_scales(inverse, reader), step.shard.start if step.shard.axis else 0
    shard = replace(weight, shape=step.shard.shape_of(weight.shape))
    for start, view in reader.read_blocks(weight, shard=step.shard, multiple=FP8_TILE):
        values = tile_values(as_tensor(view, shard), scale, start, column)
        yield step.name, as_bytes(values.to(torch.bfloat16))


def tile_scales(info: TensorInfo, reader: RowReader) -> torch.Tensor:
    """Read and check `weight_scale_inv`, float32 [ceil(N / 128), ceil(K / 128)].

    Raises CheckpointError (E-CKP-08).
    """
    import torch

    data = reader.read_all(info)
    check_float_scale(data, info.dtype, info.name)
    values = bytearray(to_float32(data, info.dtype, info.name))
    return torch.frombuffer(values, dtype=torch.float32).view(info.shape)


def tile_values(qdata: torch.Tensor, scale: torch.Tensor, row: int, column: int = 0) -> torch.Tensor:
    """Decode FP8 [n, k], which starts at `row` and `column` of a weight [N, K], to float32 [n, k].

    `scale`: float32 [ceil(N / 128), ceil(K / 128)], the `weight_scale_inv` of the complete weight. Same
    values as `mx.decode` of fp8_128x128, with a third of the memory.
    """
    import torch

    values = qdata.to(torch.float32)
    for start in range(row // FP8_TILE * FP8_TILE, row + len(values), FP8_TILE):
        factors = scale[start // FP8_TILE].repeat_interleave(FP8_TILE)
        values[max(start - row, 0) : start - row + FP8_TILE] *= factors[column : column + values.shape[1]]
    return values
