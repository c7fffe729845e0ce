"""One call at a time: a lock for objects that must not be used by two threads at once, and cancellation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ascendit.errors import Cancelled, UsageError

POLL_SECONDS = 0.05
"""A waiting call notices its cancellation within this time."""


class Stop(Protocol):
    """A cancellation signal, for example threading.Event."""

    def is_set(self) -> bool: ...


def stop_if(cancel: Stop | None) -> None:
    """Raise Cancelled (E-CAN-01) if the caller has cancelled the run."""
    if cancel is not None and cancel.is_set():
        raise Cancelled("cancelled", needs="nothing: no file was written", fix="run it again")


class Exclusive:
    """A lock for calls that must not overlap; a copy, a pickle or a forked process has a free one.

    `name`: the object that it guards, for errors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._reset()

    def _reset(self) -> None:
        self._process, self._free = os.getpid(), threading.Condition()
        self._users: list[int] = []
        self.shared: object = None
        """The `shared` of the calls in progress; None if there are none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Exclusive, (self._name,)

    @contextmanager
    def hold(
        self, cancel: Stop | None = None, *, shared: object = None, check: Callable[[], object] | None = None
    ) -> Iterator[None]:
        """Wait for the calls of other threads to end, then hold the lock.

        Calls with an equal `shared` may overlap. `check` is called while it waits, and may raise. Raises
        Cancelled (E-CAN-01) if `cancel` is set while it waits, UsageError (E-USE-01) if this thread holds the
        lock already and would wait for ever.
        """
        if self._process != os.getpid():  # after a fork, no other thread exists
            self._reset()
        value, thread = object() if shared is None else shared, threading.get_ident()
        with self._free:
            while self._users and self.shared != value:
                if thread in self._users:
                    raise self._nested()
                stop_if(cancel)
                if check is not None:
                    check()
                self._free.wait(POLL_SECONDS)
            self._users.append(thread)
            self.shared = value
        try:
            yield
        finally:
            with self._free:
                self._users.remove(thread)
                self.shared = value if self._users else None
                self._free.notify_all()

    def _nested(self) -> UsageError:
        return UsageError(
            f"{self._name} was called inside a run of its own, for example by on_progress",
            needs="one run at a time: this call would wait for its caller for ever",
            fix="make the call after the run, in another thread, or with a second pipeline",
        )
