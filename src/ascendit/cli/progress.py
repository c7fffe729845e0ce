"""How a run or a conversion is shown: a bar on a terminal, a plain line every 10 % elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from ascendit.errors import Cancelled
from ascendit.progress import ConversionProgress, Progress

if TYPE_CHECKING:
    from rich.console import Console

EXPERT_TITLES = {"transformer": "high-noise expert", "transformer_2": "low-noise expert"}
RECENT_STEPS = 8

REDRAW = 0.1  # seconds; events come for every few MiB


# ---- a run --------------------------------------------------------------------------------------


def progress_view(*, silent: bool) -> ProgressView:
    """The view that fits where stderr goes."""
    if silent:
        return ProgressView()
    return BarView() if sys.stderr.isatty() else LineView()


class ProgressMeter:
    """Turns events into text. Remembers the last steps for the pace and the time left."""

    def __init__(self) -> None:
        self.stage = ""
        """The stage of the last event; an error message names it."""
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def text(self, event: Progress) -> str:
        """`denoise (low-noise expert) 23/40  4.1 s/step  eta 1:10  38.2 GiB`."""
        if event.stage != self.stage:
            self.stage = event.stage
            self._seconds.clear()
        words = [_label(event)]
        if event.total > 1:
            words[0] += f" {event.step}/{event.total}"
        if event.stage == "denoise" and event.step and event.seconds > 0:
            self._seconds.append(event.seconds)
            pace = sum(self._seconds) / len(self._seconds)
            words += [f"{_short(pace)} s/step", f"eta {show_seconds(pace * (event.total - event.step))}"]
        if event.memory_bytes:
            words.append(show_bytes(event.memory_bytes))
        return "  ".join(words)


class ProgressView:
    """Shows nothing; the base of the other two. Use it as a context manager and call it with each event."""

    def __init__(self) -> None:
        self.meter = ProgressMeter()

    def __call__(self, event: Progress) -> None:
        self.show(event, self.meter.text(event))

    def show(self, event: Progress, text: str) -> None:
        """Put `text` on the screen, or not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the screen as it was found."""


class LineView(ProgressView):
    """Plain lines: one when a stage or an expert begins, then one for every 10 % of its steps."""

    def __init__(self, file: IO[str] | None = None) -> None:
        super().__init__()
        self._file = file
        self._last: tuple[object, ...] = ()

    def show(self, event: Progress, text: str) -> None:
        """Print a line when there is news."""
        steps = event.total > 1
        news = (event.stage, event.expert, 10 * event.step // event.total if steps else 0)
        if news != self._last and (event.step or not steps):
            self._last = news
            print(text, file=self._file or sys.stderr, flush=True)


class BarView(ProgressView):
    """One live line with a bar; gone when the run ends."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bars

        columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24)]
        self._bars = Bars(*columns, console=console or Console(stderr=True), transient=True)
        self._task = self._bars.add_task("starting", total=None)

    def show(self, event: Progress, text: str) -> None:
        """Move the bar."""
        from rich.markup import escape

        total = event.total if event.total > 1 else None
        self._bars.update(self._task, description=escape(text), completed=event.step, total=total)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


def _label(event: Progress) -> str:
    if event.expert is None:
        return event.stage
    return f"{event.stage} ({EXPERT_TITLES.get(event.expert, event.expert)})"


# ---- a conversion -------------------------------------------------------------------------------


def transfer_view(*, silent: bool) -> TransferView:
    """The view that fits where stderr goes."""
    if silent:
        return TransferView()
    return TransferBar() if sys.stderr.isatty() else TransferLines()


class TransferView:
    """Shows nothing; the base of the other two. Use it as a context manager and call it with each event."""

    def __call__(self, event: ConversionProgress) -> None:
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

    def __call__(self, event: ConversionProgress) -> None:
        news = (event.stage, 10 * event.done_bytes // max(event.total_bytes, 1))
        if news != self._last:
            self._last = news
            print(line_of(event), file=self._file or sys.stderr, flush=True)


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

    def __call__(self, event: ConversionProgress) -> None:
        now = time.monotonic()
        if now - self._drawn < REDRAW and event.done_bytes < event.total_bytes:
            return
        from rich.markup import escape

        self._drawn = now
        self._bars.update(
            self._task,
            description=escape(line_of(event)),
            completed=event.done_bytes,
            total=event.total_bytes,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


def line_of(event: ConversionProgress) -> str:
    """`transformer_2  61 %  34.1/56.2 GiB  2.81 GiB/s  eta 0:08`."""
    share = 100 * event.done_bytes // max(event.total_bytes, 1)
    done, total = show_bytes(event.done_bytes), show_bytes(event.total_bytes)
    words = [event.stage, f"{share} %", f"{done} of {total}"]
    if event.gib_per_s:
        words.append(f"{event.gib_per_s:.2f} GiB/s")
    if event.eta:
        words.append(f"eta {show_seconds(event.eta)}")
    return "  ".join(words)


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


# ---- words --------------------------------------------------------------------------------------


def show_seconds(seconds: float) -> str:
    """`0:07`, `1:10`, `1:02:03`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def show_bytes(size: int) -> str:
    """`38.2 GiB`, or `412 MiB` below one GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _short(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2g}"
