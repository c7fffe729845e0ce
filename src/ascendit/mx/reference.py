"""Encoding in plain PyTorch, on any device: the definition that every faster path reproduces to the bit.

Rows are along the last axis here, see `mx.codec`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ascendit.mx import elements, msmodelslim, scales
from ascendit.mx.formats import E2M1, Element, Format


class Parts(NamedTuple):
    """What encoding writes: the tensors of `Encoded` for rows [.., K].

    `codes` int8 for int8, else uint8 (float8 as its bytes; packed formats packed). `dual` float32
    [.., ceil(K / 512)] or None.
    """

    qdata: Tensor
    scale: Tensor
    dual: Tensor | None

    def rows(self, first: int, last: int) -> Parts:
        """Views of these rows."""
        qdata, scale, dual = self
        return Parts(qdata[first:last], scale[first:last], None if dual is None else dual[first:last])


Encoder = Callable[[Tensor, Parts], None]
"""Writes the parts of rows [n, K], contiguous, on a CPU."""


def encode_rows(rows: Tensor, form: Format, rule: str, rounding: str) -> Parts:
    """bfloat16, float16 or float32 [.., K] -> its parts. Rule and rounding are resolved (`mx.formats`)."""
    dual = None
    if form.kind == "block":
        qdata, scale = _encode_blocks(rows, form, rule, rounding)
    elif form.kind == "dual":
        qdata, scale, dual = _encode_dual(rows, form, rule, rounding)
    else:
        qdata, scale = _encode_scaled_rows(rows, form, rule, rounding)
    return Parts(elements.pack(qdata) if form.packed else qdata, scale, dual)


def encode_marked(rows: Tensor, out: Parts, marks: Tensor, form: Format, rule: str, rounding: str) -> None:
    """Encode again, into `out`, those units of rows [n, K] that are not 0 in `marks` [n, units].

    A unit is what is encoded without a look at anything else: a group, a block, or a row.
    """
    size = form.coarse or form.block or rows.shape[1]
    row, unit = marks.nonzero(as_tuple=True)
    row = row.unsqueeze(1)
    columns = unit.unsqueeze(1) * size + torch.arange(size)
    units = rows[row, columns.clamp(max=rows.shape[1] - 1)].where(columns < rows.shape[1], 0)
    for to, part in zip(out, encode_rows(units, form, rule, rounding), strict=True):
        if to is not None and part is not None:
            columns = unit.unsqueeze(1) * part.shape[1] + torch.arange(part.shape[1])
            inside = columns < to.shape[1]
            to[row.expand_as(columns)[inside], columns[inside]] = part[inside]


def _encode_blocks(rows: Tensor, form: Format, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    """[.., K] -> uint8 codes [.., K] and E8M0 bytes [.., n]."""
    assert form.element is not None
    blocks = scales.split_blocks(rows, form.block)
    finite = blocks.isfinite().all(-1)
    blocks = blocks.where(finite.unsqueeze(-1), 0)
    if rule.startswith("msms:"):
        qdata, exponents = msmodelslim.encode_blocks(blocks, form.element, rule.removeprefix("msms:"))
    else:
        qdata, exponents = _encode_finite(blocks.to(torch.float32), form.element, rule, rounding)
    return _finish(qdata, exponents, finite, form, rows.shape[-1])


def _encode_finite(blocks: Tensor, element: Element, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    """float32 [.., n, block] -> uint8 codes of the same shape and int32 exponents [.., n]."""
    exponents = scales.shared_exponents(blocks.abs().amax(-1), element, rule)
    scaled = blocks * scales.power_of_two(-exponents).unsqueeze(-1)
    return elements.encode(scaled, element, rounding), exponents


def _finish(
    qdata: Tensor, exponents: Tensor, finite: Tensor, form: Format, length: int
) -> tuple[Tensor, Tensor]:
    """Codes of blocks that are not `finite` to NaN, blocks to rows, exponents to bytes."""
    assert form.element is not None
    qdata = qdata.where(finite.unsqueeze(-1), form.element.nan or 0)
    return scales.join_blocks(qdata, length), scales.to_bytes(exponents, finite)


def _encode_dual(rows: Tensor, form: Format, rule: str, rounding: str) -> tuple[Tensor, Tensor, Tensor]:
    """[.., K] -> uint8 codes [.., K], E8M0 bytes [.., n], float32 [.., ceil(K / 512)].

    `floor` is npu_dynamic_dual_level_mx_quant: amax over the finite values of 512, times float32(1 / 6), 0 if
    that is subnormal; values divided by it, rounded to the dtype of the input, 0 if it is 0; then
    `floor` on blocks of 32. A block with an infinity or a NaN gets byte 255, its 15 neighbours do not see it.
    """
    length = rows.shape[-1]
    finite = scales.split_blocks(rows, form.block).isfinite().all(-1)
    if rule == "msms:dualscale":
        clean = rows.where(rows.isfinite(), 0)
        qdata, exponents, dual = msmodelslim.encode_dual(clean, form.coarse, form.block)
    else:
        groups = scales.split_blocks(rows.where(rows.isfinite(), 0).to(torch.float32), form.coarse)
        dual = groups.abs().amax(-1) * (1 / 6)
        dual = torch.where(dual < 2.0**-126, 0.0, dual)
        divided = groups / torch.where(dual == 0, torch.inf, dual).unsqueeze(-1)
        wide = scales.join_blocks(divided, length).to(rows.dtype).to(torch.float32)
        blocks = scales.split_blocks(wide, form.block)
        qdata, exponents = _encode_finite(blocks, E2M1, rule, rounding)
    return (*_finish(qdata, exponents, finite, form, length), dual)


def _encode_scaled_rows(rows: Tensor, form: Format, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    """[.., K] -> int8 or uint8 codes [.., K] and float32 scale [.., 1].

    `amax` is npu_dynamic_quant on A5: scale = amax x float32(1 / 127) or (1 / 448), code = round(x / scale).
    On A2 and A3 one code in 6000 differs by 1. A row of zeros has scale 0, one that is not finite scale NaN.
    """
    finite = rows.isfinite().all(-1, keepdim=True)
    rows = rows.where(finite, 0)
    if rule.startswith("msms:"):
        qdata, scale = msmodelslim.encode_int8(rows, -127 if rule.endswith("legacy") else -128)
        return qdata, scale.where(finite, torch.nan)
    wide = rows.to(torch.float32)
    scale = wide.abs().amax(-1, keepdim=True) * (1 / (form.element.max if form.element else 127))
    steps = wide / torch.where(scale == 0, torch.inf, scale)
    if form.element is None:
        negative = steps < 0
        magnitude = elements.round_steps(steps.abs(), negative, rounding)
        qdata = magnitude.where(~negative, -magnitude).clamp(-128, 127).to(torch.int8)
    else:
        qdata = elements.encode(steps, form.element, rounding).where(finite, form.element.nan or 0)
    return qdata, scale.where(finite, torch.nan)
