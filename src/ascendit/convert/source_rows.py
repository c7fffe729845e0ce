"""The rows of a float checkpoint as they are encoded or kept: untiled, folded, rounded, smoothed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ascendit.checkpoint.store import TORCH_DTYPES, TensorInfo
from ascendit.checkpoint.values import check_scale
from ascendit.convert import stream
from ascendit.convert.expert_plan import ExpertPlan
from ascendit.mx.smooth import smooth_weight

if TYPE_CHECKING:
    from ascendit.convert.lora import Folds

TILE = 128
SMALLER = 4
"""Blocks of rows that are worked on are so many times smaller: each has copies in float32."""


class SourceRows:
    """Reads tensors of one expert and does to them what the plan says, in this order:

    FP8 in tiles is decoded to BF16; LoRA files are folded in; what the recipe rounds is rounded; smoothed
    weights are multiplied. `small_blocks`: for a caller who copies rows in float32.
    """

    def __init__(
        self, plan: ExpertPlan, reader: stream.RowReader, folds: Folds | None, *, small_blocks: bool = False
    ) -> None:
        self._plan = plan
        self._small_blocks = small_blocks
        self._reader = reader
        self._folds = folds if folds is not None and folds.names else None

    def changed(self, name: str, info: TensorInfo) -> bool:
        """Whether the values differ from those in the file."""
        folded = self._folds is not None and name in self._folds.names
        smoothed = name.endswith(".weight") and name.removesuffix(".weight") in self._plan.smoothing
        return folded or smoothed or self._plan.dtype(info) != info.dtype

    def max_rows(self, name: str, info: TensorInfo) -> int:
        """The most rows that `blocks` gives at once."""
        multiple, block_bytes = self._cut(name, info)
        return stream.block_rows(info, multiple=multiple, block_bytes=block_bytes)

    def blocks(self, name: str, info: TensorInfo) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows); the rows are valid until the next come."""
        tiles = self._tiles(name)
        smoothing = self._plan.smoothing.get(name.removesuffix(".weight"))
        dtype = getattr(torch, TORCH_DTYPES[self._plan.dtype(info)])
        multiple, block_bytes = self._cut(name, info)
        for start, view in self._reader.blocks(info, multiple=multiple, block_bytes=block_bytes):
            rows = stream.as_tensor(view, info)
            if tiles is not None:
                rows = stream.tile_values(rows, tiles, start).to(torch.bfloat16)
            if self._folds is not None:
                rows = self._folds.fold(name, rows, start)
            rows = rows.to(dtype)
            yield start, rows if smoothing is None else smooth_weight(rows, smoothing)

    def _cut(self, name: str, info: TensorInfo) -> tuple[int, int]:
        """(rows that stay together, bytes of a block)."""
        small = self._small_blocks or self.changed(name, info)
        block_bytes = max(stream.BLOCK_BYTES // SMALLER, 1) if small else stream.BLOCK_BYTES
        return TILE if info.dtype == "F8_E4M3" else 1, block_bytes

    def _tiles(self, name: str) -> torch.Tensor | None:
        """`weight_scale_inv` of an FP8 weight in tiles, float32 [ceil(N / 128), ceil(K / 128)]."""
        info = self._plan.expert.tensors.get(f"{name}_scale_inv")
        if info is None:
            return None
        data = self._reader.whole(info)
        check_scale(data, info.dtype, info.name)
        flat = torch.frombuffer(bytearray(stream.float_bytes(data, info.dtype)), dtype=torch.float32)
        return flat.view(info.shape)
