"""Quantized linear layers that a CUDA card has no matmul for: decoded to bfloat16 and multiplied in it.

The numbers are those of the contract in `kernels/reference.py`: decoding to bfloat16 is exact (`steps`), the
card sums in float32, and what comes out is rounded once. In memory a weight stays codes and scales:

- few tokens, or a dual scale: one kernel decodes tiles of the weight in registers and multiplies;
- many tokens: the weight of this one layer is decoded into scratch memory and cuBLAS multiplies. Decoding
  moves 3 bytes for each number of a weight; the product takes longer than that from some 500 tokens on;
- decode-once: the decoded weight is kept beside the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.kernels import reference
from ascendit.kernels.kernel import Activation, PreparedWeight, QuantLinearKernel
from ascendit.mx.codec import Encoded
from ascendit.ops.cuda.steps import GROUP, Steps, has_outer_scales, outer_scale
from ascendit.quant.schemes import scheme_of

FEW_TOKENS = 512
PIECE_BYTES = 64 << 20
"""Of float32 sums that are in memory at a time: about what the cache of a card holds."""
PIECE_ROWS = 256

Product = Callable[[Tensor, Tensor], Tensor]


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
    """The kernel of a scheme that the card has no matmul for.

    `once`: weights are decoded when they are prepared. `wide` and `narrow`: the matmuls in bfloat16.
    """

    steps: Steps
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
        elif self.steps.matmul and weight.decoded is None and a.codes.shape[0] <= FEW_TOKENS:
            out = self.steps.matmul(a.codes, None, reference.stored(weight), None, weight.bias, a.dtype)
        elif a.dtype == torch.bfloat16:
            out = self.narrow(a.codes, self._decode(weight))
        else:
            out = self.wide(a.codes, self._decode(weight)).to(a.dtype)
        return out.view(*a.lead, -1)

    def _decode(self, weight: PreparedWeight) -> Tensor:
        if weight.decoded is not None:
            return weight.decoded
        return self.steps.decode_weight(reference.stored(weight), weight.bias)

    def _scaled(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """int8 and fp8: a scale for each token and channel multiplies the sums."""
        decoded, column = self._decode(weight), weight.scale.flatten()
        out = a.codes.new_empty(a.codes.shape[0], weight.shape[0], dtype=a.dtype)
        for rows in pieces(*out.shape):
            sums = self.wide(a.codes[rows], decoded)
            self.steps.finish(sums, a.scale[rows], column, weight.bias, out[rows])
        return out

    def _grouped(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """Dual scale: those of a token and of a channel for a group of 512 multiply the sum of the group."""
        encoded = reference.stored(weight)
        if self.steps.matmul:
            return self.steps.matmul(a.codes, a.scale, encoded, weight.decoded, weight.bias, a.dtype)
        decoded, k = self._decode(weight), weight.shape[1]
        dual = outer_scale(encoded)
        assert dual is not None
        out = a.codes.new_empty(a.codes.shape[0], weight.shape[0], dtype=a.dtype)
        for rows in pieces(*out.shape):
            total = torch.zeros(out[rows].shape, device=out.device)
            for g in range(dual.shape[1]):
                columns = slice(g * GROUP, min((g + 1) * GROUP, k))
                sums = self.wide(a.codes[rows, columns], decoded[:, columns])
                total += sums * a.scale[rows, g, None] * dual[:, g]
            self.steps.finish(total, None, None, weight.bias, out[rows])
        return out


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Rows at a time, so that float32 sums of them are PIECE_BYTES at most; multiples of PIECE_ROWS."""
    step = max(PIECE_ROWS, PIECE_BYTES // (4 * columns) // PIECE_ROWS * PIECE_ROWS)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
