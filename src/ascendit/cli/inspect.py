"""`ascendit inspect`: the contents of a checkpoint, and the differences between two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ascendit.cli.main import ANY_MODEL, Json, completion, flag
from ascendit.cli.output import Output
from ascendit.errors import UsageError


def inspect(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help=ANY_MODEL, autocompletion=completion("MODEL"))],
    layers: Annotated[
        bool, flag("--layers", "One row per layer and tensor: scheme, shape, bytes, dtypes.")
    ] = False,
    check: Annotated[
        bool, flag("--check", "Read the files and compare them with their recorded sizes and sha256.")
    ] = False,
    other: Annotated[
        str | None,
        flag("--diff OTHER", "Show the differences between PATH and OTHER; exit code 1 if any."),
    ] = None,
    values: Annotated[
        bool,
        flag(
            "--values",
            "With --diff: decode both and compare the numbers: SQNR of every layer; the exit code is theirs.",
        ),
    ] = False,
    report: Annotated[
        Path | None, flag("--report FILE", "With --values: write a page with plots (.html), or JSON (.json).")
    ] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace an existing report.")] = False,
    as_json: Json = False,
) -> None:
    """Show the contents of a checkpoint. Parts, schemes, engines, limits, problems.

    Reads headers only, without --check and --values.
    """
    out: Output = ctx.obj
    _check_flags(other, layers=layers, values=values, report=report)
    if other is None:
        ok = _inspect(out, path, layers, check)
    else:
        ok = _diff(out, path, other, check=check, values=values, report=report, overwrite=overwrite)
    if not ok:
        ctx.exit(1)


def _check_flags(other: str | None, *, layers: bool, values: bool, report: Path | None) -> None:
    if other is None and values:
        raise UsageError("--values without --diff", needs="two models to compare", fix="add --diff OTHER")
    if other is not None and layers:
        raise UsageError(
            "--layers and --diff",
            needs="one of them",
            fix="omit --layers; --json lists the differences of all layers",
        )
    if report is not None and not values:
        raise UsageError(
            f"--report {report} without --values",
            needs="a comparison of numbers: --diff OTHER --values",
            fix="add --values" if other is not None else "add --diff OTHER --values, or use --json",
        )


def _inspect(out: Output, path: str, layers: bool, check: bool) -> bool:
    from ascendit.cli.progress import progress_view
    from ascendit.inspect.checkpoint import inspect as inspect_checkpoint

    with out.work(), progress_view(silent=out.silent or not check) as view:
        report = inspect_checkpoint(path, check=True, on_progress=view) if check else inspect_checkpoint(path)
    lines = report.layer_lines(out.width) if layers else report.lines(out.width)
    out.result(report.as_dict(layers=layers), lines, colour=True)
    for problem in report.problem_texts() if layers else ():
        out.note(problem)
    return report.ok


def _diff(out: Output, path: str, other: str, **options: Any) -> bool:
    from ascendit.cli.progress import progress_view
    from ascendit.inspect.diff import diff

    reads = options["check"] or options["values"]
    with out.work(), progress_view(silent=out.silent or not reads) as view:
        result = diff(path, other, **options, on_progress=view)
    out.result(result.as_dict(), result.lines(out.width), colour=True)
    if options["report"]:
        out.note(f"report: {options['report']}")
    return result.same and result.a.ok and result.b.ok
