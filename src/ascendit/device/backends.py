"""Where a model runs, named by one string: cpu, cuda[:N], npu[:N], twin:a2, twin:a3 or twin:a5.

    device = open_device("twin:a5")     # checked, present, set up
    device.torch_name                   # "cpu": where its tensors are
    device.operators                    # "npu": which family of operators computes on it

What kinds of device differ in is one table, `BACKENDS`; no other folder asks for the kind. Importing this
imports no torch, so a wrong name is told before torch is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendit.device import environment
from ascendit.device.npu import CHIPS, native_on, not_here
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.quant.schemes import QUANTIZED

if TYPE_CHECKING:
    import torch

log = logging.getLogger("ascendit")

DTYPES = ("float32", "bfloat16", "float16")
"""What the denoiser may be told to run in."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What a kind of device is like."""

    operators: str
    """Family of operators: cpu, cuda or npu."""
    tensors: str
    """torch's name for where the tensors are."""
    collectives: str
    """For torch.distributed.init_process_group: the host always has gloo."""
    dtype: str | None
    """Of the denoiser where the user says nothing; None: as stored."""
    wide: bool = True
    """Whether it has float64 and complex numbers. Where not, sinusoids and RoPE are float32 there."""


BACKENDS: Mapping[str, Backend] = {
    "cpu": Backend(operators="cpu", tensors="cpu", collectives="gloo", dtype=None),
    "cuda": Backend(operators="cuda", tensors="cuda", collectives="cpu:gloo,cuda:nccl", dtype="bfloat16"),
    "npu": Backend(
        operators="npu", tensors="npu", collectives="cpu:gloo,npu:hccl", dtype="bfloat16", wide=False
    ),
    "twin": Backend(operators="npu", tensors="cpu", collectives="gloo", dtype="bfloat16", wide=False),
}
NAMES = "cpu, cuda, cuda:N, npu, npu:N, " + ", ".join(f"twin:{chip}" for chip in CHIPS)


@dataclass(frozen=True)
class Device:
    """One place to run. `chip`: a2, a3 or a5; that of an NPU is known once it is open."""

    kind: str
    index: int | None = None
    chip: str | None = None

    def __str__(self) -> str:
        """The name as a user writes it."""
        tail = self.chip if self.kind == "twin" else self.index
        return self.kind if tail is None else f"{self.kind}:{tail}"

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.kind]

    @property
    def operators(self) -> str:
        """cpu, cuda or npu."""
        return self.backend.operators

    @property
    def exact_gelu(self) -> bool:
        """Whether F.gelu does what it is told; a2 and a3 compute the tanh form whatever that is."""
        return self.chip not in ("a2", "a3")

    @property
    def torch_name(self) -> str:
        """For `.to(...)`: `cuda:1`, `npu:0`, and `cpu` for the twin."""
        return self.backend.tensors if self.index is None else f"{self.backend.tensors}:{self.index}"

    @property
    def collectives(self) -> str:
        """For torch.distributed.init_process_group."""
        return self.backend.collectives

    @property
    def names_its_chip(self) -> bool:
        """Whether its name tells which schemes it has: a twin, or an open NPU."""
        return self.chip is not None

    def check_schemes(self, schemes: Iterable[str]) -> None:
        """EnvironmentProblem E-CAP-01 for a scheme that its chip has no matmul for, where its name tells."""
        for scheme in sorted(set(schemes) & set(QUANTIZED)):
            if self.chip is not None and scheme not in native_on(self.chip):
                raise not_here(self, self.chip, scheme)

    @property
    def has_attention_kernels(self) -> bool:
        """Whether there are several dense attention kernels to choose from, by `attention=`."""
        return self.operators == "npu"

    def activate(self) -> None:
        """Make it the one that operators run on; before each run, since another may have been used since."""
        if self.kind == "twin":
            from ascendit import twin

            if twin.chip() != self.chip:
                twin.enable(str(self.chip))
        elif self.index is not None and (api := self._api()):
            api.set_device(self.index)

    def synchronize(self) -> None:
        """Wait until all that was launched is done."""
        if api := self._api():
            api.synchronize()

    def side_stream(self) -> contextlib.AbstractContextManager[Any]:
        """What is launched inside goes to a stream of its own; on a host there is one order only."""
        api = self._api()
        return api.stream(api.Stream()) if api else contextlib.nullcontext()

    def memory_bytes(self) -> int:
        """In use: by torch on the device, or by this process. 0 where the system does not say."""
        if api := self._api():
            return int(api.memory_allocated(self.index))
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return 0
        return pages * 4096

    def internal_format(self, allowed: bool) -> contextlib.AbstractContextManager[Any]:
        """Whether npu_format_cast gives FRACTAL_NZ on a2 and a3, which keep ND without it; a5 always does."""
        if self.operators != "npu" or (self.kind == "npu" and self.chip == "a5"):
            return contextlib.nullcontext()
        return _internal_format(self, allowed)

    def to_dtype(self, dtype: str | torch.dtype | None) -> torch.dtype | None:
        """Of the denoiser: a torch dtype, or None for "as stored". UsageError for one it does not run in."""
        import torch

        found = self.backend.dtype if dtype is None else dtype
        if isinstance(found, torch.dtype):
            found = str(found).removeprefix("torch.")
        if found == "float64" and self.backend.wide:
            return torch.float64  # for tests that need an oracle; no flag gives it
        if found is not None and found not in DTYPES:
            raise UsageError(
                f"dtype={found} on {self}",
                needs=" or ".join(DTYPES),
                fix="--set dtype=bfloat16",
                code="E-USE-01",
            )
        number: torch.dtype | None = None if found is None else getattr(torch, found)
        return number

    def _api(self) -> Any:
        """torch.cuda or torch.npu, None on a host."""
        if self.backend.tensors == "cpu":
            return None
        import torch

        return getattr(torch, self.backend.tensors)


