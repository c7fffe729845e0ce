"""Decode float tensors that files store otherwise: floats with a scale per tensor or row, and ggml's blocks.

A value is decoded in float32, in which the product of a stored number and its scale is rounded at most once,
and then rounded to the requested dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ascendit.mx import ggml

Decoder = Callable[[Tensor], Tensor]
"""Stored bytes, uint8 [bytes] -> values in their order, float32 [values]."""

_FLOATS = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
"""safetensors dtype -> torch dtype, of floats that may have a scale."""


def _float_decoder(dtype: torch.dtype) -> Decoder:
    return lambda stored: stored.view(dtype).to(torch.float32)


DECODERS: dict[str, Decoder] = {
    **{name: _float_decoder(dtype) for name, dtype in _FLOATS.items()},
    **{name: functools.partial(ggml.reference, name) for name in ggml.TYPES},
}
"""Encoding -> its decoder."""


def decode_rows(encoding: str, data: memoryview, scale: Tensor | None, out: Tensor) -> None:
    """Decode bytes into `out`, contiguous [rows, K] of a float dtype.

    `scale`: float factor of all values, or of each row [rows] or [rows, 1]. `encoding`: a key of `DECODERS`.
    """
    stored = torch.frombuffer(data, dtype=torch.uint8)
    if scale is None and out.dtype == torch.bfloat16 and ggml.to_bfloat16(encoding, stored, out):
        return
    values = DECODERS[encoding](stored).view(out.shape)
    if scale is not None:
        values = values * scale.to(torch.float32).reshape(-1, 1)
    out.copy_(values)
