"""Running backends: open a device, make it current, wait for it, ask what it uses.

    device = open_device("twin:a5")     # checked, present, set up
    activate(device)                    # before each run: another device may have been used since

`ascendit.device` holds the data; torch, torch_npu and the twin are started here.
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
from ascendit.device import npu_runtime
from ascendit.device.device import Device, parse_device
from ascendit.errors import EnvironmentProblem
from ascendit.twin import STATE

log = logging.getLogger("ascendit")


def open_device(name: object) -> Device:
    """The device of this name (or an open one again), present and set up.

    UsageError E-USE-01: no such name. EnvironmentProblem E-ENV-03: this machine does not have it.
    """
    device = name if isinstance(name, Device) else parse_device(name)
    if device.kind == "npu":
        device = device if device.chip else _start_npu(device)
    else:
        hide_torch_npu(device)
    if device.kind == "cuda":
        _check_cuda(device)
    activate(device)
    return device


def activate(device: Device) -> None:
    """Make it the one that operators run on; before each run, since another may have been used since."""
    if device.kind == "twin":
        if twin.chip() != device.chip:
            twin.enable(str(device.chip))
    elif device.index is not None and (api := _api(device)):
        api.set_device(device.index)


def synchronize(device: Device) -> None:
    """Wait until all that was launched is done."""
    if api := _api(device):
        api.synchronize()


def memory_bytes(device: Device) -> int:
    """In use: by torch on the device, or by this process. 0 where the system does not say."""
    if api := _api(device):
        return int(api.memory_allocated(device.index))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * 4096


def to_dtype(device: Device, dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Of the denoiser: a torch dtype, or None for "as stored". UsageError for one it does not run in."""
    name = device.dtype_name(dtype)
    number: torch.dtype | None = None if name is None else getattr(torch, name)
    return number


@contextlib.contextmanager
def internal_format(device: Device, allowed: bool) -> Iterator[None]:
    """Whether npu_format_cast gives FRACTAL_NZ on a2 and a3, which keep ND without it; a5 always does.

    Set back at the end.
    """
    if device.kind == "twin":
        before = STATE.internal_format
        STATE.internal_format = allowed
        try:
            yield
        finally:
            STATE.internal_format = before
    elif device.kind == "npu" and device.chip != "a5":
        config = _api(device).config  # it can be set and not be read; `npu_runtime` switched it off
        config.allow_internal_format = allowed
        try:
            yield
        finally:
            config.allow_internal_format = False
    else:
        yield


def hide_torch_npu(device: Device) -> None:
    """Keep an installed torch_npu out of this process, if it may not or cannot be loaded beside `device`.

    accelerate, Diffusers and transformers import it where they find it, and so fail without CANN. With CANN
    it may be loaded beside a CPU, but not beside the twin.
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
    """EnvironmentProblem E-ENV-03 unless there are that many cards."""
    if (device.index or 0) >= count:
        raise EnvironmentProblem(
            f"device {device}: this machine has {count} of them",
            needs=f"{device.kind}:0 to {device.kind}:{count - 1}" if count else f"a card for {device.kind}",
            fix=f"--device {device.kind}:0" if count else "--device cpu, or ascendit doctor",
            code="E-ENV-03",
        )


def _check_cuda(device: Device) -> None:
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"device {device}: this PyTorch sees no CUDA device",
            needs="a CUDA build of torch, a driver and a card",
            fix="--device cpu, or ascendit doctor",
            code="E-ENV-03",
        )
    check_index(device, torch.cuda.device_count())


def _start_npu(device: Device) -> Device:
    """Import torch_npu, apply every setting, choose the card; the device with its chip.

    EnvironmentProblem E-ENV-03 when torch_npu, CANN, the card or a chip that Wan runs on is missing.
    """
    npu_runtime.set_variables()
    show_torch_npu()
    npu = npu_runtime.import_torch_npu().npu
    check_index(device, npu.device_count())
    chip = npu_runtime.find_chip(npu)
    npu_runtime.load_mindiesd()  # before the settings: importing it switches allow_internal_format on
    npu_runtime.apply(npu)
    log.info("%s: %s, chip %s", device, chip.product, chip.name)
    return replace(device, chip=chip.name)


def _api(device: Device) -> Any:
    """torch.cuda or torch.npu, None on a host."""
    return None if device.backend.tensors == "cpu" else getattr(torch, device.backend.tensors)
