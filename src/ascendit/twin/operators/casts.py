"""Casts between dtypes and between memory formats."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.mx import elements
from ascendit.twin import STATE, contract, nz
from ascendit.twin.contract import refuse, require
from ascendit.twin.operators.mx_quantize import TARGETS
from ascendit.twin.registry import Out, current_chip, gate, operator

_FP4 = (contract.FP4_E2M1, contract.FP4_E1M2)


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
        dtype in _FP4 or dtype in contract.DTYPE_OF_NUMBER,
        f"Parameter(dtype) enum value:{dtype} not found in TORCH_DTYPE_ENUM_VALUE_TO_SCALAR_TYPE_MAP",
        needs="a torch dtype, or 296 or 297 for FP4",
        fix="the twin casts to no int4, hifloat8 or float6",
    )
    yield Out(tuple(shape), torch.uint8 if dtype in _FP4 else contract.DTYPE_OF_NUMBER[dtype])
    values = self
    if input_dtype in _FP4:
        raw = elements.unpack(self.contiguous().view(torch.uint8), self.shape[-1] * 2)
        values = elements.to_values(raw, TARGETS[input_dtype].element)
    if dtype in _FP4:
        wide = values.to(torch.float32)
        yield elements.pack(elements.to_codes(wide.nan_to_num(0.0), TARGETS[dtype].element, "rint"))
    else:
        yield values.to(contract.DTYPE_OF_NUMBER[dtype], copy=True)


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
            f"customize_dtype={contract.spell_dtype(customize_dtype)} for a tensor of {t.dtype}",
            needs="packed FP4 viewed as int8, customize_dtype=torch.int8",
            fix="npu_format_cast(w.view(torch.int8), 29, customize_dtype=torch.int8)",
        )
    require(
        input_dtype is None,
        f"input_dtype={contract.spell_dtype(input_dtype)}",
        needs="none: packed FP4 is viewed as int8 before the cast",
        fix="npu_format_cast(w.view(torch.int8), 29, customize_dtype=torch.int8)",
    )
