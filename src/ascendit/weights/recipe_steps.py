"""The steps of a float expert that is quantized: rows are read, folded, rounded, smoothed and encoded."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ascendit.checkpoint.reader import (
    BLOCK_BYTES,
    TORCH_DTYPES,
    WHOLE,
    RowReader,
    ShardSpec,
    as_bytes,
    as_tensor,
)
from ascendit.checkpoint.writer import TensorSpec
from ascendit.errors import CheckpointError
from ascendit.mx.formats import SEARCH
from ascendit.mx.row_encoder import RowEncoder, ScaleSearch, first_bad_row
from ascendit.mx.smoothing import rotation, smooth_weight
from ascendit.names import sort_names
from ascendit.quant.layer_rules import LayerScheme
from ascendit.quant.schemes import SCHEMES
from ascendit.weights.applied_recipe import TILES, AppliedRecipe, head_dim
from ascendit.weights.engine_formats import CANONICAL, Dialect, layer_specs
from ascendit.weights.lora.fold import Folds
from ascendit.weights.shards import columns_of
from ascendit.weights.tensor_steps import (
    FP8_TILE,
    WAITING,
    Piece,
    TensorStep,
    recode,
    stored_steps,
    tile_scales,
    tile_values,
)

SMALLER = 4
"""Blocks of rows that are worked on are so many times smaller: each has copies in float32."""
MOST_THREADS = 4
"""Threads that encode: no disk can feed more. Half of PyTorch's, if that is less: the others write."""


