"""`ascendit verify`: does a model do what it is asked? `--quality`: the table of what quantization costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendit.cli.output import Output, print_error, quiet_libraries, to_json
from ascendit.errors import QualityError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ascendit.cli.progress import ProgressView
    from ascendit.demo.adherence import Adherence, Reading
    from ascendit.demo.world import Scene
    from ascendit.verify.quality import OnRow
    from ascendit.verify.quality_table import Quality, QualityRow

LIMITS = {"overall": 0.90, "kept_back": 0.85}
"""Least share of videos that are right in everything."""
TITLES = {"overall": "all videos", "kept_back": "kept back"}


# ---- the command --------------------------------------------------------------------------------


def verify(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder of a model of the demo's world.")
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Use the small model that comes with ascendit.")
    ] = False,
    adherence: Annotated[
        bool, typer.Option("--adherence", help="Judge from the pixels whether videos follow their prompts.")
    ] = False,
    quality: Annotated[
        bool,
        typer.Option("--quality", help="Hold every scheme and recipe against BF16: a table in Markdown."),
    ] = False,
    cases: Annotated[
        list[str] | None,
        typer.Option("--case", metavar="NAME", help="With --quality: only this row, or a recipe's file."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", metavar="N", help="Seeds for each prompt; 2, with --quality 1."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            help="Take N of the 432 prompts, evenly spread; all, with --quality 192.",
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", metavar="N", help="With --quality: videos that are made at a time.")
    ] = 1,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write the counts as JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    swap_experts: Annotated[
        bool, typer.Option("--swap-experts", help="Control: the experts in each other's place.")
    ] = False,
) -> None:
    """Check that a model does what it is asked. Prints the counts, and PASS or FAIL."""
    out: Output = ctx.obj
    seeds = seeds if seeds is not None else 1 if quality else 2
    name = _check_call(model, demo=demo, checks=adherence + quality, seeds=seeds, report=report)
    if quality:
        _check_swap(swap_experts)
        verify_quality(out, name, cases or (), range(seeds), 192 if limit is None else limit, jobs, report)
        return
    start = time.perf_counter()
    with out.work():
        result = _measure(name, list(range(seeds)), limit, swap_experts, out)
    failed, verdict = _judge(result)
    told = result.as_dict() | {
        "model": name,
        "seeds": seeds,
        "swapped_experts": swap_experts,
        "limits": LIMITS,
        "pass": not failed,
        "seconds": round(time.perf_counter() - start, 1),
    }
    error = _below(failed).as_dict() if failed else None
    if report is not None:
        _write(report, told)
    out.emit(told | ({"error": error} if error else {}))
    out.line(result.table())
    for line in verdict:
        out.line(line)
    if error and not out.json:
        print_error(error)
    if failed:
        raise typer.Exit(1)


def _check_call(model: str | None, *, demo: bool, checks: int, seeds: int, report: Path | None) -> str:
    """The model's name. Raises UsageError for a call that cannot be done, before anything runs."""
    from ascendit.pipeline.video import check_writable

    if checks != 1:
        raise UsageError(
            "two checks at a time" if checks else "no check was asked for",
            needs="the name of one check: --adherence or --quality",
            fix="ascendit verify --demo --adherence",
            code="E-USE-01",
        )
    if demo == (model is not None):
        raise UsageError(
            "--demo and a MODEL" if demo else "no model",
            needs="one of the two",
            fix="--demo",
            code="E-USE-01",
        )
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}", needs="at least 1 seed", fix="--seeds 2", code="E-USE-01")
    if report is not None:
        if report.exists():
            raise UsageError(
                f"--report {report} exists already",
                needs="a free name",
                fix="choose another name",
                code="E-USE-03",
            )
        check_writable(report)
    return model or "demo"


# ---- adherence ----------------------------------------------------------------------------------


def _judge(result: Adherence) -> tuple[list[str], list[str]]:
    """(groups below their limit, a line for every group). A group without videos is not judged."""
    failed, lines = [], []
    for key, limit in LIMITS.items():
        counts = getattr(result, key)
        share, word = counts.share(), "PASS" if counts.total else "-"
        if counts.total and share < limit:
            failed.append(f"{TITLES[key]} {share:.1%}")
            word = "FAIL"
        lines.append(f"{word:<6}{TITLES[key]:<12}{share:7.1%}   at least {limit:.0%}")
    return failed, lines


def _measure(name: str, seeds: list[int], limit: int | None, swap: bool, out: Output) -> Adherence:
    import numpy as np

    import ascendit
    from ascendit.cli.interruptions import Interrupt
    from ascendit.cli.progress import progress_view
    from ascendit.demo import world
    from ascendit.demo.adherence import measure_adherence, pick

    scenes = pick(limit) if limit is not None else list(world.scenes())
    quiet_libraries()
    pipe = ascendit.load(name)
    if swap:
        _swap_experts(pipe)
    silent = out.quiet or out.json
    with progress_view(silent=silent) as view, Interrupt(silent=silent) as interrupt:

        def make(prompt: str, seed: int) -> NDArray[np.uint8]:
            interrupt.check()
            request = pipe.request(prompt, seed=seed)
            try:
                frames: NDArray[np.uint8] = pipe.run(request, cancel=interrupt.event).frames
                return frames
            except QualityError:  # a black video is a wrong answer, not the end of the check
                return np.zeros((request.num_frames, request.height, request.width, 3), np.uint8)

        return measure_adherence(make, scenes, seeds, _AdherenceTally(view, len(scenes) * len(seeds)))


