"""Dense attention on an Ascend NPU: one function per kernel, with the contract of `reference.attention`.

No mask is passed: Wan has none, and its meaning is the opposite of F.scaled_dot_product_attention's. The
scale is always passed, because the kernels default to 1.0. `device/attention_kernels.py` has the limits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascendit.device.attention_kernels import ATTENTION_KERNELS
from ascendit.device.attention_limits import NATIVE_QUANTIZED, AttentionCall, limit_of
from ascendit.errors import UsageError
from ascendit.kernels.kernel import Attended

LASER_TOKENS, LASER_HEAD = 256, 128
"""`mindiesd::la` takes a multiple of this many tokens, and heads of this size."""
NO_PADDING = 2**31 - 1
"""`pre_tokens` of `mindiesd::la` if no key is padding; below 256 it is the number of padding keys."""


def fusion_attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `reference.attention`, with npu_fusion_attention: every chip, head sizes up to 768.

    The layout is the model's, BSND, so nothing is transposed. Accepts any strides; CANN copies inputs that
    are not contiguous with an extra kernel.
    """
    scale = q.shape[-1] ** -0.5
    out, top, total, *_ = torch.ops.npu.npu_fusion_attention(q, k, v, q.shape[2], "BSND", scale=scale)
    return (out, top[..., 0] + total[..., 0].log()) if return_lse else out


def fused_infer_attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `reference.attention`, with npu_fused_infer_attention_score_v2, which supports graph capture.

    Runs on every chip. Raises UsageError (E-USE-01) unless the dtype is float16 or bfloat16 and the head size
    a multiple of 16, at most 512. Inputs that are not contiguous are copied.
    """
    check_inputs("fused_infer", q, k)
    out, lse = torch.ops.npu.npu_fused_infer_attention_score_v2(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        num_query_heads=q.shape[2],
        num_key_value_heads=k.shape[2],
        input_layout="BSND",
        softmax_scale=q.shape[-1] ** -0.5,
        return_softmax_lse=return_lse,
    )
    return (out, lse[..., 0]) if return_lse else out


def laser_attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
    """As `reference.attention`, with MindIE-SD's laser attention in float16, on a2 and a3.

    Values beyond 65504 become infinite in float16, and the output infinite or NaN; the check of the latents
    detects it. Tokens are padded to a multiple of 256, heads to 128; the operator masks the padding. Raises
    UsageError (E-USE-01) unless q and k have one length, at least 2048, the head size is at most 128, and the
    dtype float16 or bfloat16.
    """
    check_inputs("laser", q, k)
    (_, s, heads, d), padding = q.shape, -q.shape[1] % LASER_TOKENS
    lse, out = torch.ops.mindiesd.la(
        *(_for_laser(t, padding) for t in (q, k, v)),
        scale_value=d**-0.5,
        head_num=heads,
        input_layout="BNSD",
        pre_tokens=padding or NO_PADDING,
    )
    result = out[:, :, :s, :d].transpose(1, 2).to(q.dtype)
    return (result, lse[:, :, :s]) if return_lse else result


def _for_laser(t: Tensor, padding: int) -> Tensor:
    """[B, S, H, d] -> float16 [B, H, S + padding, 128], padded with zeros: one kernel, two if padded."""
    b, s, heads, d = t.shape
    new = torch.zeros if padding or d < LASER_HEAD else torch.empty
    out = new(b, heads, s + padding, LASER_HEAD, dtype=torch.float16, device=t.device)
    out[:, :, :s, :d].copy_(t.transpose(1, 2))
    return out


def check_inputs(name: str, q: Tensor, k: Tensor) -> None:
    """Check q [B, S, H, d] and k [B, L, H, d] for a kernel of `ATTENTION_KERNELS`, or a native scheme.

    Raises UsageError (E-USE-01) for a dtype, head size or length that it does not take.
    """
    (_, queries, heads, d), keys = q.shape, k.shape[1]
    call = AttentionCall(
        kind="self" if queries == keys else "text",
        dtype=str(q.dtype).removeprefix("torch."),
        heads=heads,
        head_dim=d,
        queries=queries,
        keys=keys,
    )
    if problem := limit_of(ATTENTION_KERNELS.get(name, NATIVE_QUANTIZED), call):
        size = f"[{queries}, {heads}, {d}] with {keys} keys in {call.dtype}"
        raise UsageError(
            f"attention {name} of {size}: {problem}",
            needs="a size within the limits of this kernel",
            fix="--attention fusion, which takes it",
        )
