"""Limits of the attention kernels: the devices that have a kernel, and the calls that it takes. No torch.

`attention.choice` asks before the loop, and the kernels of an NPU at each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ascendit.device.attention_kernels import ATTENTION_KERNELS, HALF, AttentionKernel, Kind
from ascendit.device.device import Device
from ascendit.device.operator_support import capability, native_attention_on, no_attention_for

KIND_NAMES: Mapping[Kind, str] = {
    "self": "self-attention",
    "text": "cross-attention to the text",
    "image": "cross-attention to the image",
}
BACKEND_NAMES = {"cpu": "a CPU", "cuda": "CUDA", "npu": "an NPU or its twin"}
NATIVE_QUANTIZED = AttentionKernel(
    about="quantized attention of a chip", backends=("npu",), dtypes=HALF, head_multiple=32, largest_head=128
)
"""The limits of `ops/npu/quantized_attention.py`: a head is one tile of channels, and has complete blocks."""

LONG = 2**20
"""Tokens of a video, if only the other limits of a kernel are checked."""


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """The calls of one kind of attention: q [B, queries, heads, head_dim], k and v [B, keys, ..]."""

    kind: Kind
    dtype: str
    """torch's name of the dtype of q, k and v."""
    heads: int
    head_dim: int
    queries: int
    keys: int
    key_length: int | None = None
    """Number of valid keys, if the others are padding."""


def kernels_on(device: Device) -> dict[str, AttentionKernel]:
    """Name -> kernel, of those for this kind of device."""
    return {name: row for name, row in ATTENTION_KERNELS.items() if device.operators in row.backends}


def backend_on(device: Device, name: str) -> str:
    """The backend of a kernel or scheme of this device: cpu, cuda, npu or reference."""
    return "reference" if name == "reference" else device.operators


def absence_on(device: Device, name: str) -> str:
    """Why this device never has a kernel, "" if it may have it."""
    row = ATTENTION_KERNELS[name]
    if device.operators not in row.backends:
        return f"it needs {' or '.join(BACKEND_NAMES[backend] for backend in row.backends)}"
    if row.operator and device.chip and capability(row.operator).support_on(device.chip) != "yes":
        return f"{row.operator} does not run on {device.chip}"
    return ""


def is_emulated_on(device: Device, scheme: str) -> bool:
    """Whether attention in `scheme` is computed from dequantized numbers, slower."""
    if device.chip:
        return scheme not in native_attention_on(device.chip)
    return device.operators == "cpu"


def scheme_limit_on(device: Device, scheme: str, call: AttentionCall, *, emulate: bool) -> str:
    """Why this device does not take `call` in a scheme of quantized attention, "" if it does.

    Raises EnvironmentProblem (E-CAP-01) if its chip has no kernel for the scheme, unless `emulate`.
    """
    if device.chip is None:
        return ""
    if not is_emulated_on(device, scheme):
        return limit_of(NATIVE_QUANTIZED, call)
    if not emulate:
        raise no_attention_for(device, device.chip, scheme)
    return ""


def limit_of(kernel: AttentionKernel, call: AttentionCall) -> str:
    """Why a kernel does not take `call`, "" if it does."""
    shortest = min(call.queries, call.keys)
    if call.kind not in kernel.kinds:
        return f"it computes {' and '.join(KIND_NAMES[kind] for kind in kernel.kinds)} only"
    if call.dtype not in kernel.dtypes:
        return f"it takes {' or '.join(kernel.dtypes)}, not {call.dtype}"
    if call.head_dim % kernel.head_multiple:
        return f"it takes head sizes that are multiples of {kernel.head_multiple}, not {call.head_dim}"
    if kernel.largest_head is not None and call.head_dim > kernel.largest_head:
        return f"it takes head sizes up to {kernel.largest_head}, not {call.head_dim}"
    if shortest < kernel.shortest:
        return f"it takes at least {kernel.shortest} tokens, not {shortest}"
    if call.key_length not in (None, call.keys) and not kernel.padded_keys:
        return "it takes no padded keys"
    return ""
