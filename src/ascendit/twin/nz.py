"""FRACTAL_NZ, the blocked layout of the matrix unit: the bytes are really permuted, the storage is tagged.

A matrix [R, C] becomes [ceil(C / C0), ceil(R / 16), 16, C0] with C0 = 32 bytes (64 numbers of 4 bits), filled
up with zeros. As on the card, the tensor keeps its shape and strides, so a read that takes it for ND gives
wrong numbers. The tag sits on the storage: Python attributes of a tensor are lost on views and parameters.
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
    """What a tagged storage holds: `shape` of the tensor that was cast, bytes per number."""

    shape: tuple[int, ...]
    itemsize: int
    customized: bool
    """Cast as int8 with `customize_dtype`, as packed FP4 must be."""


def fractal(t: Tensor) -> Fractal | None:
    """The tag of the storage, None for a plain one, and for meta and fake tensors, which have no bytes."""
    tag = None if is_fake(t) else getattr(t.untyped_storage(), _TAG, None)
    return tag if isinstance(tag, Fractal) else None


def is_fake(t: Tensor) -> bool:
    """No bytes behind it: its layout is not known."""
    return t.device.type == "meta" or isinstance(t, torch._subclasses.FakeTensor)


def format_of(t: Tensor) -> int:
    """What `get_npu_format` says: 29 for FRACTAL_NZ, else the plain format for this number of axes."""
    if fractal(t) is not None:
        return FRACTAL_NZ
    return {4: NCHW, 5: NCDHW}.get(t.dim(), ND)


def to_nz(t: Tensor, customized: bool) -> Tensor:
    """A tensor of the same shape and dtype whose storage holds the permuted bytes of `t` [.., R, C]."""
    plain = t.contiguous()
    raw = plain.view(torch.uint8).flatten(0, -3) if t.dim() > 2 else plain.view(torch.uint8)[None]
    rows, width = raw.shape[-2:]
    raw = torch.nn.functional.pad(raw, (0, -width % _BYTES, 0, -rows % _ROWS))
    blocks = raw.unflatten(-1, (-1, _BYTES)).unflatten(-3, (-1, _ROWS))  # [B, R1, 16, C1, 32]
    flat = blocks.permute(0, 3, 1, 2, 4).contiguous().flatten().view(t.dtype)
    out: Tensor = flat.as_strided(plain.shape, plain.stride())
    tag = Fractal(tuple(t.shape), t.element_size(), customized)
    setattr(out.untyped_storage(), _TAG, tag)
    return out


def from_nz(t: Tensor) -> Tensor:
    """The plain tensor that `t`, a whole or transposed view of a tagged storage, stands for."""
    tag = fractal(t)
    assert tag is not None
    *batch, rows, columns = tag.shape
    shape, stride = torch.empty(tag.shape, device="meta").stride(), t.stride()
    transposed = tuple(t.shape) == (*batch, columns, rows) and stride == (*shape[:-2], 1, columns)
    straight = tuple(t.shape) == tag.shape and stride == shape
    whole = t.storage_offset() == 0 and t.element_size() == tag.itemsize and (straight or transposed)
    require(whole, "nz.part", t=t, stride=stride, tag=tag)
    raw = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    wide, high = -(-columns * tag.itemsize // _BYTES), -(-rows // _ROWS)
    blocks = raw.view(-1, wide, high, _ROWS, _BYTES).permute(0, 2, 3, 1, 4)
    plain = blocks.reshape(-1, high * _ROWS, wide * _BYTES)[:, :rows, : columns * tag.itemsize]
    back = plain.contiguous().view(t.dtype).reshape(tag.shape)
    return back.transpose(-2, -1) if transposed and not straight else back
