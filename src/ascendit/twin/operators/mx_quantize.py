"""MX quantizers of the Ascend 950: elements and E8M0 scales, bit-identical to its kernels.

They encode with `mx` and three rules of the NPU: algorithms 0 and 2 multiply a block by 0 if its scale byte
is 0, algorithm 2 rounds float16 to bfloat16 before it takes the largest value, and a block with an infinity
or a NaN gets scale byte 255 and elements 0 (the cast saturates and turns NaN into 0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascendit.mx import elements, layouts, scales
from ascendit.mx.formats import E2M1, E4M3, E5M2, Element
from ascendit.twin import contract
from ascendit.twin.contract import FLOAT_DTYPES, HALF_DTYPES, Call, require
from ascendit.twin.registry import Out, operator

ROUND_MODES = {"rint": "rint", "floor": "floor", "round": "half_away"}
_BIAS = scales.BIAS


@dataclass(frozen=True)
class _Uniform(Element):
    """e1m2: both of its binades have the step 0.25."""

    @property
    def emin(self) -> int:
        return 0


E1M2 = _Uniform("e1m2", ebits=1, mbits=2, emax=0, max=1.75, nan=None)


@dataclass(frozen=True)
class TargetFormat:
    """An element format, the torch dtype of its qdata, and its scale algorithms."""

    element: Element
    dtype: torch.dtype
    algorithms: tuple[int, ...]

    @property
    def packed(self) -> bool:
        return self.element.bits == 4


TARGETS: dict[int, TargetFormat] = {
    contract.FP8_E5M2: TargetFormat(E5M2, torch.float8_e5m2, (0, 1)),
    23: TargetFormat(E5M2, torch.float8_e5m2, (0, 1)),
    contract.FP8_E4M3: TargetFormat(E4M3, torch.float8_e4m3fn, (0, 1)),
    24: TargetFormat(E4M3, torch.float8_e4m3fn, (0, 1)),
    contract.FP4_E2M1: TargetFormat(E2M1, torch.uint8, (0, 2)),
    contract.FP4_E1M2: TargetFormat(E1M2, torch.uint8, (0,)),
}


@dataclass(frozen=True)
class ScaleRule:
    """How npu_dynamic_mx_quant computes a scale."""

    algorithm: int = 0
    rounding: str = "rint"
    dst_type_max: float = 0.0
    max_low_bound: float = 0.0
    block: int = 32


def target_of(dst_type: int) -> TargetFormat:
    """The format of a `dst_type`.

    Raises TwinError (E-TWN-01) for any other, including torch.float4_e2m1fn_x2.
    """
    require(dst_type in TARGETS, "mx.dst_type", dst_type=dst_type)
    return TARGETS[dst_type]


def check_rule(rule: ScaleRule, target: TargetFormat, dtype: torch.dtype) -> None:
    """Raise TwinError (E-TWN-01) for a combination that aclnnDynamicMxQuantV3 does not support."""
    name = target.element.name
    modes = tuple(ROUND_MODES) if target.packed else ("rint",)
    require(rule.rounding in modes, "mx.round_mode", rule=rule, name=name, modes=modes)
    require(0 < rule.block <= 1024 and rule.block % 32 == 0, "mx.block_size")
    require(rule.algorithm in target.algorithms, "mx.scale_alg", rule=rule, name=name, target=target)
    scaled = 6 <= rule.dst_type_max <= 12 and target.element is E2M1 and rule.block == 32
    require(rule.dst_type_max == 0 or scaled, "mx.dst_type_max", rule=rule, name=name)
    bounded = rule.max_low_bound > 0 and rule.algorithm == 1
    require(rule.max_low_bound == 0 or bounded, "mx.max_low_bound", rule=rule)
    any_block = rule.algorithm != 2 and dtype != torch.float32
    require(rule.block == 32 or any_block, "mx.large_block", rule=rule, dtype=dtype)


def check_input(x: Tensor, axis: int, target: TargetFormat) -> int:
    """Return `axis` counted from 0, after checking x ([..] of a float dtype).

    Raises TwinError (E-TWN-01) for other inputs.
    """
    require(x.dtype in FLOAT_DTYPES and 1 <= x.dim() <= 7, "mx.input", x=x)
    require(-x.dim() <= axis < x.dim(), "mx.axis", first=-x.dim(), last=x.dim() - 1)
    require(not target.packed or x.shape[-1] % 2 == 0, "mx.fp4_odd")
    size = x.shape[axis]
    require(x.dtype != torch.float32 or size >= 32, "mx.short_float32", size=size, axis=axis)
    return axis % x.dim()


def outs(shape: tuple[int, ...], axis: int, target: TargetFormat, block: int) -> tuple[Out, Out]:
    """Outputs for an input of `shape`: qdata, and scales in pairs with a last axis of 2."""
    qdata = (*shape[:-1], shape[-1] // 2) if target.packed else shape
    pairs = math.ceil(math.ceil(shape[axis] / block) / 2)
    return Out(qdata, target.dtype), Out((*shape[:axis], pairs, *shape[axis + 1 :], 2), torch.uint8)


def to_mx(x: Tensor, axis: int, target: TargetFormat, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """qdata of x [..] in the dtype of `target`, and paired uint8 scales along `axis`; shapes as in `outs`."""
    length = x.shape[axis]
    blocks = scales.split_blocks(x.movedim(axis, -1), rule.block)
    qdata, scale = encode_blocks(blocks, target.element, rule)
    qdata = scales.join_blocks(qdata, length).movedim(-1, axis)
    if target.packed:
        qdata = elements.pack(qdata)
    return qdata.contiguous().view(target.dtype), layouts.to_pairs(scale.movedim(-1, axis), axis)


def encode_blocks(blocks: Tensor, element: Element, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """[.., n, block] -> uint8 elements, one per byte, of the same shape, and E8M0 bytes [.., n]."""
    finite = blocks.isfinite().all(-1)
    values = blocks.where(finite.unsqueeze(-1), 0).to(torch.float32)
    amax = values.abs().amax(-1)
    if rule.algorithm == 2 and rule.dst_type_max in (0, 6, 7):
        if blocks.dtype == torch.float16:
            amax = amax.to(torch.bfloat16).to(torch.float32)
        byte = scales.shared_exponents(amax, element, f"max:{rule.dst_type_max or 6:g}") + _BIAS
        multiplies = byte > 0
    elif rule.algorithm == 0:
        byte = scales.shared_exponents(amax, element, "floor") + _BIAS
        multiplies = byte > 0
    else:
        byte, multiplies = _cublas(amax, rule.dst_type_max or element.max, rule), amax > 0
    reciprocal = torch.where(multiplies, scales.power_of_two((_BIAS - byte).to(torch.int32)), 0.0)
    qdata = elements.encode(values * reciprocal.unsqueeze(-1), element, ROUND_MODES[rule.rounding])
    return qdata.where(finite.unsqueeze(-1), 0), byte.where(finite, scales.NAN_BYTE).to(torch.uint8)


def _cublas(amax: Tensor, largest: float, rule: ScaleRule) -> Tensor:
    """int32 scale bytes: amax / largest, rounded up to a power of two.

    For algorithm 1, and algorithm 2 with a dst_type_max other than 0, 6 and 7. The division is a product with
    float32(1 / largest); subnormal quotients round up under algorithm 1 only.
    """
    inverse = torch.tensor(1.0) / torch.tensor(largest)
    exponent, fraction = scales.exponent_and_fraction(amax.clamp(min=rule.max_low_bound) * inverse)
    biased = exponent + _BIAS
    up = (biased > 0) & (biased < 254) & (fraction > 0)
    if rule.algorithm == 1:
        up |= (biased == 0) & (fraction > 1 << 22)
    return torch.where(amax > 0, biased + up.to(torch.int32), 0)


def dequantize(qdata: Tensor, scale: Tensor, axis: int, element: Element) -> Tensor:
    """float32 values of qdata [..], packed if 4 bits, with paired scales along `axis`."""
    raw, scale = qdata.view(torch.uint8), scale.view(torch.uint8)
    if element.bits == 4:
        raw = elements.unpack(raw, raw.shape[-1] * 2)
    values = elements.decode(raw, element).movedim(axis, -1)
    count = -(-values.shape[-1] // 32)
    factors = scales.from_bytes(layouts.from_pairs(scale, count, axis).movedim(axis, -1))
    blocks = scales.split_blocks(values, 32) * factors.unsqueeze(-1)
    return scales.join_blocks(blocks, values.shape[-1]).movedim(-1, axis)


@operator("npu_dynamic_mx_quant")
def npu_dynamic_mx_quant(input: Tensor, axis: int, dst_type: int, **options: Any) -> Iterator[Any]:
    """qdata of `input` [..] in dtype `dst_type`, and paired scales along `axis` (aclnnDynamicMxQuantV3)."""
    a = Call(**options)
    target = target_of(dst_type)
    axis = check_input(input, axis, target)
    rule = ScaleRule(a.scale_alg or 0, a.round_mode, a.dst_type_max, a.max_low_bound, a.block_size)
    check_rule(rule, target, input.dtype)
    yield outs(tuple(input.shape), axis, target, rule.block)
    yield to_mx(input, axis, target, rule)


@operator("npu_anti_mx_quant")
def npu_anti_mx_quant(
    x: Tensor, mxscale: Tensor, axis: int | None, dst_type: int | None, src_type: int | None
) -> Iterator[Any]:
    """x [.., K], or packed FP4 [.., K / 2], dequantized to [.., K] of dtype `dst_type` (aclnnAntiMxQuant)."""
    target = target_of(contract.FP8_E4M3 if src_type is None else src_type)
    valid = x.element_size() == 1 and (x.dtype == target.dtype or target.packed)
    require(valid, "mx.qdata", x=x, src_type=src_type, target=target)
    axis = (-1 if axis is None else axis) % x.dim()
    dtype = contract.output_dtype(15 if dst_type is None else dst_type, FLOAT_DTYPES, "npu_anti_mx_quant")
    shape = (*x.shape[:-1], x.shape[-1] * 2) if target.packed else tuple(x.shape)
    scale_shape = outs(shape, axis, target, 32)[1].shape
    valid = tuple(mxscale.shape) == scale_shape and mxscale.element_size() == 1
    require(valid, "mx.scale", mxscale=mxscale, scale_shape=scale_shape)
    yield Out(shape, dtype)
    yield dequantize(x.contiguous(), mxscale.view(torch.uint8), axis, target.element).to(dtype).contiguous()


@operator("npu_dynamic_dual_level_mx_quant")
def npu_dynamic_dual_level_mx_quant(
    input: Tensor, smooth_scale: Tensor | None, round_mode: str
) -> Iterator[Any]:
    """`input` [.., K] -> FP4 [.., K / 2], and scales: float32 per 512 values, paired E8M0 per 32."""
    target = TARGETS[contract.FP4_E2M1]
    require(input.dtype in HALF_DTYPES, "mx.dual_input", input=input)
    axis = check_input(input, -1, target)
    check_rule(ScaleRule(rounding=round_mode), target, input.dtype)
    length = input.shape[-1]
    if smooth_scale is not None:
        valid = tuple(smooth_scale.shape) == (length,) and smooth_scale.dtype == input.dtype
        require(valid, "mx.smooth_scale", smooth_scale=smooth_scale, length=length, input=input)
    qdata, level1 = outs(tuple(input.shape), axis, target, 32)
    yield qdata, Out((*input.shape[:-1], math.ceil(length / 512)), torch.float32), level1
    x = input if smooth_scale is None else input * smooth_scale
    groups = scales.split_blocks(x, 512)
    level0 = groups.where(groups.isfinite(), 0).abs().amax(-1).to(torch.float32) * (1 / 6)
    level0 = torch.where(level0 < 2.0**-126, 0.0, level0)
    divided = (groups.to(torch.float32) / level0.unsqueeze(-1)).to(x.dtype)
    divided = scales.join_blocks(torch.where(groups == 0, groups, divided), length)
    y, scale = to_mx(divided, axis, target, ScaleRule(rounding=round_mode))
    yield y, level0, scale