class _AdherenceTally:
    """Shows how many videos are judged, and how many of them are right."""

    def __init__(self, view: ProgressView, total: int) -> None:
        self._view, self._total, self._done, self._right = view, total, 0, 0
        self._start = time.perf_counter()

    def __call__(self, scene: Scene, seed: int, reading: Reading) -> None:
        from ascendit.cli.progress import show_seconds
        from ascendit.progress import Progress

        self._done += 1
        self._right += all(reading.right(scene).values())
        pace = (time.perf_counter() - self._start) / self._done
        text = (
            f"judged {self._done}/{self._total}  right {self._right / self._done:.1%}  "
            f"{pace:.2g} s/video  eta {show_seconds(pace * (self._total - self._done))}"
        )
        self._view.show(Progress(stage="denoise", step=self._done, total=self._total), text)


def _check_swap(swap: bool) -> None:
    if swap:
        raise UsageError(
            "--swap-experts with --quality",
            needs="--adherence, which it is the control of",
            fix="leave it out",
            code="E-USE-01",
        )


def _swap_experts(pipe: Any) -> None:
    if getattr(pipe, "transformer_2", None) is None:
        raise UsageError(
            "--swap-experts with one expert",
            needs="a cascade of two experts",
            fix="leave it out",
            code="E-USE-01",
        )
    pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer


def _below(failed: list[str]) -> QualityError:
    return QualityError(
        f"prompt adherence is below its limit: {', '.join(failed)}",
        needs=", ".join(f"{TITLES[key]} at least {limit:.0%}" for key, limit in LIMITS.items()),
        fix="--report FILE lists each failure; check the weights with ascendit inspect",
        code="E-OUT-03",
    )


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(data) + "\n", encoding="utf-8")


# ---- --quality ----------------------------------------------------------------------------------


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
            _write(report, told(quality))

    with out.work():
        quality = _measure_quality(out, model, names, seeds, limit, jobs, on_row)
    failed = [row for row, kept in quality.verdicts() if not kept]
    error = _below_limits(quality, failed).as_dict() if failed else None
    out.emit(told(quality) | ({"error": error} if error else {}))
    out.line(quality.table())
    for row, kept in quality.verdicts():
        word = "PASS" if kept else "FAIL"
        out.line(f"{word:<6}{row.name:<18}{row.lost(quality.base):>4} lost   at most {row.allowed()}")
    if error and not out.json:
        print_error(error)
    if error:
        raise typer.Exit(1)


def _measure_quality(
    out: Output,
    model: str,
    names: Sequence[str],
    seeds: Sequence[int],
    limit: int,
    jobs: int,
    on_row: OnRow,
) -> Quality:
    from ascendit.cli.interruptions import Interrupt
    from ascendit.cli.progress import progress_view
    from ascendit.demo.adherence import pick
    from ascendit.verify.quality import choose, default_cases, measure_quality

    scenes, chosen = pick(limit), choose(names) if names else default_cases()
    quiet_libraries()
    silent = out.quiet or out.json
    with progress_view(silent=silent) as view, Interrupt(silent=silent) as interrupt:
        tally = _QualityTally(view, len(scenes) * len(seeds) * (1 + len(chosen)))
        return measure_quality(
            model, chosen, scenes, seeds, jobs=jobs, cancel=interrupt.event, on_video=tally, on_row=on_row
        )


class _QualityTally:
    """Shows how many videos are made, and how many of the current case are right."""

    def __init__(self, view: ProgressView, total: int) -> None:
        self._view, self._total, self._done = view, total, 0
        self._case, self._made, self._right = "", 0, 0
        self._start = time.perf_counter()

    def __call__(self, case: str, right: bool) -> None:
        from ascendit.cli.progress import show_seconds
        from ascendit.progress import Progress

        if case != self._case:
            self._case, self._made, self._right = case, 0, 0
        self._done += 1
        self._made += 1
        self._right += right
        pace = (time.perf_counter() - self._start) / self._done
        text = (
            f"{case}: right {self._right}/{self._made}   video {self._done}/{self._total}  "
            f"{pace:.2g} s/video  eta {show_seconds(pace * (self._total - self._done))}"
        )
        self._view.show(Progress(stage="denoise", step=self._done, total=self._total), text)


def _below_limits(quality: Quality, failed: Sequence[QualityRow]) -> QualityError:
    words = (f"{row.name} loses {row.lost(quality.base)}, at most {row.allowed()}" for row in failed)
    return QualityError(
        f"of {len(quality.base.right)} videos too many are wrong that BF16 gets right: {'; '.join(words)}",
        needs="no more than the limit of each case",
        fix="look at the layers in --report FILE; another scale rule, or a recipe that keeps more layers",
        code="E-OUT-03",
    )
