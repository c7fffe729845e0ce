"""Quantized linear layers on a CUDA card: by its own matmuls, or decoded to bfloat16 and multiplied.

The numbers are those of the contract in `kernels/reference.py`. Each matmul gives float32 or int32 sums, and
one more step multiplies them with the scales, adds the float32 bias and rounds once. (The matmuls could add a
bias themselves, but only one in bfloat16, and only to what they have rounded.) Sums go through memory in
pieces of `PIECE_BYTES`. A weight stays codes and scales in memory; the classes say what becomes of it in a
product.
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

FEW_TOKENS = 512
PIECE_BYTES = 64 << 20
"""Of float32 sums that are in memory at a time: about what the cache of a card holds."""
PIECE_ROWS = 256

LEAST_ROWS = 32
"""torch._int_mm refuses 16 rows and fewer."""
TILE_ROWS, TILE_BYTES = 128, 512
Product = Callable[[Tensor, Tensor], Tensor]


# ---- dequantized to bfloat16 --------------------------------------------------------------------


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """bfloat16 [M, K] times [N, K] -> float32 [M, N]."""
    return torch.mm(a, b.t(), out_dtype=torch.float32)


def narrow_product(a: Tensor, b: Tensor) -> Tensor:
    """The same -> bfloat16 [M, N], rounded once: parts of sums may not be added in bfloat16 either."""
    cuda = torch.backends.cuda.matmul
    before = cuda.allow_bf16_reduced_precision_reduction
    cuda.allow_bf16_reduced_precision_reduction = False
    try:
        return F.linear(a, b)
    finally:
        cuda.allow_bf16_reduced_precision_reduction = before


@dataclass(frozen=True)
class DequantizedMatmul:
    """The kernel of a scheme that the card has no matmul for. Decoding to bfloat16 is exact (`steps`).

    - few tokens, or a dual scale: one kernel decodes tiles of the weight in registers and multiplies;
    - many tokens: the weight of this one layer is decoded into scratch memory and cuBLAS multiplies. Decoding
      moves 3 bytes for each number of a weight; the product takes longer than that from some 500 tokens on;
    - decode-once: the decoded weight is kept beside the codes.

    `once`: weights are decoded when they are prepared. `wide` and `narrow`: the matmuls in bfloat16.
    """

    steps: LinearSteps
    once: bool = False
    wide: Product = wide_product
    narrow: Product = narrow_product

    def kernel(self, scheme: str, reason: str) -> QuantLinearKernel:
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
        """Codes and scales as on disk; `decoded`: bfloat16 [N, width_of(K)]."""
        weight = reference.prepare_weight(encoded, bias, device)
        return replace(weight, decoded=self._decode(weight)) if self.once else weight

    def quantize_activation(
        self, x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
    ) -> Activation:
        """Values as `codes`, what multiplies the sums as `scale`; empty for MX."""
        row = scheme_of(scheme)
        values, outer = self.steps.to_values(x.flatten(0, -2), row.activation, rule or row.rule, mul_scale)
        scale = values.new_empty(0) if outer is None else outer
        return Activation(row, tuple(x.shape[:-1]), x.shape[-1], x.dtype, values, scale)

    def quantized_linear(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """See `Schemes.quantized_linear`."""
        if weight.scheme == "mxfp4_dualscale":
            out = self._grouped(a, weight)
        elif has_outer_scales(weight.scheme):
            out = self._scaled(a, weight)
        elif self.steps.matmul and weight.decoded is None and a.qdata.shape[0] <= FEW_TOKENS:
            out = self.steps.matmul(a.qdata, None, reference.stored(weight), None, weight.bias, a.dtype)
        elif a.dtype == torch.bfloat16:
            out = self.narrow(a.qdata, self._decode(weight))
        else:
            out = self.wide(a.qdata, self._decode(weight)).to(a.dtype)
        return out.view(*a.lead, -1)

    def _decode(self, weight: PreparedWeight) -> Tensor:
        if weight.decoded is not None:
            return weight.decoded
        return self.steps.decode_weight(reference.stored(weight), weight.bias)

    def _scaled(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """int8 and fp8: a scale for each token and channel multiplies the sums."""
        decoded, column = self._decode(weight), weight.scale.flatten()
        out = a.qdata.new_empty(a.qdata.shape[0], weight.shape[0], dtype=a.dtype)
        for rows in row_pieces(*out.shape):
            sums = self.wide(a.qdata[rows], decoded)
            self.steps.finish(sums, a.scale[rows], column, weight.bias, out[rows])
        return out

    def _grouped(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """Dual scale: those of a token and of a channel for a group of 512 multiply the sum of the group."""
        encoded = reference.stored(weight)
        if self.steps.matmul:
            return self.steps.matmul(a.qdata, a.scale, encoded, weight.decoded, weight.bias, a.dtype)
        decoded, k = self._decode(weight), weight.shape[1]
        dual = outer_scale(encoded)
        assert dual is not None
        out = a.qdata.new_empty(a.qdata.shape[0], weight.shape[0], dtype=a.dtype)
        for rows in row_pieces(*out.shape):
            total = torch.zeros(out[rows].shape, device=out.device)
            for g in range(dual.shape[1]):
                columns = slice(g * GROUP, min((g + 1) * GROUP, k))
                sums = self.wide(a.qdata[rows, columns], decoded[:, columns])
                total += sums * a.scale[rows, g, None] * dual[:, g]
            self.steps.finish(total, None, None, weight.bias, out[rows])
        return out


# ---- by the matmuls of the card -----------------------------------------------------------------


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """int32, exact."""
    return torch._int_mm(a, b.t())


def fp8_product(a: Tensor, b: Tensor) -> Tensor:
    """float32. Scales of rows come later: PyTorch's row-wise matmul would round before the bias."""
    one = _one(a.device)
    return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False)


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def mxfp8_product(a: Tensor, b: Tensor, a_tiles: Tensor, b_tiles: Tensor) -> Tensor:
    """float32. Scales as `mx.layouts.to_cuda_tiles`."""
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
    """The kernel of a scheme that the card has a matmul for: int8, fp8 and, on sm100, the MX formats.

    FP4 has no matmul in PyTorch that gives float32 sums. Its numbers are e4m3 numbers too, so its codes are
    put into e4m3 for each product (a byte for each number of this one layer) and run at the speed of mxfp8.

    `once`: FP4 codes are put into e4m3 when they are prepared. `int8`, `fp8` and `mxfp8`: the matmuls, codes
    [M, K] times a weight [N, K], both K-major -> sums [M, N].
    """

    steps: LinearSteps
    once: bool = False
    int8: Callable[[Tensor, Tensor], Tensor] = int8_product
    fp8: Callable[[Tensor, Tensor], Tensor] = fp8_product
    mxfp8: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = mxfp8_product

    def kernel(self, scheme: str, reason: str) -> QuantLinearKernel:
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
        """Codes [padded(N), padded(K)], FP4 two to a byte; scales float32 [N], or E8M0 in CUDA's tiles."""
        n, k = encoded.shape
        form, scale = lookup(encoded.format), encoded.scale.to(device)
        filling = padded(k) // (2 if form.packed else 1) - encoded.qdata.shape[1]
        raw = encoded.qdata.to(device).view(torch.uint8)
        if filling or padded(n) > n:  # else the codes stay where they are: F.pad would copy them
            raw = F.pad(raw, (0, filling, 0, padded(n) - n))
        qdata = raw.view(getattr(torch, form.qdata_dtype))
        if has_outer_scales(encoded.format):
            scale = scale.flatten()
        else:
            scale = layouts.to_cuda_tiles(F.pad(scale, (0, 0, 0, padded(n) - n)))
        wide = None if bias is None else bias.to(device, torch.float32)
        weight = PreparedWeight(encoded.format, (n, k), qdata, scale, bias=wide)
        return replace(weight, decoded=_e4m3(weight)) if self.once and form.packed else weight

    def stored(self, weight: PreparedWeight) -> Encoded:
        """The inverse of `prepare_weight`."""
        n, k = weight.shape
        form, scale = lookup(weight.scheme), weight.scale
        width = -(-k // 2) if form.packed else k
        qdata = weight.qdata.view(torch.uint8)[:n, :width].contiguous().view(weight.qdata.dtype)
        if has_outer_scales(weight.scheme):
            scale = scale.view(-1, 1)
        else:
            scale = layouts.from_cuda_tiles(scale, padded(n), -(-k // 32))[:n].contiguous()
        return Encoded(qdata, scale, None, weight.scheme, -1, weight.shape)

    def quantize_activation(
        self, x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
    ) -> Activation:
        """Codes [M, padded(K)]; scales float32 [M], or E8M0 in CUDA's tiles."""
        row = scheme_of(scheme)
        qdata, scale = self.steps.to_codes(x.flatten(0, -2), row.activation, rule or row.rule, mul_scale)
        if scale.dtype == torch.uint8:
            scale = layouts.to_cuda_tiles(scale)
        return Activation(row, tuple(x.shape[:-1]), x.shape[-1], x.dtype, qdata, scale)

    def quantized_linear(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """See `Schemes.quantized_linear`."""
        outer = has_outer_scales(weight.scheme)
        out = a.qdata.new_empty(a.qdata.shape[0], weight.shape[0], dtype=a.dtype)
        qdata = _e4m3(weight) if lookup(weight.scheme).packed else weight.qdata
        for rows in row_pieces(*out.shape):
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
        a = F.pad(a, (0, 0, 0, LEAST_ROWS - rows)) if rows < LEAST_ROWS else a
        return self.int8(a, qdata)[:rows]


def _e4m3(weight: PreparedWeight) -> Tensor:
    """The codes of FP4 as those of e4m3, [padded(N), padded(K)]."""
    if weight.decoded is not None:
        return weight.decoded
    pairs = _pairs(weight.qdata.device)[weight.qdata.to(torch.int32)]
    return pairs.view(torch.float8_e4m3fn)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """int16 [256]: what two codes of FP4 in a byte are in e4m3, the even one in the low byte."""
    every = torch.arange(256, dtype=torch.uint8)[:, None]
    return layouts.to_e4m3_container(every, 2).view(torch.int16).flatten().to(device)


def _tiles(tiles: Tensor, rows: slice, k: int) -> Tensor:
    """Those of some rows, which begin at a whole tile."""
    across = -(-k // 32 // 4) * TILE_BYTES
    return tiles[rows.start // TILE_ROWS * across : -(-rows.stop // TILE_ROWS) * across]


# ---- sums in pieces -----------------------------------------------------------------------------


def row_pieces(rows: int, columns: int) -> Iterator[slice]:
    """Rows at a time, so that float32 sums of them are PIECE_BYTES at most; multiples of PIECE_ROWS."""
    step = max(PIECE_ROWS, PIECE_BYTES // (4 * columns) // PIECE_ROWS * PIECE_ROWS)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
