"""The canonical tensors of one expert, straight into memory: what `quantize` or `repack` would write.

    feed(applied, sink)                   # a float checkpoint, quantized as it is read
    feed(stored_steps(expert), sink)      # a quantized checkpoint, in any layout

A tensor is read some rows at a time into the memory that `room` gives for it; `arrived` is called when it is
complete. Online and offline quantization are equal by construction: both are `ExpertWriter`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ascendit.checkpoint.reader import TORCH_DTYPES, RowReader, TensorInfo, as_bytes
from ascendit.checkpoint.transformer import Expert
from ascendit.checkpoint.writer import Data, TensorSpec
from ascendit.weights.applied_recipe import AppliedRecipe
from ascendit.weights.engine_formats import Dialect
from ascendit.weights.quantize_writer import ExpertWriter
from ascendit.weights.tensor_steps import TensorSteps, produce, steps_for


class TensorSink:
    """Takes tensors piece by piece, in the order of `specs`.

    `room(spec)`: the CPU tensor to fill, contiguous, of the dtype and shape of `spec`; None: not wanted.
    `arrived(name)` once it is full.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        room: Callable[[TensorSpec], torch.Tensor | None],
        arrived: Callable[[str], None],
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._room, self._arrived = room, arrived
        self._name = ""
        self._view: memoryview | None = None
        self._at = 0

    def done(self, name: str) -> bool:
        """Nothing is there from an earlier run."""
        return False

    def flush(self) -> None:
        """Nothing waits: each piece is copied when it comes."""

    def append(self, name: str, data: Data) -> None:
        """The next bytes of a tensor."""
        self._open(name)
        piece = memoryview(data).cast("B")
        if self._view is not None:
            self._view[self._at : self._at + len(piece)] = piece
        self._advance(len(piece))

    def read(self, info: TensorInfo, name: str, reader: RowReader) -> None:
        """A whole tensor from a file, as it is stored."""
        self._open(name)
        if self._view is not None:
            reader.into(info, self._view)
        self._advance(info.nbytes)

    def _open(self, name: str) -> None:
        if self._name == name:
            return
        assert not self._name, (self._name, name)
        tensor = self._room(self._specs[name])
        assert tensor is None or tensor.is_contiguous(), name
        self._name, self._at = name, 0
        self._view = None if tensor is None else as_bytes(tensor).cast("B")

    def _advance(self, count: int) -> None:
        self._at += count
        assert self._at <= self._specs[self._name].nbytes, self._name
        if self._at == self._specs[self._name].nbytes:
            name, self._name, self._view = self._name, "", None
            self._arrived(name)


class _WriterSink:
    """A `TensorSink` with the interface that `ExpertWriter` writes to."""

    def __init__(self, sink: TensorSink, reader: RowReader) -> None:
        self._sink, self._reader = sink, reader
        self.done, self.append, self.flush = sink.done, sink.append, sink.flush

    def move(self, info: TensorInfo, name: str) -> None:
        """A tensor that stays as it is."""
        self._sink.read(info, name, self._reader)


def feed(source: AppliedRecipe | TensorSteps, sink: TensorSink) -> None:
    """Every tensor of an expert, quantized by a recipe, or as it is stored.

    Raises CheckpointError: E-CKP-08 for invalid scales, E-CKP-02 for files that shrink, E-QNT-01 for
    weights that are not finite.
    """
    with RowReader() as reader:
        if isinstance(source, AppliedRecipe):
            ExpertWriter(source, reader, _WriterSink(sink, reader)).write()
            return
        for step in source.written:
            if step.how == "move":
                sink.read(step.sources[0], step.spec.name, reader)
                continue
            for data in produce(step, reader):
                sink.append(step.spec.name, data)
        for step in source.dropped:
            for _ in produce(step, reader):
                pass


def stored_steps(expert: Expert) -> TensorSteps:
    """From the expert as stored to its canonical tensors, without the offsets, which are zeros."""
    return steps_for(expert, Dialect(offset=False))


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """Of a tensor that is to hold `spec`."""
    found: torch.dtype = getattr(torch, TORCH_DTYPES[spec.dtype])
    return found
