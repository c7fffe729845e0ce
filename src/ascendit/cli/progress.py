"""How a run is shown: a bar on a terminal, a plain line every 10 % elsewhere, or nothing."""

from __future__ import annotations

import sys
from collections import deque
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from ascendit.pipeline.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console

EXPERTS = {"transformer": "high-noise expert", "transformer_2": "low-noise expert"}
RECENT_STEPS = 8


class Meter:
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
            words += [f"{_short(pace)} s/step", f"eta {clock(pace * (event.total - event.step))}"]
        if event.memory_bytes:
            words.append(memory(event.memory_bytes))
        return "  ".join(words)


class ProgressView:
    """Shows nothing; the base of the other two. Use it as a context manager and call it with each event."""

    def __init__(self) -> None:
        self.meter = Meter()

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


def progress_view(*, silent: bool) -> ProgressView:
    """The view that fits where stderr goes."""
    if silent:
        return ProgressView()
    return BarView() if sys.stderr.isatty() else LineView()


def clock(seconds: float) -> str:
    """`0:07`, `1:10`, `1:02:03`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def memory(size: int) -> str:
    """`38.2 GiB`, or `412 MiB` below one GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _short(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2g}"


def _label(event: Progress) -> str:
    if event.expert is None:
        return event.stage
    return f"{event.stage} ({EXPERTS.get(event.expert, event.expert)})"
