"""Choose a kernel: `select(operator, device, wish)` returns the first one that works on the device.

Each backend has a module with `list_kernels(device, wish)`: its kernels for every operator and every scheme
of quantized linear layers, best first. The module is imported when a device of that backend is first used, so
a CPU never imports Triton or NPU code.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ascendit.device.device import Device
from ascendit.device.operator_support import no_attention_for, no_matmul_for
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.kernels import reference
from ascendit.kernels.kernel import Kernel, Wish
from ascendit.kernels.quantized_attention import emulated_kernels
from ascendit.quant.schemes import LINEAR_SCHEMES

log = logging.getLogger("ascendit")

KERNEL_LISTS = {
    "cpu": "ascendit.ops.cpu",
    "cuda": "ascendit.ops.cuda.kernels",
    "npu": "ascendit.ops.npu.kernels",
}
"""Backend -> the module that lists its kernels."""


def kernels_of(device: Device, wish: Wish) -> Sequence[Kernel]:
    """Every kernel that this device may have, the best of each operator first."""
    backend: Any = importlib.import_module(KERNEL_LISTS[device.operators])
    kernels: Sequence[Kernel] = backend.list_kernels(device, wish)
    return kernels


def select(operator: str, device: Device, wish: Wish) -> Kernel:
    """The first kernel of `operator` that works on `device`; plain PyTorch if none does.

    `operator`: a field of `Ops`, or the scheme of a quantized linear layer. The reason of the result includes
    the problems of skipped kernels. Raises UsageError (E-USE-01) if no kernel has the name in `wish`. Raises
    EnvironmentProblem (E-CAP-01) if that kernel does not work on this device, or if the chip has no matmul or
    attention for the scheme and `wish.emulate` is None.
    """
    requested = None if wish.reference else wish.names.get(operator)
    listed = () if wish.reference else [k for k in kernels_of(device, wish) if k.operator == operator]
    if requested is not None and requested not in [k.name for k in listed]:
        _unknown_name(operator, requested, listed)
    skipped: list[str] = []
    for kernel in sorted(listed, key=lambda k: k.name != requested):
        if kernel.on_request and kernel.name != requested:
            continue
        if problem := kernel.missing():
            skipped.append(problem)
            if kernel.name == requested:
                _not_on_this_device(kernel, problem)
            continue
        return replace(kernel, reason="; ".join((kernel.reason, *skipped)))
    return _reference_kernel(operator, device, wish)


def _reference_kernel(operator: str, device: Device, wish: Wish) -> Kernel:
    for kernel in emulated_kernels("reference", reference.attention):
        if kernel.operator == operator:
            if device.chip and wish.emulate is None:
                raise no_attention_for(device, device.chip, operator.removeprefix("attention_"))
            return kernel
    if operator not in LINEAR_SCHEMES:
        reason = "requested" if wish.reference else f"{device.operators} has no faster kernel"
        return Kernel(operator, "reference", getattr(reference, operator), f"reference: {reason}")
    if device.chip and wish.emulate is None:
        raise no_matmul_for(device, device.chip, operator)
    reason = "emulated: dequantized and multiplied, the same numbers, slower"
    return reference.quant_linear_kernel(operator, wish.emulate, reason)


def _unknown_name(operator: str, requested: str, listed: Sequence[Kernel]) -> None:
    names = [k.name for k in listed if k.name]
    raise UsageError(
        f"{operator}={requested}",
        needs=" or ".join(names),
        fix=f"--set {operator}={names[0]}, or omit it" if names else "omit it",
    )


def _not_on_this_device(kernel: Kernel, problem: str) -> None:
    """A requested kernel does not work: a warning for a layer norm, an error for an attention."""
    if kernel.operator == "layer_norm":
        log.warning("%s: %s; using the default layer norm", kernel.name, problem)
        return
    raise EnvironmentProblem(
        f"{kernel.operator}={kernel.name}: {problem}",
        needs=kernel.needs,
        fix=f"omit {kernel.operator} to use the best kernel of the chip",
        code="E-CAP-01",
    )
