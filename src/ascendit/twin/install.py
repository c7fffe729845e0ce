"""Define the operators under torch.ops, and block `import torch_npu` while they are defined.

`ascendit.twin.enable("a5", fake_module=True)` also provides a minimal `torch_npu` for code that imports it:
all npu_* operators, the numbers of torch_npu's dtypes, and a `torch.npu` whose `is_available()` is False and
whose `synchronize`, `empty_cache`, .. do nothing. There is no device "npu": tensors stay on the CPU. The
module has a ModuleSpec, which accelerate and Diffusers need when they are imported. Other attributes raise
AttributeError, as in an older torch_npu.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from ascendit.device.chip import CHIPS
from ascendit.twin import STATE, operators  # noqa: F401  (importing operators registers them all)
from ascendit.twin.contract import DTYPE_NUMBERS, IMPORT, TwinImportError
from ascendit.twin.registry import OPERATORS, VERSIONS, current_chip, fake, frozen, refuse_uncomputed, run

_LIBRARIES: list[torch.library.Library] = []


def install(chip: str, *, with_module: bool) -> None:
    """Define every frozen schema; if already installed, only change the chip.

    Raises TwinImportError (E-TWN-02) if torch_npu is loaded or the operators are already defined.
    """
    real = sys.modules.get("torch_npu")
    if real is not None and not is_ours(real):
        raise TwinImportError(
            "torch_npu is loaded in this process",
            needs="a process without torch_npu: the twin defines the same operators",
            fix='ascendit.twin.use("a5") and ascendit.twin.call(...), which define nothing',
            code=IMPORT,
        )
    if not _LIBRARIES:
        for namespace in VERSIONS:
            _LIBRARIES.append(_define(namespace))
        sys.meta_path.insert(0, _GUARD)
    STATE.chip = chip
    if with_module:
        add_module()


def uninstall() -> None:
    """Undo `install`."""
    remove_module()
    if _GUARD in sys.meta_path:
        sys.meta_path.remove(_GUARD)
    while _LIBRARIES:
        _LIBRARIES.pop()._destroy()
    STATE.chip = None


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "FRAGMENT")
    try:
        for name, schema in frozen(namespace).items():
            library.define(schema)
            key = name if namespace == "npu" else f"{namespace}::{name}"
            if key in OPERATORS:
                library.impl(name, functools.partial(run, key), "CPU")
                library.impl(name, functools.partial(fake, key), "Meta")
            else:
                library.impl(name, functools.partial(refuse_uncomputed, key), "CompositeExplicitAutograd")
    except RuntimeError as e:
        library._destroy()
        raise TwinImportError(
            f"torch.ops.{namespace} cannot be defined: {str(e).splitlines()[0]}",
            needs="a process in which no other package has defined these operators",
            fix="enable the twin before other packages define them, or use another process",
            code=IMPORT,
        ) from e
    return library


class Guard(importlib.abc.MetaPathFinder):
    """Import hook that blocks `import torch_npu` but leaves `importlib.util.find_spec` alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Raise TwinImportError (E-TWN-02) for `import torch_npu`."""
        if fullname != "torch_npu":
            return None
        # Diffusers and accelerate call importlib.util.find_spec on import. Frames: 0 this function,
        # 1 _find_spec, 2 its caller.
        if sys._getframe(2).f_globals.get("__name__") == "importlib.util":
            return None
        raise TwinImportError(
            f"import torch_npu while the {STATE.chip} twin is enabled in this process",
            needs="either torch_npu or the twin: they define the same operators",
            fix="use another process, or enable(chip, fake_module=True) for code that imports torch_npu",
            code=IMPORT,
        )


_GUARD = Guard()


MODULE_VERSION = "2.13.0"
_MARK = "ascendit_twin"


def is_ours(module: Any) -> bool:
    """Whether this `torch_npu` is the module made by `add_module`."""
    return getattr(module, "__dict__", {}).get(_MARK) is True


def add_module() -> None:
    """Install `torch_npu`, `torch_npu.npu` and `torch.npu`, unless they are already installed."""
    if is_ours(sys.modules.get("torch_npu")):
        return
    npu = _torch_npu_npu()
    module = _new_module("torch_npu", _TorchNpu)
    vars(module).update(
        {_MARK: True, "__version__": MODULE_VERSION, "npu": npu, "__path__": [], **DTYPE_NUMBERS}
    )
    sys.modules.update({"torch_npu": module, "torch_npu.npu": npu, "torch.npu": npu})
    vars(torch)["npu"] = npu


def remove_module() -> None:
    """Undo `add_module`."""
    if is_ours(sys.modules.get("torch_npu")):
        for name in ("torch_npu", "torch_npu.npu", "torch.npu"):
            sys.modules.pop(name, None)
        vars(torch).pop("npu", None)


class _TorchNpu(types.ModuleType):
    """The module `torch_npu`: operators are its attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in {n.partition(".")[0] for n in frozen("npu")}:
            return getattr(torch.ops.npu, name)
        raise AttributeError(
            f"module 'torch_npu' has no attribute {name!r}: this is the module of ascendit's twin"
        )


class _Config:
    """`torch.npu.config`; a5 ignores the flag, like the card."""

    @property
    def allow_internal_format(self) -> bool:
        return STATE.internal_format

    @allow_internal_format.setter
    def allow_internal_format(self, value: bool) -> None:
        STATE.internal_format = bool(value)


def _new_module(name: str, kind: type[types.ModuleType] = types.ModuleType) -> types.ModuleType:
    module = kind(name, __doc__)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    return module


_NO_OPS = ("synchronize", "empty_cache", "set_device", "set_compile_mode", "manual_seed")
"""Functions of `torch.npu` that do nothing on the twin."""


def _torch_npu_npu() -> types.ModuleType:
    """`torch.npu`."""
    npu = _new_module("torch.npu")

    def soc_version() -> int:
        return CHIPS[current_chip()].soc_versions[0]

    vars(npu).update(
        is_available=lambda: False,
        device_count=lambda: 0,
        current_device=lambda: 0,
        get_device_name=lambda device=None: CHIPS[current_chip()].soc_name,
        get_soc_version=soc_version,
        config=_Config(),
        **dict.fromkeys(_NO_OPS, lambda *args, **kwargs: None),
    )
    vars(npu)["utils"] = types.SimpleNamespace(get_soc_version=soc_version)
    return npu