def parse_device(name: object) -> Device:
    """The device of this name; nothing is looked at. UsageError E-USE-01 for a name that is none."""
    text = str(name)
    found = re.fullmatch(r"(cuda|npu)(?::(\d+))?", text)
    if found:
        return Device(found[1], None if found[2] is None else int(found[2]))
    kind, _, chip = text.partition(":")
    if text == "cpu" or (kind == "twin" and chip in CHIPS):
        return Device(kind, chip=chip or None)
    raise UsageError(f"device {text!r}", needs=NAMES, fix="--device cpu", code="E-USE-01")


def open_device(name: object) -> Device:
    """The device of this name (or an open one again), present and set up.

    UsageError E-USE-01: no such name. EnvironmentProblem E-ENV-03: this machine does not have it.
    """
    device = name if isinstance(name, Device) else parse_device(name)
    if device.kind in _OPEN:
        device = _OPEN[device.kind](device)
    else:
        hide_torch_npu(device)
    device.activate()
    return device


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


def _open_cuda(device: Device) -> Device:
    import torch

    hide_torch_npu(device)

    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"device {device}: this PyTorch sees no CUDA device",
            needs="a CUDA build of torch, a driver and a card",
            fix="--device cpu, or ascendit doctor",
            code="E-ENV-03",
        )
    check_index(device, torch.cuda.device_count())
    return device


def _open_npu(device: Device) -> Device:
    from ascendit.device import npu_settings

    return device if device.chip else replace(device, chip=npu_settings.start(device))


_OPEN: Mapping[str, Callable[[Device], Device]] = {"cuda": _open_cuda, "npu": _open_npu}


def check_index(device: Device, count: int) -> None:
    """EnvironmentProblem E-ENV-03 unless there are that many cards."""
    if (device.index or 0) >= count:
        raise EnvironmentProblem(
            f"device {device}: this machine has {count} of them",
            needs=f"{device.kind}:0 to {device.kind}:{count - 1}" if count else f"a card for {device.kind}",
            fix=f"--device {device.kind}:0" if count else "--device cpu, or ascendit doctor",
            code="E-ENV-03",
        )


@contextlib.contextmanager
def _internal_format(device: Device, allowed: bool) -> Any:
    """`Device.internal_format`, set back at the end."""
    if device.kind == "twin":
        from ascendit import twin
        from ascendit.twin.registry import STATE

        before = STATE.internal_format
        twin.allow_internal_format(allowed)
        try:
            yield
        finally:
            twin.allow_internal_format(before)
    else:
        config = device._api().config  # it can be set and not be read; `npu_settings` switched it off
        config.allow_internal_format = allowed
        try:
            yield
        finally:
            config.allow_internal_format = False
