"""The kernels of an Ascend NPU and its twin, best first; a chip takes the first that it has.

What a chip has is in the table of `device/chip.py`; `hasattr` alone does not tell, since torch_npu has every
name on every chip. MindIE-SD's own RoPE and attention are not rows: on every chip they call the operators
that are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ascendit.device.chip import capability
from ascendit.kernels.kernel import Function, Kernel, Prepare, Wish, in_dtype
from ascendit.ops.npu import attention, dense, linear

if TYPE_CHECKING:
    from ascendit.device.device import Device


def _kernel(operator: str, needs: str, call: Function, reason: str, prepare: Prepare | None = None) -> Kernel:
    return Kernel(operator, "npu", call, reason, needs, prepare)


NORM, FUSED = "one kernel, float32 weights beside BF16 tokens", "one kernel for norm, scale and shift"
KERNELS: tuple[Kernel, ...] = (
    _kernel("linear", "aten::linear", dense.linear, "one kernel on [tokens, K]"),
    _kernel("rms_norm", "npu_rms_norm", dense.rms_norm, "one kernel over all heads instead of six"),
    Kernel(
        "layer_norm",
        "npu",
        dense.mindiesd_layer_norm,
        "one kernel, its precise mode; only where fast_layernorm asked for it",
        "mindiesd::layernorm",
        name="fast_layernorm",
        on_request=True,
    ),
    _kernel("layer_norm", "aten::layer_norm", dense.layer_norm, NORM),
    _kernel("adaln", "mindiesd::adaln_v2", dense.mindiesd_adaln_v2, FUSED, in_dtype),
    _kernel("adaln", "mindiesd::adaln", dense.mindiesd_adaln, FUSED, in_dtype),
    _kernel("adaln", "aten::layer_norm", dense.layer_norm_adaln, "a layer norm whose weight is 1 + scale"),
    _kernel("gated_residual", "aten::addcmul", dense.gated_residual, "one kernel", in_dtype),
    _kernel("rope", "npu_rotary_mul", dense.rope, "interleaved pairs, in float32", dense.prepare_rope),
    _kernel("gelu_tanh", "npu_gelu", dense.gelu_tanh, "the tanh form on every chip"),
    _kernel(
        "gelu",
        "npu_gelu",
        dense.gelu,
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
    return (*(_on(chip, k) for k in KERNELS), *linear.list_kernels(device))


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
