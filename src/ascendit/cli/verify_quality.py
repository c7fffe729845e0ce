"""`ascendit verify --quality`: the table of what each scheme and recipe costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ascendit.cli.render import Output, print_error, quiet_libraries, to_json
from ascendit.errors import QualityError, UsageError

if TYPE_CHECKING:
    from ascendit.cli.progress import ProgressView
    from ascendit.pipeline.quality import OnRow
    from ascendit.pipeline.quality_report import Quality, Row


def verify_quality(
    out: Output,
    model: str,
    names: Sequence[str],
    seeds: Sequence[int],
    limit: int,
    jobs: int,
    report: Path | None,
) -> None:
    """Measure, print the table and the verdicts. Exits with 1 when a case is below its limit.

    `report` is written anew after each row: it takes long, and what is done is not lost.
    """
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}", needs="at least 1", fix="--jobs 1", code="E-USE-01")
    start = time.perf_counter()

    def told(quality: Quality) -> dict[str, Any]:
        good = all(kept for _, kept in quality.verdicts())
        return quality.as_dict() | {"pass": good, "seconds": round(time.perf_counter() - start, 1)}

    def on_row(quality: Quality) -> None:
        if report is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(to_json(told(quality)) + "\n", encoding="utf-8")

    with out.work():
        quality = _measure(out, model, names, seeds, limit, jobs, on_row)
    failed = [row for row, kept in quality.verdicts() if not kept]
    error = _below(quality, failed).as_dict() if failed else None
    out.emit(told(quality) | ({"error": error} if error else {}))
    out.line(quality.table())
    for row, kept in quality.verdicts():
        word = "PASS" if kept else "FAIL"
        out.line(f"{word:<6}{row.name:<18}{row.lost(quality.base):>4} lost   at most {row.allowed()}")
    if error and not out.json:
        print_error(error)
    if error:
        raise typer.Exit(1)


def _measure(
    out: Output,
    model: str,
    names: Sequence[str],
    seeds: Sequence[int],
    limit: int,
    jobs: int,
    on_row: OnRow,
) -> Quality:
    from ascendit.cli.interrupt import Interrupt
    from ascendit.cli.progress import progress_view
    from ascendit.pipeline.quality import cases, choose, measure_quality
    from ascendit.pipeline.verify import pick

    scenes, chosen = pick(limit), choose(names) if names else cases()
    quiet_libraries()
    silent = out.quiet or out.json
    with progress_view(silent=silent) as view, Interrupt(silent=silent) as interrupt:
        tally = _Tally(view, len(scenes) * len(seeds) * (1 + len(chosen)))
        return measure_quality(
            model, chosen, scenes, seeds, jobs=jobs, cancel=interrupt.event, on_video=tally, on_row=on_row
        )


class _Tally:
    """Shows how many videos are made, and how many of the current case are right."""

    def __init__(self, view: ProgressView, total: int) -> None:
        self._view, self._total, self._done = view, total, 0
        self._case, self._made, self._right = "", 0, 0
        self._start = time.perf_counter()

    def __call__(self, case: str, right: bool) -> None:
        from ascendit.cli.progress import clock
        from ascendit.pipeline.progress import Progress

        if case != self._case:
            self._case, self._made, self._right = case, 0, 0
        self._done += 1
        self._made += 1
        self._right += right
        pace = (time.perf_counter() - self._start) / self._done
        text = (
            f"{case}: right {self._right}/{self._made}   video {self._done}/{self._total}  "
            f"{pace:.2g} s/video  eta {clock(pace * (self._total - self._done))}"
        )
        self._view.show(Progress(stage="denoise", step=self._done, total=self._total), text)


def _below(quality: Quality, failed: Sequence[Row]) -> QualityError:
    words = (f"{row.name} loses {row.lost(quality.base)}, at most {row.allowed()}" for row in failed)
    return QualityError(
        f"of {len(quality.base.right)} videos too many are wrong that BF16 gets right: {'; '.join(words)}",
        needs="no more than the limit of each case",
        fix="look at the layers in --report FILE; another scale rule, or a recipe that keeps more layers",
        code="E-OUT-03",
    )
