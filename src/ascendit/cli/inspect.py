"""`ascendit inspect`: what a checkpoint holds, and what differs between two."""

from __future__ import annotations

from typing import Annotated

import typer

from ascendit.cli.output import Output


def inspect(
    ctx: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="Model folder or file in any layout, demo, hf:org/name or ms:org/name."
        ),
    ],
    layers: Annotated[
        bool,
        typer.Option("--layers", help="One row for each layer and tensor: scheme, shape, bytes, dtypes."),
    ] = False,
    other: Annotated[
        str | None,
        typer.Option("--diff", metavar="OTHER", help="What differs from PATH to OTHER; exit code 1 if any."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show what a checkpoint holds. Parts, schemes, engines, limits, completeness; reads headers only."""
    out: Output = ctx.obj
    ok = _diff(out, path, other, layers) if other is not None else _inspect(out, path, layers)
    if not ok:
        raise typer.Exit(1)


def _inspect(out: Output, path: str, layers: bool) -> bool:
    from ascendit.inspect.checkpoint import inspect as look

    with out.work():
        report = look(path)
    out.emit(report.as_dict(layers=layers))
    for line in report.layer_lines() if layers else report.lines():
        out.line(line)
    for problem in report.problem_texts() if layers else ():
        out.note(problem)
    return report.ok


def _diff(out: Output, path: str, other: str, layers: bool) -> bool:
    from ascendit.errors import UsageError
    from ascendit.inspect.diff import diff

    if layers:
        raise UsageError(
            "--layers and --diff", needs="one of them", fix="leave one out; --json has all", code="E-USE-01"
        )
    with out.work():
        found = diff(path, other)
    out.emit(found.as_dict())
    for line in found.lines():
        out.line(line)
    return found.same and found.a.ok and found.b.ok
