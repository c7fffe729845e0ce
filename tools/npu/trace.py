"""What the stub CANN saw: kernels launched, bytes copied, waits. In the process that runs over it."""

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
    """`launched`: kernels in order. `copied`: `H2D 512` and such. `waited`: where the host stood still.

    `strided`: (kernel, `18x64/192x1`) for each argument that is not contiguous.
    """

    launched: tuple[str, ...]
    copied: tuple[str, ...]
    waited: tuple[str, ...]
    strided: tuple[tuple[str, str], ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Kernel -> how often, the most frequent first."""
        return dict(Counter(self.launched).most_common())

    @property
    def host(self) -> list[str]:
        """Everything for which the host stood still or touched the device's memory."""
        return [*self.copied, *self.waited]


class Stub:
    """The stub as it is loaded in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(LIBRARY)
        self._library.fake_cann_take.restype = ctypes.c_void_p
        self._library.fake_cann_free.argtypes = [ctypes.c_void_p]

    def take(self) -> Trace:
        """Since the last call, everything queued included; the wait for that is left out."""
        torch.npu.synchronize()
        taken = self._library.fake_cann_take()
        text = ctypes.string_at(taken).decode()
        self._library.fake_cann_free(taken)
        lines = [(line.partition(" ")[0], line.partition(" ")[2]) for line in text.splitlines()]
        assert lines.pop() == ("sync", "aclrtSynchronizeDevice"), lines
        kinds = {kind: tuple(rest for k, rest in lines if k == kind) for kind in ("launch", "copy", "sync")}
        return Trace(kinds["launch"], kinds["copy"], kinds["sync"], tuple(_strided(lines)))

    def during(self, run: Callable[[], Any]) -> tuple[Any, Trace]:
        """What `run` gives, and its trace."""
        self.take()
        result = run()
        return result, self.take()


def _strided(lines: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Arguments are described before their kernel is launched."""
    waiting: list[str] = []
    for kind, rest in lines:
        if kind == "strided":
            waiting.append(rest)
        elif kind == "launch":
            yield from ((rest, shape) for shape in waiting)
            waiting = []
