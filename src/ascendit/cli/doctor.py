"""`ascendit doctor`: does this machine have what is needed?"""

from __future__ import annotations

from typing import Annotated

import typer

from ascendit.cli.render import Output, table


def doctor(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check this machine and its libraries. Says how to fix what is wrong."""
    from ascendit.device.doctor import examine

    out: Output = ctx.obj
    with out.work():
        report = examine()
    out.emit(report.as_dict())
    quiet = ("ok", "absent")  # nothing to fix
    cells = [(r.item, r.found, r.needed, r.status, "" if r.status in quiet else r.fix) for r in report.rows]
    for line in table(("item", "found", "needed", "status", "fix"), cells):
        out.line(line)
    out.line("\nready to run on the CPU" if report.ok else "\nnot ready: see the rows with a fix")
    if not report.ok:
        raise typer.Exit(3)
