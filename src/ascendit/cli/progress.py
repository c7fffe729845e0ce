"""Progress of runs and conversions: a bar on a terminal, otherwise a plain line every 10 %, or nothing."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from ascendit.errors import escaped
from ascendit.progress import Progress
from ascendit.report import human_bytes

if TYPE_CHECKING:
    from rich.console import Console

EXPERT_TITLES = {"transformer": "high-noise expert", "transformer_2": "low-noise expert"}
RECENT_STEPS = 8
REDRAW = 0.1  # seconds; a conversion reports every few MiB


@contextmanager
def progress_view(*, silent: bool) -> Iterator[ProgressView]:
    """The view for the current stderr. A bar is removed at the end."""
    if silent:
        yield ProgressView()
    elif not sys.stderr.isatty():
        yield LineView()
    else:
        view = BarView()
        with view.bars:
            yield view


class ProgressView:
    """Base class of the views, which shows nothing. Call it with each event."""

    def __init__(self) -> None:
        self.stage = ""
        """Stage of the last event; `quantize` uses it to detect errors of the float model."""
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def __call__(self, event: Progress) -> None:
        if event.stage != self.stage:
            self.stage = event.stage
            self._seconds.clear()
        if event.unit == "step" and event.step and event.seconds > 0:
            self._seconds.append(event.seconds)
        self.show(event)

    def show(self, event: Progress, text: str = "") -> None:
        """Show the event. `text`: shown instead of the event's own text."""

    def text(self, event: Progress) -> str:
        """`denoise (low-noise expert) 23/40  4.1 s/step  eta 1:10  38.2 GiB`; for bytes, see `_bytes`."""
        if event.unit == "byte":
            return _bytes(event)
        texts = [event.stage]
        if event.expert is not None:
            texts[0] += f" ({EXPERT_TITLES.get(event.expert, event.expert)})"
        if event.total > 1:
            texts[0] += f" {event.step}/{event.total}"
        if event.stage == "denoise" and self._seconds:
            pace = sum(self._seconds) / len(self._seconds)
            shown = f"{pace:.1f}" if pace >= 1 else f"{pace:.2g}"
            texts += [f"{shown} s/step", f"eta {show_seconds(replace(event, seconds=pace).eta or 0)}"]
        if event.memory_bytes:
            texts.append(human_bytes(event.memory_bytes))
        return "  ".join(texts)


class LineView(ProgressView):
    """Plain lines: one when a stage or an expert starts, then one per 10 % of its steps."""

    def __init__(self, file: IO[str] | None = None) -> None:
        super().__init__()
        self._file = file
        self._last: tuple[object, ...] = ()

    def show(self, event: Progress, text: str = "") -> None:
        """Print a line if the stage or the expert has changed, or another 10 % is done."""
        counted = event.unit == "byte" or event.total > 1
        state = (event.stage, event.expert, 10 * event.step // max(event.total, 1) if counted else 0)
        if state != self._last and (event.step or event.unit == "byte" or not counted):
            self._last = state
            print(escaped(text or self.text(event)), file=self._file or sys.stderr, flush=True)


class BarView(ProgressView):
    """One live line with a bar, inside the context of `bars`."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bars

        columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24)]
        self.bars = Bars(*columns, console=console or Console(stderr=True), transient=True)
        self._task = self.bars.add_task("starting", total=None)
        self._drawn = ("", 0.0)

    def show(self, event: Progress, text: str = "") -> None:
        """Update the bar, at most every `REDRAW` seconds within a stage."""
        from rich.markup import escape

        seconds, (stage, drawn) = time.monotonic(), self._drawn
        if event.stage == stage and event.step < event.total and seconds - drawn < REDRAW:
            return
        self._drawn = (event.stage, seconds)
        total = event.total if event.total > 1 else None
        description = escape(escaped(text or self.text(event)))
        self.bars.update(self._task, description=description, completed=event.step, total=total)


def _bytes(event: Progress) -> str:
    """`transformer_2  61 %  34.1 GiB of 56.2 GiB  2.81 GiB/s  eta 0:08`."""
    share = 100 * event.step // max(event.total, 1)
    texts = [event.stage, f"{share} %", f"{human_bytes(event.step)} of {human_bytes(event.total)}"]
    if event.speed:
        texts.append(f"{event.speed / 2**30:.2f} GiB/s")
    if event.eta:
        texts.append(f"eta {show_seconds(event.eta)}")
    return "  ".join(texts)


def show_seconds(seconds: float) -> str:
    """Seconds as text: `0:07`, `1:10`, `1:02:03`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
