"""RowReader: read tensors, or one rank's shard of them, in blocks of rows into a reused buffer.

It does not map files: mapped pages would count as memory of this process, and a file that shrinks would kill
it. Only `library_component` maps the parts that a library runs. torch and numpy are imported by the functions
that need them.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from ascendit.checkpoint.layer_format import check_positive
from ascendit.checkpoint.sources import OpenFiles, unreadable
from ascendit.checkpoint.tensor_info import DTYPE_BITS, TORCH_DTYPES, Buffer, Encoding, TensorInfo
from ascendit.mx.stored_floats import decode_rows

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 4 << 20
_LARGE = 1 << 30  # bytes in one call; no system reads 2 GiB


@dataclass(frozen=True)
class ShardSpec:
    """One rank's shard of a tensor: `count` rows (axis 0) or columns (axis 1) from `start`; default: all.

    `start` and `count` are in elements of the stored tensor.
    """

    axis: int = 0
    start: int = 0
    count: int | None = None
    """None: to the end."""

    def shape_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this shard of a tensor with the shape `shape`."""
        if self == WHOLE:
            return shape
        count = shape[self.axis] - self.start if self.count is None else self.count
        assert 0 <= self.start and 0 < count and self.start + count <= shape[self.axis], (self, shape)
        return (*shape[: self.axis], count, *shape[self.axis + 1 :])


WHOLE = ShardSpec()


