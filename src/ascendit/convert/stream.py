"""Tensors read some rows at a time into one buffer that is used again. No torch at module level.

No mmap of files: the pages of one would count as memory of this process, and a shrinking file would kill it.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ascendit.checkpoint.store import TORCH_DTYPES, TensorInfo
from ascendit.errors import CheckpointError

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 4 << 20


def rows_of(info: TensorInfo) -> tuple[int, int]:
    """(number of rows, bytes of one): rows lie along the first axis; a scalar is one row."""
    count = info.shape[0] if info.shape else 1
    return count, info.nbytes // max(count, 1)


def block_rows(info: TensorInfo, *, multiple: int = 1, block_bytes: int | None = None) -> int:
    """Rows read at once: at most `block_bytes`, by default BLOCK_BYTES, but `multiple`; whole multiples."""
    rows = (block_bytes or BLOCK_BYTES) // max(rows_of(info)[1], 1) // multiple * multiple
    return max(rows, multiple)


class RowReader:
    """Reads tensors in blocks of rows. What it gives is valid until the next block is read."""

    def __init__(self) -> None:
        self._buffer = mmap.mmap(-1, BLOCK_BYTES)
        self._files: dict[Path, int] = {}

    def blocks(
        self, info: TensorInfo, *, multiple: int = 1, block_bytes: int | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """(index of the first row, bytes of the rows), from the first row to the last.

        Raises CheckpointError E-CKP-02 if the file has shrunk since its header was read.
        """
        count, row_bytes = rows_of(info)
        step = block_rows(info, multiple=multiple, block_bytes=block_bytes)
        if step * row_bytes > len(self._buffer):
            self._buffer = mmap.mmap(-1, step * row_bytes)
        for start in range(0, count, step):
            rows = min(step, count - start)
            view = memoryview(self._buffer)[: rows * row_bytes]
            self._fill(info, info.start + start * row_bytes, view)
            yield start, view

    def whole(self, info: TensorInfo) -> bytes:
        """All bytes of a small tensor, in memory of their own."""
        data = bytearray(info.nbytes)
        self._fill(info, info.start, memoryview(data))
        return bytes(data)

    def into(self, info: TensorInfo, view: memoryview) -> None:
        """All bytes of a tensor into `view`."""
        self._fill(info, info.start, view[: info.nbytes])

    def _fill(self, info: TensorInfo, offset: int, view: memoryview) -> None:
        handle = self._files.get(info.file)
        if handle is None:
            handle = self._files[info.file] = os.open(info.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        done = 0
        while done < len(view):
            count = os.preadv(handle, [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{info.file}: truncated while it was read, in {info.name}",
                    needs="files that nobody changes during the run",
                    fix="download the file again, then run this again",
                    code="E-CKP-02",
                )
            done += count

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def as_tensor(view: memoryview, info: TensorInfo) -> torch.Tensor:
    """The rows in `view` as a tensor [rows, ...] of the dtype of `info`. It shares the memory."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
    flat = torch.frombuffer(view, dtype=dtype)
    rest = info.shape[1:]
    return flat.view(-1, *rest) if math.prod(rest) else flat


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, which must outlive the view."""
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def tile_values(codes: torch.Tensor, scale: torch.Tensor, start: int, tile: int = 128) -> torch.Tensor:
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


def float_bytes(data: bytes | bytearray | memoryview, dtype: str) -> bytes:
    """BF16, F16 or F32 numbers as F32, exact."""
    if dtype == "F32":
        return bytes(data)
    if dtype == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[0::2], data[1::2]
        return bytes(wide)
    import numpy as np

    assert dtype == "F16", dtype
    return np.frombuffer(data, np.float16).astype(np.float32).tobytes()
