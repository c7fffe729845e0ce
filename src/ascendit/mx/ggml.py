"""Decode the block types of GGUF files: the package `gguf` is the reference, common types are compiled.

A block holds integers and their factors, in one run of bytes. Both paths compute in float32 and round once to
bfloat16; factors that are infinite or NaN give infinite or NaN values. torch and gguf are imported when used.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ascendit.native.build import Built, declared, native

if TYPE_CHECKING:
    from torch import Tensor

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
