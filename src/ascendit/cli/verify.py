"""`ascendit verify`: check the quality of a model's videos, or of every way to quantize it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ascendit.cli.interruptions import Interrupt
from ascendit.cli.main import Json, flag
from ascendit.cli.output import Output, quiet_libraries
from ascendit.cli.progress import ProgressView, progress_view, show_seconds
from ascendit.errors import QualityError, UsageError
from ascendit.pages.page import check_report_file, write_report
from ascendit.progress import Progress

if TYPE_CHECKING:
    from ascendit.verify.quality_table import Quality


def verify(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder of a model of the demo world.")
    ] = None,
    demo: Annotated[bool, flag("--demo", "Use the small demo model included with ascendit.")] = False,
    adherence: Annotated[
        bool, flag("--adherence", "Check from pixels whether videos match their prompts.")
    ] = False,
    quality: Annotated[
        bool, flag("--quality", "Compare every scheme and recipe with BF16: a Markdown table.")
    ] = False,
    cases: Annotated[
        list[str] | None, flag("--case NAME", "With --quality: only this row, or a recipe file; repeatable.")
    ] = None,
    seeds: Annotated[int | None, flag("--seeds N", "Seeds per prompt; default 2, with --quality 1.")] = None,
    limit: Annotated[
        int | None,
        flag("--limit N", "Number of prompts, evenly spread; default 432, with --quality 192."),
    ] = None,
    jobs: Annotated[int, flag("--jobs N", "With --quality: videos generated in parallel.")] = 1,
    report: Annotated[
        Path | None, flag("--report FILE", "Write the results: a page with plots (.html), or JSON (.json).")
    ] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace an existing report.")] = False,
    as_json: Json = False,
    swap_experts: Annotated[
        bool, flag("--swap-experts", "With --adherence: exchange the experts, as a control.")
    ] = False,
) -> None:
    """Check the quality of a model's videos. Prints counts, and PASS or FAIL."""
    out: Output = ctx.obj
    seeds = seeds if seeds is not None else 1 if quality else 2
    name = _check_call(model, demo=demo, checks=adherence + quality, seeds=seeds)
    if report is not None:
        check_report_file(report, overwrite=overwrite)
    if not quality:
        verify_adherence(out, name, range(seeds), limit, report, swap_experts)
        return
    _check_quality_call(jobs, swap_experts)
    verify_quality(out, name, cases or (), range(seeds), 192 if limit is None else limit, jobs, report)


def _check_call(model: str | None, *, demo: bool, checks: int, seeds: int) -> str:
    """Check the flags and return the model's name. Raises UsageError for an invalid call."""
    if checks != 1:
        raise UsageError(
            "two checks in one call" if checks else "no check selected",
            needs="one check: --adherence or --quality",
            fix="ascendit verify --demo --adherence",
        )
    if demo == (model is not None):
        raise UsageError(
            "--demo and a MODEL" if demo else "no model",
            needs="one of the two",
            fix="omit MODEL" if demo else "--demo",
        )
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}", needs="at least 1 seed", fix="--seeds 2")
    return model or "demo"


def _check_model(out: Output, name: str) -> str:
    """A first line about the model, which is checked before torch is imported.

    Raises the errors of `prepare_model`.
    """
    from ascendit.pipeline.job import prepare_model
    from ascendit.pipeline.options import LoadOptions

    with out.work():
        model = prepare_model(LoadOptions(model=name))
    return f"verifying {model.defaults.model} in {model.layout.root}; it is loaded first"


def _check_quality_call(jobs: int, swap_experts: bool) -> None:
    if swap_experts:
        got, needs = "--swap-experts with --quality", "--adherence, which it is a control for"
        raise UsageError(got, needs=needs, fix="omit --swap-experts")
    if jobs < 1:
        raise UsageError(f"--jobs {jobs}", needs="at least 1", fix="--jobs 1")


