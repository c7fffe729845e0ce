"""Quantized linear layers for CUDA: with the quantized matmuls of the GPU, or dequantized to bfloat16.

The contract is in `kernels/reference.py`. Each matmul returns float32 or int32 sums; a last step multiplies
them by the scales, adds the float32 bias and rounds once. (The matmuls could add a bias themselves, but only
in bfloat16 and after rounding.) Sums are written to memory in chunks of `CHUNK_BYTES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.kernels import reference
from ascendit.kernels.kernel import Activation, PreparedWeight, QuantLinearKernel
from ascendit.mx import layouts
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import lookup
from ascendit.ops.cuda.steps import GROUP, LinearSteps, has_outer_scales, outer_scale, padded
from ascendit.quant.schemes import scheme_of

FEW_ROWS = 512
"""Up to this many rows, dequantizing inside the matmul is faster."""
CHUNK_BYTES = 64 << 20
"""float32 sums in memory at a time: about the size of a GPU's cache."""
CHUNK_ROWS = 256
"""Chunks are multiples of this many rows."""
INT8_MIN_ROWS = 32
"""torch._int_mm rejects 16 rows and fewer."""
TILE_ROWS, TILE_BYTES = 128, 512
Product = Callable[[Tensor, Tensor], Tensor]


# ---- dequantized to bfloat16 --------------------------------------------------------------------


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """bfloat16 a [M, K] @ b [N, K].T -> float32 [M, N]."""
    return torch.mm(a, b.t(), out_dtype=torch.float32)


def bf16_product(a: Tensor, b: Tensor) -> Tensor:
    """bfloat16 a [M, K] @ b [N, K].T -> bfloat16 [M, N], accumulated in float32 and rounded once."""
    cuda = torch.backends.cuda.matmul
    before = cuda.allow_bf16_reduced_precision_reduction
    cuda.allow_bf16_reduced_precision_reduction = False
    try:
        return F.linear(a, b)
    finally:
        cuda.allow_bf16_reduced_precision_reduction = before


