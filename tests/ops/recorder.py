"""Record operator calls with their arguments, and count those that launch a kernel on a device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FREE = frozenset({"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh"})
"""Not views by their schema, but no kernels either."""
SYNCHRONIZES = frozenset({"_local_scalar_dense", "is_nonzero", "nonzero", "equal"})


class Recorder(TorchDispatchMode):
    """`calls`: (name, arguments by name) in order, without defaults and without operators inside the twin.

    Use it outside inference mode, which does not decompose compound operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.launched: Counter[str] = Counter()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket.__name__
        name = f"{func.namespace}::{packet}" if func.namespace != "aten" else packet
        out = func(*args, **(kwargs or {}))
        names = [a.name for a in func._schema.arguments]
        self.calls.append((name.removeprefix("npu::"), dict(zip(names, args, strict=False)) | (kwargs or {})))
        if not func.is_view and packet not in FREE:
            self.launched[name.removeprefix("npu::")] += 1
        outputs = out if isinstance(out, tuple | list) else (out,)
        self.dtypes |= {t.dtype for t in outputs if isinstance(t, torch.Tensor)}
        return out

    def named(self, name: str) -> list[dict[str, Any]]:
        """Arguments of every call of one operator."""
        return [arguments for called, arguments in self.calls if called == name]