class Tally:
    """Shows the number of videos, and how many of the current case are right."""

    def __init__(self, view: ProgressView, total: int) -> None:
        self._view, self._total, self._done = view, total, 0
        self._case, self._in_case, self._right = "", 0, 0
        self._start = time.perf_counter()

    def __call__(self, case: str, right: bool) -> None:
        """Count one more video of this case; the name of a single case is ""."""
        if case != self._case:
            self._case, self._in_case, self._right = case, 0, 0
        self._done += 1
        self._in_case += 1
        self._right += right
        text = f"judged {self._done}/{self._total}  right {self._right / self._done:.1%}"
        if case:
            text = f"{case}: right {self._right}/{self._in_case}   video {self._done}/{self._total}"
        pace = (time.perf_counter() - self._start) / self._done
        text += f"  {pace:.2g} s/video  eta {show_seconds(pace * (self._total - self._done))}"
        self._view.show(Progress(stage="denoise", step=self._done, total=self._total), text)


def verify_adherence(
    out: Output, model: str, seeds: Sequence[int], limit: int | None, report: Path | None, swap_experts: bool
) -> None:
    """Judge the videos, and print counts and verdicts. Exits with code 1 if a group is below its limit."""
    from ascendit.demo import world
    from ascendit.demo.adherence import pick

    start = time.perf_counter()
    scenes = pick(limit) if limit is not None else list(world.scenes())
    out.note(_check_model(out, model))
    from ascendit.pipeline.job import load
    from ascendit.verify.adherence import (
        LIMITS,
        adherence_error,
        adherence_page,
        check_adherence,
        verdict_lines,
    )

    quiet_libraries()
    with out.work(), progress_view(silent=out.silent) as view:
        pipe = load(model)
        with Interrupt(silent=out.silent) as interrupt:
            tally = Tally(view, len(scenes) * len(seeds))
            result = check_adherence(
                pipe, scenes, seeds, swap_experts=swap_experts, cancel=interrupt.event, on_video=tally
            )
    error = adherence_error(result)
    data = result.as_dict() | {
        "model": model,
        "seeds": len(seeds),
        "swapped_experts": swap_experts,
        "limits": LIMITS,
        "pass": error is None,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if report is not None:
        write_report(report, data, lambda: adherence_page(result, model))
    out.result(data, [*result.table().split("\n"), *verdict_lines(result)], error)


def verify_quality(
    out: Output,
    model: str,
    names: Sequence[str],
    seeds: Sequence[int],
    limit: int,
    jobs: int,
    report: Path | None,
) -> None:
    """Measure every case, and print the table and the verdicts.

    Exits with code 1 if a case is over its limit.

    `report` is rewritten after each row, so that an interrupted run keeps its results.
    """
    from ascendit.demo.adherence import pick
    from ascendit.verify.quality_table import choose_cases, default_cases

    start = time.perf_counter()
    scenes, cases = pick(limit), choose_cases(names) if names else default_cases()
    out.note(_check_model(out, model))
    from ascendit.verify.quality import measure_quality

    def report_data(quality: Quality) -> dict[str, object]:
        passed = all(within for _, within in quality.verdicts())
        return quality.as_dict() | {"pass": passed, "seconds": round(time.perf_counter() - start, 1)}

    def on_row(quality: Quality) -> None:
        if report is not None:
            write_report(report, report_data(quality), quality.page)

    quiet_libraries()
    with out.work(), progress_view(silent=out.silent) as view, Interrupt(silent=out.silent) as interrupt:
        tally = Tally(view, len(scenes) * len(seeds) * (1 + len(cases)))
        quality = measure_quality(
            model, cases, scenes, seeds, jobs=jobs, cancel=interrupt.event, on_video=tally, on_row=on_row
        )
    out.result(report_data(quality), _quality_lines(quality), _quality_error(quality))


def _quality_lines(quality: Quality) -> Iterator[str]:
    yield from quality.table().split("\n")
    for row, within in quality.verdicts():
        verdict = "PASS" if within else "FAIL"
        yield f"{verdict:<6}{row.name:<18}{row.lost(quality.base):>4} lost   at most {row.allowed()}"


def _quality_error(quality: Quality) -> QualityError | None:
    failed = [row for row, within in quality.verdicts() if not within]
    if not failed:
        return None
    losses = (f"{row.name} loses {row.lost(quality.base)}, at most {row.allowed()}" for row in failed)
    return QualityError(
        f"too many of {len(quality.base.right)} videos are right in BF16 only: {'; '.join(losses)}",
        needs="losses within the limit of each case",
        fix="see the layers in --report FILE; use another scale rule, or a recipe that excludes more layers",
        code="E-OUT-03",
    )