@dataclass(frozen=True)
class DequantizedMatmul:
    """The kernel of a scheme without a matmul on this GPU. Dequantizing to bfloat16 is exact (`steps`).

    - Up to FEW_ROWS rows, or a dual scale: one kernel dequantizes tiles of the weight in registers and
      multiplies.
    - More rows: the weight of this layer is dequantized into scratch memory and cuBLAS multiplies. That moves
      3 bytes per element, which takes less time than the matmul from about 500 rows on.
    - decode-once: the dequantized weight is stored as well.

    `once`: dequantize weights when they are prepared. `float32` and `bf16`: matmuls of bfloat16 operands with
    results in that dtype.
    """

    steps: LinearSteps
    once: bool = False
    float32: Product = float32_product
    bf16: Product = bf16_product

    def kernel(self, scheme: str, reason: str) -> QuantLinearKernel:
        """The record of this kernel for `scheme`."""
        return QuantLinearKernel(
            scheme,
            "cuda",
            self.quantized_linear,
            reason,
            prepare=self.prepare_weight,
            quantize_activation=self.quantize_activation,
            stored=reference.stored,
        )

    def prepare_weight(
        self, encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
    ) -> PreparedWeight:
        """Move qdata [N, K] and scales as stored; with `once`, also make `decoded`, bfloat16 [N,
        width_of(K)].
        """
        weight = reference.prepare_weight(encoded, bias, device)
        return replace(weight, decoded=self._decode(weight)) if self.once else weight

    def quantize_activation(
        self, x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
    ) -> Activation:
        """See `Schemes.quantize_activation`. `qdata` holds dequantized bfloat16 values [M, width_of(K)].

        `scale` holds the outer scales (`steps.outer_scale`), [0] for MX.
        """
        s = scheme_of(scheme)
        values, outer = self.steps.fake_quantize(x.flatten(0, -2), s.activation, rule or s.rule, mul_scale)
        scale = values.new_empty(0) if outer is None else outer
        return Activation(s, tuple(x.shape[:-1]), x.shape[-1], x.dtype, values, scale)

    def quantized_linear(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """See `Schemes.quantized_linear`."""
        if weight.scheme == "mxfp4_dualscale":
            out = self._grouped(a, weight)
        elif has_outer_scales(weight.scheme):
            out = self._per_channel(a, weight)
        elif self.steps.matmul and weight.decoded is None and a.qdata.shape[0] <= FEW_ROWS:
            out = self.steps.matmul(a.qdata, None, reference.stored(weight), None, weight.bias, a.dtype)
        elif a.dtype == torch.bfloat16:
            out = self.bf16(a.qdata, self._decode(weight))
        else:
            out = self.float32(a.qdata, self._decode(weight)).to(a.dtype)
        return out.view(*a.lead, -1)

    def _decode(self, weight: PreparedWeight) -> Tensor:
        if weight.decoded is not None:
            return weight.decoded
        return self.steps.decode_weight(reference.stored(weight), weight.bias)

    def _per_channel(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """int8 and fp8: the sums are multiplied by one scale per row and one per channel."""
        decoded, column = self._decode(weight), weight.scale.flatten()
        out = a.qdata.new_empty(a.qdata.shape[0], weight.shape[0], dtype=a.dtype)
        for rows in row_chunks(*out.shape):
            sums = self.float32(a.qdata[rows], decoded)
            self.steps.finish(sums, a.scale[rows], column, weight.bias, out[rows])
        return out

    def _grouped(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """Dual scale: the sum over each group of 512 is multiplied by the level 0 of its row and channel."""
        encoded = reference.stored(weight)
        if self.steps.matmul:
            return self.steps.matmul(a.qdata, a.scale, encoded, weight.decoded, weight.bias, a.dtype)
        decoded, k = self._decode(weight), weight.shape[1]
        dual = outer_scale(encoded)
        assert dual is not None
        out = a.qdata.new_empty(a.qdata.shape[0], weight.shape[0], dtype=a.dtype)
        for rows in row_chunks(*out.shape):
            total = torch.zeros(out[rows].shape, device=out.device)
            for g in range(dual.shape[1]):
                columns = slice(g * GROUP, min((g + 1) * GROUP, k))
                sums = self.float32(a.qdata[rows, columns], decoded[:, columns])
                total += sums * a.scale[rows, g, None] * dual[:, g]
            self.steps.finish(total, None, None, weight.bias, out[rows])
        return out


# ---- quantized matmuls of the GPU ---------------------------------------------------------------


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """int8 a [M, K] @ b [N, K].T -> int32 [M, N], exact."""
    return torch._int_mm(a, b.t())


def fp8_product(a: Tensor, b: Tensor) -> Tensor:
    """float8_e4m3fn a [M, K] @ b [N, K].T -> float32 [M, N].

    Scales are applied later: PyTorch's row-wise matmul would round before the bias.
    """
    unit = _unit_scale(a.device)
    return torch._scaled_mm(
        a, b.t(), scale_a=unit, scale_b=unit, out_dtype=torch.float32, use_fast_accum=False
    )


@functools.cache
def _unit_scale(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def mxfp8_product(a: Tensor, b: Tensor, a_tiles: Tensor, b_tiles: Tensor) -> Tensor:
    """float8_e4m3fn a [M, K] @ b [N, K].T -> float32 [M, N].

    E8M0 scales in the layout of `mx.layouts.to_cuda_tiles`.
    """
    functional: Any = F
    blocks = functional.ScalingType.BlockWise1x32
    swizzle = functional.SwizzleType.SWIZZLE_32_4_4
    out: Tensor = functional.scaled_mm(
        a,
        b.t(),
        a_tiles.view(torch.float8_e8m0fnu),
        blocks,
        b_tiles.view(torch.float8_e8m0fnu),
        blocks,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=torch.float32,
    )
    return out


@dataclass(frozen=True)
class ScaledMatmul:
    """The kernel of a scheme with a matmul on this GPU: int8, fp8 and, on sm100, the MX formats.

    PyTorch has no FP4 matmul that returns float32 sums. Every FP4 value is exact in e4m3, so the weight of
    one layer is converted to e4m3 (a byte per element) for each matmul and runs at the speed of mxfp8.

    `once`: convert FP4 to e4m3 when a weight is prepared. `int8`, `fp8` and `mxfp8`: the matmuls of an
    activation [M, K] and a weight [N, K], both K-major -> sums [M, N].
    """

    steps: LinearSteps
    once: bool = False
    int8: Callable[[Tensor, Tensor], Tensor] = int8_product
    fp8: Callable[[Tensor, Tensor], Tensor] = fp8_product
    mxfp8: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = mxfp8_product

    def kernel(self, scheme: str, reason: str) -> QuantLinearKernel:
        """The record of this kernel for `scheme`."""
        return QuantLinearKernel(
            scheme,
            "cuda",
            self.quantized_linear,
            reason,
            prepare=self.prepare_weight,
            quantize_activation=self.quantize_activation,
            stored=self.stored,
        )

    def prepare_weight(
        self, encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
    ) -> PreparedWeight:
        """Pad qdata to [padded(N), padded(K)], FP4 two per byte; scales become float32 [N], or E8M0 in
        CUDA's tiles.
        """
        n, k = encoded.shape
        fmt, scale = lookup(encoded.format), encoded.scale.to(device)
        padding = padded(k) // (2 if fmt.packed else 1) - encoded.qdata.shape[1]
        raw = encoded.qdata.to(device).view(torch.uint8)
        if padding or padded(n) > n:  # F.pad copies even without padding
            raw = F.pad(raw, (0, padding, 0, padded(n) - n))
        qdata = raw.view(getattr(torch, fmt.qdata_dtype))
        if has_outer_scales(encoded.format):
            scale = scale.flatten()
        else:
            scale = layouts.to_cuda_tiles(F.pad(scale, (0, 0, 0, padded(n) - n)))
        bias = None if bias is None else bias.to(device, torch.float32)
        weight = PreparedWeight(encoded.format, (n, k), qdata, scale, bias=bias)
        return replace(weight, decoded=_e4m3(weight)) if self.once and fmt.packed else weight

    def stored(self, weight: PreparedWeight) -> Encoded:
        """The inverse of `prepare_weight`: qdata [N, K] and scales, in dtypes and layout as on disk."""
        n, k = weight.shape
        fmt, scale = lookup(weight.scheme), weight.scale
        width = -(-k // 2) if fmt.packed else k
        qdata = weight.qdata.view(torch.uint8)[:n, :width].contiguous().view(weight.qdata.dtype)
        if has_outer_scales(weight.scheme):
            scale = scale.view(-1, 1)
        else:
            scale = layouts.from_cuda_tiles(scale, padded(n), -(-k // 32))[:n].contiguous()
        return Encoded(qdata, scale, None, weight.scheme, -1, weight.shape)

    def quantize_activation(
        self, x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
    ) -> Activation:
        """See `Schemes.quantize_activation`. qdata [M, padded(K)]; scales float32 [M] or tiles of E8M0."""
        s = scheme_of(scheme)
        qdata, scale = self.steps.quantize(x.flatten(0, -2), s.activation, rule or s.rule, mul_scale)
        if scale.dtype == torch.uint8:
            scale = layouts.to_cuda_tiles(scale)
        return Activation(s, tuple(x.shape[:-1]), x.shape[-1], x.dtype, qdata, scale)

    def quantized_linear(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """See `Schemes.quantized_linear`."""
        outer = has_outer_scales(weight.scheme)
        out = a.qdata.new_empty(a.qdata.shape[0], weight.shape[0], dtype=a.dtype)
        qdata = _e4m3(weight) if lookup(weight.scheme).packed else weight.qdata
        for rows in row_chunks(*out.shape):
            scale = a.scale[rows] if outer else _tiles(a.scale, rows, qdata.shape[1])
            sums = self._sums(a.qdata[rows], qdata, scale, weight)
            row, column = (scale, weight.scale) if outer else (None, None)
            self.steps.finish(sums, row, column, weight.bias, out[rows])
        return out.view(*a.lead, -1)

    def _sums(self, a: Tensor, qdata: Tensor, scale: Tensor, weight: PreparedWeight) -> Tensor:
        if weight.scheme == "fp8":
            return self.fp8(a, qdata)
        if weight.scheme != "int8":
            return self.mxfp8(a, qdata, scale, weight.scale)
        rows = a.shape[0]
        a = F.pad(a, (0, 0, 0, INT8_MIN_ROWS - rows)) if rows < INT8_MIN_ROWS else a
        return self.int8(a, qdata)[:rows]


@dataclass(frozen=True)
class TileMatmul:
    """Kernel of int8_block: one exact int8 matmul per 128 of K, scaled and added up in float64.

    `int8`: as in `ScaledMatmul`.
    """

    int8: Callable[[Tensor, Tensor], Tensor] = int8_product

    def kernel(self, scheme: str, reason: str) -> QuantLinearKernel:
        return QuantLinearKernel(
            scheme,
            "cuda",
            self.quantized_linear,
            reason,
            prepare=reference.prepare_weight,
            quantize_activation=reference.quantize_activation,
            stored=reference.stored,
        )

    def quantized_linear(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """See `Schemes.quantized_linear`."""
        return reference.int8_tile_linear(a, weight, self._padded_product)

    def _padded_product(self, a: Tensor, b: Tensor) -> Tensor:
        """int8 [M, k] times int8 [N, k].T -> int32 [M, N]; torch._int_mm takes only some sizes."""
        (m, k), n = a.shape, len(b)
        a = F.pad(a, (0, padded(k) - k, 0, max(INT8_MIN_ROWS - m, 0)))
        b = F.pad(b, (0, padded(k) - k, 0, padded(n) - n))
        return self.int8(a.contiguous(), b.contiguous())[:m, :n]


def _e4m3(weight: PreparedWeight) -> Tensor:
    """An FP4 weight as float8_e4m3fn, [padded(N), padded(K)]."""
    if weight.decoded is not None:
        return weight.decoded
    pairs = _pairs(weight.qdata.device)[weight.qdata.to(torch.int32)]
    return pairs.view(torch.float8_e4m3fn)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """int16 [256]: byte of two FP4 elements -> both as e4m3, the one of even index in the low byte."""
    all_bytes = torch.arange(256, dtype=torch.uint8)[:, None]
    return layouts.to_e4m3_container(all_bytes, 2).view(torch.int16).flatten().to(device)


def _tiles(tiles: Tensor, rows: slice, k: int) -> Tensor:
    """The scale tiles of `rows`, which start at a tile boundary."""
    tile_row_bytes = -(-k // 32 // 4) * TILE_BYTES
    return tiles[rows.start // TILE_ROWS * tile_row_bytes : -(-rows.stop // TILE_ROWS) * tile_row_bytes]


# ---- chunks of sums -----------------------------------------------------------------------------


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows in multiples of CHUNK_ROWS, with at most CHUNK_BYTES of float32 sums each."""
    step = max(CHUNK_ROWS, CHUNK_BYTES // (4 * columns) // CHUNK_ROWS * CHUNK_ROWS)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
