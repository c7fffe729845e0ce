"""Decode float tensors that files store otherwise: floats with a scale per tensor or row, and ggml's blocks.

A value is decoded in float32, in which the product of a stored number and its scale is rounded at most once,
and then rounded to the requested dtype. A block of GGUF files holds integers and their factors, in one run of
bytes: the package `gguf` is the reference, common types are compiled. Factors that are infinite or NaN give
infinite or NaN values. torch and gguf are imported when used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from ascendit.native.build import Built, declared, native

if TYPE_CHECKING:
    from torch import Tensor

# ---- blocks of ggml -------------------------------------------------------------------------------

COMPILED = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
"""Types that `native/ggml.cpp` decodes."""
TYPES = (
    *COMPILED,
    *("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K"),
    *("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
"""Block types that can be decoded, by their names in the package."""
PIECE = 512
"""Blocks that the reference decodes at a time, so that its temporaries stay in the cache."""


@functools.cache
def library() -> Built:
    """The compiled kernels, or the reason why they are unavailable. The first call compiles them."""
    return declared(native("ggml"), {f"{name}_to_bf16": "ppii" for name in COMPILED})


def reference(name: str, stored: Tensor) -> Tensor:
    """Decode blocks of the type `name`, uint8 [bytes], to float32 [values]."""
    import gguf
    import numpy as np
    import torch

    kind = gguf.GGMLQuantizationType[name]
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = stored.view(-1, nbytes)
    out = torch.empty(len(blocks), values)
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), PIECE):
            piece = blocks[start : start + PIECE].reshape(1, -1).numpy()
            decoded = torch.from_numpy(gguf.quants.dequantize(piece, kind))
            out[start : start + PIECE] = decoded.view(-1, values)
    return out.view(-1)


def to_bfloat16(name: str, stored: Tensor, out: Tensor, threads: int | None = None) -> bool:
    """Decode blocks of the type `name`, uint8 [bytes], into `out`, bfloat16 [values]; contiguous, on the CPU.

    Returns False if there is no compiled kernel. `threads`: default: PyTorch's number of threads.
    """
    if name not in COMPILED or (lib := library().library) is None:
        return False
    import gguf
    import torch

    blocks = stored.numel() // gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    function = getattr(lib, f"{name}_to_bf16")
    function(stored.data_ptr(), out.data_ptr(), blocks, threads or torch.get_num_threads())
    return True


# ---- every encoding -------------------------------------------------------------------------------

Decoder = Callable[["Tensor"], "Tensor"]
"""Stored bytes, uint8 [bytes] -> values in their order, float32 [values]."""

_FLOATS = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "I8": "int8",
}
"""safetensors dtype -> torch dtype, of numbers that may have a scale."""


def _decode_float(dtype: str, stored: Tensor) -> Tensor:
    import torch

    return stored.view(getattr(torch, dtype)).to(torch.float32)


DECODERS: dict[str, Decoder] = {
    **{name: functools.partial(_decode_float, dtype) for name, dtype in _FLOATS.items()},
    **{name: functools.partial(reference, name) for name in TYPES},
}
"""Encoding -> its decoder."""


def decode_rows(encoding: str, data: memoryview, scale: Tensor | None, out: Tensor) -> None:
    """Decode bytes into `out`, contiguous [rows, K] of a float dtype.

    `scale`: float factor of all values, or of each row [rows] or [rows, 1]. `encoding`: a key of `DECODERS`.
    """
    import torch

    stored = torch.frombuffer(data, dtype=torch.uint8)
    if scale is None and out.dtype == torch.bfloat16 and to_bfloat16(encoding, stored, out):
        return
    values = DECODERS[encoding](stored).view(out.shape)
    if scale is not None:
        values = values * scale.to(torch.float32).reshape(-1, 1)
    out.copy_(values)
