"""`ascendit doctor`: does this machine have what is needed, and does its device compute what it should?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ascendit.cli.render import Output, table

if TYPE_CHECKING:
    from ascendit.device.report import Report


def doctor(
    ctx: typer.Context,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Run every operator of a device and compare its numbers.")
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="NAME", help="To self-check: npu (default), npu:1, twin:a5, cuda, cpu."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.json", help="Write what the self-check found, to send in."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check this machine and its libraries. Says how to fix what is wrong."""
    from ascendit.cli.self_check import checked, no_check

    out: Output = ctx.obj
    if self_check:
        if code := checked(device, file, out):
            raise typer.Exit(code)
        return
    if given := {name: value for name, value in (("--device", device), ("--out", file)) if value is not None}:
        raise no_check(given)
    if not _examined(out).ok:
        raise typer.Exit(3)


def _examined(out: Output) -> Report:
    from ascendit.device.doctor import examine
    from ascendit.device.report import NO_FIX

    with out.work():
        report = examine()
    out.emit(report.as_dict())
    cells = [(r.item, r.found, r.needed, r.status, "" if r.status in NO_FIX else r.fix) for r in report.rows]
    for line in table(("item", "found", "needed", "status", "fix"), cells):
        out.line(line)
    out.line()
    for line in report.verdicts():
        out.line(line)
    return report
