"""Open a device, make it current, synchronize it, measure its memory.

    device = open_device("twin:a5")     # checked and set up
    activate(device)                    # before each run: another device may have been used since

`ascendit.device` holds the data; this module starts torch, torch_npu and the twin.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ascendit import environment, twin
from ascendit.device import cpu_threads, npu_runtime
from ascendit.device.device import Device, parse_device
from ascendit.errors import EnvironmentProblem
from ascendit.exclusive import Stop
from ascendit.native.build import processor_name
from ascendit.twin import STATE

log = logging.getLogger("ascendit")


def open_device(name: object) -> Device:
    """Open a device by name, or an open one again: check that it is present, and set it up.

    Raises UsageError (E-USE-01) for an unknown name, EnvironmentProblem (E-ENV-03) if this machine does not
    have it.
    """
    device = name if isinstance(name, Device) else parse_device(name)
    if device.kind == "npu":
        device = device if device.chip else _start_npu(device)
    else:
        hide_torch_npu(device)
    if device.kind == "cuda":
        _check_cuda(device)
    if device.kind in ("cpu", "twin"):
        cpu_threads.report()
    activate(device)
    return device


def activate(device: Device) -> None:
    """Make `device` the current one of torch or the twin."""
    if device.kind == "twin":
        if twin.chip() != device.chip:
            twin.enable(str(device.chip))
    elif device.index is not None and (api := _api(device)):
        api.set_device(device.index)


@contextlib.contextmanager
def hold_chip(device: Device, cancel: Stop | None = None) -> Iterator[None]:
    """Keep other threads from changing the chip of the twin; wait for their runs on another chip.

    Raises Cancelled (E-CAN-01) while waiting, UsageError (E-USE-01) inside a run of this thread on another
    chip.
    """
    if device.kind != "twin":
        yield
        return
    with twin.IN_USE.hold(cancel, shared=device.chip):
        yield


def synchronize(device: Device) -> None:
    """Wait until all launched kernels have finished."""
    if api := _api(device):
        api.synchronize()


def memory_bytes(device: Device) -> int:
    """Bytes in use by torch on an accelerator, or by this process on a host; 0 if unknown."""
    if api := _api(device):
        return int(api.memory_allocated(device.index))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * 4096


def free_bytes(device: Device) -> int | None:
    """Free memory of an open accelerator; None if its library does not report it."""
    mem_get_info = getattr(_api(device), "mem_get_info", None)
    return None if mem_get_info is None else int(mem_get_info(device.index)[0])


def hardware_name(device: Device) -> str:
    """The model of an open device: of the GPU, the NPU, or this processor."""
    api = _api(device)
    return processor_name() if api is None else str(api.get_device_name(device.index))


def to_dtype(device: Device, dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of the denoiser; None for the stored dtype.

    Raises UsageError for a dtype that the denoiser does not support.
    """
    name = device.dtype_name(dtype)
    torch_dtype: torch.dtype | None = None if name is None else getattr(torch, name)
    return torch_dtype


@contextlib.contextmanager
def internal_format(device: Device, allowed: bool) -> Iterator[None]:
    """Allow npu_format_cast to return FRACTAL_NZ on a2 and a3, which return ND otherwise; a5 always does.

    The setting is restored at the end.
    """
    if device.kind == "twin":
        before = STATE.internal_format
        STATE.internal_format = allowed
        try:
            yield
        finally:
            STATE.internal_format = before
    elif device.kind == "npu" and device.chip != "a5":
        config = _api(device).config  # write-only; `npu_runtime` switched it off
        config.allow_internal_format = allowed
        try:
            yield
        finally:
            config.allow_internal_format = False
    else:
        yield


def hide_torch_npu(device: Device) -> None:
    """Block the import of an installed torch_npu if it conflicts with `device` or cannot be loaded.

    accelerate, Diffusers and transformers import it if it is installed, which fails without CANN. With CANN
    it may be loaded together with a CPU, but not with the twin.
    """
    if "torch_npu" in sys.modules or find_spec("torch_npu") is None:
        return
    if device.kind == "twin" or environment.toolkit_folder() is None:
        sys.modules["torch_npu"] = None  # type: ignore[assignment]


def show_torch_npu() -> None:
    """Undo `hide_torch_npu`."""
    if sys.modules.get("torch_npu", sys) is None:
        del sys.modules["torch_npu"]


def check_index(device: Device, count: int) -> None:
    """Raise EnvironmentProblem (E-ENV-03) if the index of `device` is not below `count`."""
    if (device.index or 0) >= count:
        raise EnvironmentProblem(
            f"device {device}: this machine has {count} such devices",
            needs=f"{device.kind}:0 to {device.kind}:{count - 1}" if count else f"a card for {device.kind}",
            fix=f"--device {device.kind}:0" if count else "--device cpu, or ascendit doctor",
            code="E-ENV-03",
        )


def _check_cuda(device: Device) -> None:
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"device {device}: PyTorch reports no CUDA device",
            needs="a CUDA build of torch, a driver and a GPU",
            fix="use --device cpu, or run ascendit doctor",
            code="E-ENV-03",
        )
    check_index(device, torch.cuda.device_count())


def _start_npu(device: Device) -> Device:
    """Import torch_npu, apply all settings, select the card; returns the device with its chip.

    Raises EnvironmentProblem (E-ENV-03) if torch_npu, CANN, the card or a supported chip is missing.
    """
    npu_runtime.set_variables()
    show_torch_npu()
    npu = npu_runtime.import_torch_npu().npu
    check_index(device, npu.device_count())
    chip = npu_runtime.find_chip(npu)
    npu_runtime.load_mindiesd()  # before the settings, since its import switches allow_internal_format on
    npu_runtime.apply(npu)
    log.info("%s: %s, chip %s", device, chip.product, chip.name)
    return replace(device, chip=chip.name)


def _api(device: Device) -> Any:
    """torch.cuda or torch.npu; None for a device on the host."""
    return None if device.backend.tensors == "cpu" else getattr(torch, device.backend.tensors)
