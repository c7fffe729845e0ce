"""Progress of runs and conversions: a bar on a terminal, otherwise a plain line every 10 %, or nothing."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

from ascendit.errors import escaped
from ascendit.progress import Progress
from ascendit.report import human_bytes, pace_text

if TYPE_CHECKING:
    from rich.console import Console

EXPERT_TITLES = {"transformer": "high-noise expert", "transformer_2": "low-noise expert"}
RECENT_STEPS = 8
NARROW, BAR = 80, 24  # columns; a narrower terminal shows no bar
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
        self.title = ""
        """Shown before each event, for example `video 3/8`."""
        self.columns: int | None = None
        """Columns of the terminal that are left for the text."""
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
        """`denoise (low-noise expert) 23/40  4.1 s/step  eta 1:10  38.2 GiB`, or for bytes
        `transformer_2  61 %  34.1 GiB of 56.2 GiB  2.81 GiB/s  eta 0:08`.

        Parts of least interest are left out until the text fits into `columns`.
        """
        parts = _byte_parts(event) if event.unit == "byte" else self._step_parts(event)
        parts = {"title": (self.title, ""), **parts}
        lengths = dict.fromkeys(parts, 0)
        text = _joined(parts, lengths)
        for name in SHORTEN:
            if self.columns is None or len(text) <= self.columns:
                break
            lengths[name] = -1
            text = _joined(parts, lengths)
        return text

    def _step_parts(self, event: Progress) -> dict[str, tuple[str, ...]]:
        expert = "" if event.expert is None else f" ({EXPERT_TITLES.get(event.expert, event.expert)})"
        count = f" {event.step}/{event.total}" if event.total > 1 else ""
        parts: dict[str, tuple[str, ...]] = {}
        parts["head"] = (f"{event.stage}{expert}{count}", f"{event.stage}{count}")
        if event.total > 1 and self._seconds:
            pace = sum(self._seconds) / len(self._seconds)
            shown = f"{pace:.1f}" if pace >= 1 else f"{pace:.2g}"
            unit = {"denoise": "step", "decode": "frame"}.get(event.stage, "step")
            parts["pace"] = (f"{shown} s/{unit}", "")
            parts["eta"] = (f"eta {show_seconds(replace(event, seconds=pace).eta or 0)}", "")
        return parts | {"memory": (human_bytes(event.memory_bytes) if event.memory_bytes else "", "")}


SHORTEN = ("memory", "amount", "pace", "head", "title", "eta")
"""Parts of a text in the order in which a narrow terminal loses or shortens them."""


def _joined(parts: Mapping[str, tuple[str, ...]], lengths: Mapping[str, int]) -> str:
    return "  ".join(filter(None, (texts[lengths[name]] for name, texts in parts.items())))


def _byte_parts(event: Progress) -> dict[str, tuple[str, ...]]:
    share = 100 * event.step // max(event.total, 1)
    speed, eta = event.speed, event.eta
    return {
        "head": (f"{event.stage}  {share} %",),
        "amount": (f"{human_bytes(event.step)} of {human_bytes(event.total)}", ""),
        "pace": (pace_text(speed) if speed else "", ""),
        "eta": (f"eta {show_seconds(eta)}" if eta else "", ""),
    }


class LineView(ProgressView):
    """Plain lines: one when a stage or an expert starts, then one per 10 % of its steps."""

    def __init__(self, file: IO[str] | None = None) -> None:
        super().__init__()
        self._file = file
        self._last: tuple[object, ...] = ()

    def show(self, event: Progress, text: str = "") -> None:
        """Print a line if the stage or the expert has changed, or another 10 % is done."""
        counted = event.unit == "byte" or event.total > 1
        state = (
            self.title,
            event.stage,
            event.expert,
            10 * event.step // max(event.total, 1) if counted else 0,
        )
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

        console = console or Console(stderr=True)
        columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}")]
        columns += [BarColumn(bar_width=BAR)] if console.width >= NARROW else []
        self.columns = console.width - (BAR + 3 if console.width >= NARROW else 2)
        self.bars = Bars(*columns, console=console, transient=True)
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


def show_seconds(seconds: float) -> str:
    """Seconds as text: `0:07`, `1:10`, `1:02:03`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
