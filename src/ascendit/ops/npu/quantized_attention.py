"""Quantized attention on an Ascend NPU: native fp8 and mxfp8 on a5.

The contract is that of `reference.attention`, the numbers are those of `kernels/quantized_attention.py`: Q, K
and V are quantized here, the operator dequantizes them. One call computes one sample, because the tiles of fp8
have no batch axis in CANN, and blocks of MX values must not cross samples. A card may quantize the
probabilities too, the twin does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.kernels.kernel import Attended, Function, Kernel
from ascendit.quant.attention_schemes import ATTENTION_FORMATS
from ascendit.twin.contract import FP8_E4M3, HALF_DTYPES, SCALE_E8M0

CHANNELS = 128
"""Channels of a tile of npu_dynamic_block_quant. A tile of fp8 attention is a whole head, at most this."""
INFER = "fused_infer_attention_score_v2"
QKV = ("query", "key", "value")


def native_kernels() -> tuple[Kernel, ...]:
    """The native kernels, the best of each scheme first. `operator_support` has their chips."""
    mindiesd, infer = f"mindiesd::{INFER}", f"npu_{INFER}"
    fp8, mxfp8 = "native: e4m3, one scale per tile of tokens", "native: e4m3, one scale per 32 values"
    return (
        _kernel("fp8", mindiesd, partial(_fp8_sample, lambda: torch.ops.mindiesd), fp8, "mindiesd"),
        _kernel("fp8", infer, partial(_fp8_sample, lambda: torch.ops.npu), fp8, "fused_infer"),
        _kernel("mxfp8", infer, _mxfp8_sample, mxfp8, "fused_infer"),
    )
