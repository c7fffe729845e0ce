"""Dense attention on an Ascend NPU, a function for each kernel, all as `reference.attention`.

Heads come as the model has them, [B, S, H, d] (BSND), so nothing is transposed. No kernel gets a mask: Wan
has none, and a mask here means the opposite of F.scaled_dot_product_attention's. Every scale is given: the
kernels' own defaults, 1.0 and 0.0, are never what attention means.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fusion_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `reference.attention`, by npu_fusion_attention: every chip, any strides, heads up to 768."""
    scale = q.shape[-1] ** -0.5
    out: Tensor = torch.ops.npu.npu_fusion_attention(q, k, v, q.shape[2], "BSND", scale=scale)[0]
    return out


def fused_infer_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `reference.attention`, by npu_fused_infer_attention_score_v2: can be captured in a graph.

    Every chip; float16 and bfloat16 only; heads a multiple of 16, at most 512.
    """
    out: Tensor = torch.ops.npu.npu_fused_infer_attention_score_v2(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        num_query_heads=q.shape[2],
        num_key_value_heads=k.shape[2],
        input_layout="BSND",
        softmax_scale=q.shape[-1] ** -0.5,
    )[0]
    return out
