"""`ascendit quantize`: a float checkpoint becomes a quantized one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from ascendit.cli.output import Output, quiet_libraries
from ascendit.errors import OutOfMemory, UsageError

if TYPE_CHECKING:
    from ascendit.pipeline.calibrate import Calibrator

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
        help="default, recommended-fp4, ascend-w8a8f8, ascend-w4a4, ascend-w4a4f4, ... or a TOML file.",
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
Calibrate = Annotated[
    str | None,
    typer.Option(
        "--calibrate",
        metavar="PROMPTS",
        help="Smooth the inputs by what these prompts show: a file, one on a line, or a number for demo.",
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", metavar="X", help="With --calibrate, how much moves into the weights; 0.9."),
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="NAME", help="With --calibrate, where the model runs; cpu."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="With --calibrate, of its videos: num_inference_steps=20; repeatable.",
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
    from ascendit.cli.progress import resumable
    from ascendit.convert.quantize import quantize as run

    out: Output = ctx.obj
    with out.work(), resumable(), Screen(silent=out.quiet or out.json) as screen:
        calibrator = _calibrator(calibrate, alpha, device, settings or [], screen)
        done = run(
            source,
            output,
            scheme=scheme,
            recipe=recipe,
            scale_rule=scale_rule,
            keep=keep or (),
            loras=lora or (),
            calibrate=calibrator,
            engine=engine,
            copy=copy,
            resume=resume,
            force=force,
            report=report,
            hash=hash,
            dry_run=dry_run,
            on_progress=screen.conversion,
        )
    out.emit(done.as_dict())
    for line in done.lines():
        out.line(line)


def _calibrator(
    prompts: str | None, alpha: float | None, device: str | None, settings: list[str], screen: Screen
) -> Calibrator | None:
    if prompts is None:
        for flag, value in (("--alpha", alpha), ("--device", device), ("--set", " ".join(settings) or None)):
            if value is not None:
                raise UsageError(
                    f"{flag} {value} without --calibrate",
                    needs="--calibrate PROMPTS: the model is run for nothing else",
                    fix=f"leave {flag} out, or add --calibrate",
                    code="E-USE-01",
                )
        screen.show_conversion()
        return None
    from ascendit.pipeline.calibrate import Calibrator

    quiet_libraries()
    given: dict[str, Any] = {"alpha": alpha, "device": device}
    given |= {"fields": _fields(settings)}
    given = {name: value for name, value in given.items() if value is not None}
    return Calibrator(prompts=prompts, on_progress=screen.calibration, **given)


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
            code="E-USE-01",
        )
    return layer


class Screen:
    """First the bar of the run that calibrates, if there is one, then that of the conversion."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._stack = ExitStack()
        self._stage, self._view = "", None

    def calibration(self, event: Any) -> None:
        """A step of the model."""
        from ascendit.cli.progress import progress_view

        self._show("calibration", progress_view)(event)

    def conversion(self, event: Any) -> None:
        """Some bytes."""
        self.show_conversion()(event)

    def show_conversion(self) -> Any:
        """Its bar, before the first event too."""
        from ascendit.cli.progress import transfer_view

        return self._show("conversion", transfer_view)

    def _show(self, stage: str, make: Any) -> Any:
        if self._stage != stage:
            self._stack.close()
            self._stage, self._view = stage, self._stack.enter_context(make(silent=self._silent))
        return self._view

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the screen as it was found. A run of the model that had too little memory says so."""
        from ascendit.pipeline.job import is_out_of_memory

        self._stack.close()
        if self._stage == "calibration" and error is not None and is_out_of_memory(error):
            raise OutOfMemory(
                "out of memory while the float model ran to calibrate",
                needs="memory for the model as it is, with text encoder and VAE",
                fix="--device with more memory; without --calibrate a small machine does it",
                code="E-MEM-01",
            ) from error
