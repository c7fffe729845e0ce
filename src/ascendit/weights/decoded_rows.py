"""Decode stored tensors and layers to numbers, a few rows at a time, from the bytes on disk.

Used to compare numbers: it shares no code with `tensor_steps`, which writes them. Functions import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ascendit import mx
from ascendit.checkpoint.layer_format import FLOAT_DTYPES, Layer
from ascendit.checkpoint.reader import RowReader, as_tensor
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.mx.formats import FORMATS
from ascendit.quant.schemes import FP8_TILES, SCHEMES, STORED_SCHEMES

if TYPE_CHECKING:
    from torch import Tensor

_TILE, _GROUP = FORMATS[FP8_TILES].block, SCHEMES["mxfp4_dualscale"].group


def tensor_rows(info: TensorInfo, reader: RowReader) -> Iterator[Tensor]:
    """The rows [n, ...] of a tensor: floats as float32, other dtypes as stored."""
    import torch

    for _, view in reader.read_blocks(info):
        rows = as_tensor(view, info)
        yield rows.to(torch.float32) if info.dtype in FLOAT_DTYPES else rows


def layer_rows(layer: Layer, reader: RowReader) -> Iterator[Tensor]:
    """Decode the weight of a layer to float32 rows [n, K]; FP8 in tiles is rounded to bfloat16 first."""
    import torch

    if layer.scheme == "bf16":
        yield from tensor_rows(layer.tensors["weight"], reader)
        return
    weight, tiled = layer.tensors["weight"], layer.scheme == FP8_TILES
    scheme = STORED_SCHEMES[layer.scheme]
    unpacked = layer.packing not in ("plain", "packed")  # FP4 values in e4m3 or BF16 elements
    scales = {role: _read_scale(info, reader) for role, info in layer.tensors.items() if "scale" in role}
    format = "mxfp8" if unpacked else "mxfp4" if "weight_dual_scale" in scales else layer.scheme
    scale, dual = scales["weight_scale_inv" if tiled else "weight_scale"], scales.get("weight_dual_scale")
    if not scheme.block and not scheme.tile:
        scale = scale.reshape(-1, 1).expand(layer.shape[0], 1)
    for start, view in reader.read_blocks(weight, multiple=_TILE):
        qdata = as_tensor(view, weight)
        stop, step = start + len(qdata), scheme.tile or 1
        row_scale = scale[start // step : -(-stop // step)]
        qdata = qdata.to(torch.float8_e4m3fn) if unpacked else qdata
        encoded = mx.Encoded(qdata, row_scale, None, format, -1, (len(qdata), layer.shape[1]))
        values = mx.decode(encoded, torch.bfloat16 if tiled else torch.float32).to(torch.float32)
        if dual is not None:
            factors = dual.reshape(layer.shape[0], -1)[start:stop].repeat_interleave(_GROUP, -1)
            values *= factors[:, : layer.shape[1]]
        yield values


def _read_scale(info: TensorInfo, reader: RowReader) -> Tensor:
    """Read a scale: E8M0 as uint8, others as float32."""
    import torch

    data = bytearray(reader.read_all(info))
    values = as_tensor(memoryview(data), info).reshape(info.shape)
    return values.to(torch.float32) if info.dtype in FLOAT_DTYPES else values.view(torch.uint8)


@dataclass
class NonFinite:
    """NaN and infinite values of one tensor, counted block by block."""

    count: int = 0
    first: tuple[int, ...] = ()
    """Index of the first one."""
    _rows: int = 0

    def add(self, rows: Tensor) -> None:
        """Count the values of the next rows [n, ...], of any dtype."""
        if rows.is_floating_point() and (bad := int((~rows.isfinite()).sum())):
            if not self.count:
                index = (~rows.isfinite()).nonzero()[0].tolist()
                self.first = (index[0] + self._rows, *index[1:])
            self.count += bad
        self._rows += len(rows)
