"""`ascendit inspect`: what a model folder holds."""

from __future__ import annotations

from typing import Annotated

import typer

from ascendit.cli.render import Output


def inspect(
    ctx: typer.Context,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="Model folder, demo, hf:org/name or ms:org/name.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Show what a model folder holds. Parts, sizes, formats, limits, completeness; reads headers only."""
    from ascendit.pipeline.folder import model_folder
    from ascendit.pipeline.inspect import inspect_folder

    out: Output = ctx.obj
    with out.work():
        report = inspect_folder(model_folder(path))
    out.emit(report.as_dict())
    for line in report.lines():
        out.line(line)
    if not report.ok:
        raise typer.Exit(1)
