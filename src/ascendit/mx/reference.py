"""Encoding in plain PyTorch on any device: the definition that every faster path reproduces bit for bit.

Blocks run along the last axis here; `mx.codec` moves other axes there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ascendit.mx import elements, msmodelslim, scales
from ascendit.mx.formats import E2M1, Element, Format


class Parts(NamedTuple):
    """Output of an encoder: the tensors of `Encoded` for rows [.., K].

    `qdata`: int8, else uint8 (float8 as bytes; FP4 packed). `dual`: float32 [.., ceil(K / 512)] or None.
    """

    qdata: Tensor
    scale: Tensor
    dual: Tensor | None

    def rows(self, first: int, last: int, tile: int = 0) -> Parts:
        """Views of rows `first` to `last`, exclusive. `tile`: `Format.tile`, which divides `first`."""
        (qdata, scale, dual), unit = self, tile or 1
        scale = scale[first // unit : -(-last // unit)]
        return Parts(qdata[first:last], scale, None if dual is None else dual[first:last])


Encoder = Callable[[Tensor, Parts], None]
"""Encodes contiguous rows [n, K] on the CPU into preallocated `Parts`."""


def encode_rows(rows: Tensor, fmt: Format, rule: str, rounding: str) -> Parts:
    """Encode rows [.., K], bfloat16, float16 or float32.

    `rule` and `rounding`: as resolved by `mx.formats`.
    """
    dual = None
    if fmt.kind == "block":
        qdata, scale = _encode_blocks(rows, fmt, rule, rounding)
    elif fmt.kind == "dual":
        qdata, scale, dual = _encode_dual(rows, fmt, rule, rounding)
    elif fmt.kind == "tile":
        qdata, scale = encode_tiles(rows, fmt, rounding, (fmt.tile, fmt.tile))
    else:
        qdata, scale = _encode_scaled_rows(rows, fmt, rule, rounding)
    return Parts(elements.pack(qdata) if fmt.packed else qdata, scale, dual)


def encode_marked(rows: Tensor, out: Parts, mask: Tensor, fmt: Format, rule: str, rounding: str) -> None:
    """Encode the marked units of rows [n, K] again, into `out`.

    `mask`: bool or uint8 [n, units], nonzero if marked. A unit is a group, a block or a row: the values that
    are encoded independently of all others.
    """
    size = fmt.coarse or fmt.block or rows.shape[1]
    row, unit = mask.nonzero(as_tuple=True)
    row = row.unsqueeze(1)
    columns = unit.unsqueeze(1) * size + torch.arange(size)
    units = rows[row, columns.clamp(max=rows.shape[1] - 1)].where(columns < rows.shape[1], 0)
    for to, part in zip(out, encode_rows(units, fmt, rule, rounding), strict=True):
        if to is not None and part is not None:
            columns = unit.unsqueeze(1) * part.shape[1] + torch.arange(part.shape[1])
            inside = columns < to.shape[1]
            to[row.expand_as(columns)[inside], columns[inside]] = part[inside]


def _encode_blocks(rows: Tensor, fmt: Format, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    """[.., K] -> uint8 encodings [.., K] and E8M0 bytes [.., n]."""
    assert fmt.element is not None
    blocks = scales.split_blocks(rows, fmt.block)
    finite = blocks.isfinite().all(-1)
    blocks = blocks.where(finite.unsqueeze(-1), 0)
    if rule.startswith("msms:"):
        qdata, exponents = msmodelslim.encode_blocks(blocks, fmt.element, rule.removeprefix("msms:"))
    else:
        qdata, exponents = _encode_finite(blocks.to(torch.float32), fmt.element, rule, rounding)
    return _finish(qdata, exponents, finite, fmt, rows.shape[-1])


def _encode_finite(blocks: Tensor, element: Element, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    """float32 [.., n, block] -> uint8 encodings [.., n, block] and int32 exponents [.., n]."""
    exponents = scales.shared_exponents(blocks.abs().amax(-1), element, rule)
    scaled = blocks * scales.power_of_two(-exponents).unsqueeze(-1)
    return elements.encode(scaled, element, rounding), exponents


def _finish(
    qdata: Tensor, exponents: Tensor, finite: Tensor, fmt: Format, length: int
) -> tuple[Tensor, Tensor]:
    """Set blocks that are not `finite` to NaN, join blocks to rows, and convert exponents to bytes."""
    assert fmt.element is not None
    qdata = qdata.where(finite.unsqueeze(-1), fmt.element.nan or 0)
    return scales.join_blocks(qdata, length), scales.to_bytes(exponents, finite)


def _encode_dual(rows: Tensor, fmt: Format, rule: str, rounding: str) -> tuple[Tensor, Tensor, Tensor]:
    """[.., K] -> uint8 encodings [.., K], E8M0 bytes [.., n], float32 dual_scale [.., ceil(K / 512)].

    `floor` is npu_dynamic_dual_level_mx_quant: dual_scale = amax over the finite values of 512, times
    float32(1 / 6), 0 if subnormal; values are divided by it (0 if it is 0) and rounded to the input dtype;
    then `floor` on blocks of 32. A block with an infinity or a NaN gets byte 255, its 15 neighbours do not.
    """
    length = rows.shape[-1]
    finite = scales.split_blocks(rows, fmt.block).isfinite().all(-1)
    if rule == "msms:dualscale":
        clean = rows.where(rows.isfinite(), 0)
        qdata, exponents, dual = msmodelslim.encode_dual(clean, fmt.coarse, fmt.block)
    else:
        groups = scales.split_blocks(rows.where(rows.isfinite(), 0).to(torch.float32), fmt.coarse)
        dual = groups.abs().amax(-1) * (1 / 6)
        dual = torch.where(dual < 2.0**-126, 0.0, dual)
        divided = groups / torch.where(dual == 0, torch.inf, dual).unsqueeze(-1)
        rounded = scales.join_blocks(divided, length).to(rows.dtype).to(torch.float32)
        blocks = scales.split_blocks(rounded, fmt.block)
        qdata, exponents = _encode_finite(blocks, E2M1, rule, rounding)
    return (*_finish(qdata, exponents, finite, fmt, length), dual)


def _encode_scaled_rows(rows: Tensor, fmt: Format, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    """[.., K] -> int8 or uint8 qdata [.., K] and float32 scale [.., 1].

    `amax` is npu_dynamic_quant on A5: scale = amax x float32(1 / 127) or (1 / 448), qdata = round(x / scale).
    On A2 and A3 one value in 6000 differs by 1. A row of zeros has scale 0, a row that is not finite NaN.
    """
    finite = rows.isfinite().all(-1, keepdim=True)
    rows = rows.where(finite, 0)
    if rule.startswith("msms:"):
        qdata, scale = msmodelslim.encode_int8(rows, -127 if rule.endswith("legacy") else -128)
        return qdata, scale.where(finite, torch.nan)
    values = rows.to(torch.float32)
    scale = values.abs().amax(-1, keepdim=True) * (1 / fmt.largest)
    return _quantized(values, scale, finite, fmt, rounding), scale.where(finite, torch.nan)


def encode_tiles(rows: Tensor, fmt: Format, rounding: str, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[.., N, K] -> int8 or uint8 qdata [.., N, K] and a float32 scale for each `tile` of rows and columns.

    Scales: [.., ceil(N / rows), ceil(K / columns)]. npu_dynamic_block_quant on A5: scale = amax / 127 or
    / 448, qdata = round(x / scale). A tile of zeros has scale 0, a tile that is not finite NaN. The last
    tiles may be short.
    """
    (n, k), (r, c) = rows.shape[-2:], tile
    padded = torch.nn.functional.pad(rows, (0, -k % c, 0, -n % r))
    tiles = padded.unflatten(-1, (-(-k // c), c)).unflatten(-3, (-(-n // r), r))
    finite = tiles.isfinite().all(-1, keepdim=True).all(-3, keepdim=True)
    values = tiles.where(finite, 0).to(torch.float32)
    scale = values.abs().amax((-3, -1), keepdim=True) / fmt.largest
    qdata = _quantized(values, scale, finite, fmt, rounding).flatten(-2).flatten(-3, -2)[..., :n, :k]
    return qdata, scale.where(finite, torch.nan)[..., 0, :, 0]


def _quantized(values: Tensor, scale: Tensor, finite: Tensor, fmt: Format, rounding: str) -> Tensor:
    """float32 values [..] / scale, rounded -> int8 or uint8 [..]; NaN, for int8 0, where not `finite`."""
    steps = values / torch.where(scale == 0, torch.inf, scale)
    if fmt.element is not None:
        return elements.encode(steps, fmt.element, rounding).where(finite, fmt.element.nan or 0)
    negative = steps < 0
    magnitude = elements.round_steps(steps.abs(), negative, rounding)
    return magnitude.where(~negative, -magnitude).clamp(-128, 127).to(torch.int8)
