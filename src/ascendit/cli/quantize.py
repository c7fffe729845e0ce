"""`ascendit quantize`: a float checkpoint becomes a quantized one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendit.cli.main import Copy, DryRun, Engine, Json, Resume, Source, Target, chosen, flag
from ascendit.cli.output import Output, quiet_libraries
from ascendit.cli.progress import ProgressView, progress_view
from ascendit.errors import Cancelled, OutOfMemory, UsageError, is_out_of_memory
from ascendit.quant.schemes import QUANTIZED

if TYPE_CHECKING:
    from ascendit.pipeline.calibrate import Calibrator

Scheme = Annotated[str | None, flag("--scheme NAME", f"{', '.join(QUANTIZED)}.")]
Recipe = Annotated[
    str | None,
    flag(
        "--recipe NAME",
        "default, recommended-fp4, ascend-w8a8f8, ascend-w4a4, ascend-w4a4f4, ... or a TOML file.",
    ),
]
ScaleRule = Annotated[
    str | None, flag("--scale-rule RULE", "Another scale rule for --scheme, as msms:minmax.")
]
Keep = Annotated[list[str] | None, flag("--keep PATTERN", "Layers that stay as they are; repeatable.")]
Lora = Annotated[
    list[str] | None,
    flag(
        "--lora FILE[:WEIGHT]",
        "Fold it in first; transformer=FILE or transformer_2=FILE for one expert; repeatable.",
    ),
]
Calibrate = Annotated[
    str | None,
    flag(
        "--calibrate PROMPTS",
        "Smooth the inputs by what these prompts show: a file, one on a line, or a number for demo.",
    ),
]
Alpha = Annotated[float | None, flag("--alpha X", "With --calibrate, how much moves into the weights; 0.9.")]
Device = Annotated[str | None, flag("--device NAME", "With --calibrate, where the model runs; cpu.")]
Set = Annotated[
    list[str] | None,
    flag("--set KEY=VALUE", "With --calibrate, of its videos: num_inference_steps=20; repeatable."),
]
Force = Annotated[bool, flag("--force", "Also where accuracy is known to suffer.")]
Report = Annotated[bool, flag("--report", "Measure every layer; list the ten worst.")]
Hash = Annotated[
    bool, flag("--hash", "Put the sha256 of every file into ascendit.json; takes as long again.")
]


def quantize(
    ctx: typer.Context,
    src: Source,
    dst: Target,
    scheme: Scheme = None,
    recipe: Recipe = None,
    scale_rule: ScaleRule = None,
    keep: Keep = None,
    loras: Lora = None,
    calibrate: Calibrate = None,
    alpha: Alpha = None,
    device: Device = None,
    settings: Set = None,
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
    from ascendit.convert.quantize import quantize as run

    out: Output = ctx.obj
    options = chosen(ctx, without=("calibrate", "alpha", "device", "settings"))
    with out.work(), progress_view(silent=out.silent) as view, _ended_early(view):
        calibrator = _calibrator(calibrate, alpha, device, settings or [], view)
        done = run(**options, calibrate=calibrator, on_progress=view)
    out.result(done.as_dict(), done.lines())


def _calibrator(
    prompts: str | None, alpha: float | None, device: str | None, settings: list[str], view: ProgressView
) -> Calibrator | None:
    if prompts is None:
        for flag, value in (("--alpha", alpha), ("--device", device), ("--set", " ".join(settings) or None)):
            if value is not None:
                raise UsageError(
                    f"{flag} {value} without --calibrate",
                    needs="--calibrate PROMPTS: the model is run for nothing else",
                    fix=f"leave {flag} out, or add --calibrate",
                )
        return None
    from ascendit.pipeline.calibrate import Calibrator

    quiet_libraries()
    options: dict[str, Any] = {"alpha": alpha, "device": device, "fields": _fields(settings)}
    options = {name: value for name, value in options.items() if value is not None}
    return Calibrator(prompts=prompts, on_progress=view, **options)


def _fields(settings: list[str]) -> dict[str, Any]:
    """Fields of the request that a calibration runs with."""
    from ascendit.cli.generate_options import parse_settings
    from ascendit.pipeline.request import GenerateRequest

    layer = parse_settings(settings)
    if wrong := sorted(set(layer) - ({*GenerateRequest.model_fields} - {"prompt", "image"})):
        raise UsageError(
            f"--set {wrong[0]} with --calibrate",
            needs="a value of its videos, as num_inference_steps, height, width, num_frames",
            fix="leave it out",
        )
    return layer


@contextmanager
def _ended_early(view: ProgressView) -> Iterator[None]:
    """Ctrl-C, and too little memory for a calibration, as errors that say how to continue."""
    try:
        yield
    except KeyboardInterrupt as e:
        raise Cancelled(
            "cancelled",
            needs="nothing; there is no output, and files that are whole wait beside its place",
            fix="the same command with --resume goes on, without it starts anew",
        ) from e
    except Exception as e:
        if view.stage in ("load", "denoise") and is_out_of_memory(e):
            raise OutOfMemory(
                "out of memory while the float model ran to calibrate",
                needs="memory for the model as it is, with text encoder and VAE",
                fix="--device with more memory; without --calibrate a small machine does it",
            ) from e
        raise
