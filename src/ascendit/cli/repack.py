"""`ascendit repack`: convert a checkpoint to another layout, with the same numbers."""

from __future__ import annotations

from typing import Annotated

import typer

from ascendit.cli.main import Copy, DryRun, Engine, Json, Overwrite, Resume, Target, chosen, flag
from ascendit.cli.output import Output

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SRC...",
        help="Model folder or file in any layout, hf:org/name or ms:org/name; or files of components, each "
        "[NAME=]FILE with NAME transformer (or high), "
        "transformer_2 (or low), text_encoder, vae or image_encoder.",
    ),
]
Base = Annotated[
    str | None,
    flag("--base MODEL", "Diffusers folder of the same model, for text encoder, VAE and configs."),
]
To = Annotated[str | None, flag("--to NAMES", "Tensor names and folders: diffusers (default) or wan.")]
Check = Annotated[bool, flag("--check", "Decode source and output, and compare every value.")]


def repack(
    ctx: typer.Context,
    src: Sources,
    dst: Target,
    base: Base = None,
    to: To = None,
    engine: Engine = None,
    check: Check = False,
    copy: Copy = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint to another layout. Values do not change; the operating system copies the bytes.

    ascendit repack msmodelslim-export -o Wan2.2-T2V-A14B-mxfp8 --base hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers

    ascendit repack wan-high.gguf wan-low.gguf umt5.gguf -o DST --base hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers
    """
    from ascendit.cli.progress import progress_view
    from ascendit.convert.repack import repack as run

    out: Output = ctx.obj
    with out.work(), progress_view(silent=out.silent) as view:
        result = run(**chosen(ctx), on_progress=view)
    out.result(result.as_dict(), result.lines())
