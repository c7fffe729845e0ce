"""The operators of one device for the self-check: called by name on inputs that lie on the CPU, and timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascendit.device.backends import Device
from ascendit.ops.runtime import synchronize

Caller = Callable[..., Any]
"""`call(name, *args, **kwargs)` with tensors on the CPU, results on the CPU."""
RUNS = 5


class Card:
    """One open device. `real`: it has a speed of its own, and so repeats are timed."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.real = device.backend.tensors != "cpu"

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """torch.ops.npu.NAME, or torch.ops.mindiesd for `mindiesd::NAME`, on arguments on the device."""
        namespace, _, rest = name.rpartition("::")
        return getattr(getattr(torch.ops, namespace or "npu"), rest)(*args, **kwargs)

    def on_cpu(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """`call`, on inputs that are copied to the device and results that are copied back."""
        return self.back(self.call(name, *map(self.put, args), **{k: self.put(v) for k, v in kwargs.items()}))

    def put(self, value: Any) -> Any:
        """A copy on the device, with the same strides: some operators read them."""
        if isinstance(value, list | tuple):
            return [self.put(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        strides = value.stride()
        order = sorted(range(value.dim()), key=lambda axis: -strides[axis])
        back = sorted(range(value.dim()), key=order.__getitem__)
        plain = value.permute(order).contiguous()
        return plain.to(self.device.torch_name, copy=True).permute(back)

    def back(self, value: Any) -> Any:
        """A copy on the CPU. The kernel must have ended for that, so what went wrong in it is told here."""
        if isinstance(value, list | tuple):
            return tuple(self.back(v) for v in value)
        return value.to("cpu", copy=True) if isinstance(value, Tensor) else value

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median of a few runs, each waited for; of one where there is no device to wait for."""
        times = []
        for _ in range(RUNS if self.real else 1):
            synchronize(self.device)
            start = time.perf_counter()
            run()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def works(self) -> bool:
        """Whether the device still computes: after some faults it refuses everything until a new process."""
        try:
            (torch.ones(4, device=self.device.torch_name) * 2).cpu()
        except RuntimeError:
            return False
        return True
