"""CPU stand-ins for the matmuls of a GPU, with the GPU's rules for shapes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from ascendit import mx
from ascendit.mx import layouts
from ascendit.mx.codec import Encoded
from ascendit.ops.cuda.matmul import DequantizedMatmul, ScaledMatmul
from ascendit.ops.cuda.steps import LinearSteps


def _check_operands(a: Tensor, b: Tensor, multiple: int) -> None:
    """Both are K-major with the same K; K and N are multiples (of 8 for _int_mm, of 16 for scaled_mm)."""
    assert a.dim() == b.dim() == 2 and a.stride(1) == b.stride(1) == 1
    assert a.shape[1] == b.shape[1] and a.shape[1] % multiple == 0 == b.shape[0] % multiple
    assert a.stride(0) % multiple == 0 == b.stride(0) % multiple


def int8(a: Tensor, b: Tensor) -> Tensor:
    _check_operands(a, b, 8)
    assert a.dtype == b.dtype == torch.int8 and a.shape[0] > 16, "self.size(0) needs to be greater than 16"
    return (a.to(torch.int32) @ b.to(torch.int32).t()).to(torch.int32)


def fp8(a: Tensor, b: Tensor) -> Tensor:
    _check_operands(a, b, 16)
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    return a.float() @ b.float().t()


def mxfp8(a: Tensor, b: Tensor, a_tiles: Tensor, b_tiles: Tensor) -> Tensor:
    _check_operands(a, b, 16)
    assert a.dtype == b.dtype == torch.float8_e4m3fn and a.shape[1] % 32 == 0
    values = []
    for qdata, tiles in ((a, a_tiles), (b, b_tiles)):
        rows, blocks = qdata.shape[0], qdata.shape[1] // 32
        assert tiles.dtype == torch.uint8 and tiles.is_contiguous()
        assert tiles.numel() == -(-rows // 128) * 128 * -(-blocks // 4) * 4
        scale = layouts.from_cuda_tiles(tiles, rows, blocks)
        values.append(mx.decode(Encoded(qdata.contiguous(), scale, None, "mxfp8", -1, tuple(qdata.shape))))
    return values[0] @ values[1].t()


def bf16(a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype == torch.bfloat16 and a.shape[1] == b.shape[1]
    return a.float() @ b.float().t()


def scaled(steps: LinearSteps, *, once: bool = False) -> ScaledMatmul:
    return ScaledMatmul(steps, once, int8, fp8, mxfp8)


def dequantized(steps: LinearSteps, *, once: bool = False) -> DequantizedMatmul:
    return DequantizedMatmul(steps, once, bf16, lambda a, b: bf16(a, b).to(torch.bfloat16))
