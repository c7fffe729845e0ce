"""A minimal `torch_npu` for code that imports it: `ascendit.twin.enable("a5", fake_module=True)`.

It offers what can be true on a CPU: every npu_* operator, the numbers of torch_npu's own dtypes, and a
`torch.npu` whose `is_available()` is False and whose `synchronize`, `empty_cache`, .. do nothing. There is no
device "npu": tensors stay where they are, on the CPU. It has a ModuleSpec, without which importing accelerate
and Diffusers fails. Anything else is an AttributeError, as on an older torch_npu.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch

from ascendit.device.chip import CHIPS
from ascendit.twin.contract import NAMES
from ascendit.twin.registry import current_chip, frozen
from ascendit.twin.state import STATE

VERSION = "2.13.0"
_MARK = "ascendit_twin"


class _Module(types.ModuleType):
    """`torch_npu`: operators by name."""

    def __getattr__(self, name: str) -> Any:
        if name in {n.partition(".")[0] for n in frozen("npu")}:
            return getattr(torch.ops.npu, name)
        raise AttributeError(f"module 'torch_npu' has no attribute {name!r}: this is ascendit's twin of it")


class _Config:
    """`torch.npu.config`; a5 ignores the flag, as the card does."""

    @property
    def allow_internal_format(self) -> bool:
        return STATE.internal_format

    @allow_internal_format.setter
    def allow_internal_format(self, value: bool) -> None:
        STATE.internal_format = bool(value)


def is_ours(module: Any) -> bool:
    """Whether this `torch_npu` is the one made here."""
    return getattr(module, "__dict__", {}).get(_MARK) is True


def install() -> None:
    """Put `torch_npu`, `torch_npu.npu` and `torch.npu` in place; a second call does nothing."""
    if is_ours(sys.modules.get("torch_npu")):
        return
    npu = _npu()
    module = _named("torch_npu", _Module)
    vars(module).update({_MARK: True, "__version__": VERSION, "npu": npu, "__path__": [], **NAMES})
    sys.modules.update({"torch_npu": module, "torch_npu.npu": npu, "torch.npu": npu})
    vars(torch)["npu"] = npu


def uninstall() -> None:
    """Take them away again."""
    if is_ours(sys.modules.get("torch_npu")):
        for name in ("torch_npu", "torch_npu.npu", "torch.npu"):
            sys.modules.pop(name, None)
        vars(torch).pop("npu", None)


def _named(name: str, kind: type[types.ModuleType] = types.ModuleType) -> types.ModuleType:
    module = kind(name, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    return module


def _npu() -> types.ModuleType:
    """`torch.npu`."""
    npu = _named("torch.npu")

    def soc_version() -> int:
        return CHIPS[current_chip()].soc_versions[0]

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    vars(npu).update(
        is_available=lambda: False,
        device_count=lambda: 0,
        current_device=lambda: 0,
        get_device_name=lambda device=None: CHIPS[current_chip()].soc_name,
        get_soc_version=soc_version,
        config=_Config(),
        **{
            n: nothing
            for n in ("synchronize", "empty_cache", "set_device", "set_compile_mode", "manual_seed")
        },
    )
    vars(npu)["utils"] = types.SimpleNamespace(get_soc_version=soc_version)
    return npu
