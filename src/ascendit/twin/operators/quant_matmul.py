"""npu_quant_matmul in all its modes: int8, fp8, MXFP8, MXFP4, W4A8 and 128 x 128 blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.mx import elements, layouts
from ascendit.mx import scales as e8m0
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import E2M1, lookup
from ascendit.twin import cpu_kernels, nz
from ascendit.twin.operators import quant_matmul_contract as contract
from ascendit.twin.operators.quant_matmul_contract import Call, is_transposed, mode_of
from ascendit.twin.registry import Out, gate, operator

FORMATS = {
    "fp8": ("fp8", "fp8"),
    "mxfp8": ("mxfp8", "mxfp8"),
    "mxfp4": ("mxfp4", "mxfp4"),
    "w4a8": ("mxfp8", "mxfp4"),
}
"""Mode -> formats of x1 and x2, where a CPU has the same product."""


@operator("npu_quant_matmul")
def npu_quant_matmul(**arguments: Any) -> Iterator[Any]:
    """x1 @ x2 with scales: `scale` is x2's, `pertoken_scale` x1's (aclnnQuantMatmulV5, ...WeightNz)."""
    call = Call(**arguments)
    mode = mode_of(call)
    gate("npu_quant_matmul", mode)
    shape, dtype = contract.CHECKS[mode](call)
    yield Out(shape, dtype)
    x2 = nz.from_nz(call.x2) if nz.fractal(call.x2) else call.x2
    shared = _as_encoded(call, x2, mode)
    if shared is not None:
        yield cpu_kernels.linear(*shared, dtype).view(shape)
    else:
        yield NUMBERS[mode](call, x2).to(dtype)


def _as_encoded(call: Call, x2: Tensor, mode: str) -> tuple[Encoded, Encoded, Tensor | None] | None:
    """Tokens, weight [N, K] and bias, where a CPU has this product too; None for the layouts it lacks."""
    e5m2 = torch.float8_e5m2 in (call.x1.dtype, x2.dtype)
    if mode not in FORMATS or e5m2 or call.x1.dim() != 2 or not is_transposed(call.x2):
        return None
    if call.bias is not None and call.bias.numel() != x2.shape[-1]:
        return None
    assert call.pertoken_scale is not None
    k = call.x1.shape[-1] * (2 if mode == "mxfp4" else 1)
    sides = (
        (call.x1, call.pertoken_scale),
        (x2.mT, call.scale if mode == "fp8" else call.scale.transpose(0, 1)),
    )
    if mode == "fp8":
        scales = [scale.view(-1, 1).expand(len(codes), 1) for codes, scale in sides]
    else:
        scales = [layouts.from_pairs(scale.view(torch.uint8), -(-k // 32)) for _, scale in sides]
    tokens, weight = (
        Encoded(codes.view(getattr(torch, lookup(name).codes_dtype)), scale, None, name, -1, (len(codes), k))
        for (codes, _), scale, name in zip(sides, scales, FORMATS[mode], strict=True)
    )
    return tokens, weight, None if call.bias is None else call.bias.to(torch.float32).flatten()


# ---- numbers: float32 before the output cast -------------------------------------------------------------


def _int8(call: Call, x2: Tensor) -> Tensor:
    """(x1 @ x2 [+ int32 bias]) x scale x pertoken [+ bias]."""
    total = int8_matmul(call.x1, x2)
    if call.bias is not None and call.bias.dtype == torch.int32:
        total = total + call.bias
    out = total.to(torch.float32) * fp32_scale(call.scale)
    if call.pertoken_scale is not None:
        out = out * call.pertoken_scale.unsqueeze(-1)
    if call.bias is not None and call.bias.dtype != torch.int32:
        out = out + call.bias.to(torch.float32)
    if call.pertoken_scale is None and call.output_dtype in (None, 1):
        offset = 0.0 if call.offset is None else call.offset
        return torch.round(out + offset).clamp(-128, 127)
    return out


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int64 a @ b, exact: float32 products of at most 1024 terms stay below 2^24."""
    parts = [
        (x.to(torch.float32) @ y.to(torch.float32)).to(torch.int64)
        for x, y in zip(a.split(1024, -1), b.split(1024, -2), strict=True)
    ]
    return torch.stack(parts).sum(0)


