"""Writes one expert as planned, some rows at a time."""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, Protocol

import torch

from ascendit.checkpoint.store import TORCH_DTYPES, TensorInfo
from ascendit.checkpoint.write import TensorSpec
from ascendit.convert import stream
from ascendit.convert.behind import WAITING, Data, Sink
from ascendit.convert.expert_plan import ROTATIONS, ExpertPlan
from ascendit.convert.rewrite import recode
from ascendit.convert.rules import LayerPlan
from ascendit.convert.source_rows import SourceRows
from ascendit.errors import CheckpointError
from ascendit.mx.formats import SEARCH
from ascendit.mx.rows import RowEncoder, ScaleSearch, first_bad_row
from ascendit.mx.smooth import rotation
from ascendit.quant.schemes import SCHEMES

if TYPE_CHECKING:
    from ascendit.convert.lora import Folds


class Advance(Protocol):
    """Told how many bytes of the source are dealt with; `skipped`: an earlier run had done it."""

    def __call__(self, name: str, count: int, skipped: bool = False) -> None: ...


def _no_news(name: str, count: int, skipped: bool = False) -> None:
    """Nobody wants to know."""


MOST_THREADS = 4
"""Of encoding: more than these no disk can feed. Half of PyTorch's, if that is less: the others write."""


class ExpertWriter:
    """The tensors of one expert, in the order of the plan, from a reader to a writer.

    `advance` is told how many bytes of the source are done and to which tensor they belong. `measure`: the
    SQNR of each quantized layer, for which layers are encoded too that an earlier run has written.
    """

    def __init__(
        self,
        plan: ExpertPlan,
        reader: stream.RowReader,
        writer: Sink,
        *,
        folds: Folds | None = None,
        measure: bool = False,
        advance: Advance = _no_news,
    ) -> None:
        self.plan, self.reader, self.writer = plan, reader, writer
        self.sqnr: dict[str, float] = {}
        self._rows = SourceRows(plan, reader, folds)
        self._measure = measure
        self._advance = advance
        self._key: tuple[str, str, int, str, int] | None = None
        self._encoder: RowEncoder | None = None
        self._disk_names = {s.name: d.name for s, d in zip(plan.specs, plan.disk_specs, strict=True)}

    def write(self) -> None:
        """Everything. Raises UsageError and CheckpointError for weights that cannot be encoded or read."""
        coded = self.plan.coded

        def layer_of(spec: TensorSpec) -> str:
            layer = spec.name.rpartition(".")[0]
            return layer if layer in coded else ""

        for layer, specs in itertools.groupby(self.plan.specs, key=layer_of):
            if layer:
                self._layer(coded[layer], list(specs))
            else:
                for spec in specs:
                    self._tensor(spec)

    # ---- tensors that stay floats ---------------------------------------------------------------

    def _tensor(self, spec: TensorSpec) -> None:
        layer, _, role = spec.name.rpartition(".")
        info = self.plan.expert.tensors.get(spec.name)
        done = self.writer.done(self._disk_names[spec.name])
        if not done:
            if role in ROTATIONS and any(a.rotate and a.name == layer for a in self.plan.attention):
                self._append(spec.name, stream.as_bytes(rotation(spec.shape[0])))
            elif info is None:
                assert role == "mul_scale", spec.name
                self._append(spec.name, self._mul_scale(spec))
            elif self._rows.changed(spec.name, info):
                for _, rows in self._rows.blocks(spec.name, info):
                    self._append(spec.name, stream.as_bytes(rows))
                    self.writer.flush()
            else:
                self.writer.move(info, self._disk_names[spec.name])
        if info is not None:
            self._advance(spec.name, info.nbytes, done)

    def _mul_scale(self, spec: TensorSpec) -> Data:
        """As given, or ones where the reader of the result wants a factor and there is none."""
        scale = self.plan.smoothing.get(spec.name.removesuffix(".mul_scale"))
        if scale is None:
            return struct.pack("<f", 1.0) * spec.shape[0]
        return stream.as_bytes(scale.float())

    # ---- quantized layers -----------------------------------------------------------------------

    def _layer(self, plan: LayerPlan, specs: list[TensorSpec]) -> None:
        done = all(self.writer.done(self._disk_names[spec.name]) for spec in specs)
        info = self.plan.weight(plan.layer)
        if done and not self._measure:
            self._advance(plan.layer, self._source_bytes(plan.layer), True)
            return
        scales = self._encode(plan, info)
        for spec in specs[1:]:
            role = spec.name.rpartition(".")[2]
            if role == "bias":
                data: Data = self._bias(spec.name)
            elif role == "mul_scale":
                data = self._mul_scale(spec)
            else:  # an offset is zeros
                data = scales.get(role) or bytes(spec.nbytes)
            self._append(spec.name, data)
        self._advance(plan.layer, self._source_bytes(plan.layer) - info.nbytes)

    def _encode(self, plan: LayerPlan, info: TensorInfo) -> dict[str, bytearray]:
        """Write the codes, return the scales by role."""
        assert plan.scale_rule is not None
        name = f"{plan.layer}.weight"
        rule = self._search(name, info) if plan.scale_rule == SEARCH else plan.scale_rule
        scales = {"weight_scale": bytearray(), "weight_dual_scale": bytearray()}
        row_bytes = info.nbytes // info.shape[0]
        encoder = self._encoder_of(plan.scheme, rule, name, info)
        for start, rows in self._rows.blocks(name, info):
            encoded = encoder(rows)
            if (bad_row := first_bad_row(encoded)) is not None:
                raise not_finite(self.plan.expert.name, name, start + bad_row)
            self._append(name, self._codes(plan.scheme, info, stream.as_bytes(encoded.codes)))
            scales["weight_scale"] += stream.as_bytes(encoded.scale)
            if encoded.dual_scale is not None:
                scales["weight_dual_scale"] += stream.as_bytes(encoded.dual_scale)
            self._advance(name, len(rows) * row_bytes)
        if self._measure:
            self.sqnr[plan.layer] = encoder.sqnr
        return scales

    def _encoder_of(self, scheme: str, rule: str, name: str, info: TensorInfo) -> RowEncoder:
        """The last one again, if it fits. Codes must outlive WAITING pieces that are not written yet."""
        format, max_rows = SCHEMES[scheme].weight, self._rows.max_rows(name, info)
        key = (format, rule, info.shape[1], self.plan.dtype(info), max_rows)
        if self._encoder is None or self._key != key:
            self._key = key
            self._encoder = RowEncoder(
                format,
                info.shape[1],
                dtype=getattr(torch, TORCH_DTYPES[self.plan.dtype(info)]),
                max_rows=max_rows,
                scale_rule=rule,
                measure=self._measure,
                buffers=WAITING + 1,
                threads=min(max(torch.get_num_threads() // 2, 1), MOST_THREADS),
            )
        self._encoder.restart()
        return self._encoder

    def _codes(self, scheme: str, info: TensorInfo, codes: memoryview) -> Data:
        if self.plan.dialect.container(scheme) != "e4m3":
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
        info = self.plan.expert.tensors[name]
        if not self._rows.changed(name, info):
            return stream.float_bytes(self.reader.whole(info), info.dtype)
        dtype = self.plan.dtype(info)
        return b"".join(
            stream.float_bytes(stream.as_bytes(rows), dtype) for _, rows in self._rows.blocks(name, info)
        )

    def _source_bytes(self, layer: str) -> int:
        names = (f"{layer}.{role}" for role in ("weight", "bias"))
        return sum(i.nbytes for n in names if (i := self.plan.expert.tensors.get(n)) is not None)

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
