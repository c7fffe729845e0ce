"""`ascendit inspect`: the contents of a checkpoint, and the differences between two."""

from __future__ import annotations

from typing import Annotated

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
    as_json: Json = False,
) -> None:
    """Show the contents of a checkpoint. Parts, schemes, engines, limits, problems.

    Reads headers only, without --check and --values.
    """
    out: Output = ctx.obj
    _check_flags(other, layers=layers, values=values)
    if other is None:
        ok = _inspect(out, path, layers, check)
    else:
        ok = _diff(out, path, other, check=check, values=values)
    if not ok:
        ctx.exit(1)


def _check_flags(other: str | None, *, layers: bool, values: bool) -> None:
    if other is None and values:
        raise UsageError("--values without --diff", needs="two models to compare", fix="add --diff OTHER")
    if other is not None and layers:
        raise UsageError(
            "--layers and --diff",
            needs="one of them",
            fix="omit --layers; --json lists the differences of all layers",
        )


def _inspect(out: Output, path: str, layers: bool, check: bool) -> bool:
    from ascendit.cli.progress import progress_view
    from ascendit.inspect.checkpoint import inspect as inspect_checkpoint

    with out.work(), progress_view(silent=out.silent or not check) as view:
        report = inspect_checkpoint(path, check=True, on_progress=view) if check else inspect_checkpoint(path)
    out.result(report.as_dict(layers=layers), report.layer_lines() if layers else report.lines())
    for problem in report.problem_texts() if layers else ():
        out.note(problem)
    return report.ok


def _diff(out: Output, path: str, other: str, *, check: bool, values: bool) -> bool:
    from ascendit.cli.progress import progress_view
    from ascendit.inspect.diff import diff

    with out.work(), progress_view(silent=out.silent or not (check or values)) as view:
        result = diff(path, other, check=check, values=values, on_progress=view)
    out.result(result.as_dict(), result.lines())
    return result.same and result.a.ok and result.b.ok
