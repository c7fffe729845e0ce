"""The kernels of an Ascend NPU and its twin, best first; a chip takes the first that it has.

What a chip has is in the table of `device/chip.py`; `hasattr` alone does not tell, since torch_npu has every
name on every chip. MindIE-SD's own RoPE and attention are not rows: on every chip they call the operators
that are.

The dense operators on an NPU and its twin: every call is torch.ops.npu, torch.ops.mindiesd or aten.

What a card does differently from a CPU, so that none of it is met by accident:
- F.gelu is the tanh form on a2 and a3 whatever it is told; npu_gelu listens. npu_fast_gelu is neither.
- F.rms_norm is six kernels. npu_rms_norm takes a float32 gamma beside BF16 tokens.
- npu_rotary_mul cuts its tables to the dtype of the tokens, so these go in as float32; cos and sin hold each
  number of a pair twice. a5 takes any `rotary_mode` without a word.
- adaln takes its rows in the dtype of the tokens and nothing else; aten layer_norm takes float32 ones too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.device.chip import capability
from ascendit.kernels.kernel import Function, Kernel, Prepare, Wish, in_dtype
from ascendit.kernels.reference import Spans
from ascendit.ops.npu import attention
from ascendit.ops.npu import linear as quant_linear

if TYPE_CHECKING:
    from ascendit.device.device import Device

# ---- the operators ------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear`. The kernel sees [tokens, K]."""
    return F.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    out: Tensor = torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]
    return out


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.layer_norm`. Weight and bias in one dtype: that of x, or float32."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def mindiesd_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `reference.layer_norm`; impl_mode 0 is the precise one."""
    out: Tensor = torch.ops.mindiesd.layernorm(x, x.shape[-1:], weight, bias, eps, 0)[0]
    return out


def layer_norm_adaln(x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float) -> Tensor:
    """As `reference.adaln`: a layer norm with the weight 1 + scale, in float32."""

    def one(part: Tensor, r: int) -> Tensor:
        return F.layer_norm(part, part.shape[-1:], scale[r].float() + 1, shift[r].float(), eps)

    return _by_span(one, x, spans)


def mindiesd_adaln(x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float) -> Tensor:
    """As `reference.adaln` with the rows rounded to x's dtype; for a2 and a3."""
    return _mindiesd_adaln(torch.ops.mindiesd.adaln, x, scale, shift, spans, eps)


def mindiesd_adaln_v2(x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float) -> Tensor:
    """As `reference.adaln` with the rows rounded to x's dtype; for a5."""

    def first(*given: Any) -> Tensor:
        out: Tensor = torch.ops.mindiesd.adaln_v2(*given)[0]
        return out

    return _mindiesd_adaln(first, x, scale, shift, spans, eps)


def _mindiesd_adaln(
    call: Callable[..., Tensor], x: Tensor, scale: Tensor, shift: Tensor, spans: Spans, eps: float
) -> Tensor:
    scale, shift = scale.to(x.dtype), shift.to(x.dtype)

    def one(part: Tensor, r: int) -> Tensor:
        rows = (t[r].expand(part.shape[0], -1) for t in (scale, shift))  # one row for each sample
        return call(part, *rows, None, None, eps)

    return _by_span(one, x, spans)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, spans: Spans) -> Tensor:
    """As `reference.gated_residual` with rows rounded to x's dtype; float32 ones would cost four kernels."""
    gate = gate.to(x.dtype)
    parts = y.split(spans, dim=1)
    return _by_span(lambda part, r: torch.addcmul(part, parts[r], gate[r]), x, spans)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rope`, and with tables from `prepare_rope`. Rotates in float32."""
    if cos.dim() == 2:
        cos, sin = prepare_rope(cos, sin, dtype=x.dtype)
    out: Tensor = torch.ops.npu.npu_rotary_mul(x.float(), cos, sin, rotary_mode="interleave")
    return out.to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """As `reference.gelu_tanh`."""
    out: Tensor = torch.ops.npu.npu_gelu(x, approximate="tanh")
    return out


def gelu(x: Tensor) -> Tensor:
    """As `reference.gelu`, on every chip."""
    out: Tensor = torch.ops.npu.npu_gelu(x, approximate="none")
    return out


def _by_span(one: Callable[[Tensor, int], Tensor], x: Tensor, spans: Spans) -> Tensor:
    """`one(tokens, row)` for each span, side by side."""
    if len(spans) == 1:
        return one(x, 0)
    return torch.cat([one(part, r) for r, part in enumerate(x.split(spans, dim=1))], 1)


# ---- what is prepared once ----------------------------------------------------------------------


def prepare_rope(*tables: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """cos and sin [S, d/2] -> [1, S, 1, d], each number twice; float32 whatever the tokens are."""
    return tuple(torch.stack((t, t), -1).flatten(-2)[None, :, None, :].float() for t in tables)


# ---- The kernels of an Ascend NPU and its twin, best first; a chip takes the first that it has --


def _kernel(operator: str, needs: str, call: Function, reason: str, prepare: Prepare | None = None) -> Kernel:
    return Kernel(operator, "npu", call, reason, needs, prepare)


NORM, FUSED = "one kernel, float32 weights beside BF16 tokens", "one kernel for norm, scale and shift"
KERNELS: tuple[Kernel, ...] = (
    _kernel("linear", "aten::linear", linear, "one kernel on [tokens, K]"),
    _kernel("rms_norm", "npu_rms_norm", rms_norm, "one kernel over all heads instead of six"),
    Kernel(
        "layer_norm",
        "npu",
        mindiesd_layer_norm,
        "one kernel, its precise mode; only where fast_layernorm asked for it",
        "mindiesd::layernorm",
        name="fast_layernorm",
        on_request=True,
    ),
    _kernel("layer_norm", "aten::layer_norm", layer_norm, NORM),
    _kernel("adaln", "mindiesd::adaln_v2", mindiesd_adaln_v2, FUSED, in_dtype),
    _kernel("adaln", "mindiesd::adaln", mindiesd_adaln, FUSED, in_dtype),
    _kernel("adaln", "aten::layer_norm", layer_norm_adaln, "a layer norm whose weight is 1 + scale"),
    _kernel("gated_residual", "aten::addcmul", gated_residual, "one kernel", in_dtype),
    _kernel("rope", "npu_rotary_mul", rope, "interleaved pairs, in float32", prepare_rope),
    _kernel("gelu_tanh", "npu_gelu", gelu_tanh, "the tanh form on every chip"),
    _kernel(
        "gelu",
        "npu_gelu",
        gelu,
        "the exact form on every chip, where F.gelu is tanh on a2 and a3",
    ),
    Kernel(
        "attention",
        "npu",
        attention.fusion_attention,
        "BSND as the model has it, nothing is transposed",
        "npu_fusion_attention",
        name="fusion",
    ),
    Kernel(
        "attention",
        "npu",
        attention.fused_infer_attention,
        "asked for; can be captured in a graph, copies heads that are not contiguous",
        "npu_fused_infer_attention_score_v2",
        name="fused_infer",
        on_request=True,
    ),
)
"""The dense operators. `needs`: the operator of torch.ops that is called."""


def list_kernels(device: Device, wish: Wish) -> Sequence[Kernel]:
    """Those of `KERNELS`, and the schemes that this chip has a matmul for."""
    chip = str(device.chip)
    return (*(_on(chip, k) for k in KERNELS), *quant_linear.list_kernels(device))


def _on(chip: str, kernel: Kernel) -> Kernel:
    reason = f"npu: {kernel.needs}: {kernel.reason}"
    return replace(kernel, reason=reason, missing=lambda: missing(kernel.needs, chip))


def missing(call: str, chip: str) -> str:
    """Why `call` cannot be made on `chip`, "" if it can."""
    namespace, _, name = call.rpartition("::")
    if namespace == "aten":
        return ""
    if capability(call).on(chip) != "yes":
        return f"{call} does not run on {chip}"
    if not hasattr(getattr(torch.ops, namespace or "npu"), name):
        return f"{call} is not installed"
    return ""
