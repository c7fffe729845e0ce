"""`ascendit repack`: a checkpoint in another layout, with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ascendit.cli.output import Output

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Model folder or file in any layout, demo, hf:org/name or ms:org/name."
    ),
]
Target = Annotated[Path, typer.Option("-o", "--output", metavar="DST", help="The new folder.")]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Diffusers folder of the same model, which gives text encoder, VAE and configs.",
    ),
]
To = Annotated[
    str | None,
    typer.Option("--to", metavar="NAMES", help="diffusers (default) or wan: whose names and folders."),
]
Engine = Annotated[
    str | None,
    typer.Option("--for", metavar="ENGINE", help="Write what vllm-omni, sglang or mindie loads."),
]
Check = Annotated[bool, typer.Option("--check", help="Decode both sides and compare every number.")]
Copy = Annotated[bool, typer.Option("--copy", help="Copy the other components instead of linking them.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the same command was killed.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def repack(
    ctx: typer.Context,
    source: Source,
    output: Target,
    base: Base = None,
    to: To = None,
    engine: Engine = None,
    check: Check = False,
    copy: Copy = False,
    resume: Resume = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another layout. Not one number changes; bytes go from file to file in the kernel.

    ascendit repack msmodelslim-export -o Wan2.2-T2V-A14B-mxfp8 --base hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers
    """
    from ascendit.cli.progress import transfer_view
    from ascendit.convert.repack import repack as run

    out: Output = ctx.obj
    with out.work(), transfer_view(silent=out.quiet or out.json) as view:
        done = run(
            source,
            output,
            base=base,
            to=to,
            engine=engine,
            check=check,
            copy=copy,
            resume=resume,
            dry_run=dry_run,
            on_progress=view,
        )
    out.emit(done.as_dict())
    for line in done.lines():
        out.line(line)
