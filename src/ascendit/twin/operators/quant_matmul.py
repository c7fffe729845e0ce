"""The quantized matmuls: `npu_quant_matmul`, `npu_dual_level_quant_matmul`, `npu_weight_quant_batchmatmul`.

npu_quant_matmul has seven modes: int8, static int8, fp8, MXFP8, MXFP4, W4A8 and 128 x 128 blocks; what it
takes in each is `quant_matmul_contract`. The dual-level one is FP4 x FP4 with an E8M0 scale per 32 values and
a float32 one per 512. The last is W8A16 and W4A16: the weight is decoded on the way in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.mx import elements, layouts
from ascendit.mx import scales as e8m0
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import E2M1, lookup
from ascendit.twin import contract, cpu_kernels, nz
from ascendit.twin.contract import require
from ascendit.twin.operators.quant_matmul_contract import MODE_CHECKS, QuantMatmulCall, is_transposed, mode_of
from ascendit.twin.registry import Out, gate, operator

OPERAND_FORMATS = {
    "fp8": ("fp8", "fp8"),
    "mxfp8": ("mxfp8", "mxfp8"),
    "mxfp4": ("mxfp4", "mxfp4"),
    "w4a8": ("mxfp8", "mxfp4"),
}
"""Mode -> formats of x1 and x2, where a CPU has the same product."""


# ---- npu_quant_matmul ---------------------------------------------------------------------------


@operator("npu_quant_matmul")
def npu_quant_matmul(**arguments: Any) -> Iterator[Any]:
    """x1 @ x2 with scales: `scale` is x2's, `pertoken_scale` x1's (aclnnQuantMatmulV5, ...WeightNz)."""
    call = QuantMatmulCall(**arguments)
    mode = mode_of(call)
    gate("npu_quant_matmul", mode)
    shape, dtype = MODE_CHECKS[mode](call)
    yield Out(shape, dtype)
    x2 = nz.from_nz(call.x2) if nz.fractal(call.x2) else call.x2
    shared = _operands(call, x2, mode)
    if shared is not None:
        yield cpu_kernels.linear(*shared, dtype).view(shape)
    else:
        yield MODES[mode](call, x2).to(dtype)


def _operands(call: QuantMatmulCall, x2: Tensor, mode: str) -> tuple[Encoded, Encoded, Tensor | None] | None:
    """Tokens, weight [N, K] and bias, where a CPU has this product too; None for the layouts it lacks."""
    e5m2 = torch.float8_e5m2 in (call.x1.dtype, x2.dtype)
    if mode not in OPERAND_FORMATS or e5m2 or call.x1.dim() != 2 or not is_transposed(call.x2):
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
        for (codes, _), scale, name in zip(sides, scales, OPERAND_FORMATS[mode], strict=True)
    )
    return tokens, weight, None if call.bias is None else call.bias.to(torch.float32).flatten()


# ---- its modes: float32 before the output cast --------------------------------------------------


def _int8(call: QuantMatmulCall, x2: Tensor) -> Tensor:
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


def _static_scale(call: QuantMatmulCall) -> Tensor:
    return (call.scale.view(torch.int32) & ~0x1FFF).view(torch.float32)


def _int8_static(call: QuantMatmulCall, x2: Tensor) -> Tensor:
    """Without a scale per token. A float32 scale loses 13 bits unless the output is bfloat16 or int32."""
    if call.output_dtype == 3:
        return int8_matmul(call.x1, x2) + (0 if call.bias is None else call.bias)
    if call.scale.dtype == torch.float32 and call.output_dtype not in (15, 283):
        return _int8(call.with_scale(_static_scale(call)), x2)
    return _int8(call, x2)


def _fp8(call: QuantMatmulCall, x2: Tensor) -> Tensor:
    assert call.pertoken_scale is not None
    out = call.x1.to(torch.float32) @ x2.to(torch.float32)
    return _biased(out * call.scale * call.pertoken_scale.unsqueeze(-1), call.bias)


def _mx(call: QuantMatmulCall, x2: Tensor) -> Tensor:
    """Sums of 32 products x both scales; exact in float32 up to the order of the sums."""
    assert call.pertoken_scale is not None
    a = mx_values(call.x1, call.pertoken_scale, packed=call.x1_dtype is not None)
    n_first = is_transposed(call.x2)
    weight, scale = (x2.mT, call.scale.transpose(0, 1)) if n_first else (x2, call.scale)
    if n_first:
        b = mx_values(weight, scale, packed=call.x2_dtype is not None).mT
    else:
        codes = to_float32(weight, packed=call.x2_dtype is not None)
        b = mx_scaled(codes.mT, scale.transpose(0, 1)).mT
    return _biased(a @ b, call.bias)


def mx_values(codes: Tensor, pairs: Tensor, packed: bool) -> Tensor:
    """Codes [.., K] or packed [.., K / 2] and paired scales [.., K / 64, 2] -> float32 [.., K]."""
    return mx_scaled(to_float32(codes, packed), pairs)


def mx_scaled(values: Tensor, pairs: Tensor) -> Tensor:
    """float32 [.., K] times its scales; those of blocks beyond K are filling."""
    length = values.shape[-1]
    plain = e8m0.from_bytes(pairs.contiguous().view(torch.uint8)).flatten(-2)[..., : -(-length // 32)]
    return e8m0.join_blocks(e8m0.split_blocks(values, 32) * plain.unsqueeze(-1), length)


def to_float32(codes: Tensor, packed: bool) -> Tensor:
    """FP8 or packed FP4 codes -> float32."""
    if not packed:
        return codes.to(torch.float32)
    raw = codes.contiguous().view(torch.uint8)
    table = elements.to_values(torch.arange(16, dtype=torch.uint8), E2M1)
    return table[elements.unpack(raw, raw.shape[-1] * 2).to(torch.int64)]


def _block(call: QuantMatmulCall, x2: Tensor) -> Tensor:
    """FP8 with one float32 scale per 128 x 128 of x2, and per 128 of K, or 128 x 128, of x1."""
    assert call.pertoken_scale is not None and call.group_sizes is not None
    rows = call.group_sizes[0]
    a = times_tile_scales(call.x1.to(torch.float32), call.pertoken_scale, rows)
    return a @ times_tile_scales(x2.to(torch.float32), call.scale, 128)


def times_tile_scales(values: Tensor, scale: Tensor, rows: int) -> Tensor:
    """float32 [R, C] times one scale per `rows` x 128."""
    full = scale.repeat_interleave(rows, 0)[: values.shape[0]].repeat_interleave(128, 1)
    return values * full[:, : values.shape[1]]


def _biased(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias.to(torch.float32)


MODES = {
    "int8": _int8,
    "static": _int8_static,
    "fp8": _fp8,
    "mxfp8": _mx,
    "mxfp4": _mx,
    "w4a8": _mx,
    "block": _block,
}
"""Mode -> its product before the output cast."""


# ---- npu_dual_level_quant_matmul ----------------------------------------------------------------


@operator("npu_dual_level_quant_matmul")
def npu_dual_level_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    bias: Tensor | None,
    output_dtype: int,
) -> Iterator[Any]:
    """x1 packed [M, K / 2], x2 packed [N, K / 2] in FRACTAL_NZ, read as transposed -> [M, N]."""
    _check_dual_level_matrices(x1, x2)
    m, n, k = x1.shape[0], x2.shape[0], 2 * x1.shape[1]
    groups, pairs = math.ceil(k / 512), math.ceil(k / 64)
    float32, byte = torch.float32, torch.uint8
    for name, tensor, shape, dtype, fix in (
        ("x1_level0_scale", x1_level0_scale, (m, groups), float32, "as the quantizer returned it"),
        (
            "x2_level0_scale",
            x2_level0_scale,
            (groups, n),
            float32,
            "weight_dual_scale.squeeze(-1).t().contiguous()",
        ),
        ("x1_level1_scale", x1_level1_scale, (m, pairs, 2), byte, "as the quantizer returned it"),
        (
            "x2_level1_scale",
            x2_level1_scale,
            (n, pairs, 2),
            byte,
            "weight_scale.view(N, -1, 2), not transposed",
        ),
    ):
        require(
            tuple(tensor.shape) == shape and (tensor.dtype == dtype or dtype == byte == _bytes(tensor)),
            "weight.dual_scale",
            name=name,
            tensor=tensor,
            shape=shape,
            dtype=dtype,
            fix=fix,
        )
        require(tensor.is_contiguous(), "weight.dual_strides", name=name, fix=fix)
    require(
        bias is None or (tuple(bias.shape) == (n,) and bias.dtype == float32),
        "weight.dual_bias",
        bias=bias,
        n=n,
    )
    dtype = contract.output_dtype(output_dtype, (torch.bfloat16, torch.float16), "dual-level FP4")
    yield Out((m, n), dtype)
    tokens = _dual_level_encoded(x1, x1_level1_scale, x1_level0_scale.unsqueeze(-1))
    weight = _dual_level_encoded(nz.from_nz(x2), x2_level1_scale, layouts.from_npu_dual(x2_level0_scale))
    yield cpu_kernels.linear(tokens, weight, bias, dtype)


def _dual_level_encoded(codes: Tensor, pairs: Tensor, coarse: Tensor) -> Encoded:
    """Packed codes [R, K / 2], pairs [R, K / 64, 2] and coarse scales [R, K / 512, 1]."""
    k = 2 * codes.shape[1]
    fine = layouts.from_pairs(pairs.view(torch.uint8), -(-k // 32))
    return Encoded(codes.view(torch.uint8), fine, coarse, "mxfp4_dualscale", -1, (len(codes), k))


def _check_dual_level_matrices(x1: Tensor, x2: Tensor) -> None:
    for name, tensor in (("x1", x1), ("x2", x2)):
        require(tensor.dim() == 2, "weight.dual_axes", name=name, tensor=tensor)
        require(tensor.element_size() == 1, "weight.dual_bytes", name=name, tensor=tensor)
    tag = nz.fractal(x2)
    require(tag is not None or nz.is_fake(x2), "weight.dual_plain")
    require(tag is None or tag.customized, "weight.dual_cast")
    require(x1.shape[1] == x2.shape[1], "weight.dual_k", k1=2 * x1.shape[1], k2=2 * x2.shape[1])
    require(x1.is_contiguous(), "weight.dual_x1_strides")


def _bytes(t: Tensor) -> torch.dtype | None:
    """uint8 for what is a byte per number: E8M0 may come as uint8 or float8_e8m0fnu."""
    return torch.uint8 if t.dtype in (torch.uint8, torch.float8_e8m0fnu) else None


# ---- npu_weight_quant_batchmatmul and what prepares its weights ---------------------------------


@operator("npu_weight_quant_batchmatmul")
def npu_weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    bias: Tensor | None,
    antiquant_group_size: int,
    inner_precise: int,
    weight_dtype: int | None,
) -> Iterator[Any]:
    """x @ ((weight + offset) x scale) + bias; weight int8 [K, N], or int32 [K, N / 8] of int4.

    Scale and offset: [N], [1, N], or [K / group, N] with `antiquant_group_size`.
    """
    require(
        x.dim() == 2 and weight.dim() == 2 and x.dtype in (torch.float16, torch.bfloat16),
        "weight.inputs",
        x=x,
        weight=weight,
    )
    require(
        weight.dtype in (torch.int8, torch.int32) and weight_dtype is None and quant_scale is None,
        "weight.dtype",
        weight=weight,
        weight_dtype=weight_dtype,
        scaled=quant_scale is not None,
    )
    n = weight.shape[1] * (8 if weight.dtype == torch.int32 else 1)
    k = weight.shape[0]
    require(k == x.shape[1], "weight.k", x=x, k=k)
    groups = -(-k // antiquant_group_size) if antiquant_group_size else 1
    shapes = [(groups, n)] + ([(n,)] if groups == 1 else [])
    for name, tensor in (("antiquant_scale", antiquant_scale), ("antiquant_offset", antiquant_offset)):
        require(
            tensor is None or (tuple(tensor.shape) in shapes and tensor.dtype == x.dtype),
            "weight.antiquant",
            name=name,
            tensor=tensor,
            shapes=shapes,
            x=x,
        )
    yield Out((x.shape[0], n), x.dtype)
    values = weight.to(torch.float32) if weight.dtype == torch.int8 else _int4(weight, n)
    if antiquant_offset is not None:
        values = values + _rows(antiquant_offset, k, antiquant_group_size)
    values = values * _rows(antiquant_scale, k, antiquant_group_size)
    out = x.to(torch.float32) @ values
    yield (out if bias is None else out + bias.to(torch.float32)).to(x.dtype)


def _int4(weight: Tensor, n: int) -> Tensor:
    """int32 [K, N / 8] -> float32 [K, N]."""
    nibbles = elements.unpack(weight.contiguous().view(torch.uint8), n).to(torch.float32)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def _rows(t: Tensor, k: int, group: int) -> Tensor:
    """A scale or offset for every row of the weight."""
    wide = t.to(torch.float32).view(-1, t.shape[-1])
    return wide.repeat_interleave(group, 0)[:k] if group else wide


@operator("npu_convert_weight_to_int4pack")
def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int) -> Iterator[Any]:
    """int32 [K, N] of values -8 to 7 -> int32 [K, N / 8], the first value in the lowest bits."""
    require(
        weight.dtype == torch.int32 and weight.shape[-1] % 8 == 0 and weight.is_contiguous(),
        "weight.int4_pack",
        weight=weight,
        dense=weight.is_contiguous(),
    )
    yield Out((*weight.shape[:-1], weight.shape[-1] // 8), torch.int32)
    nibbles = (weight & 0xF).to(torch.uint8)
    yield elements.pack(nibbles).contiguous().view(torch.int32)


@operator("npu_trans_quant_param")
def npu_trans_quant_param(scale: Tensor, offset: Tensor | None, round_mode: int | None) -> Iterator[Any]:
    """float32 scales as the matrix unit takes them: 19 bits in an int64, bit 46 set, 9 bits of offset."""
    require(scale.dim() == 1 or (scale.dim() == 2 and scale.shape[0] == 1), "weight.param_shape")
    require(
        scale.dtype == torch.float32 and round_mode in (None, 0, 1),
        "weight.param_dtype",
        scale=scale,
        round_mode=round_mode,
    )
    length = max(scale.shape[-1], 0 if offset is None else offset.shape[-1])
    shape = (length,) if scale.dim() == 1 else tuple(scale.shape)
    yield Out(shape, torch.int64)
    bits = scale.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if round_mode == 1:
        bits = (bits + 0x1000) & 0xFFFFFFFF
    out = (bits & 0xFFFFE000) | (1 << 46)
    if offset is not None:
        nine = torch.round(offset.to(torch.float32)).clamp(-256, 255).to(torch.int64) & 0x1FF
        out = (out & 0x4000FFFFFFFF) | (nine << 37)
    yield out.expand(shape).clone()
