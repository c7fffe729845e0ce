"""`ascendit inspect`: the contents of a checkpoint, and the differences between two."""

from __future__ import annotations

from typing import Annotated

import typer

from ascendit.cli.main import ANY_MODEL, Json, flag
from ascendit.cli.output import Output
from ascendit.errors import UsageError


def inspect(
    ctx: typer.Context,
    path: Annotated[str, typer.Argument(metavar="PATH", help=ANY_MODEL)],
    layers: Annotated[
        bool, flag("--layers", "One row per layer and tensor: scheme, shape, bytes, dtypes.")
    ] = False,
    other: Annotated[
        str | None, flag("--diff OTHER", "Show the differences between PATH and OTHER; exit code 1 if any.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the contents of a checkpoint. Parts, schemes, engines, limits, problems; reads headers only."""
    out: Output = ctx.obj
    ok = _diff(out, path, other, layers) if other is not None else _inspect(out, path, layers)
    if not ok:
        ctx.exit(1)


def _inspect(out: Output, path: str, layers: bool) -> bool:
    from ascendit.inspect.checkpoint import inspect as inspect_checkpoint

    with out.work():
        report = inspect_checkpoint(path)
    out.result(report.as_dict(layers=layers), report.layer_lines() if layers else report.lines())
    for problem in report.problem_texts() if layers else ():
        out.note(problem)
    return report.ok


def _diff(out: Output, path: str, other: str, layers: bool) -> bool:
    if layers:
        raise UsageError("--layers and --diff", needs="one of them", fix="omit one; --diff --json lists all")
    from ascendit.inspect.diff import diff

    with out.work():
        result = diff(path, other)
    out.result(result.as_dict(), result.lines())
    return result.same and result.a.ok and result.b.ok
