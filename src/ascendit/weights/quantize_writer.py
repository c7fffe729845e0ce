"""A float expert, quantized some rows at a time, into a file or into memory.

`SourceRows` reads rows as the recipe wants them, `ExpertWriter` encodes them and puts them into a `Sink`.
`WriteBehind` is the sink of a folder: a ShardWriter in a thread of its own, so that the next rows are encoded
while these are written.
"""

from __future__ import annotations

import itertools
import queue
import struct
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

import torch

from ascendit.checkpoint.layer_format import check_float_scale
from ascendit.checkpoint.reader import (
    BLOCK_BYTES,
    TORCH_DTYPES,
    RowReader,
    TensorInfo,
    as_bytes,
    as_tensor,
    block_rows,
    float_bytes,
)
from ascendit.checkpoint.writer import Data, ShardWriter, TensorSpec
from ascendit.errors import CheckpointError
from ascendit.mx.formats import SEARCH
from ascendit.mx.row_encoder import RowEncoder, ScaleSearch, first_bad_row
from ascendit.mx.smoothing import rotation, smooth_weight
from ascendit.progress import Advance
from ascendit.quant.layer_rules import LayerScheme
from ascendit.quant.schemes import SCHEMES
from ascendit.weights.applied_recipe import ROTATIONS, AppliedRecipe
from ascendit.weights.lora.fold import Folds
from ascendit.weights.tensor_steps import FP8_TILE, recode, tile_values


class Sink(Protocol):
    """Where `ExpertWriter` puts tensors: a file, or memory."""

    def done(self, name: str) -> bool: ...

    def append(self, name: str, data: Data) -> None: ...

    def move(self, info: TensorInfo, name: str) -> None: ...

    def flush(self) -> None: ...


def _no_progress(name: str, count: int, skipped: bool = False) -> None:
    """No progress is reported."""


MOST_THREADS = 4
"""Threads that encode: no disk can feed more. Half of PyTorch's, if that is less: the others write."""


