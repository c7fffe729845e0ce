"""Ctrl-C: the first stops a run between two steps, the second immediately."""

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
        needs="nothing: no file was written",
        fix="run the same command again",
    )


def ignore_ctrl_c() -> None:
    """Ignore further Ctrl-C, which would break the end of the process in the middle of its clean-up."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Interrupt:
    """The first Ctrl-C sets `event`, the `cancel` of a run; the second raises KeyboardInterrupt.

    Has no effect outside the main thread.
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
        """Raise Cancelled (E-CAN-01) if Ctrl-C was pressed."""
        if self.event.is_set():
            raise cancelled()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.event.is_set():
            raise KeyboardInterrupt
        self.event.set()
        if not self._silent:
            # not print(): the signal may interrupt another print()
            os.write(2, b"\nstopping after this step or frame; press Ctrl-C again to stop immediately\n")