class RowReader:
    """Read tensors, or one rank's shard of them, with a bounded number of open files.

    Raises CheckpointError (E-CKP-02) for a file that was written, replaced, truncated or removed after its
    header was read: when it opens the file, closes it to open others, and at the end of a `with` block; and
    E-CKP-08 for a scale of encoded values that is zero, negative or not finite.
    """

    def __init__(self) -> None:
        self._buffer: memoryview | None = None
        self._encoded: memoryview | None = None
        self._files = OpenFiles()

    def read_blocks(
        self,
        info: TensorInfo,
        *,
        shard: ShardSpec = WHOLE,
        multiple: int = 1,
        block_bytes: int | None = None,
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield (index of the first row in the tensor, bytes of the rows) for all rows of the shard.

        The bytes are valid until the next block is read.
        """
        first, count, row_bytes = _shard_rows(info, shard)
        step = max((block_bytes or BLOCK_BYTES) // max(row_bytes, 1) // multiple * multiple, multiple)
        if self._buffer is None or step * row_bytes > len(self._buffer):
            self._buffer = memoryview(mmap.mmap(-1, max(step * row_bytes, BLOCK_BYTES)))
        for start in range(first, first + count, step):
            rows = min(step, first + count - start)
            view = self._buffer[: rows * row_bytes]
            self._read_rows(info, shard, start, rows, view)
            yield start, view

    def read_all(self, info: TensorInfo, shard: ShardSpec = WHOLE) -> bytes:
        """Return all bytes of a small tensor, or of a shard of it, as a copy."""
        _, count, row_bytes = _shard_rows(info, shard)
        data = bytearray(count * row_bytes)
        self.read_into(info, memoryview(data), shard)
        return bytes(data)

    def read_into(self, info: TensorInfo, view: memoryview, shard: ShardSpec = WHOLE) -> None:
        """Read all bytes of a tensor, or of a shard of it, into `view`."""
        first, count, row_bytes = _shard_rows(info, shard)
        self._read_rows(info, shard, first, count, view[: count * row_bytes])

    def read_tensor(self, info: TensorInfo, shard: ShardSpec = WHOLE) -> torch.Tensor:
        """Return a tensor, or a shard of it, in a new CPU tensor of the stored dtype and shape [N, ...]."""
        import torch

        shape = shard.shape_of(info.shape)
        if info.dtype == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        tensor = torch.empty(shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]))
        if tensor.numel():
            self.read_into(info, as_bytes(tensor), shard)
        return tensor

    def _read_rows(self, info: TensorInfo, shard: ShardSpec, start: int, rows: int, view: memoryview) -> None:
        """Read `rows` rows of the shard from row `start` of the tensor. Columns are read row by row."""
        if info.encoding is not None:
            self._decode_rows(info, shard, start, rows, view)
            return
        if info.strides is not None:
            self._gather_rows(info, info.strides, shard, start, rows, view)
            return
        stride = rows_of(info)[1]
        if shard.axis == 0:
            self._read(info, info.start + start * stride, view)
            return
        width = len(view) // max(rows, 1)
        offset = info.start + shard.start * (stride // info.shape[1])
        for row in range(rows):
            self._read(info, offset + (start + row) * stride, view[row * width : (row + 1) * width])

    def _gather_rows(
        self,
        info: TensorInfo,
        strides: tuple[int, ...],
        shard: ShardSpec,
        start: int,
        rows: int,
        view: memoryview,
    ) -> None:
        """Read `rows` rows of a strided tensor [N, ...], with the bytes between them. For the transpose of a
        tensor, those are all of its bytes.
        """
        import torch

        if not len(view):
            return
        shape = (rows, *info.shape[1:])
        size = DTYPE_BITS[info.dtype] // 8
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        self._read(info, info.start + start * strides[0] * size, memoryview(data := bytearray(span * size)))
        stored = torch.frombuffer(data, dtype=getattr(torch, TORCH_DTYPES[info.dtype]))
        values = stored.as_strided(shape, strides)
        if shard.axis == 1:
            values = values[:, shard.start : shard.start + shard.shape_of(info.shape)[1]]
        view[:] = as_bytes(values)

    def _decode_rows(
        self, info: TensorInfo, shard: ShardSpec, start: int, rows: int, view: memoryview
    ) -> None:
        """Decode `rows` rows of the shard from row `start` of the tensor, a few at a time."""
        import torch

        if not len(view):
            return
        assert info.encoding is not None
        stop, columns = start + rows, math.prod(info.shape[1:])
        unit = info.encoding.block // math.gcd(info.encoding.block, columns)  # rows in complete blocks
        stored = info.nbytes
        if info.strides is not None:  # its encoding is a float dtype
            raw = replace(info, dtype=info.encoding.name, encoding=None)
            stored = raw.read_nbytes
        size = stored * unit // rows_of(info)[0]
        step = max(BLOCK_BYTES // size, 1) * unit
        scale = self._read_scale(info.encoding)
        out = torch.frombuffer(view, dtype=getattr(torch, TORCH_DTYPES[info.dtype])).view(rows, -1)
        for first in range(start // unit * unit, stop, step):
            last = min(first + step, -(-stop // unit) * unit)
            data = self._stored_bytes((last - first) // unit * size)
            if info.strides is None:
                self._read(info, info.start + first // unit * size, data)
            else:
                self._gather_rows(raw, info.strides, WHOLE, first, last - first, data)
            target = out[max(first - start, 0) : last - start]
            direct = shard.axis == 0 and len(target) == last - first
            values = target if direct else torch.empty(last - first, columns, dtype=out.dtype)
            factor = scale if scale is None or scale.numel() == 1 else scale[first:last]
            decode_rows(info.encoding.name, data, factor, values)
            if not direct:
                inner = columns // info.shape[1] if shard.axis else 0
                values = values[max(start - first, 0) :, shard.start * inner :]
                target.copy_(values[: len(target), : out.shape[1]])

    def _stored_bytes(self, count: int) -> memoryview:
        """A reused buffer of `count` bytes."""
        if self._encoded is None or count > len(self._encoded):
            self._encoded = memoryview(bytearray(count))
        return self._encoded[:count]

    def _read_scale(self, encoding: Encoding) -> torch.Tensor | None:
        """The checked scale of encoded values. Raises CheckpointError (E-CKP-08) for an invalid one."""
        if (info := encoding.scale) is None:
            return None
        name = f"{info.name} ({encoding.label})" if encoding.label else info.name
        check_positive(self.read_all(info), info.dtype, name)
        return self.read_tensor(info)

    def _read(self, info: TensorInfo, offset: int, view: memoryview) -> None:
        fd = self.open(info)
        while len(view):
            if not (count := os.preadv(fd, [view[:_LARGE]], offset)):
                raise unreadable(info.file, f"truncated during the read of {info.name}")
            view, offset = view[count:], offset + count

    def open(self, info: TensorInfo) -> int:
        """Return the descriptor of the file of a tensor, valid until the next call of any method."""
        return self._files.open(info.file, info.state)

    def close(self) -> None:
        """Close the files. Later calls open them again."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._files.check()
        finally:
            self.close()


def _shard_rows(info: TensorInfo, shard: ShardSpec) -> tuple[int, int, int]:
    """(first row, number of rows, bytes of one row) of a shard."""
    count, row_bytes = rows_of(info)
    if shard == WHOLE:
        return 0, count, row_bytes
    shape = shard.shape_of(info.shape)
    if shard.axis == 0:
        return shard.start, shape[0], row_bytes
    return 0, count, row_bytes // info.shape[1] * shape[1]


def rows_of(info: TensorInfo) -> tuple[int, int]:
    """(number of rows, bytes per row after reading). Rows are along the first axis; a scalar is one row."""
    count = info.shape[0] if info.shape else 1
    return count, info.read_nbytes // max(count, 1)


# ---- bytes and tensors --------------------------------------------------------------------------


def as_tensor(view: memoryview, info: TensorInfo) -> torch.Tensor:
    """Return the rows in `view` as a tensor [rows, ...] with the dtype of `info`, sharing the memory."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
    flat = torch.frombuffer(view, dtype=dtype)
    row_shape = info.shape[1:]
    return flat.view(-1, *row_shape) if math.prod(row_shape) else flat


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor [..] of any dtype. The tensor must outlive the view."""
    import torch

    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def float_bytes(data: Buffer, dtype: str) -> bytes:
    """Convert the bytes of BF16, F16 or F32 numbers to F32, exactly."""
    if dtype == "F32":
        return bytes(data)
    if dtype == "BF16":  # the upper half of a float32
        as_float32 = bytearray(2 * len(data))
        as_float32[2::4], as_float32[3::4] = data[0::2], data[1::2]
        return bytes(as_float32)
    import numpy as np

    assert dtype == "F16", dtype
    return np.frombuffer(data, np.float16).astype(np.float32).tobytes()
