"""Arguments and flags that several commands share."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

ANY_MODEL = "Model folder or file in any layout, demo, hf:org/name or ms:org/name."

Source = Annotated[str, typer.Argument(metavar="SRC", help=ANY_MODEL)]
Target = Annotated[Path, typer.Option("-o", "--output", metavar="DST", help="The new folder.")]
Engine = Annotated[
    str | None,
    typer.Option("--for", metavar="ENGINE", help="Write what vllm-omni, sglang or mindie loads."),
]
Copy = Annotated[bool, typer.Option("--copy", help="Copy the other components instead of linking them.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the same command was killed.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def chosen(ctx: typer.Context, without: Collection[str] = ()) -> dict[str, Any]:
    """The values of this call, by the names of its parameters; neither those left out nor `--json`."""
    return {k: v for k, v in ctx.params.items() if v is not None and k not in ("as_json", *without)}
