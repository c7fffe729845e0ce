"""The kernels of a CUDA card: PyTorch's own, and those of Triton where they are right on that card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ascendit.kernels.cpu.attention import attention
from ascendit.kernels.cpu.elementwise import gelu, gelu_tanh
from ascendit.kernels.kernel import Kernel, Wish
from ascendit.ops.cuda import dense, linear

if TYPE_CHECKING:
    from ascendit.device.device import Device

PYTORCH = tuple(
    Kernel(f.__name__, "cuda", f, "cuda: fused PyTorch kernel") for f in (gelu_tanh, gelu, attention)
)
"""PyTorch has a fused kernel for these, called as on a CPU."""


def list_kernels(device: Device, wish: Wish) -> Sequence[Kernel]:
    """The best of each operator first."""
    return (*dense.list_kernels(device.torch_name), *PYTORCH, *linear.list_kernels(device, wish.emulate))
