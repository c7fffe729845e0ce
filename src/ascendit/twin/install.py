"""Put the operators under torch.ops, and keep torch_npu out of the process while they are there."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from ascendit.twin import (
    torch_npu_module,
)
from ascendit.twin.contract import IMPORT, TwinImportError
from ascendit.twin.registry import OPERATORS, VERSIONS, fake, frozen, not_here, run
from ascendit.twin.state import STATE

_LIBRARIES: list[torch.library.Library] = []


class Guard(importlib.abc.MetaPathFinder):
    """Refuses `import torch_npu`. Who only asks if it is there (find_spec) gets the usual answer."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch_npu":
            return None
        # A question comes from importlib.util; Diffusers and accelerate ask while they are imported. Frames:
        # 0 here, 1 _find_spec, 2 who wants to know.
        if sys._getframe(2).f_globals.get("__name__") == "importlib.util":
            return None
        raise TwinImportError(
            f"import torch_npu while the twin of {STATE.chip} is enabled in this process",
            needs="torch_npu or the twin, never both: they define the same operators",
            fix="use another process, or enable(chip, fake_module=True) for code that imports torch_npu",
            code=IMPORT,
        )


_GUARD = Guard()


def installed() -> bool:
    """Whether the operators are defined."""
    return bool(_LIBRARIES)


def install(chip: str, *, with_module: bool) -> None:
    """Define every frozen schema, computed or refused by name. A second call changes the chip."""
    real = sys.modules.get("torch_npu")
    if real is not None and not torch_npu_module.is_ours(real):
        raise TwinImportError(
            "torch_npu is loaded in this process",
            needs="a process without it: the twin defines the same operators",
            fix='ascendit.twin.use("a5") and ascendit.twin.call(...), which define nothing',
            code=IMPORT,
        )
    if not _LIBRARIES:
        for namespace in VERSIONS:
            _LIBRARIES.append(_define(namespace))
        sys.meta_path.insert(0, _GUARD)
    STATE.chip = chip
    if with_module:
        torch_npu_module.install()


def uninstall() -> None:
    """Undo `install`."""
    torch_npu_module.uninstall()
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
            ours = name if namespace == "npu" else f"{namespace}::{name}"
            if ours in OPERATORS:
                library.impl(name, _computed(ours), "CPU")
                library.impl(name, _faked(ours), "Meta")
            else:
                library.impl(name, _missing(ours), "CompositeExplicitAutograd")
    except RuntimeError as e:
        library._destroy()
        raise TwinImportError(
            f"torch.ops.{namespace} cannot be defined: {str(e).splitlines()[0]}",
            needs="a process in which nothing else defined these operators",
            fix="enable the twin before other packages load theirs, or use another process",
            code=IMPORT,
        ) from e
    return library


def _computed(name: str) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return run(name, args, kwargs)

    return kernel


def _faked(name: str) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return fake(name, args, kwargs)

    return kernel


def _missing(name: str) -> Any:
    return functools.partial(_not_here, name)


def _not_here(name: str, *args: Any, **kwargs: Any) -> None:
    not_here(name)
