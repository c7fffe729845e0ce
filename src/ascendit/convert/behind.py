"""A ShardWriter in a thread of its own: the next rows are encoded while these are written."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from ascendit.checkpoint.store import TensorInfo
from ascendit.checkpoint.write import ShardWriter

Data = bytes | bytearray | memoryview
WAITING = 2
"""Pieces that wait or are being written, at most; a ring of buffers needs one more."""


class Sink(Protocol):
    """Where `ExpertWriter` puts tensors: a file, or memory."""

    def done(self, name: str) -> bool: ...

    def append(self, name: str, data: Data) -> None: ...

    def move(self, info: TensorInfo, name: str) -> None: ...

    def flush(self) -> None: ...


class WriteBehind:
    """Calls `append` and `move` of a writer in their order, a little later.

    Data that is given must stay as it is until two more pieces have been taken, or until `flush` returns.
    What goes wrong there is raised by the next call here. As a context manager it ends the thread; the
    writer is the caller's to close.
    """

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._room = threading.Semaphore(WAITING)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ascendit-write", daemon=True)
        self._thread.start()

    def done(self, name: str) -> bool:
        """As of the writer: known from the beginning."""
        return self._writer.done(name)

    def append(self, name: str, data: Data) -> None:
        """The next bytes of a tensor. Waits while as many pieces as may are on their way."""
        self._put(lambda: self._writer.append(name, data))

    def move(self, info: TensorInfo, name: str) -> None:
        """A whole tensor from another file."""
        self._put(lambda: self._writer.move(info, name))

    def flush(self) -> None:
        """Wait until all is written."""
        for _ in range(WAITING):
            self._room.acquire()
        self._room.release(WAITING)
        self._raise()

    def _put(self, call: Callable[[], None]) -> None:
        self._room.acquire()
        self._raise()
        self._work.put(call)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (call := self._work.get()) is not None:
            try:
                if self._error is None:
                    call()
            except BaseException as e:  # raised where the caller can see it
                self._error = e
            self._room.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.put(None)
        self._thread.join()
        if error is None:
            self._raise()
