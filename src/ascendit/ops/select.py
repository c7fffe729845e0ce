"""Choose a kernel: `select(operator, device, wish)` takes the first one that the device has.

Each backend has one module with `list_kernels(device, wish)`: its kernels for every operator and every
scheme of quantized linear layers, the best first. The module is imported when a device of that backend is
first used, so a CPU never loads Triton or the NPU's calls.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ascendit.device.device import Device
from ascendit.device.operator_support import no_matmul_for
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.kernels import reference
from ascendit.kernels.kernel import Kernel, Wish
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
    found: Sequence[Kernel] = backend.list_kernels(device, wish)
    return found


def select(operator: str, device: Device, wish: Wish) -> Kernel:
    """The first kernel of `operator` that `device` has, plain PyTorch if it has none.

    `operator`: a field of `Ops`, or the scheme of a quantized linear layer. What was passed over is part of
    the reason. UsageError E-USE-01: no kernel has the name that `wish` asks for. EnvironmentProblem E-CAP-01:
    it is not on this device; or the chip has no matmul for the scheme and `wish` does not say `emulate`.
    """
    wanted = None if wish.reference else wish.names.get(operator)
    listed = () if wish.reference else [k for k in kernels_of(device, wish) if k.operator == operator]
    if wanted is not None and wanted not in [k.name for k in listed]:
        _no_such_name(operator, wanted, listed)
    passed: list[str] = []
    for kernel in sorted(listed, key=lambda k: k.name != wanted):
        if kernel.on_request and kernel.name != wanted:
            continue
        if problem := kernel.missing():
            passed.append(problem)
            if kernel.name == wanted:
                _not_on_this_device(kernel, problem)
            continue
        return replace(kernel, reason="; ".join((kernel.reason, *passed)))
    return _plain(operator, device, wish)


def _plain(operator: str, device: Device, wish: Wish) -> Kernel:
    if operator not in LINEAR_SCHEMES:
        why = "asked for" if wish.reference else f"{device.operators} has no faster form"
        return Kernel(operator, "reference", getattr(reference, operator), f"reference: {why}")
    if device.chip and wish.emulate is None:
        raise no_matmul_for(device, device.chip, operator)
    reason = "emulated: decoded and multiplied, the same numbers, slower"
    return reference.quant_linear_kernel(operator, wish.emulate, reason)


def _no_such_name(operator: str, wanted: str, listed: Sequence[Kernel]) -> None:
    names = [k.name for k in listed if k.name]
    raise UsageError(
        f"{operator}={wanted}",
        needs=" or ".join(names),
        fix=f"--set {operator}={names[0]}, or leave it out" if names else "leave it out",
    )


def _not_on_this_device(kernel: Kernel, problem: str) -> None:
    """For a kernel asked for by name: another attention is an error, another layer norm is a warning."""
    if kernel.operator == "layer_norm":
        log.warning("%s: %s, layer norms stay as they are", kernel.name, problem)
        return
    raise EnvironmentProblem(
        f"{kernel.operator}={kernel.name}: {problem}",
        needs=kernel.needs,
        fix=f"leave {kernel.operator} out: the best kernel of the chip is taken",
        code="E-CAP-01",
    )
