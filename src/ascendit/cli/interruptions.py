"""Ctrl-C: it asks a run to stop between two steps, then stops it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

from ascendit.errors import Cancelled


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
