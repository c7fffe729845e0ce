"""What ends a run early: Ctrl-C, and out of memory with how much, in which stage and which flag helps."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Self

from ascendit.errors import Cancelled, OutOfMemory

PHRASES = ("not enough memory", "can't allocate memory", "out of memory", "cannot allocate memory")
MEMINFO = Path("/proc/meminfo")


# ---- Ctrl-C -------------------------------------------------------------------------------------


def cancelled() -> Cancelled:
    """The error that ends a command after Ctrl-C."""
    return Cancelled(
        "cancelled",
        needs="nothing; no file was left behind",
        fix="run the same command again",
    )


class Interrupt:
    """The first Ctrl-C asks the run to stop between two steps, the second stops at once.

    `event` goes to the run as `cancel=`. Outside the main thread Ctrl-C is left as it is.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self.event = threading.Event()
        self._silent = silent
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            before = signal.default_int_handler if self._before is None else self._before
            signal.signal(signal.SIGINT, before)

    def check(self) -> None:
        """Raise Cancelled if Ctrl-C came."""
        if self.event.is_set():
            raise cancelled()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.event.is_set():
            raise KeyboardInterrupt
        self.event.set()
        if not self._silent:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


# ---- out of memory ------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how PyTorch, a driver or Python says that memory ran out."""
    if isinstance(error, (MemoryError, OutOfMemory)):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(p in str(error).lower() for p in PHRASES)


def out_of_memory(error: BaseException, stage: str = "", device: str = "cpu") -> OutOfMemory:
    """The error to show. `stage`: of the progress events; `device`: as given to `--device`."""
    if isinstance(error, OutOfMemory):
        return error
    text = str(error)
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?[kKMGT]?i?[bB]\w*)", text)
    free = re.search(r"([\d.]+ [KMG]iB) is free", text)
    left = free[1] if free else (_host_memory() if device == "cpu" else "")
    return OutOfMemory(
        f"out of memory on {device}" + (f" in stage {stage}" if stage else ""),
        needs=(f"{_readable(asked[1])} more" if asked else "more memory")
        + (f"; {left} is free" if left else ""),
        fix="a smaller --size or --frames; --text-on drop frees the text encoder after use",
    )


def _readable(size: str) -> str:
    """`68719476736 bytes` as `64.0 GiB`; other texts as they are."""
    found = re.fullmatch(r"(\d+) bytes\w*", size)
    return f"{int(found[1]) / 2**30:.1f} GiB" if found else size


def _host_memory() -> str:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())
    except OSError:
        return ""
    return f"{int(found[1]) / 2**20:.1f} GiB" if found else ""