class RecipeSteps:
    """What `applied` makes of an expert, as a plan of steps and as plain rows.

    `folds`: LoRA files, added first. `measure`: while the steps run, `sqnr` gets that of each layer, in dB.
    Steps that `weights.shards` has cut read their part alone, with one exception: columns of int8 and fp8,
    whose scale for each row needs whole rows.
    """

    def __init__(
        self,
        applied: AppliedRecipe,
        dialect: Dialect = CANONICAL,
        folds: Folds | None = None,
        *,
        measure: bool = False,
    ) -> None:
        self.applied, self.dialect, self.folds = applied, dialect, folds
        self.sqnr: dict[str, float] = {}
        self._measure = measure
        self._encoder = functools.lru_cache(maxsize=1)(self._new_encoder)

    def plan(self) -> list[TensorStep]:
        """In the order of the output."""
        expert, coded = self.applied.expert, self.applied.quantized
        steps: dict[str, TensorStep] = {}
        for step in stored_steps(expert, self.dialect):
            layer, _, role = step.name.rpartition(".")
            if layer in coded and role == "weight":
                step = self._layer(coded[layer])
            elif layer in coded or self._changed(step.name):
                dtype = "F32" if layer in coded else self.applied.dtype(step.sources[0])
                specs = (replace(step.specs[0], dtype=dtype),)
                step = replace(step, how="rows", specs=specs, make=self._float_rows)
            steps[step.name] = step
        added = {f"{layer}.mul_scale": scale.float() for layer, scale in self._smoothing().items()}
        rotated = [attention.name for attention in self.applied.attention if attention.rotate]
        if rotated:
            matrix = rotation(head_dim(expert))
            added |= {f"{name}.{rot}": matrix for name in rotated for rot in ("q_rot", "k_rot")}
        for name, tensor in added.items():
            spec = TensorSpec(name, "BF16" if tensor.ndim == 2 else "F32", tuple(tensor.shape))
            sources = steps[name].sources if name in steps else ()
            make = functools.partial(_constant, tensor)
            steps[name] = TensorStep(name=name, how="fill", specs=(spec,), sources=sources, make=make)
        return [steps[name] for name in sort_names(steps)]

    def _smoothing(self) -> Mapping[str, Tensor]:
        """As given; ones where the engine that reads the result requires a factor."""
        ones = [name for name, layer in self.applied.quantized.items() if layer.scheme in self.dialect.ones]
        return {name: torch.ones(self.applied.weight(name).shape[1]) for name in ones} | dict(
            self.applied.smoothing
        )

    def _layer(self, layer: LayerScheme) -> TensorStep:
        tensors, name = self.applied.expert.tensors, f"{layer.name}.weight"
        specs = layer_specs(layer.name, layer.scheme, tensors[name].shape, bias=False, dialect=self.dialect)
        return TensorStep(
            name=name,
            how="encode",
            specs=tuple(spec for spec in specs if not spec.name.endswith(".mul_scale")),
            sources=tuple(tensors[x] for x in (name, f"{name}_scale_inv") if x in tensors),
            make=functools.partial(self._encode, layer),
        )

    def _changed(self, name: str) -> bool:
        """Whether the values differ from those in the file."""
        info = self.applied.expert.tensors[name]
        folded = self.folds is not None and name in self.folds.names
        smoothed = name.endswith(".weight") and name.removesuffix(".weight") in self.applied.smoothing
        return folded or smoothed or self.applied.dtype(info) != info.dtype

    def rows(
        self,
        reader: RowReader,
        name: str,
        shard: ShardSpec = WHOLE,
        *,
        small: bool = False,
        multiple: int = 1,
    ) -> Iterator[tuple[int, Tensor]]:
        """(row of the tensor, rows from there on) of its part; the rows are valid until the next come.

        FP8 in tiles is decoded to BF16; LoRA files are folded in; what the recipe rounds is rounded; smoothed
        weights are multiplied. `small`: for a caller that copies rows in float32. `multiple`: of rows in each
        piece but the last.
        """
        info, columns = self.applied.expert.tensors[name], columns_of(shard)
        inverse = self.applied.expert.tensors.get(f"{name}_scale_inv")
        tiles = None if inverse is None else tile_scales(inverse, reader)
        smoothing = self.applied.smoothing.get(name.removesuffix(".weight"))
        part = replace(info, shape=shard.of(info.shape))
        for start, view in reader.blocks(
            info,
            shard=shard,
            multiple=math.lcm(multiple, FP8_TILE if info.dtype == TILES else 1),
            block_bytes=max(BLOCK_BYTES // SMALLER, 1) if small or self._changed(name) else None,
        ):
            rows = as_tensor(view, part)
            if tiles is not None:
                rows = tile_values(rows, tiles, start, columns.start or 0).to(torch.bfloat16)
            if self.folds is not None:
                rows = self.folds.fold(name, rows, start, columns)
            rows = rows.to(getattr(torch, TORCH_DTYPES[self.applied.dtype(info)]))
            yield start, rows if smoothing is None else smooth_weight(rows, smoothing[columns])

    def _float_rows(self, step: TensorStep, reader: RowReader) -> Iterator[Piece]:
        dtype = getattr(torch, TORCH_DTYPES[step.specs[0].dtype])
        for _, rows in self.rows(reader, step.name, step.shard):
            yield step.name, as_bytes(rows.to(dtype))

    def _encode(self, layer: LayerScheme, step: TensorStep, reader: RowReader) -> Iterator[Piece]:
        """Codes while rows are read, then scales."""
        name, info = step.name, step.sources[0]
        row = SCHEMES[layer.scheme]
        by_rows = step.shard.axis == 1 and not (row.block or row.tile)
        part, kept = (WHOLE, columns_of(step.shard)) if by_rows else (step.shard, slice(None))
        rule = self.scale_rule(reader, layer)
        scales = {"weight_scale": bytearray(), "weight_dual_scale": bytearray()}
        encoder = None
        for start, rows in self.rows(reader, name, part, multiple=row.tile or 1):
            if encoder is None:
                encoder = self._encoder(row.weight, rule, rows.shape[1], rows.dtype, len(rows))
                encoder.restart()
            encoded = encoder(rows)
            if (bad_row := first_bad_row(encoded, rows)) is not None:
                raise not_finite(self.applied.expert.name, name, start + bad_row)
            qdata = as_bytes(encoded.qdata[:, kept])
            wide = self.dialect.container(layer.scheme) == "e4m3"
            yield name, recode(qdata, info.shape[1], "packed", "e4m3") if wide else qdata
            scales["weight_scale"] += as_bytes(encoded.scale)
            if encoded.dual_scale is not None:
                scales["weight_dual_scale"] += as_bytes(encoded.dual_scale)
        if self._measure and encoder is not None:
            self.sqnr[layer.name] = encoder.sqnr
        for spec in step.specs[1:]:
            role = spec.name.rpartition(".")[2]
            yield spec.name, scales.get(role) or bytes(spec.nbytes)  # an offset is zeros

    def _new_encoder(
        self, form: str, rule: str, length: int, dtype: torch.dtype, max_rows: int
    ) -> RowEncoder:
        """Kept for the next layer; codes must outlive WAITING pieces that are not written yet."""
        return RowEncoder(
            form,
            length,
            dtype=dtype,
            max_rows=max_rows,
            scale_rule=rule,
            measure=self._measure,
            buffers=WAITING + 1,
            threads=min(max(torch.get_num_threads() // 2, 1), MOST_THREADS),
        )

    def scale_rule(self, reader: RowReader, layer: LayerScheme) -> str:
        """The rule of a layer; a constant that is searched for errs least over the whole weight."""
        assert layer.scale_rule is not None
        if layer.scale_rule != SEARCH:
            return layer.scale_rule
        search = ScaleSearch()
        for _, rows in self.rows(reader, f"{layer.name}.weight"):
            search.add(rows)
        return search.best()


def _constant(tensor: Tensor, step: TensorStep, reader: RowReader) -> Iterator[Piece]:
    stop = None if step.shard.count is None else step.shard.start + step.shard.count
    yield step.name, as_bytes(tensor[step.shard.start : stop])


def not_finite(expert: str, name: str, row: int) -> CheckpointError:
    """A weight that has no codes."""
    return CheckpointError(
        f"{expert}: {name} holds NaN or infinity in row {row}",
        needs="finite weights: a block without a scale (byte 255) is refused by every reader",
        fix=f"download the model again, or keep the layer: --keep {name.removesuffix('.weight')}",
        code="E-QNT-01",
    )
