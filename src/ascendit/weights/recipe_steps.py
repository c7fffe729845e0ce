"""Plan the steps that quantize a float expert: read rows, fold LoRA files, round, smooth and encode."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ascendit.checkpoint.reader import BLOCK_BYTES, WHOLE, RowReader, ShardSpec, as_bytes, as_tensor
from ascendit.checkpoint.tensor_info import TORCH_DTYPES
from ascendit.checkpoint.writer import TensorSpec
from ascendit.errors import CheckpointError
from ascendit.mx.formats import SEARCH
from ascendit.mx.row_encoder import RowEncoder, ScaleSearch, first_bad_row
from ascendit.mx.smoothing import rotation, smooth_weight
from ascendit.names import sort_names
from ascendit.quant.layer_rules import LayerScheme
from ascendit.quant.schemes import SCHEMES
from ascendit.weights.applied_recipe import TILES, AppliedRecipe, head_dim
from ascendit.weights.engine_formats import CANONICAL, TargetFormat, layer_specs
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

BLOCK_DIVISOR = 4
"""Divisor of the block size when rows are processed in float32, which needs several copies."""
MAX_ENCODER_THREADS = 4
"""Limit of encoder threads, enough for any disk. At most half of PyTorch's threads: the others write."""


class RecipeSteps:
    """The output of an applied recipe, as a plan of steps and as float rows.

    `measure`: the steps store the SQNR of each layer in `sqnr`, in dB.
    Steps cut by `weights.shards` read only their shard, except for columns of int8 and fp8: the scale of a
    row needs the complete row.
    """

    def __init__(
        self, applied: AppliedRecipe, target: TargetFormat = CANONICAL, *, measure: bool = False
    ) -> None:
        self.applied, self.target = applied, target
        self.sqnr: dict[str, float] = {}
        self._measure = measure
        self._encoder = functools.lru_cache(maxsize=1)(self._new_encoder)

    def plan(self) -> list[TensorStep]:
        """Return the steps in the order of the output."""
        expert, quantized = self.applied.expert, self.applied.quantized
        steps: dict[str, TensorStep] = {}
        for step in stored_steps(expert, self.target):
            layer, _, role = step.name.rpartition(".")
            if layer in quantized and role == "weight":
                step = self._layer(quantized[layer])
            elif layer in quantized or self._changed(step.name):
                dtype = "F32" if layer in quantized else self.applied.dtype(step.sources[0])
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
        """Layer -> mul_scale; ones if the target requires it and the recipe has none."""
        required = self.target.unit_mul_scale
        unsmoothed = [name for name, layer in self.applied.quantized.items() if layer.scheme in required]
        ones = {name: torch.ones(self.applied.weight(name).shape[1]) for name in unsmoothed}
        return ones | dict(self.applied.smoothing)

    def _layer(self, layer: LayerScheme) -> TensorStep:
        tensors, name = self.applied.expert.tensors, f"{layer.name}.weight"
        specs = layer_specs(layer.name, layer.scheme, tensors[name].shape, bias=False, target=self.target)
        return TensorStep(
            name=name,
            how="encode",
            specs=tuple(spec for spec in specs if not spec.name.endswith(".mul_scale")),
            sources=tuple(tensors[x] for x in (name, f"{name}_scale_inv") if x in tensors),
            make=functools.partial(self._encode, layer),
        )

    def _changed(self, name: str) -> bool:
        """Whether the values differ from the stored ones."""
        info = self.applied.expert.tensors[name]
        folded = self.applied.folds is not None and name in self.applied.folds.names
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
        """Yield (index of the first row, float rows [n, K]) of the shard, valid until the next block.

        Decodes FP8 in tiles to BF16, folds LoRA files, rounds to the recipe's dtype and multiplies smoothed
        weights. `small`: smaller blocks, for a caller that copies rows in float32. `multiple`: the rows of
        each block but the last are a multiple of this. Raises CheckpointError: E-CKP-08 for invalid tile
        scales, E-LRA-01 for LoRA values that are not finite.
        """
        info, columns = self.applied.expert.tensors[name], columns_of(shard)
        inverse = self.applied.expert.tensors.get(f"{name}_scale_inv")
        tiles = None if inverse is None else tile_scales(inverse, reader)
        smoothing = self.applied.smoothing.get(name.removesuffix(".weight"))
        part = replace(info, shape=shard.shape_of(info.shape))
        for start, view in reader.read_blocks(
            info,
            shard=shard,
            multiple=math.lcm(multiple, FP8_TILE if info.dtype == TILES else 1),
            block_bytes=max(BLOCK_BYTES // BLOCK_DIVISOR, 1) if small or self._changed(name) else None,
        ):
            rows = as_tensor(view, part)
            if tiles is not None:
                rows = tile_values(rows, tiles, start, columns.start or 0).to(torch.bfloat16)
            if (folds := self.applied.folds) is not None:
                rows = folds.fold(name, rows, start, columns)
            rows = rows.to(getattr(torch, TORCH_DTYPES[self.applied.dtype(info)]))
            yield start, rows if smoothing is None else smooth_weight(rows, smoothing[columns])

    def _float_rows(self, step: TensorStep, reader: RowReader) -> Iterator[Piece]:
        dtype = getattr(torch, TORCH_DTYPES[step.specs[0].dtype])
        for _, rows in self.rows(reader, step.name, step.shard):
            yield step.name, as_bytes(rows.to(dtype))

    def _encode(self, layer: LayerScheme, step: TensorStep, reader: RowReader) -> Iterator[Piece]:
        """Yield the quantized weights while rows are read, then the scales."""
        name, info = step.name, step.sources[0]
        row = SCHEMES[layer.scheme]
        full_rows = step.shard.axis == 1 and not (row.block or row.tile)
        shard, columns = (WHOLE, columns_of(step.shard)) if full_rows else (step.shard, slice(None))
        rule = self.scale_rule(reader, layer)
        scales = {"weight_scale": bytearray(), "weight_dual_scale": bytearray()}
        encoder = None
        for start, rows in self.rows(reader, name, shard, multiple=row.tile or 1):
            if encoder is None:
                encoder = self._encoder(row.weight, rule, rows.shape[1], rows.dtype, len(rows))
                encoder.restart()
            encoded = encoder(rows)
            if (bad_row := first_bad_row(encoded, rows)) is not None:
                raise not_finite(self.applied.expert.name, name, start + bad_row)
            qdata = as_bytes(encoded.qdata[:, columns])
            unpack = self.target.packing(layer.scheme) == "e4m3"
            yield name, recode(qdata, info.shape[1], "packed", "e4m3") if unpack else qdata
            scales["weight_scale"] += as_bytes(encoded.scale)
            if encoded.dual_scale is not None:
                scales["weight_dual_scale"] += as_bytes(encoded.dual_scale)
        if self._measure and encoder is not None:
            self.sqnr[layer.name] = encoder.sqnr
        for spec in step.specs[1:]:
            role = spec.name.rpartition(".")[2]
            yield spec.name, scales.get(role) or bytes(spec.nbytes)  # an offset is zeros

    def _new_encoder(self, fmt: str, rule: str, length: int, dtype: torch.dtype, max_rows: int) -> RowEncoder:
        """An encoder that is cached for the next layer, with a buffer for each piece not written yet."""
        return RowEncoder(
            fmt,
            length,
            dtype=dtype,
            max_rows=max_rows,
            scale_rule=rule,
            measure=self._measure,
            buffers=WAITING + 1,
            threads=min(max(torch.get_num_threads() // 2, 1), MAX_ENCODER_THREADS),
        )

    def scale_rule(self, reader: RowReader, layer: LayerScheme) -> str:
        """The scale rule of a layer; SEARCH selects the one with the smallest error on the weight."""
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
    """The error E-QNT-01 for a weight with NaN or infinite values."""
    return CheckpointError(
        f"{expert}: {name} has NaN or infinity in row {row}",
        needs="finite weights: every reader rejects a block with a NaN scale (byte 255)",
        fix=f"download the model again, or exclude the layer: --keep {name.removesuffix('.weight')}",
        code="E-QNT-01",
    )
