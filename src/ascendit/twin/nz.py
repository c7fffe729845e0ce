"""FRACTAL_NZ, the blocked layout of the matrix unit: the bytes are permuted and the storage is tagged.

A matrix [R, C] becomes [ceil(C / C0), ceil(R / 16), 16, C0] with C0 = 32 bytes (64 elements of 4 bits),
padded with zeros. As on the card, the tensor keeps its shape and strides, so reading it as ND gives wrong
numbers. The tag is an attribute of the storage: Python attributes of a tensor are lost on views and
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascendit.twin.contract import require

ND, NCHW, NCDHW, FRACTAL_NZ = 2, 0, 30, 29
_ROWS, _BYTES = 16, 32
_TAG = "ascendit_fractal"


@dataclass(frozen=True)
class Fractal:
    """Tag of a storage: shape of the tensor that was cast, and bytes per element."""

    shape: tuple[int, ...]
    itemsize: int
    customized: bool
    """Cast as int8 with `customize_dtype`, as packed FP4 must be."""


def fractal(t: Tensor) -> Fractal | None:
    """The tag of the storage of `t` ([..] of any dtype); None for ND storages, meta and fake tensors."""
    tag = None if is_fake(t) else getattr(t.untyped_storage(), _TAG, None)
    return tag if isinstance(tag, Fractal) else None


def is_fake(t: Tensor) -> bool:
    """Whether `t` ([..] of any dtype) is a meta or fake tensor, whose layout is unknown."""
    return t.device.type == "meta" or isinstance(t, torch._subclasses.FakeTensor)


def format_of(t: Tensor) -> int:
    """Format of `t` ([..] of any dtype): 29 for FRACTAL_NZ, else ND, NCHW or NCDHW by its number of axes."""
    if fractal(t) is not None:
        return FRACTAL_NZ
    return {4: NCHW, 5: NCDHW}.get(t.dim(), ND)


def to_nz(t: Tensor, customized: bool) -> Tensor:
    """A tensor of the same shape and dtype whose storage holds the permuted bytes of `t` [.., R, C]."""
    dense = t.contiguous()
    raw = dense.view(torch.uint8).flatten(0, -3) if t.dim() > 2 else dense.view(torch.uint8)[None]
    rows, width = raw.shape[-2:]
    raw = torch.nn.functional.pad(raw, (0, -width % _BYTES, 0, -rows % _ROWS))
    blocks = raw.unflatten(-1, (-1, _BYTES)).unflatten(-3, (-1, _ROWS))  # [B, R1, 16, C1, 32]
    flat = blocks.permute(0, 3, 1, 2, 4).contiguous().flatten().view(t.dtype)
    out: Tensor = flat.as_strided(dense.shape, dense.stride())
    tag = Fractal(tuple(t.shape), t.element_size(), customized)
    setattr(out.untyped_storage(), _TAG, tag)
    return out


def from_nz(t: Tensor) -> Tensor:
    """Convert `t` ([.., R, C] of any dtype) to ND.

    Raises TwinError (E-TWN-01) for views other than its transpose.
    """
    tag = fractal(t)
    assert tag is not None
    *batch, rows, columns = tag.shape
    strides, stride = torch.empty(tag.shape, device="meta").stride(), t.stride()
    transposed = tuple(t.shape) == (*batch, columns, rows) and stride == (*strides[:-2], 1, columns)
    unchanged = tuple(t.shape) == tag.shape and stride == strides
    complete = t.storage_offset() == 0 and t.element_size() == tag.itemsize and (unchanged or transposed)
    require(complete, "nz.part", t=t, stride=stride, tag=tag)
    raw = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    c_blocks, r_blocks = -(-columns * tag.itemsize // _BYTES), -(-rows // _ROWS)
    blocks = raw.view(-1, c_blocks, r_blocks, _ROWS, _BYTES).permute(0, 2, 3, 1, 4)
    padded = blocks.reshape(-1, r_blocks * _ROWS, c_blocks * _BYTES)
    dense = padded[:, :rows, : columns * tag.itemsize].contiguous().view(t.dtype).reshape(tag.shape)
    return dense.transpose(-2, -1) if transposed and not unchanged else dense
