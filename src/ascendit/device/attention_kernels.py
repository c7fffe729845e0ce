"""Table of the attention kernels, and the requests for them: `self=laser,cross=sdpa`. Does not import torch.

The reference of every kernel is `kernels.reference.attention`. All have the signature
`call(q, k, v, *, return_lse=False)`, layout [B, S, H, d]; `attention/` chooses one for each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["self", "text", "image"]
"""Self-attention of the video, cross-attention to the text and, in Wan2.1 I2V, to the image."""
KINDS: Mapping[str, tuple[Kind, ...]] = {
    "self": ("self",),
    "cross": ("text", "image"),
    "text": ("text",),
    "image": ("image",),
}
"""Name in a request -> the kinds it selects."""
HALF = ("bfloat16", "float16")
FLOATS = (*HALF, "float32")


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """One dense attention kernel. Its operator and chips are in `operator_support.CAPABILITIES`."""

    about: str
    backends: tuple[str, ...]
    """Values of `Device.operators`: cpu, cuda, npu."""
    operator: str = ""
    """The operator of `torch.ops` on an NPU."""
    aliases: tuple[str, ...] = ()
    """Names that other projects use."""
    kinds: tuple[Kind, ...] = ("self", "text", "image")
    dtypes: tuple[str, ...] = FLOATS
    head_multiple: int = 1
    largest_head: int | None = None
    shortest: int = 1
    """Least number of queries and of keys."""
    on_request: bool = False
    """Never chosen automatically: its numbers differ by more than rounding to the dtype."""


ATTENTION_KERNELS: Mapping[str, AttentionKernel] = {
    "reference": AttentionKernel(about="plain PyTorch in float32", backends=("cpu", "cuda", "npu")),
    "cpu": AttentionKernel(
        about="C++ with the BF16 instructions of the processor",
        backends=("cpu",),
        dtypes=("bfloat16",),
        head_multiple=32,
        largest_head=256,
    ),
    "qk_int8": AttentionKernel(
        about="scores from int8 queries and smoothed int8 keys, values in BF16",
        backends=("cpu", "cuda"),
        aliases=("sage", "sageattn"),
        dtypes=("bfloat16",),
        head_multiple=64,
        largest_head=256,
        on_request=True,
    ),
    "sdpa": AttentionKernel(
        about="PyTorch's scaled_dot_product_attention",
        backends=("cpu", "cuda"),
        aliases=("torch_sdpa", "native"),
    ),
    "sdpa_flash": AttentionKernel(
        about="PyTorch's FlashAttention",
        backends=("cuda",),
        aliases=("_native_flash",),
        dtypes=HALF,
        head_multiple=8,
        largest_head=256,
    ),
    "sdpa_cudnn": AttentionKernel(
        about="cuDNN's attention through PyTorch",
        backends=("cuda",),
        aliases=("_native_cudnn",),
        dtypes=HALF,
        head_multiple=8,
        largest_head=128,
    ),
    "sdpa_efficient": AttentionKernel(
        about="PyTorch's memory-efficient attention",
        backends=("cuda",),
        aliases=("_native_efficient",),
        head_multiple=8,
    ),
    "flash": AttentionKernel(
        about="the flash-attn package, if installed",
        backends=("cuda",),
        aliases=("flash_attn", "fa"),
        dtypes=HALF,
        head_multiple=8,
        largest_head=256,
    ),
    "fusion": AttentionKernel(
        about="npu_fusion_attention; MindIE-SD's fused_attn_score calls the same operator",
        backends=("npu",),
        operator="npu_fusion_attention",
        aliases=("npu_fusion_attention", "fused_attn_score", "_native_npu"),
        largest_head=768,
    ),
    "fused_infer": AttentionKernel(
        about="npu_fused_infer_attention_score, which supports graph capture",
        backends=("npu",),
        operator="npu_fused_infer_attention_score_v2",
        aliases=("npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"),
        dtypes=HALF,
        head_multiple=16,
        largest_head=512,
    ),
    "laser": AttentionKernel(
        about="MindIE-SD's laser attention: computes in float16, has no masks",
        backends=("npu",),
        operator="mindiesd::la",
        aliases=("ascend_laser_attention", "laser_attn", "la"),
        kinds=("self",),
        dtypes=HALF,
        largest_head=128,
        shortest=2048,
        on_request=True,
    ),
}
"""Name -> kernel; on each backend the best first, of those that are not only on request."""
