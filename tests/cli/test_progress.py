"""The display of progress."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ascendit.cli.progress import (
    BarView,
    LineView,
    ProgressView,
    progress_view,
    show_seconds,
)
from ascendit.progress import Progress


def denoise(
    step: int, total: int = 40, seconds: float = 4.13, expert: str | None = "transformer_2"
) -> Progress:
    return Progress(
        stage="denoise",
        step=step,
        total=total,
        expert=expert,
        seconds=seconds,
        memory_bytes=int(38.2 * 2**30),
    )


def text_of(*events: Progress) -> str:
    """The text of the last of these events."""
    view = ProgressView()
    for event in events:
        view(event)
    return view.text(events[-1])


def test_the_line_of_a_step():
    assert text_of(denoise(23)) == "denoise (low-noise expert) 23/40  4.1 s/step  eta 1:10  38.2 GiB"
    text = text_of(denoise(1, expert=None, seconds=0.053))
    assert text.startswith("denoise 1/40  0.053 s/step  eta 0:02")


def test_the_pace_is_that_of_the_last_steps():
    events = [denoise(1, seconds=100), *(denoise(step, seconds=1) for step in range(2, 10))]
    assert "1.0 s/step  eta 0:31" in text_of(*events)


def test_the_pace_restarts_with_each_stage():
    text = text_of(denoise(40, seconds=100), Progress(stage="decode"), denoise(1, seconds=1))
    assert "1.0 s/step  eta 0:39" in text


def test_stages_without_steps():
    assert text_of(Progress(stage="decode", total=1, memory_bytes=412 * 2**20)) == "decode  412.0 MiB"
    assert text_of(Progress(stage="load", step=2, total=5)) == "load 2/5"


def test_the_view_knows_the_stage():
    view = ProgressView()
    view(denoise(1))
    assert view.stage == "denoise"


def test_a_title_and_the_pace_of_frames():
    view = ProgressView()
    view.title = "video 3/8"
    for step in range(3):
        event = Progress(stage="decode", step=step, total=5, seconds=2.0 * (step > 0))
        view(event)
    assert view.text(event) == "video 3/8  decode 2/5  2.0 s/frame  eta 0:06"


def test_small_loads_have_a_speed():
    event = Progress(stage="load", step=9 << 20, total=18 << 20, unit="byte", seconds=0.5)
    assert text_of(event) == "load  50 %  9.0 MiB of 18.0 MiB  18.0 MiB/s  eta 0:00"
    event = Progress(stage="load", step=9 << 30, total=18 << 30, unit="byte", seconds=9.0)
    assert text_of(event) == "load  50 %  9.0 GiB of 18.0 GiB  1.00 GiB/s  eta 0:09"
    assert "/s" not in text_of(Progress(stage="load", total=18 << 20, unit="byte"))


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (200, "video 3/8  denoise (low-noise expert) 23/40  4.1 s/step  eta 1:10  38.2 GiB"),
        (70, "video 3/8  denoise (low-noise expert) 23/40  4.1 s/step  eta 1:10"),
        (60, "video 3/8  denoise (low-noise expert) 23/40  eta 1:10"),
        (38, "video 3/8  denoise 23/40  eta 1:10"),
        (30, "denoise 23/40  eta 1:10"),
        (14, "denoise 23/40"),
    ],
)
def test_a_narrow_terminal_loses_the_time_left_last(columns, text):
    view = ProgressView()
    view.title, view.columns = "video 3/8", columns
    view(denoise(23))
    assert view.text(denoise(23)) == text


@pytest.mark.parametrize("width", [40, 79, 80])
def test_the_time_left_is_visible_on_a_terminal_of_40_columns(width):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    view = BarView(console)
    with view.bars:
        view(denoise(23))
        view.bars.refresh()
    assert "23/40" in file.getvalue() and "eta 1:10" in file.getvalue() and "…" not in file.getvalue()
    assert ("━" in file.getvalue()) == (width == 80)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (70, "1:10"), (3723, "1:02:03"), (59.7, "1:00")]
)
def test_clock(seconds, text):
    assert show_seconds(seconds) == text


def test_lines_every_tenth():
    file = io.StringIO()
    view = LineView(file)
    view(Progress(stage="load", total=5))
    for step in range(1, 6):
        view(Progress(stage="load", step=step, total=5))
    view(Progress(stage="decode", total=1))
    view(Progress(stage="decode", step=1, total=1))
    for step in range(1, 101):
        view(denoise(step, total=100, expert=None))
    lines = file.getvalue().splitlines()
    assert lines[:6] == ["load 1/5", "load 2/5", "load 3/5", "load 4/5", "load 5/5", "decode"]
    steps = [line.split()[1] for line in lines[6:]]
    assert steps == ["1/100", *(f"{n}/100" for n in range(10, 101, 10))]


def test_a_bar_on_a_terminal():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None, legacy_windows=False)
    view = BarView(console)
    with view.bars:
        view(denoise(23))
        view.bars.refresh()
    shown = file.getvalue()
    assert "denoise (low-noise expert) 23/40  4.1 s/step  eta 1:10  38.2 GiB" in shown
    assert "━" in shown
    assert shown.endswith("\x1b[2K")  # the line is gone at the end


def test_the_view_depends_on_stderr(monkeypatch):
    def view_type(silent: bool) -> type:
        with progress_view(silent=silent) as view:
            return type(view)

    assert view_type(silent=True) is ProgressView
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert view_type(silent=False) is LineView
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert view_type(silent=False) is BarView


def test_nothing_is_shown_when_silent(capsys):
    with progress_view(silent=True) as view:
        view(denoise(1))
    assert capsys.readouterr() == ("", "")
    assert view.stage == "denoise"


# ---- a conversion -------------------------------------------------------------------------------


def moved(i: int, stage: str = "transformer") -> Progress:
    """`i` of 20 GiB; 1 GiB of them counts as skipped after the third."""
    skipped = 2**30 if i > 3 else 0
    return Progress(
        stage=stage, step=i * 2**30, total=20 * 2**30, unit="byte", seconds=i / 2, skipped=skipped
    )


def test_lines_of_bytes_every_tenth():
    file = io.StringIO()
    view = LineView(file)
    for i in range(21):
        view(moved(i))
    lines = file.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "transformer  0 %  0 B of 20.0 GiB"
    assert lines[1] == "transformer  10 %  2.0 GiB of 20.0 GiB  2.00 GiB/s  eta 0:09"
    assert lines[-1] == "transformer  100 %  20.0 GiB of 20.0 GiB  1.90 GiB/s"


def test_one_view_shows_a_run_and_then_a_conversion():
    file = io.StringIO()
    view = LineView(file)
    view(denoise(40))
    view(moved(0))
    view(moved(20, stage="check"))
    assert [line.split("  ")[0] for line in file.getvalue().splitlines()] == [
        "denoise (low-noise expert) 40/40",
        "transformer",
        "check",
    ]


def test_a_bar_of_bytes_is_drawn_a_few_times_a_second():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None, legacy_windows=False)
    drawn: list[str] = []

    class RecordingView(BarView):
        def text(self, event: Progress) -> str:
            drawn.append(event.stage)
            return super().text(event)

    view = RecordingView(console)
    with view.bars:
        for i in range(20):
            view(moved(i))
        view(moved(20))
        view(moved(1, stage="check"))
    assert drawn == ["transformer", "transformer", "check"]
