"""Dense attention on an Ascend NPU: one function per kernel, with the contract of `reference.attention`.

q, k and v keep the model's layout [B, S, H, d] (BSND), so nothing is transposed. No mask is passed: Wan has
none, and its meaning is the opposite of F.scaled_dot_product_attention's. The scale is always passed, because
the kernels default to 1.0 and 0.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascendit.errors import UsageError

INFER_HEADS = 512
"""Largest head size of npu_fused_infer_attention_score_v2; a multiple of 16."""


def fusion_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `reference.attention`, with npu_fusion_attention: every chip, head sizes up to 768.

    Accepts any strides; CANN copies inputs that are not contiguous with an extra kernel.
    """
    scale = q.shape[-1] ** -0.5
    out: Tensor = torch.ops.npu.npu_fusion_attention(q, k, v, q.shape[2], "BSND", scale=scale)[0]
    return out


def fused_infer_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `reference.attention`, with npu_fused_infer_attention_score_v2, which supports graph capture.

    Runs on every chip. Raises UsageError (E-USE-01) unless the dtype is float16 or bfloat16 and the head size
    a multiple of 16, at most 512. Inputs that are not contiguous are copied.
    """
    head = q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16) or head % 16 or head > INFER_HEADS:
        raise UsageError(
            f"attention=fused_infer with head size {head} in {str(q.dtype)[6:]}",
            needs=f"bfloat16 or float16, and a head size that is a multiple of 16 and at most {INFER_HEADS}",
            fix="use --set attention=fusion, which supports it",
        )
    out: Tensor = torch.ops.npu.npu_fused_infer_attention_score_v2(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        num_query_heads=q.shape[2],
        num_key_value_heads=k.shape[2],
        input_layout="BSND",
        softmax_scale=head**-0.5,
    )[0]
    return out
