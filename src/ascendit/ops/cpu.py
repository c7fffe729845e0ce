"""The kernels of a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from ascendit.device.device import Device
from ascendit.kernels.cpu import attention, elementwise, linear, qk_int8
from ascendit.kernels.kernel import Kernel, Wish
from ascendit.kernels.quantized_attention import emulated_kernels


def list_kernels(device: Device, wish: Wish) -> Sequence[Kernel]:
    """All kernels, the best of each operator first. The C++ sources are compiled on first use."""
    return (
        *elementwise.list_kernels(),
        *attention.list_kernels(),
        qk_int8.kernel(),
        *emulated_kernels("cpu", attention.attention),
        *linear.list_kernels(wish.emulate),
    )
