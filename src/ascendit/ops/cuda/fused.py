"""CUDA forms of the operators, where PyTorch has one fused kernel for them. The rest runs `reference`."""

from __future__ import annotations

from ascendit.kernels.cpu.elementwise import attention, gelu, gelu_tanh

__all__ = ["attention", "gelu", "gelu_tanh"]
