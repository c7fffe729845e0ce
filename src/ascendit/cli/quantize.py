"""`ascendit quantize`: a float checkpoint becomes a quantized one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ascendit.cli.render import Output

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Model folder or file in any layout, demo, hf:org/name or ms:org/name."
    ),
]
Target = Annotated[Path, typer.Option("-o", "--output", metavar="DST", help="The new folder.")]
Scheme = Annotated[
    str | None,
    typer.Option("--scheme", metavar="NAME", help="mxfp8, mxfp4, mxfp4_dualscale, int8 or fp8."),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="default, ascend-w8a8f8, ascend-w4a4, ascend-w4a4f4, dualscale-bf16-5, or a TOML file.",
    ),
]
ScaleRule = Annotated[
    str | None,
    typer.Option("--scale-rule", metavar="RULE", help="Another scale rule for --scheme, as msms:minmax."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="PATTERN", help="Layers that stay as they are; repeatable."),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:WEIGHT]",
        help="Fold it in first; transformer=FILE or transformer_2=FILE for one expert; repeatable.",
    ),
]
Engine = Annotated[
    str | None,
    typer.Option("--for", metavar="ENGINE", help="Write what vllm-omni, sglang or mindie loads."),
]
Copy = Annotated[bool, typer.Option("--copy", help="Copy the other components instead of linking them.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the same command was killed.")]
Force = Annotated[bool, typer.Option("--force", help="Also where accuracy is known to suffer.")]
Report = Annotated[bool, typer.Option("--report", help="Measure every layer; list the ten worst.")]
Hash = Annotated[
    bool, typer.Option("--hash", help="Put the sha256 of every file into ascendit.json; takes as long again.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def quantize(
    ctx: typer.Context,
    source: Source,
    output: Target,
    scheme: Scheme = None,
    recipe: Recipe = None,
    scale_rule: ScaleRule = None,
    keep: Keep = None,
    lora: Lora = None,
    engine: Engine = None,
    copy: Copy = False,
    resume: Resume = False,
    force: Force = False,
    report: Report = False,
    hash: Hash = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Quantize the transformers of a model. Streams, so a small machine can do a large model.

    ascendit quantize hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers -o Wan2.2-T2V-A14B-mxfp8 --scheme mxfp8
    """
    from ascendit.cli.transfer import resumable, transfer_view
    from ascendit.convert.quantize import quantize as run

    out: Output = ctx.obj
    with out.work(), resumable(), transfer_view(silent=out.quiet or out.json) as view:
        done = run(
            source,
            output,
            scheme=scheme,
            recipe=recipe,
            scale_rule=scale_rule,
            keep=keep or (),
            loras=lora or (),
            engine=engine,
            copy=copy,
            resume=resume,
            force=force,
            report=report,
            hash=hash,
            dry_run=dry_run,
            on_progress=view,
        )
    out.emit(done.as_dict())
    for line in done.lines():
        out.line(line)
