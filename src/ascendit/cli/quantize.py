"""`ascendit quantize`: convert a float checkpoint to a quantized one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendit.cli.main import Copy, DryRun, Engine, Json, Overwrite, Resume, Source, Target, chosen, flag
from ascendit.cli.output import Output, quiet_libraries
from ascendit.cli.progress import ProgressView, progress_view
from ascendit.errors import Cancelled, OutOfMemory, UsageError, is_out_of_memory
from ascendit.quant.schemes import QUANTIZED

if TYPE_CHECKING:
    from ascendit.pipeline.calibrate import Calibrator

Scheme = Annotated[
    str | None,
    flag("--scheme NAME", f"{', '.join(QUANTIZED)}; or bf16 with --lora, for a float folder."),
]
Recipe = Annotated[
    str | None,
    flag(
        "--recipe NAME",
        "default, recommended-fp4, ascend-w8a8f8, ascend-w4a4, ascend-w4a4f4, ... or a TOML file.",
    ),
]
ScaleRule = Annotated[
    str | None, flag("--scale-rule RULE", "Scale rule for --scheme, for example msms:minmax.")
]
Keep = Annotated[list[str] | None, flag("--keep PATTERN", "Layers to exclude from quantization; repeatable.")]
Lora = Annotated[
    list[str] | None,
    flag(
        "--lora FILE[:WEIGHT]",
        "LoRA to fold in first; high=FILE or low=FILE for one expert; repeatable.",
    ),
]
LoraSkip = Annotated[
    list[str] | None,
    flag(
        "--lora-skip GROUP", "LoRA keys to leave out: image, text, control, audio, face or patch; repeatable."
    ),
]
Calibrate = Annotated[
    str | None,
    flag(
        "--calibrate PROMPTS",
        "Smooth layer inputs by running prompts: a file with one per line, or a number for demo.",
    ),
]
Alpha = Annotated[
    float | None, flag("--alpha X", "With --calibrate: smoothing strength, 0 to 1; default 0.9.")
]
Device = Annotated[str | None, flag("--device NAME", "With --calibrate: device of the model; default cpu.")]
Set = Annotated[
    list[str] | None,
    flag("--set KEY=VALUE", "With --calibrate: a request field, like num_inference_steps=20; repeatable."),
]
Force = Annotated[bool, flag("--force", "Allow quantization that is known to lose accuracy.")]
Report = Annotated[
    str | None,
    flag("--report [FILE]", "Measure every layer and list the ten worst; also write FILE.html or FILE.json."),
]
Hash = Annotated[
    bool, flag("--hash", "Write the sha256 of every file into ascendit.json; takes about twice as long.")
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
    lora_skip: LoraSkip = None,
    calibrate: Calibrate = None,
    alpha: Alpha = None,
    device: Device = None,
    settings: Set = None,
    engine: Engine = None,
    copy: Copy = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    force: Force = False,
    report: Report = None,
    hash: Hash = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Quantize the transformers of a model. Weights are streamed: memory use does not depend on model size.

    ascendit quantize hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers -o Wan2.2-T2V-A14B-mxfp8 --scheme mxfp8
    """
    from ascendit.convert.quantize import quantize as run

    out: Output = ctx.obj
    options = chosen(ctx, without=("calibrate", "alpha", "device", "settings", "report"))
    options["report"] = report is not None and (report or True)  # `--report` without a file is ""
    with out.work(), progress_view(silent=out.silent) as view, _ended_early(view):
        calibrator = _calibrator(calibrate, alpha, device, settings or [], view)
        result = run(**options, calibrate=calibrator, on_progress=view)
    out.result(result.as_dict(), result.lines())


def _calibrator(
    prompts: str | None, alpha: float | None, device: str | None, settings: list[str], view: ProgressView
) -> Calibrator | None:
    if prompts is None:
        for flag, value in (("--alpha", alpha), ("--device", device), ("--set", " ".join(settings) or None)):
            if value is not None:
                raise UsageError(
                    f"{flag} {value} without --calibrate",
                    needs="--calibrate PROMPTS: only calibration runs the model",
                    fix=f"omit {flag}, or add --calibrate",
                )
        return None
    from ascendit.pipeline.calibrate import Calibrator

    quiet_libraries()
    options: dict[str, Any] = {"alpha": alpha, "device": device, "fields": _fields(settings)}
    options = {name: value for name, value in options.items() if value is not None}
    return Calibrator(prompts=prompts, on_progress=view, **options)


def _fields(settings: list[str]) -> dict[str, Any]:
    """Request fields for the calibration run."""
    from ascendit.cli.generate_options import parse_settings
    from ascendit.pipeline.request import GenerateRequest

    layer = parse_settings(settings)
    if wrong := sorted(set(layer) - ({*GenerateRequest.model_fields} - {"prompt", "image", "last_image"})):
        raise UsageError(
            f"--set {wrong[0]} with --calibrate",
            needs="a request field such as num_inference_steps, height, width or num_frames",
            fix=f"omit --set {wrong[0]}",
        )
    return layer


@contextmanager
def _ended_early(view: ProgressView) -> Iterator[None]:
    """Convert Ctrl-C and out-of-memory errors during calibration to errors that say how to continue."""
    try:
        yield
    except KeyboardInterrupt as e:
        raise Cancelled(
            "cancelled",
            needs="nothing: no output was written; completed files are stored for --resume",
            fix="run the same command with --resume to continue, without it to start over",
        ) from e
    except Exception as e:
        if view.stage in ("load", "denoise") and is_out_of_memory(e):
            raise OutOfMemory(
                "out of memory while the float model ran to calibrate",
                needs="memory for the unquantized model, with text encoder and VAE",
                fix="use a device with more memory, or omit --calibrate",
            ) from e
        raise
