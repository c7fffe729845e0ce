"""The trace of the stub CANN in this process: launched kernels, copied bytes, waits."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

LIBRARY = "libascendcl.so"


@dataclass(frozen=True)
class Trace:
    """`launched`: kernels in order. `copied`: `H2D 512` and such. `waited`: where the host waited.

    `strided`: (kernel, `18x64/192x1`) for each argument that is not contiguous.
    """

    launched: tuple[str, ...]
    copied: tuple[str, ...]
    waited: tuple[str, ...]
    strided: tuple[tuple[str, str], ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Kernel -> launches, the most frequent first."""
        return dict(Counter(self.launched).most_common())

    @property
    def host(self) -> list[str]:
        """All waits of the host and copies between host and device."""
        return [*self.copied, *self.waited]


class Stub:
    """The stub CANN loaded in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._library.fake_cann_take.restype = ctypes.c_void_p
        self._library.fake_cann_free.argtypes = [ctypes.c_void_p]

    def take(self) -> Trace:
        """The trace since the last call, after a synchronization, which is left out."""
        torch.npu.synchronize()
        taken = self._library.fake_cann_take()
        text = ctypes.string_at(taken).decode()
        self._library.fake_cann_free(taken)
        lines = [(line.partition(" ")[0], line.partition(" ")[2]) for line in text.splitlines()]
        assert lines.pop() == ("sync", "aclrtSynchronizeDevice"), lines
        kinds = {kind: tuple(text for k, text in lines if k == kind) for kind in ("launch", "copy", "sync")}
        return Trace(kinds["launch"], kinds["copy"], kinds["sync"], tuple(_strided(lines)))

    def during(self, run: Callable[[], Any]) -> tuple[Any, Trace]:
        """The result of `run`, and its trace."""
        self.take()
        result = run()
        return result, self.take()


def _strided(lines: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(kernel, argument) pairs; arguments are recorded before their kernel."""
    pending: list[str] = []
    for kind, text in lines:
        if kind == "strided":
            pending.append(text)
        elif kind == "launch":
            yield from ((text, shape) for shape in pending)
            pending = []
