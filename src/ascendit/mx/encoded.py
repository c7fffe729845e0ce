"""What encoding gives and decoding takes: codes and scales that fit together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.mx.formats import Format, lookup


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tensor as codes and scales. For `axis=-1` and a weight [N, K] these are the tensors of a checkpoint.

    `codes`: [.., K], packed formats [.., ceil(K / 2)]; int8, float8_e4m3fn, float8_e5m2 or uint8 as the
    format says (float8 codes are also taken as uint8).
    `scale`: E8M0 uint8 [.., ceil(K / 32)]; int8 and fp8: float32 [.., 1]; fp8_128x128: float32
    [ceil(N / 128), ceil(K / 128)].
    `dual_scale`: float32 [.., ceil(K / 512), 1] for mxfp4_dualscale, else None.
    `shape` is that of the decoded tensor, `axis` the one along which blocks lie; K stands there.
    UsageError E-USE-01 if shapes or dtypes disagree.
    """

    codes: Tensor
    scale: Tensor
    dual_scale: Tensor | None
    format: str
    axis: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        form = lookup(self.format)
        axis = checked_axis(self.axis, len(self.shape))
        object.__setattr__(self, "shape", tuple(self.shape))
        wanted = {"codes": self.shape, "scale": _scale_shape(form, self.shape, axis), "dual_scale": None}
        if form.packed:
            wanted["codes"] = _with(self.shape, axis, -(-self.shape[axis] // 2))
        if form.coarse:
            wanted["dual_scale"] = (*_with(self.shape, axis, -(-self.shape[axis] // form.coarse)), 1)
        dtypes = {
            "codes": (getattr(torch, form.codes_dtype), torch.int8 if form.element is None else torch.uint8),
            "scale": (torch.uint8,) if form.kind in ("block", "dual") else (torch.float32,),
            "dual_scale": (torch.float32,),
        }
        for name, shape in wanted.items():
            tensor: Tensor | None = getattr(self, name)
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape or (tensor is not None and tensor.dtype not in dtypes[name]):
                dtype = "" if tensor is None else tensor.dtype
                raise UsageError(
                    f"{name} {found} {dtype} for {self.format} of {self.shape}",
                    needs=f"{name} {shape} of {' or '.join(map(str, dtypes[name]))}",
                    fix="give the tensors as mx.encode returns them; mx.layouts undoes devices' layouts",
                    code="E-USE-01",
                )


def checked_axis(axis: int, ndim: int) -> int:
    """`axis` counted from the front. UsageError E-USE-01 if there is no such axis."""
    if not -ndim <= axis < ndim:
        raise UsageError(
            f"axis {axis} of a tensor with {ndim} axes",
            needs=f"{-ndim} to {ndim - 1}" if ndim else "a tensor with at least one axis",
            fix="the axis is the one that the matmul sums over, -1 for a weight [N, K]",
            code="E-USE-01",
        )
    return axis % ndim


def _with(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])


def _scale_shape(form: Format, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    if form.kind == "tile":
        return tuple(-(-n // form.block) for n in shape)
    return _with(shape, axis, 1 if form.kind == "row" else -(-shape[axis] // form.block))