def fp32_scale(scale: Tensor) -> Tensor:
    """float32 of a scale; an int64 one is npu_trans_quant_param's, 19 bits in the lower word."""
    if scale.dtype == torch.int64:
        return (scale & 0xFFFFE000).to(torch.int32).view(torch.float32)
    return scale.to(torch.float32)


def _static_scale(call: Call) -> Tensor:
    return (call.scale.view(torch.int32) & ~0x1FFF).view(torch.float32)


def _int8_static(call: Call, x2: Tensor) -> Tensor:
    """Without a scale per token. A float32 scale loses 13 bits unless the output is bfloat16 or int32."""
    if call.output_dtype == 3:
        return int8_matmul(call.x1, x2) + (0 if call.bias is None else call.bias)
    if call.scale.dtype == torch.float32 and call.output_dtype not in (15, 283):
        return _int8(call.with_scale(_static_scale(call)), x2)
    return _int8(call, x2)


def _fp8(call: Call, x2: Tensor) -> Tensor:
    assert call.pertoken_scale is not None
    out = call.x1.to(torch.float32) @ x2.to(torch.float32)
    return _biased(out * call.scale * call.pertoken_scale.unsqueeze(-1), call.bias)


def _mx(call: Call, x2: Tensor) -> Tensor:
    """Sums of 32 products x both scales; exact in float32 up to the order of the sums."""
    assert call.pertoken_scale is not None
    a = mx_values(call.x1, call.pertoken_scale, packed=call.x1_dtype is not None)
    n_first = is_transposed(call.x2)
    weight, scale = (x2.mT, call.scale.transpose(0, 1)) if n_first else (x2, call.scale)
    if n_first:
        b = mx_values(weight, scale, packed=call.x2_dtype is not None).mT
    else:
        codes = numbers(weight, packed=call.x2_dtype is not None)
        b = mx_scaled(codes.mT, scale.transpose(0, 1)).mT
    return _biased(a @ b, call.bias)


def mx_values(codes: Tensor, pairs: Tensor, packed: bool) -> Tensor:
    """Codes [.., K] or packed [.., K / 2] and paired scales [.., K / 64, 2] -> float32 [.., K]."""
    return mx_scaled(numbers(codes, packed), pairs)


def mx_scaled(values: Tensor, pairs: Tensor) -> Tensor:
    """float32 [.., K] times its scales; those of blocks beyond K are filling."""
    length = values.shape[-1]
    plain = e8m0.from_bytes(pairs.contiguous().view(torch.uint8)).flatten(-2)[..., : -(-length // 32)]
    return e8m0.join_blocks(e8m0.split_blocks(values, 32) * plain.unsqueeze(-1), length)


def numbers(codes: Tensor, packed: bool) -> Tensor:
    """FP8 or packed FP4 codes -> float32."""
    if not packed:
        return codes.to(torch.float32)
    raw = codes.contiguous().view(torch.uint8)
    table = elements.to_values(torch.arange(16, dtype=torch.uint8), E2M1)
    return table[elements.unpack(raw, raw.shape[-1] * 2).to(torch.int64)]


def _block(call: Call, x2: Tensor) -> Tensor:
    """FP8 with one float32 scale per 128 x 128 of x2, and per 128 of K, or 128 x 128, of x1."""
    assert call.pertoken_scale is not None and call.group_sizes is not None
    rows = call.group_sizes[0]
    a = tiled(call.x1.to(torch.float32), call.pertoken_scale, rows)
    return a @ tiled(x2.to(torch.float32), call.scale, 128)


def tiled(values: Tensor, scale: Tensor, rows: int) -> Tensor:
    """float32 [R, C] times one scale per `rows` x 128."""
    full = scale.repeat_interleave(rows, 0)[: values.shape[0]].repeat_interleave(128, 1)
    return values * full[:, : values.shape[1]]


def _biased(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias.to(torch.float32)


NUMBERS = {
    "int8": _int8,
    "static": _int8_static,
    "fp8": _fp8,
    "mxfp8": _mx,
    "mxfp4": _mx,
    "w4a8": _mx,
    "block": _block,
}
