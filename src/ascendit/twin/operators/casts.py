"""npu_weight_quant_batchmatmul: W8A16 and W4A16, the weight decoded on the way in.

Casts between dtypes and between memory formats.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.mx import elements
from ascendit.twin import contract, nz
from ascendit.twin.contract import refuse, require
from ascendit.twin.operators.mx_quantize import TARGETS
from ascendit.twin.registry import Out, current_chip, gate, operator
from ascendit.twin.state import STATE

_FP4 = (contract.E2M1, contract.E1M2)


@operator("npu_dtype_cast")
def npu_dtype_cast(self: Tensor, dtype: int, input_dtype: int | None) -> Iterator[Any]:
    """To another dtype; FP4 (296, 297) is packed two to a byte, the even index in the low nibble."""
    shape = list(self.shape)
    if input_dtype in _FP4:
        require(
            bool(shape) and self.element_size() == 1,
            "Scalar input cannot be float4_e2m1fn_x2 or float4_e1m2fn_x2",
            needs="packed bytes [.., K / 2]",
            fix="leave input_dtype out for a tensor of a torch dtype",
        )
        shape[-1] *= 2
    if dtype in _FP4:
        require(
            bool(shape) and shape[-1] % 2 == 0,
            "If output dtype is float4_e2m1fn_x2, float4_e1m2fn_x2 or int4, "
            "the last dim of input must be divisible by 2",
            needs="an even last axis",
            fix="keep this layer in another format",
        )
        shape[-1] //= 2
    require(
        dtype in _FP4 or dtype in contract.TORCH,
        f"Parameter(dtype) enum value:{dtype} not found in TORCH_DTYPE_ENUM_VALUE_TO_SCALAR_TYPE_MAP",
        needs="a torch dtype, or 296 or 297 for FP4",
        fix="the twin casts to no int4, hifloat8 or float6",
    )
    yield Out(tuple(shape), torch.uint8 if dtype in _FP4 else contract.TORCH[dtype])
    values = self
    if input_dtype in _FP4:
        raw = elements.unpack(self.contiguous().view(torch.uint8), self.shape[-1] * 2)
        values = elements.to_values(raw, TARGETS[input_dtype].element)
    if dtype in _FP4:
        wide = values.to(torch.float32)
        yield elements.pack(elements.to_codes(wide.nan_to_num(0.0), TARGETS[dtype].element, "rint"))
    else:
        yield values.to(contract.TORCH[dtype], copy=True)


@operator("_npu_dtype_cast")
def _npu_dtype_cast(self: Tensor, dtype: torch.dtype) -> Iterator[Any]:
    yield Out(tuple(self.shape), dtype)
    yield self.to(dtype, copy=True)


@operator("get_npu_format")
def get_npu_format(self: Tensor) -> Iterator[Any]:
    """29 for FRACTAL_NZ, else 2, 0 or 30 by the number of axes."""
    number = nz.format_of(self)
    yield number
    yield number


@operator("npu_format_cast")
def npu_format_cast(
    self: Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None
) -> Iterator[Any]:
    """To FRACTAL_NZ (29), or back to a plain format."""
    if customize_dtype is not None:
        gate("npu_format_cast", "customize_dtype")
    if acl_format != nz.FRACTAL_NZ:
        require(
            acl_format in (nz.ND, nz.NCHW, nz.NCDHW),
            f"acl_format={acl_format}",
            needs="29 (FRACTAL_NZ), or 2, 0, 30 for plain",
            fix="convolution formats are chosen by CANN itself; leave them out",
        )
        require(
            current_chip() != "a5" or nz.fractal(self) is None or self.is_contiguous(),
            "npu_format_cast aclnn interface does not support non-contiguous tensor with internal format "
            "FRACTAL_NZ.",
            needs="the tensor as the cast to 29 gave it",
            fix="transpose it back before this cast",
        )
        yield Out(tuple(self.shape), self.dtype)
        yield nz.from_nz(self).clone() if nz.fractal(self) else self.clone()
        return
    _check_nz(self, customize_dtype, input_dtype)
    yield Out(tuple(self.shape), self.dtype)
    if current_chip() != "a5" and not STATE.internal_format:
        warnings.warn(
            "npu_format_cast(t, 29) returns ND: set torch.npu.config.allow_internal_format = True on a2 "
            "and a3; in the twin: ascendit.twin.allow_internal_format(True)",
            UserWarning,
            stacklevel=2,
        )
        yield self.clone()
    else:
        yield nz.to_nz(self, customize_dtype == 1)


def _check_nz(t: Tensor, customize_dtype: int | None, input_dtype: int | None) -> None:
    require(
        t.dim() >= 2 and nz.fractal(t) is None,
        f"npu_format_cast of {'a FRACTAL_NZ tensor' if nz.fractal(t) else tuple(t.shape)} to 29",
        needs="a plain matrix [.., R, C]",
        fix="cast each weight once, when it is loaded",
    )
    require(
        current_chip() != "a5" or t.shape[-1] > 1,
        f"FRACTAL_NZ of {tuple(t.shape)}",
        needs="more than one column on a5",
        fix="keep this weight in ND",
    )
    if customize_dtype is not None and (customize_dtype != 1 or t.dtype != torch.int8):
        refuse(
            f"customize_dtype={contract.spelled(customize_dtype)} for a tensor of {t.dtype}",
            needs="packed FP4 viewed as int8, customize_dtype=torch.int8",
            fix="npu_format_cast(w.view(torch.int8), 29, customize_dtype=torch.int8)",
        )
    require(
        input_dtype is None,
        f"input_dtype={contract.spelled(input_dtype)}",
        needs="none: packed FP4 is viewed as int8 before the cast",
        fix="npu_format_cast(w.view(torch.int8), 29, customize_dtype=torch.int8)",
    )


@operator("npu_convert_weight_to_int4pack")
def npu_convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int) -> Iterator[Any]:
    """int32 [K, N] of values -8 to 7 -> int32 [K, N / 8], the first value in the lowest bits."""
    require(
        weight.dtype == torch.int32 and weight.shape[-1] % 8 == 0 and weight.is_contiguous(),
        f"weight {tuple(weight.shape)} of {weight.dtype}, contiguous: {weight.is_contiguous()}",
        needs="contiguous int32 whose last axis is a multiple of 8",
        fix="w.to(torch.int32).contiguous()",
    )
    yield Out((*weight.shape[:-1], weight.shape[-1] // 8), torch.int32)
    nibbles = (weight & 0xF).to(torch.uint8)
    yield elements.pack(nibbles).contiguous().view(torch.int32)


@operator("npu_trans_quant_param")
def npu_trans_quant_param(scale: Tensor, offset: Tensor | None, round_mode: int | None) -> Iterator[Any]:
    """float32 scales as the matrix unit takes them: 19 bits in an int64, bit 46 set, 9 bits of offset."""
    require(
        scale.dim() == 1 or (scale.dim() == 2 and scale.shape[0] == 1),
        "the scale shape support only (1, ) and (1, n)",
        needs="float32 [N] or [1, N]",
        fix="scale.flatten()",
    )
    require(
        scale.dtype == torch.float32 and round_mode in (None, 0, 1),
        f"scale of {scale.dtype}, round_mode={round_mode}",
        needs="float32; round_mode 0 or 1",
        fix="scale.float()",
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


# ---- npu_weight_quant_batchmatmul: W8A16 and W4A16, the weight decoded on the way in ------------


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
        f"x {tuple(x.shape)} of {x.dtype}, weight {tuple(weight.shape)}",
        needs="x [M, K] in float16 or bfloat16, weight [K, N]",
        fix="x.reshape(-1, K)",
    )
    require(
        weight.dtype in (torch.int8, torch.int32) and weight_dtype is None and quant_scale is None,
        f"weight of {weight.dtype}, weight_dtype={weight_dtype}, quant_scale={quant_scale is not None}",
        needs="int8, or int32 from npu_convert_weight_to_int4pack; a floating-point output",
        fix="the twin computes no FP4 or int8 output here",
    )
    n = weight.shape[1] * (8 if weight.dtype == torch.int32 else 1)
    k = weight.shape[0]
    require(k == x.shape[1], f"K {x.shape[1]} and {k}", needs="weight [K, N]", fix="weight.t() for [N, K]")
    groups = -(-k // antiquant_group_size) if antiquant_group_size else 1
    shapes = [(groups, n)] + ([(n,)] if groups == 1 else [])
    for name, tensor in (("antiquant_scale", antiquant_scale), ("antiquant_offset", antiquant_offset)):
        require(
            tensor is None or (tuple(tensor.shape) in shapes and tensor.dtype == x.dtype),
            f"{name} {tensor is not None and (tuple(tensor.shape), tensor.dtype)}",
            needs=f"{' or '.join(map(str, shapes))} of {x.dtype}",
            fix="give antiquant_group_size with scales per group",
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
