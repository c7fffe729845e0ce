"""Quantizers with float32 scales: dynamic ones per row or per tile, and static ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.mx import elements
from ascendit.mx.formats import Element
from ascendit.twin.contract import FLOAT_DTYPES, HALF_DTYPES, Call, require
from ascendit.twin.operators.mx_quantize import TARGETS
from ascendit.twin.registry import Out, check_capability, current_chip, operator

_FP8: dict[int, tuple[Element, torch.dtype]] = {
    number: (target.element, target.dtype) for number, target in TARGETS.items() if not target.packed
}
_INT8 = (1, 12)
"""torch.int8 and torch.qint8."""


def _mode(name: str, dst_type: int | None) -> str:
    """`int8` or `fp8`. Raises TwinError if the chip has no kernel for it."""
    dst_type = 1 if dst_type is None else dst_type
    mode = "int8" if dst_type in _INT8 else "fp8"
    require(mode == "int8" or dst_type in _FP8, "rows.dst_type", dst_type=dst_type, name=name)
    check_capability(name, mode)
    return mode


def _encode(steps: Tensor, dst_type: int | None) -> Tensor:
    """x / scale rounded to the nearest element, ties to even, saturated; NaN becomes 0. Contiguous."""
    steps = steps.contiguous()
    finite = steps.where(steps.isfinite(), 0)
    if dst_type in _FP8:
        element, dtype = _FP8[dst_type]
        saturated = torch.where(steps.isinf(), steps.sign() * element.max, finite)
        return elements.encode(saturated, element, "rint").view(dtype)
    return torch.round(finite).clamp(-128, 127).to(torch.int8)


def _qdata_dtype(dst_type: int | None) -> torch.dtype:
    return _FP8[dst_type][1] if dst_type in _FP8 else torch.int8


def _largest(dst_type: int | None) -> float:
    return _FP8[dst_type][0].max if dst_type in _FP8 else 127.0


@operator("npu_dynamic_quant")
def npu_dynamic_quant(input: Tensor, smooth_scales: Tensor | None, **options: Any) -> Iterator[Any]:
    """int8 or FP8 qdata of `input` [.., K], and float32 scales per row, tensor or channel
    (aclnnDynamicQuantV2).
    """
    a = Call(**options)
    _mode("npu_dynamic_quant", a.dst_type)
    require(input.dim() > 1, "rows.axes")
    require(input.dtype in HALF_DTYPES, "mx.dual_input", input=input)
    *lead, width = input.shape
    scale_shape = {"pertoken": lead, "pertensor": [1], "perchannel": [*lead[:-1], width]}.get(a.quant_mode)
    computed = scale_shape is not None and a.group_index is None and a.dst_type_max == 0
    a.require(computed, "rows.mode", grouped=a.group_index is not None)
    assert scale_shape is not None
    if smooth_scales is not None:
        valid = tuple(smooth_scales.shape) == (width,) and smooth_scales.dtype == input.dtype
        require(valid, "rows.smooth_scales", smooth_scales=smooth_scales, width=width, input=input)
    yield Out(tuple(input.shape), _qdata_dtype(a.dst_type)), Out(tuple(scale_shape), torch.float32)
    x = input.to(torch.float32)
    if smooth_scales is not None:
        x = x * smooth_scales.to(torch.float32)
    axis = {"pertoken": -1, "pertensor": None, "perchannel": -2}[a.quant_mode]
    amax = x.abs().amax() if axis is None else x.abs().amax(axis, keepdim=True)
    steps, scale = _divide_by_scale(x, amax, _largest(a.dst_type))
    yield _encode(steps, a.dst_type), scale.reshape(scale_shape)


def _divide_by_scale(x: Tensor, amax: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """x in units of the scale, and the scale.

    a5 divides by amax * (1 / 127), a2 and a3 multiply by 127 / amax: one value in 6000 rounds differently. A
    row of zeros has scale 0 and quantized values 0 on all chips.
    """
    if current_chip() == "a5":
        scale = amax * (1 / largest)
        return x / scale, scale
    factor = torch.tensor(largest) / amax
    return x * factor, 1 / factor


@operator("npu_dynamic_block_quant")
def npu_dynamic_block_quant(x: Tensor, min_scale: float, dst_type: int, **options: Any) -> Iterator[Any]:
    """int8 or FP8 qdata of x [.., M, K] and a float32 scale per tile (aclnnDynamicBlockQuantV2).

    The scale is amax / largest, which multiplies qdata; torch_npu's documentation wrongly gives its inverse.
    """
    a = Call(**options)
    _mode("npu_dynamic_block_quant", dst_type)
    chip, row, column = current_chip(), a.row_block_size, a.col_block_size
    rows, columns = ((1, 64, 128, 256, 512), (64, 128, 192, 256)) if chip == "a5" else ((1,), (1, 128))
    floats = FLOAT_DTYPES if chip == "a5" else HALF_DTYPES
    require(x.dim() in (2, 3) and x.dtype in floats, "rows.block_input", x=x, floats=floats)
    a.require(row in rows and column in columns, "rows.block_sizes", chip=chip, rows=rows, columns=columns)
    computed = a.round_mode == "rint" and a.dst_type_max == 0 and min_scale >= 0
    a.require(computed, "rows.block_options", min_scale=min_scale)
    m_tiles, k_tiles = math.ceil(x.shape[-2] / row), math.ceil(x.shape[-1] / column)
    yield Out(tuple(x.shape), _qdata_dtype(dst_type)), Out((*x.shape[:-2], m_tiles, k_tiles), torch.float32)
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, -x.shape[-1] % column, 0, -x.shape[-2] % row))
    # [.., m_tiles, row, k_tiles, column]
    tiles = padded.unflatten(-1, (k_tiles, column)).unflatten(-3, (m_tiles, row))
    amax = tiles.where(tiles.isfinite(), 0).abs().amax((-3, -1))
    scale = amax / _largest(dst_type)
    if min_scale > 0:
        scale = scale.clamp(max=1 / min_scale)
    steps = (tiles / scale[..., None, :, None]).flatten(-4, -3).flatten(-2)
    yield _encode(steps[..., : x.shape[-2], : x.shape[-1]], dst_type), scale


@operator("npu_quantize")
def npu_quantize(
    self: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int, div_mode: bool
) -> Iterator[Any]:
    """int8 qdata of `self` [..] with static scales, zero points [N] or [1] along `axis` (aclnnQuantize)."""
    require(dtype in _INT8, "rows.static_dtype", dtype=dtype)
    length = self.shape[axis]
    valid = scales.dim() == 1 and scales.shape[0] in (1, length)
    require(valid, "rows.static_scales", scales=scales, axis=axis, self=self, length=length)
    yield Out(tuple(self.shape), torch.int8)

    def aligned(t: Tensor) -> Tensor:
        return t.to(torch.float32).view(-1, *[1] * (self.dim() - 1 - axis % self.dim()))

    x, scale = self.to(torch.float32), aligned(scales)
    steps = x / scale if div_mode else x * scale
    if zero_points is not None:
        steps = steps + aligned(zero_points)
    yield torch.round(steps).clamp(-128, 127).to(torch.int8)


def dequantize_tiles(qdata: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """Dequantize qdata [.., R, C] to float32; `scale` [.., tiles, tiles]: one per `rows` x `columns` tile."""
    full = scale.repeat_interleave(rows, -2)[..., : qdata.shape[-2], :].repeat_interleave(columns, -1)
    return qdata.to(torch.float32) * full[..., : qdata.shape[-1]]
