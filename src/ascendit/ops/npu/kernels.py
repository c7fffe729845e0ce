"""The kernels of an Ascend NPU and its twin, the best of each operator first.

`device/operator_support.py` lists the operators of each chip; `hasattr` is not enough, since torch_npu has
every name on every chip. MindIE-SD's RoPE and `fused_attn_score` are not listed, because they call operators
listed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ascendit.device.device import Device
from ascendit.device.operator_support import capability
from ascendit.kernels.kernel import Function, Kernel, Prepare, Wish, in_dtype
from ascendit.ops.npu import attention, elementwise, linear, quantized_attention


def _kernel(operator: str, needs: str, call: Function, reason: str, prepare: Prepare | None = None) -> Kernel:
    return Kernel(operator, "npu", call, reason, needs, prepare)


NORM, FUSED = "one kernel, float32 weights with BF16 hidden states", "one kernel for norm, scale and shift"
KERNELS: tuple[Kernel, ...] = (
    _kernel("linear", "aten::linear", elementwise.linear, "one kernel on [M, K]"),
    _kernel("rms_norm", "npu_rms_norm", elementwise.rms_norm, "one kernel over all heads instead of six"),
    Kernel(
        "layer_norm",
        "npu",
        elementwise.mindiesd_layer_norm,
        "one kernel in its precise mode; only with fast_layernorm",
        "mindiesd::layernorm",
        name="fast_layernorm",
        on_request=True,
    ),
    _kernel("layer_norm", "aten::layer_norm", elementwise.layer_norm, NORM),
    _kernel("adaln", "mindiesd::adaln_v2", elementwise.mindiesd_adaln_v2, FUSED, in_dtype),
    _kernel("adaln", "mindiesd::adaln", elementwise.mindiesd_adaln, FUSED, in_dtype),
    _kernel(
        "adaln", "aten::layer_norm", elementwise.layer_norm_adaln, "a layer norm with the weight 1 + scale"
    ),
    _kernel("gated_residual", "aten::addcmul", elementwise.gated_residual, "one kernel", in_dtype),
    _kernel(
        "rope", "npu_rotary_mul", elementwise.rope, "interleaved pairs, in float32", elementwise.prepare_rope
    ),
    _kernel("gelu_tanh", "npu_gelu", elementwise.gelu_tanh, "the tanh approximation on every chip"),
    _kernel(
        "gelu",
        "npu_gelu",
        elementwise.gelu,
        "exact on every chip, while F.gelu is the tanh approximation on a2 and a3",
    ),
    Kernel(
        "attention",
        "npu",
        attention.fusion_attention,
        "BSND, the model's layout: no transposes",
        "npu_fusion_attention",
        name="fusion",
    ),
    Kernel(
        "attention",
        "npu",
        attention.fused_infer_attention,
        "supports graph capture, copies heads that are not contiguous",
        "npu_fused_infer_attention_score_v2",
        name="fused_infer",
    ),
    Kernel(
        "attention",
        "npu",
        attention.laser_attention,
        "on request; computes in float16, self-attention of at least 2048 tokens only",
        "mindiesd::la",
        name="laser",
        on_request=True,
    ),
)
"""The dense operators. `needs`: the operator of torch.ops that it calls."""


def list_kernels(device: Device, wish: Wish) -> Sequence[Kernel]:
    """`KERNELS`, and the quantized attention and linear kernels of this chip."""
    chip = str(device.chip)
    kernels = (*KERNELS, *quantized_attention.list_kernels(wish))
    return (*(_for_chip(chip, k) for k in kernels), *linear.list_kernels(device))


def _for_chip(chip: str, kernel: Kernel) -> Kernel:
    """Quantized attention is a mode of its operator, with the name of the scheme."""
    if not kernel.needs:
        return kernel
    quantized = kernel.operator.partition("attention_")[2]
    mode = (quantized,) if quantized else ()
    reason = f"npu: {kernel.needs}: {kernel.reason}"
    return replace(kernel, reason=reason, missing=lambda: missing(kernel.needs, chip, *mode))


def missing(call: str, chip: str, mode: str = "") -> str:
    """Why the operator `call` cannot be used on `chip`, "" if it can. `mode`: of `CAPABILITIES`."""
    namespace, _, name = call.rpartition("::")
    if namespace == "aten":
        return ""
    if capability(call, mode).support_on(chip) != "yes":
        return f"{call} does not run on {chip}"
    if not hasattr(getattr(torch.ops, namespace or "npu"), name):
        return f"{call} is not installed"
    return ""
