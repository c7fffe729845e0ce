"""How a conversion is shown: a bar on a terminal, a plain line every 10 % elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from ascendit.cli.progress import clock, memory
from ascendit.convert.job import Progress
from ascendit.errors import Cancelled

if TYPE_CHECKING:
    from rich.console import Console

REDRAW = 0.1  # seconds; events come for every few MiB


class TransferView:
    """Shows nothing; the base of the other two. Use it as a context manager and call it with each event."""

    def __call__(self, event: Progress) -> None:
        """Show `event`, or not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the screen as it was found."""


class TransferLines(TransferView):
    """A line when a stage begins, and one for every 10 % of it."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self._file = file
        self._last: tuple[str, int] | None = None

    def __call__(self, event: Progress) -> None:
        news = (event.stage, 10 * event.done_bytes // max(event.total_bytes, 1))
        if news != self._last:
            self._last = news
            print(text(event), file=self._file or sys.stderr, flush=True)


class TransferBar(TransferView):
    """One live line with a bar; gone when the run ends."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bars

        columns: list[Any] = [SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}")]
        self._bars = Bars(*columns, console=console or Console(stderr=True), transient=True)
        self._task = self._bars.add_task("reading headers", total=None)
        self._drawn = 0.0

    def __call__(self, event: Progress) -> None:
        now = time.monotonic()
        if now - self._drawn < REDRAW and event.done_bytes < event.total_bytes:
            return
        from rich.markup import escape

        self._drawn = now
        self._bars.update(
            self._task, description=escape(text(event)), completed=event.done_bytes, total=event.total_bytes
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


def transfer_view(*, silent: bool) -> TransferView:
    """The view that fits where stderr goes."""
    if silent:
        return TransferView()
    return TransferBar() if sys.stderr.isatty() else TransferLines()


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C ends the command with a word about `--resume`."""
    try:
        yield
    except KeyboardInterrupt as e:
        raise Cancelled(
            "cancelled",
            needs="nothing; there is no output, and files that are whole wait beside its place",
            fix="the same command with --resume goes on, without it starts anew",
            code="E-CAN-01",
        ) from e


def text(event: Progress) -> str:
    """`transformer_2  61 %  34.1/56.2 GiB  2.81 GiB/s  eta 0:08`."""
    share = 100 * event.done_bytes // max(event.total_bytes, 1)
    done, total = memory(event.done_bytes), memory(event.total_bytes)
    words = [event.stage, f"{share} %", f"{done} of {total}"]
    if event.gib_per_s:
        words.append(f"{event.gib_per_s:.2f} GiB/s")
    if event.eta:
        words.append(f"eta {clock(event.eta)}")
    return "  ".join(words)