class ExpertWriter:
    """The tensors of one expert, in canonical order, from a reader to a writer.

    `advance` is called with the bytes of the source that are done and their tensor. `measure`: the
    SQNR of each quantized layer, for which layers are encoded too that an earlier run has written.
    """

    def __init__(
        self,
        applied: AppliedRecipe,
        reader: RowReader,
        writer: Sink,
        *,
        folds: Folds | None = None,
        measure: bool = False,
        advance: Advance = _no_progress,
    ) -> None:
        self.applied, self.reader, self.writer = applied, reader, writer
        self.sqnr: dict[str, float] = {}
        self._rows = SourceRows(applied, reader, folds)
        self._measure = measure
        self._advance = advance
        self._key: tuple[str, str, int, str, int] | None = None
        self._encoder: RowEncoder | None = None
        self._disk_names = {s.name: d.name for s, d in zip(applied.specs, applied.disk_specs, strict=True)}

    def write(self) -> None:
        """Write every tensor. UsageError and CheckpointError for weights that cannot be encoded or read."""
        coded = self.applied.coded

        def layer_of(spec: TensorSpec) -> str:
            layer = spec.name.rpartition(".")[0]
            return layer if layer in coded else ""

        for layer, specs in itertools.groupby(self.applied.specs, key=layer_of):
            if layer:
                self._layer(coded[layer], list(specs))
            else:
                for spec in specs:
                    self._tensor(spec)

    # ---- tensors that stay floats ---------------------------------------------------------------

    def _tensor(self, spec: TensorSpec) -> None:
        layer, _, role = spec.name.rpartition(".")
        info = self.applied.expert.tensors.get(spec.name)
        done = self.writer.done(self._disk_names[spec.name])
        if not done:
            if role in ROTATIONS and any(a.rotate and a.name == layer for a in self.applied.attention):
                self._append(spec.name, as_bytes(rotation(spec.shape[0])))
            elif info is None:
                assert role == "mul_scale", spec.name
                self._append(spec.name, self._mul_scale(spec))
            elif self._rows.changed(spec.name, info):
                for _, rows in self._rows.blocks(spec.name, info):
                    self._append(spec.name, as_bytes(rows))
                    self.writer.flush()
            else:
                self.writer.move(info, self._disk_names[spec.name])
        if info is not None:
            self._advance(spec.name, info.nbytes, done)

    def _mul_scale(self, spec: TensorSpec) -> Data:
        """As given, or ones if the engine that reads the result requires a factor."""
        scale = self.applied.smoothing.get(spec.name.removesuffix(".mul_scale"))
        if scale is None:
            return struct.pack("<f", 1.0) * spec.shape[0]
        return as_bytes(scale.float())

    # ---- quantized layers -----------------------------------------------------------------------

    def _layer(self, layer: LayerScheme, specs: list[TensorSpec]) -> None:
        done = all(self.writer.done(self._disk_names[spec.name]) for spec in specs)
        info = self.applied.weight(layer.name)
        if done and not self._measure:
            self._advance(layer.name, self._source_bytes(layer.name), True)
            return
        scales = self._encode(layer, info)
        for spec in specs[1:]:
            role = spec.name.rpartition(".")[2]
            if role == "bias":
                data: Data = self._bias(spec.name)
            elif role == "mul_scale":
                data = self._mul_scale(spec)
            else:  # an offset is zeros
                data = scales.get(role) or bytes(spec.nbytes)
            self._append(spec.name, data)
        self._advance(layer.name, self._source_bytes(layer.name) - info.nbytes)

    def _encode(self, layer: LayerScheme, info: TensorInfo) -> dict[str, bytearray]:
        """Write the codes, return the scales by role."""
        assert layer.scale_rule is not None
        name = f"{layer.name}.weight"
        rule = self._search(name, info) if layer.scale_rule == SEARCH else layer.scale_rule
        scales = {"weight_scale": bytearray(), "weight_dual_scale": bytearray()}
        row_bytes = info.nbytes // info.shape[0]
        encoder = self._encoder_of(layer.scheme, rule, name, info)
        for start, rows in self._rows.blocks(name, info):
            encoded = encoder(rows)
            if (bad_row := first_bad_row(encoded)) is not None:
                raise not_finite(self.applied.expert.name, name, start + bad_row)
            self._append(name, self._codes(layer.scheme, info, as_bytes(encoded.codes)))
            scales["weight_scale"] += as_bytes(encoded.scale)
            if encoded.dual_scale is not None:
                scales["weight_dual_scale"] += as_bytes(encoded.dual_scale)
            self._advance(name, len(rows) * row_bytes)
        if self._measure:
            self.sqnr[layer.name] = encoder.sqnr
        return scales

    def _encoder_of(self, scheme: str, rule: str, name: str, info: TensorInfo) -> RowEncoder:
        """The last one again, if it fits. Codes must outlive WAITING pieces that are not written yet."""
        format, max_rows = SCHEMES[scheme].weight, self._rows.max_rows(name, info)
        key = (format, rule, info.shape[1], self.applied.dtype(info), max_rows)
        if self._encoder is None or self._key != key:
            self._key = key
            self._encoder = RowEncoder(
                format,
                info.shape[1],
                dtype=getattr(torch, TORCH_DTYPES[self.applied.dtype(info)]),
                max_rows=max_rows,
                scale_rule=rule,
                measure=self._measure,
                buffers=WAITING + 1,
                threads=min(max(torch.get_num_threads() // 2, 1), MOST_THREADS),
            )
        self._encoder.restart()
        return self._encoder

    def _codes(self, scheme: str, info: TensorInfo, codes: memoryview) -> Data:
        if self.applied.dialect.container(scheme) != "e4m3":
            return codes
        return recode(codes, info.shape[1], "packed", "e4m3")

    def _search(self, name: str, info: TensorInfo) -> str:
        """The one constant of a tensor that errs least: a pass of its own."""
        search = ScaleSearch()
        for _, rows in self._rows.blocks(name, info):
            search.add(rows)
        return search.best()

    def _bias(self, name: str) -> bytes:
        """As float32: folded and rounded in the dtype of the source, then widened, which is exact."""
        info = self.applied.expert.tensors[name]
        if not self._rows.changed(name, info):
            return float_bytes(self.reader.whole(info), info.dtype)
        dtype = self.applied.dtype(info)
        return b"".join(float_bytes(as_bytes(rows), dtype) for _, rows in self._rows.blocks(name, info))

    def _source_bytes(self, layer: str) -> int:
        names = (f"{layer}.{role}" for role in ("weight", "bias"))
        return sum(i.nbytes for n in names if (i := self.applied.expert.tensors.get(n)) is not None)

    def _append(self, name: str, data: Data) -> None:
        if not self.writer.done(self._disk_names[name]):
            self.writer.append(self._disk_names[name], data)


def not_finite(expert: str, name: str, row: int) -> CheckpointError:
    """A weight that has no codes."""
    return CheckpointError(
        f"{expert}: {name} holds NaN or infinity in row {row}",
        needs="finite weights: a block without a scale (byte 255) is refused by every reader",
        fix=f"download the model again, or keep the layer: --keep {name.removesuffix('.weight')}",
        code="E-QNT-01",
    )


# ---- rows as they are encoded or kept -----------------------------------------------------------

SMALLER = 4
"""Blocks of rows that are worked on are so many times smaller: each has copies in float32."""


class SourceRows:
    """Reads tensors of one expert and does to them what the recipe asks for, in this order:

    FP8 in tiles is decoded to BF16; LoRA files are folded in; what the recipe rounds is rounded; smoothed
    weights are multiplied. `small_blocks`: for a caller who copies rows in float32.
    """

    def __init__(
        self, applied: AppliedRecipe, reader: RowReader, folds: Folds | None, *, small_blocks: bool = False
    ) -> None:
        self._applied = applied
        self._small_blocks = small_blocks
        self._reader = reader
        self._folds = folds if folds is not None and folds.names else None

    def changed(self, name: str, info: TensorInfo) -> bool:
        """Whether the values differ from those in the file."""
        folded = self._folds is not None and name in self._folds.names
        smoothed = name.endswith(".weight") and name.removesuffix(".weight") in self._applied.smoothing
        return folded or smoothed or self._applied.dtype(info) != info.dtype

    def max_rows(self, name: str, info: TensorInfo) -> int:
        """The most rows that `blocks` gives at once."""
        multiple, block_bytes = self._cut(name, info)
        return block_rows(info, multiple=multiple, block_bytes=block_bytes)

    def blocks(self, name: str, info: TensorInfo) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows); the rows are valid until the next come."""
        tiles = self._tiles(name)
        smoothing = self._applied.smoothing.get(name.removesuffix(".weight"))
        dtype = getattr(torch, TORCH_DTYPES[self._applied.dtype(info)])
        multiple, block_bytes = self._cut(name, info)
        for start, view in self._reader.blocks(info, multiple=multiple, block_bytes=block_bytes):
            rows = as_tensor(view, info)
            if tiles is not None:
                rows = tile_values(rows, tiles, start).to(torch.bfloat16)
            if self._folds is not None:
                rows = self._folds.fold(name, rows, start)
            rows = rows.to(dtype)
            yield start, rows if smoothing is None else smooth_weight(rows, smoothing)

    def _cut(self, name: str, info: TensorInfo) -> tuple[int, int]:
        """(rows that stay together, bytes of a block)."""
        small = self._small_blocks or self.changed(name, info)
        block_bytes = max(BLOCK_BYTES // SMALLER, 1) if small else BLOCK_BYTES
        return FP8_TILE if info.dtype == "F8_E4M3" else 1, block_bytes

    def _tiles(self, name: str) -> torch.Tensor | None:
        """`weight_scale_inv` of an FP8 weight in tiles, float32 [ceil(N / 128), ceil(K / 128)]."""
        info = self._applied.expert.tensors.get(f"{name}_scale_inv")
        if info is None:
            return None
        data = self._reader.whole(info)
        check_float_scale(data, info.dtype, info.name)
        flat = torch.frombuffer(bytearray(float_bytes(data, info.dtype)), dtype=torch.float32)
        return flat.view(info.shape)


# ---- writing in a thread ------------------------------------------------------------------------

WAITING = 2
"""Pieces that wait or are being written, at most; a ring of buffers needs one more."""


class WriteBehind:
    """Calls `append` and `move` of a writer in their order, a little later.

    Data that is given must stay as it is until two more pieces have been taken, or until `flush` returns.
    What goes wrong there is raised by the next call here. As a context manager it ends the thread; the
    writer is the caller's to close.
    """

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._room = threading.Semaphore(WAITING)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ascendit-write", daemon=True)
        self._thread.start()

    def done(self, name: str) -> bool:
        """As of the writer: known from the beginning."""
        return self._writer.done(name)

    def append(self, name: str, data: Data) -> None:
        """The next bytes of a tensor. Waits while as many pieces as may are on their way."""
        self._put(lambda: self._writer.append(name, data))

    def move(self, info: TensorInfo, name: str) -> None:
        """A whole tensor from another file."""
        self._put(lambda: self._writer.move(info, name))

    def flush(self) -> None:
        """Wait until all is written."""
        for _ in range(WAITING):
            self._room.acquire()
        self._room.release(WAITING)
        self._raise()

    def _put(self, call: Callable[[], None]) -> None:
        self._room.acquire()
        self._raise()
        self._work.put(call)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (call := self._work.get()) is not None:
            try:
                if self._error is None:
                    call()
            except BaseException as e:  # raised where the caller can see it
                self._error = e
            self._room.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.put(None)
        self._thread.join()
        if error is None:
            self._raise()
