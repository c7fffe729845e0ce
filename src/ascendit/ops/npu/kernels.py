"""The kernels of an Ascend NPU and its twin, the best of each operator first; a chip takes the first it has.

Which chip has what is in `device/operator_support.py`; `hasattr` alone does not tell, since torch_npu has
every name on every chip. MindIE-SD's own RoPE and attention are not listed: on every chip they call the
operators that are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ascendit.device.device import Device
from ascendit.device.operator_support import capability
from ascendit.kernels.kernel import Function, Kernel, Prepare, Wish, in_dtype
from ascendit.ops.npu import attention, elementwise, linear


def _kernel(operator: str, needs: str, call: Function, reason: str, prepare: Prepare | None = None) -> Kernel:
    return Kernel(operator, "npu", call, reason, needs, prepare)


NORM, FUSED = "one kernel, float32 weights beside BF16 tokens", "one kernel for norm, scale and shift"
KERNELS: tuple[Kernel, ...] = (
    _kernel("linear", "aten::linear", elementwise.linear, "one kernel on [tokens, K]"),
    _kernel("rms_norm", "npu_rms_norm", elementwise.rms_norm, "one kernel over all heads instead of six"),
    Kernel(
        "layer_norm",
        "npu",
        elementwise.mindiesd_layer_norm,
        "one kernel, its precise mode; only where fast_layernorm asked for it",
        "mindiesd::layernorm",
        name="fast_layernorm",
        on_request=True,
    ),
    _kernel("layer_norm", "aten::layer_norm", elementwise.layer_norm, NORM),
    _kernel("adaln", "mindiesd::adaln_v2", elementwise.mindiesd_adaln_v2, FUSED, in_dtype),
    _kernel("adaln", "mindiesd::adaln", elementwise.mindiesd_adaln, FUSED, in_dtype),
    _kernel(
        "adaln", "aten::layer_norm", elementwise.layer_norm_adaln, "a layer norm whose weight is 1 + scale"
    ),
    _kernel("gated_residual", "aten::addcmul", elementwise.gated_residual, "one kernel", in_dtype),
    _kernel(
        "rope", "npu_rotary_mul", elementwise.rope, "interleaved pairs, in float32", elementwise.prepare_rope
    ),
    _kernel("gelu_tanh", "npu_gelu", elementwise.gelu_tanh, "the tanh form on every chip"),
    _kernel(
        "gelu",
        "npu_gelu",
        elementwise.gelu,
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
