"""Dense attention on an Ascend NPU, a function for each kernel, all as `reference.attention`.

Heads come as the model has them, [B, S, H, d] (BSND), so nothing is transposed. No kernel gets a mask: Wan
has none, and a mask here means the opposite of F.scaled_dot_product_attention's. Every scale is given: the
kernels' own defaults, 1.0 and 0.0, are never what attention means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascendit.errors import UsageError

INFER_HEADS = 512
"""The longest head of npu_fused_infer_attention_score_v2; a multiple of 16."""


def fusion_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `reference.attention`, by npu_fusion_attention: every chip, heads up to 768.

    Any strides; CANN makes what is not contiguous so by a kernel of its own.
    """
    scale = q.shape[-1] ** -0.5
    out: Tensor = torch.ops.npu.npu_fusion_attention(q, k, v, q.shape[2], "BSND", scale=scale)[0]
    return out


def fused_infer_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `reference.attention`, by npu_fused_infer_attention_score_v2: can be captured in a graph.

    Every chip; float16 and bfloat16 only; heads a multiple of 16, at most 512; else UsageError E-USE-01.
    It takes contiguous heads, so strided ones are copied first.
    """
    head = q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16) or head % 16 or head > INFER_HEADS:
        raise UsageError(
            f"attention=fused_infer on heads of {head} in {str(q.dtype)[6:]}",
            needs=f"bfloat16 or float16, heads a multiple of 16 and at most {INFER_HEADS}",
            fix="--set attention=fusion, which takes them",
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
