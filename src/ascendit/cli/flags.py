"""Arguments and flags that several commands share."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

ANY_MODEL = "Model folder or file in any layout, demo, hf:org/name or ms:org/name."


def flag(shown: str, help: str) -> Any:
    """A flag for `Annotated`. `shown`: its names and what it takes, as in the help: `-o, --output DST`."""
    words = shown.replace(",", "").split()
    metavar = None if words[-1].startswith("-") else words.pop()
    return typer.Option(*words, metavar=metavar, help=help)


Source = Annotated[str, typer.Argument(metavar="SRC", help=ANY_MODEL)]
Target = Annotated[Path, flag("-o, --output DST", "The new folder.")]
Engine = Annotated[str | None, flag("--for ENGINE", "Write what vllm-omni, sglang or mindie loads.")]
Copy = Annotated[bool, flag("--copy", "Copy the other components instead of linking them.")]
Resume = Annotated[bool, flag("--resume", "Go on where the same command was killed.")]
DryRun = Annotated[bool, flag("--dry-run", "Show the plan; write nothing.")]
Json = Annotated[bool, flag("--json", "Print one JSON object and nothing else.")]


def chosen(ctx: typer.Context, without: Collection[str] = ()) -> dict[str, Any]:
    """The values of this call, by the names of its parameters; neither those left out nor `--json`."""
    return {k: v for k, v in ctx.params.items() if v is not None and k not in ("as_json", *without)}
