"""Decode float tensors that files store in other encodings: FP8 and floats with at most one scale per row.

A value is decoded in float32, in which the product of a stored number and its scale is rounded at most once,
and then rounded to the requested dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Decoder = Callable[[Tensor], Tensor]
"""Stored bytes of complete rows, uint8 [rows, bytes] -> values, float32 [rows, K]."""

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


DECODERS: dict[str, Decoder] = {name: _float_decoder(dtype) for name, dtype in _FLOATS.items()}
"""Encoding -> its decoder."""


def decode_rows(encoding: str, data: memoryview, rows: int, scale: Tensor | None, dtype: str) -> Tensor:
    """Decode `rows` rows of bytes to [rows, K] of the torch dtype `dtype`.

    `scale`: float factor of all values, or of each row [rows] or [rows, 1]. `encoding`: a key of `DECODERS`.
    """
    stored = torch.frombuffer(data, dtype=torch.uint8).view(rows, -1)
    values = DECODERS[encoding](stored)
    if scale is not None:
        values = values * scale.to(torch.float32).reshape(-1, 1)
    return values.to(getattr(torch, dtype))
