"""The quantized matmuls: `npu_quant_matmul`, `npu_dual_level_quant_matmul`, `npu_weight_quant_batchmatmul`.

npu_quant_matmul has eight modes: int8, static int8, fp8, MXFP8, MXFP4, W4A8, 128 x 128 blocks of FP8 and of
int8; `quant_matmul_contract` checks the arguments of each. npu_dual_level_quant_matmul multiplies FP4 by FP4
with an E8M0 scale per 32 values and a float32 scale per 512. npu_weight_quant_batchmatmul is W8A16 and W4A16:
it dequantizes the weight before the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.kernels.reference import int8_tile_matmul
from ascendit.mx import elements, layouts
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import E2M1, E4M3, E5M2, Element, lookup
from ascendit.twin import contract, cpu_kernels, nz
from ascendit.twin.contract import HALF_DTYPES, Call, require
from ascendit.twin.operators.mx_quantize import dequantize
from ascendit.twin.operators.quant_matmul_contract import check, is_transposed, mode_of
from ascendit.twin.operators.row_quantize import dequantize_tiles
from ascendit.twin.registry import Out, check_capability, operator

OPERAND_FORMATS = {
    "fp8": ("fp8", "fp8"),
    "mxfp8": ("mxfp8", "mxfp8"),
    "mxfp4": ("mxfp4", "mxfp4"),
    "w4a8": ("mxfp8", "mxfp4"),
}
"""Mode -> formats of x1 and x2, for the modes that the CPU kernels compute too."""


# ---- npu_quant_matmul ---------------------------------------------------------------------------


@operator("npu_quant_matmul")
def npu_quant_matmul(**arguments: Any) -> Iterator[Any]:
    """x1 [.., M, K] @ x2 [K, N] -> [.., M, N] (aclnnQuantMatmulV5, ...WeightNz).

    `scale` belongs to x2, `pertoken_scale` to x1. Raises the errors of `quant_matmul_contract`.
    """
    call = Call(**arguments)
    mode = mode_of(call)
    check_capability("npu_quant_matmul", mode)
    shape, dtype = check(call, mode)
    yield Out(shape, dtype)
    x2 = nz.from_nz(call.x2) if nz.fractal(call.x2) else call.x2
    operands = _cpu_operands(call, x2, mode)
    if operands is not None:
        yield cpu_kernels.linear(*operands, dtype).view(shape)
    else:
        yield MODES[mode](call, x2).to(dtype)


def _cpu_operands(call: Call, x2: Tensor, mode: str) -> tuple[Encoded, Encoded, Tensor | None] | None:
    """Activation [M, K], weight [N, K] and bias [N] for the CPU kernels; None if they lack this product."""
    e5m2 = torch.float8_e5m2 in (call.x1.dtype, x2.dtype)
    if mode not in OPERAND_FORMATS or e5m2 or call.x1.dim() != 2 or not is_transposed(call.x2):
        return None
    if call.bias is not None and call.bias.numel() != x2.shape[-1]:
        return None
    k = call.x1.shape[-1] * (2 if mode == "mxfp4" else 1)

    def encoded(name: str, qdata: Tensor, scale: Tensor) -> Encoded:
        if mode == "fp8":
            scale = scale.view(-1, 1).expand(len(qdata), 1)
        else:
            scale = layouts.from_pairs(scale.view(torch.uint8), -(-k // 32))
        qdata = qdata.view(getattr(torch, lookup(name).qdata_dtype))
        return Encoded(qdata, scale, None, name, -1, (len(qdata), k))

    activation_format, weight_format = OPERAND_FORMATS[mode]
    activation = encoded(activation_format, call.x1, call.pertoken_scale)
    weight = encoded(weight_format, x2.mT, call.scale if mode == "fp8" else call.scale.transpose(0, 1))
    return activation, weight, None if call.bias is None else call.bias.to(torch.float32).flatten()


# ---- modes of npu_quant_matmul: float32 before the output cast ----------------------------------


def _int8(call: Call, x2: Tensor) -> Tensor:
    """(x1 @ x2 [+ int32 bias]) * scale [* pertoken_scale] [+ bias]."""
    total = int8_matmul(call.x1, x2)
    if call.bias is not None and call.bias.dtype == torch.int32:
        total = total + call.bias
    if call.output_dtype == 3:
        return total
    out = total.to(torch.float32) * _fp32_scale(call)
    if call.pertoken_scale is not None:
        out = out * call.pertoken_scale.unsqueeze(-1)
    if call.bias is not None and call.bias.dtype != torch.int32:
        out = out + call.bias.to(torch.float32)
    if call.pertoken_scale is None and call.output_dtype in (None, 1):
        offset = 0.0 if call.offset is None else call.offset
        return torch.round(out + offset).clamp(-128, 127)
    return out


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """int64 a [M, K] @ b [K, N] of int8, exact: float32 sums of at most 1024 products stay below 2^24."""
    parts = [
        (x.to(torch.float32) @ y.to(torch.float32)).to(torch.int64)
        for x, y in zip(a.split(1024, -1), b.split(1024, -2), strict=True)
    ]
    return torch.stack(parts).sum(0)


def _fp32_scale(call: Call) -> Tensor:
    """`scale` as float32; an int64 scale from npu_trans_quant_param has 19 bits in the lower word.

    In static mode the operator drops 13 bits of a float32 scale unless the output is bfloat16.
    """
    scale: Tensor = call.scale
    if scale.dtype == torch.int64:
        return (scale & 0xFFFFE000).to(torch.int32).view(torch.float32)
    if scale.dtype == torch.float32 and call.pertoken_scale is None and call.output_dtype not in (15, 283):
        return (scale.view(torch.int32) & ~0x1FFF).view(torch.float32)
    return scale.to(torch.float32)


def _fp8(call: Call, x2: Tensor) -> Tensor:
    out = call.x1.to(torch.float32) @ x2.to(torch.float32)
    return _add_bias(out * call.scale * call.pertoken_scale.unsqueeze(-1), call.bias)


def _element_of(qdata: Tensor, number: int | None) -> Element:
    """Format of the elements; only packed FP4 is passed with the `number` of its dtype."""
    fp8 = E5M2 if qdata.dtype == torch.float8_e5m2 else E4M3
    return fp8 if number is None else E2M1


def _mx(call: Call, x2: Tensor) -> Tensor:
    """Product of the dequantized matrices: exact in float32 up to the order of the sums."""
    element1, element2 = _element_of(call.x1, call.x1_dtype), _element_of(call.x2, call.x2_dtype)
    a = dequantize(call.x1, call.pertoken_scale, -1, element1)
    if is_transposed(call.x2):
        b = dequantize(x2.mT, call.scale.transpose(0, 1), -1, element2).mT
    else:
        b = dequantize(x2, call.scale, 0, element2)
    return _add_bias(a @ b, call.bias)


def _block(call: Call, x2: Tensor) -> Tensor:
    """FP8 with a float32 scale per 128 x 128 tile of x2 and per 1 x 128 or 128 x 128 tile of x1."""
    a = dequantize_tiles(call.x1, call.pertoken_scale, call.group_sizes[0], 128)
    return a @ dequantize_tiles(x2, call.scale, 128, 128)


def _int8_block(call: Call, x2: Tensor) -> Tensor:
    """int8 with a float32 scale per 128 x 128 tile of x2 and per 128 of a row of x1, plus the bias.

    A chip adds up the blocks in float32, so the last bits may differ.
    """
    return int8_tile_matmul(call.x1, call.pertoken_scale, x2.mT, call.scale.mT, call.bias)


def _add_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias.to(torch.float32)


MODES = {
    **dict.fromkeys(("int8", "static"), _int8),
    **dict.fromkeys(("mxfp8", "mxfp4", "w4a8"), _mx),
    "fp8": _fp8,
    "block": _block,
    "int8_block": _int8_block,
}
"""Mode -> function of the float32 product, before the output cast."""


# ---- npu_dual_level_quant_matmul ----------------------------------------------------------------

_SCALE_BYTES = (torch.uint8, torch.float8_e8m0fnu)
_QUANTIZED = "pass the tensor that the quantizer returned"


@operator("npu_dual_level_quant_matmul")
def npu_dual_level_quant_matmul(**arguments: Any) -> Iterator[Any]:
    """x1 [M, K / 2] @ x2 [N, K / 2] transposed -> [M, N]: packed FP4, x2 in FRACTAL_NZ."""
    a = Call(**arguments)
    _check_dual_level_matrices(a, a.x1, a.x2)
    m, n, k = a.x1.shape[0], a.x2.shape[0], 2 * a.x1.shape[1]
    groups, pairs = math.ceil(k / 512), math.ceil(k / 64)
    for name, shape, fix in (
        ("x1_level0_scale", (m, groups), _QUANTIZED),
        ("x2_level0_scale", (groups, n), "weight_dual_scale.squeeze(-1).t().contiguous()"),
        ("x1_level1_scale", (m, pairs, 2), _QUANTIZED),
        ("x2_level1_scale", (n, pairs, 2), "weight_scale.view(N, -1, 2), not transposed"),
    ):
        tensor, dtypes = getattr(a, name), _SCALE_BYTES if "level1" in name else (torch.float32,)
        valid = tuple(tensor.shape) == shape and tensor.dtype in dtypes
        values = {"name": name, "tensor": tensor, "fix": fix}
        a.require(valid, "weight.dual_scale", **values, shape=shape, dtype=dtypes[0])
        a.require(tensor.is_contiguous(), "weight.dual_strides", **values)
    valid = a.bias is None or (tuple(a.bias.shape), a.bias.dtype) == ((n,), torch.float32)
    a.require(valid, "weight.dual_bias", n=n)
    dtype = contract.output_dtype(a.output_dtype, (torch.bfloat16, torch.float16), "dual-level FP4")
    yield Out((m, n), dtype)
    activation = _dual_level_encoded(a.x1, a.x1_level1_scale, a.x1_level0_scale.unsqueeze(-1))
    coarse = layouts.from_npu_dual(a.x2_level0_scale)
    weight = _dual_level_encoded(nz.from_nz(a.x2), a.x2_level1_scale, coarse)
    yield cpu_kernels.linear(activation, weight, a.bias, dtype)


def _dual_level_encoded(qdata: Tensor, pairs: Tensor, coarse: Tensor) -> Encoded:
    """Make an `Encoded` from packed qdata [R, K / 2], paired scales [R, K / 64, 2] and coarse scales [R, K /
    512, 1].
    """
    k = 2 * qdata.shape[1]
    fine = layouts.from_pairs(pairs.view(torch.uint8), -(-k // 32))
    return Encoded(qdata.view(torch.uint8), fine, coarse, "mxfp4_dualscale", -1, (len(qdata), k))


def _check_dual_level_matrices(a: Call, x1: Tensor, x2: Tensor) -> None:
    for name, tensor in (("x1", x1), ("x2", x2)):
        a.require(tensor.dim() == 2, "weight.dual_axes", name=name, tensor=tensor)
        a.require(tensor.element_size() == 1, "weight.dual_bytes", name=name, tensor=tensor)
    tag = nz.fractal(x2)
    a.require(tag is not None or nz.is_fake(x2), "weight.dual_nd")
    a.require(tag is None or tag.customized, "weight.dual_cast")
    a.require(x1.shape[1] == x2.shape[1], "weight.dual_k", k1=2 * x1.shape[1], k2=2 * x2.shape[1])
    a.require(x1.is_contiguous(), "weight.dual_x1_strides")


# ---- npu_weight_quant_batchmatmul and the preparation of its weights ----------------------------


@operator("npu_weight_quant_batchmatmul")
def npu_weight_quant_batchmatmul(**arguments: Any) -> Iterator[Any]:
    """x [M, K] @ ((weight + offset) * scale) + bias -> [M, N].

    weight: int8 [K, N], or int4 in int32 [K, N / 8]. Scale and offset: [N], [1, N], or [K / group, N] with
    `antiquant_group_size`.
    """
    a = Call(**arguments)
    x, weight, group = a.x, a.weight, a.antiquant_group_size
    a.require(x.dim() == weight.dim() == 2 and x.dtype in HALF_DTYPES, "weight.inputs")
    scaled = a.quant_scale is not None
    computed = weight.dtype in (torch.int8, torch.int32) and a.weight_dtype is None and not scaled
    a.require(computed, "weight.dtype", scaled=scaled)
    k, n = len(weight), weight.shape[1] * (8 if weight.dtype == torch.int32 else 1)
    a.require(k == x.shape[1], "weight.k", k=k)
    groups = -(-k // group) if group else 1
    shapes = [(groups, n)] + ([(n,)] if groups == 1 else [])
    for name in ("antiquant_scale", "antiquant_offset"):
        if (tensor := getattr(a, name)) is not None:
            valid = tuple(tensor.shape) in shapes and tensor.dtype == x.dtype
            a.require(valid, "weight.antiquant", name=name, tensor=tensor, shapes=shapes)
    yield Out((x.shape[0], n), x.dtype)
    values = weight.to(torch.float32) if weight.dtype == torch.int8 else _int4(weight, n)
    if a.antiquant_offset is not None:
        values = values + _per_row(a.antiquant_offset, k, group)
    values = values * _per_row(a.antiquant_scale, k, group)
    yield _add_bias(x.to(torch.float32) @ values, a.bias).to(x.dtype)


def _int4(weight: Tensor, n: int) -> Tensor:
    """int32 [K, N / 8] -> float32 [K, N]."""
    nibbles = elements.unpack(weight.contiguous().view(torch.uint8), n).to(torch.float32)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def _per_row(t: Tensor, k: int, group: int) -> Tensor:
    """A scale or offset for every row of the weight, float32 [K or 1, N]."""
    per_group = t.to(torch.float32).view(-1, t.shape[-1])
    return per_group.repeat_interleave(group, 0)[:k] if group else per_group


@operator("npu_convert_weight_to_int4pack")
def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int) -> Iterator[Any]:
    """int32 [K, N] of values -8 to 7 -> int32 [K, N / 8], the first value in the lowest bits."""
    contiguous = weight.is_contiguous()
    valid = weight.dtype == torch.int32 and weight.shape[-1] % 8 == 0 and contiguous
    require(valid, "weight.int4_pack", weight=weight, contiguous=contiguous)
    yield Out((*weight.shape[:-1], weight.shape[-1] // 8), torch.int32)
    nibbles = (weight & 0xF).to(torch.uint8)
    yield elements.pack(nibbles).contiguous().view(torch.int32)


@operator("npu_trans_quant_param")
def npu_trans_quant_param(scale: Tensor, offset: Tensor | None, round_mode: int | None) -> Iterator[Any]:
    """float32 scales [N] for the matrix unit: 19 bits in an int64, bit 46 set, 9 bits of offset."""
    require(scale.dim() == 1 or (scale.dim() == 2 and scale.shape[0] == 1), "weight.param_shape")
    valid = scale.dtype == torch.float32 and round_mode in (None, 0, 1)
    require(valid, "weight.param_dtype", scale=scale, round_mode=round_mode)
    length = max(scale.shape[-1], 0 if offset is None else offset.shape[-1])
    shape = (length,) if scale.dim() == 1 else tuple(scale.shape)
    yield Out(shape, torch.int64)
    bits = scale.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if round_mode == 1:
        bits = (bits + 0x1000) & 0xFFFFFFFF
    out = (bits & 0xFFFFE000) | (1 << 46)
    if offset is not None:
        offset_bits = torch.round(offset.to(torch.float32)).clamp(-256, 255).to(torch.int64) & 0x1FF
        out = (out & 0x4000FFFFFFFF) | (offset_bits << 37)
    yield out.expand(shape).clone()
