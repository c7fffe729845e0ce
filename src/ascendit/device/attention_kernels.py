"""Table of the attention kernels, and the requests for them: `self=laser,cross=fusion`. No torch.

The reference of every kernel is `kernels.reference.attention`. All have the signature
`call(q, k, v, *, return_lse=False)`, layout [B, S, H, d]; `attention/` chooses one for each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args

from ascendit.errors import UsageError
from ascendit.quant.attention_schemes import ATTENTION_FORMATS

Kind = Literal["self", "text", "image"]
"""Self-attention of the video, cross-attention to the text and, in Wan2.1 I2V, to the image."""
ATTENTION_KINDS: tuple[Kind, ...] = get_args(Kind)
KINDS: Mapping[str, tuple[Kind, ...]] = {
    "self": ("self",),
    "cross": ("text", "image"),
    "text": ("text",),
    "image": ("image",),
}
"""Name in a request -> the kinds it selects."""
Probabilities = Literal["one", "two"]
"""BF16 numbers whose sum is a probability, in the kernel `cpu`. With one, as in PyTorch, its rounding error
is as large as that of the output; two take half as long again and leave only the error of the output."""
PROBABILITIES: ContextVar[Probabilities] = ContextVar("attention_probabilities", default="one")
HALF = ("bfloat16", "float16")
FLOATS = (*HALF, "float32")


@contextmanager
def attention_probabilities(numbers: Probabilities | None) -> Iterator[None]:
    """Use `numbers` in the kernel `cpu` in this context, on a CPU and on a twin. None changes nothing."""
    token = PROBABILITIES.set(numbers or PROBABILITIES.get())
    try:
        yield
    finally:
        PROBABILITIES.reset(token)


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """One dense attention kernel. Its operator and chips are in `operator_support.CAPABILITIES`."""

    about: str
    backends: tuple[str, ...]
    """Values of `Device.operators`: cpu, cuda, npu."""
    operator: str = ""
    """The operator of `torch.ops` on an NPU."""
    source: str = ""
    """The C++ file in `native/` on a CPU, without `.cpp`."""
    aliases: tuple[str, ...] = ()
    """Names that other projects use."""
    kinds: tuple[Kind, ...] = ("self", "text", "image")
    dtypes: tuple[str, ...] = FLOATS
    head_multiple: int = 1
    largest_head: int | None = None
    shortest: int = 1
    """Least number of queries and of keys."""
    padded_keys: bool = True
    """Whether it takes the first of a padded sequence of keys."""
    on_request: bool = False
    """Never chosen automatically: its numbers differ by more than rounding to the dtype."""


ATTENTION_KERNELS: Mapping[str, AttentionKernel] = {
    "cpu": AttentionKernel(
        about="C++ with the BF16 instructions of the processor",
        backends=("cpu",),
        source="attention",
        dtypes=("bfloat16",),
        head_multiple=32,
        largest_head=256,
    ),
    "qk_int8": AttentionKernel(
        about="scores from int8 queries and smoothed int8 keys, values in BF16",
        backends=("cpu", "cuda"),
        source="attention_int8",
        aliases=("sage", "sageattn"),
        dtypes=("bfloat16",),
        head_multiple=64,
        largest_head=128,
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
        padded_keys=False,
        on_request=True,
    ),
    "reference": AttentionKernel(about="plain PyTorch in float32", backends=("cpu", "cuda", "npu")),
}
"""Name -> kernel; on each backend the best first, of those that are not only on request."""

# ---- requests -----------------------------------------------------------------------------------

AUTOMATIC = "bf16"
"""In a request: no quantization, the best kernel of the device."""
_ALIASES = {alias: name for name, row in ATTENTION_KERNELS.items() for alias in row.aliases}


def attention_name(text: str) -> str | None:
    """The key of a table for the name or alias of a kernel or scheme, or `bf16`; None if it is unknown."""
    name = _ALIASES.get(text, text)
    return name if name in (AUTOMATIC, *ATTENTION_KERNELS, *ATTENTION_FORMATS) else None


def near_name(text: str) -> str | None:
    """The name of a kernel or scheme that is spelled like `text`."""
    names = [AUTOMATIC, *ATTENTION_KERNELS, *ATTENTION_FORMATS, *_ALIASES]
    return next(iter(get_close_matches(text.lower(), names, n=1)), None)


def parse_attention(text: str) -> dict[Kind, str]:
    """Parse a kernel or scheme for every kind, `sdpa`, or for some: `self=laser,cross=fusion`.

    Raises UsageError (E-USE-01) for an unknown kind or name, and for a kind that is named twice.
    """
    if not isinstance(text, str):
        fix = 'attention="self=fp8,cross=bf16"'
        raise _bad(str(text), f"it has type {type(text).__name__}, not text", fix=fix)
    request: dict[Kind, str] = {}
    for item in text.split(","):
        kind, equals, name = (part.strip() for part in item.rpartition("="))
        if equals and kind not in KINDS:
            raise _bad(text, f"{kind!r} is no kind of attention")
        if (key := attention_name(name)) is None:
            raise _bad(text, f"{name!r} is no kernel and no scheme", near_name(name))
        for one in KINDS[kind] if equals else ATTENTION_KINDS:
            if one in request:
                raise _bad(text, f"{one}-attention is named twice")
            request[one] = key
    return request


def attention_text(request: Mapping[Kind, str]) -> str:
    """The text of a request, which `parse_attention` reads."""
    if len({*request.values()}) == 1 and len(request) == len(ATTENTION_KINDS):
        return request["self"]
    names = dict(request)
    cross = {"cross": names["text"]} if "text" in names and names["text"] == names.get("image") else {}
    items = {kind: name for kind, name in names.items() if kind == "self" or not cross} | cross
    return ",".join(f"{kind}={name}" for kind, name in items.items())


def _bad(text: str, problem: str, near: str | None = None, fix: str = "") -> UsageError:
    fix = fix or "--attention bf16, or omit --attention"
    kernels, schemes = ", ".join(ATTENTION_KERNELS), ", ".join(ATTENTION_FORMATS)
    fixed = ",".join(f"{item.rpartition('=')[0]}={near}".lstrip("=") for item in text.split(",")[:1])
    return UsageError(
        f"attention {text!r}: {problem}",
        needs=f"NAME or KIND=NAME,..; kinds: {', '.join(KINDS)}; names: bf16, {kernels}, {schemes}",
        fix=f"--attention {fixed}" if near and "," not in text else fix,
    )
