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
from ascendit.twin.registry import Out, check_capability, current_chip, operator

_FP4 = (contract.FP4_E2M1, contract.FP4_E1M2)


@operator("npu_dtype_cast")
def npu_dtype_cast(self: Tensor, dtype: int, input_dtype: int | None) -> Iterator[Any]:
    """Cast `self` [.., K] to a dtype; FP4 (296, 297) is packed [.., K / 2], even index in the low nibble."""
    shape = list(self.shape)
    if input_dtype in _FP4:
        require(bool(shape) and self.element_size() == 1, "cast.fp4_scalar")
        shape[-1] *= 2
    if dtype in _FP4:
        require(bool(shape) and shape[-1] % 2 == 0, "cast.fp4_odd")
        shape[-1] //= 2
    require(dtype in _FP4 or dtype in contract.DTYPE_OF_NUMBER, "cast.dtype", dtype=dtype)
    yield Out(tuple(shape), torch.uint8 if dtype in _FP4 else contract.DTYPE_OF_NUMBER[dtype])
    values = self
    if input_dtype in _FP4:
        raw = elements.unpack(self.contiguous().view(torch.uint8), self.shape[-1] * 2)
        values = elements.decode(raw, TARGETS[input_dtype].element)
    if dtype in _FP4:
        finite = values.to(torch.float32).nan_to_num(0.0)
        yield elements.pack(elements.encode(finite, TARGETS[dtype].element, "rint"))
    else:
        yield values.to(contract.DTYPE_OF_NUMBER[dtype], copy=True)


@operator("_npu_dtype_cast")
def _npu_dtype_cast(self: Tensor, dtype: torch.dtype) -> Iterator[Any]:
    yield Out(tuple(self.shape), dtype)
    yield self.to(dtype, copy=True)


@operator("get_npu_format")
def get_npu_format(self: Tensor) -> Iterator[Any]:
    """Format of `self` ([..] of any dtype): 29 for FRACTAL_NZ, else 2, 0 or 30 by its number of axes."""
    number = nz.format_of(self)
    yield number
    yield number


@operator("npu_format_cast")
def npu_format_cast(
    self: Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None
) -> Iterator[Any]:
    """`self` ([.., R, C] of any dtype) in FRACTAL_NZ (29) or back in ND (2, 0, 30)."""
    if customize_dtype is not None:
        check_capability("npu_format_cast", "customize_dtype")
    if acl_format != nz.FRACTAL_NZ:
        require(acl_format in (nz.ND, nz.NCHW, nz.NCDHW), "cast.format", acl_format=acl_format)
        require(current_chip() != "a5" or nz.fractal(self) is None or self.is_contiguous(), "cast.strided_nz")
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
    label = "a FRACTAL_NZ tensor" if nz.fractal(t) else t.shape
    require(t.dim() >= 2 and nz.fractal(t) is None, "cast.no_matrix", tensor=label)
    require(current_chip() != "a5" or t.shape[-1] > 1, "cast.one_column", t=t)
    if customize_dtype is not None and (customize_dtype != 1 or t.dtype != torch.int8):
        refuse("cast.customize_dtype", customize_dtype=customize_dtype, t=t)
    require(input_dtype is None, "cast.input_dtype", input_dtype=input_dtype)
