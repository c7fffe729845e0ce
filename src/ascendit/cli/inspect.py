"""`ascendit inspect`: what a checkpoint holds, and what differs between two."""

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
        bool, flag("--layers", "One row for each layer and tensor: scheme, shape, bytes, dtypes.")
    ] = False,
    other: Annotated[
        str | None, flag("--diff OTHER", "What differs from PATH to OTHER; exit code 1 if any.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds. Parts, schemes, engines, limits, completeness; reads headers only."""
    out: Output = ctx.obj
    if other is not None and layers:
        raise UsageError("--layers and --diff", needs="one of them", fix="leave one out; --json has all")
    ok = _diff(out, path, other) if other is not None else _inspect(out, path, layers)
    if not ok:
        raise typer.Exit(1)


def _inspect(out: Output, path: str, layers: bool) -> bool:
    from ascendit.inspect.checkpoint import inspect as look

    with out.work():
        report = look(path)
    out.result(report.as_dict(layers=layers), report.layer_lines() if layers else report.lines())
    for problem in report.problem_texts() if layers else ():
        out.note(problem)
    return report.ok


def _diff(out: Output, path: str, other: str) -> bool:
    from ascendit.inspect.diff import diff

    with out.work():
        found = diff(path, other)
    out.result(found.as_dict(), found.lines())
    return found.same and found.a.ok and found.b.ok
