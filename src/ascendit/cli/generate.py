"""`ascendit generate`: make a video file from a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendit.cli.main import completion, flag
from ascendit.cli.output import Output
from ascendit.convert.report import lora_lines
from ascendit.errors import UsageError
from ascendit.family import PRESETS, Solver
from ascendit.option_text import flag_of
from ascendit.pipeline.options import OPTIONS
from ascendit.report import shell_line
from ascendit.validation import one_of

if TYPE_CHECKING:
    from ascendit.cli.generate_plan import Planned


KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY


def _flag(
    name: str, kind: Any, help: str, metavar: str | None = None, names: str = "", *, hidden: bool = False
) -> inspect.Parameter:
    """Declare a parameter of `generate` with its flag."""
    option = flag(f"{names or flag_of(name)} {metavar or ''}", help, hidden=hidden)
    default, hint = (False, bool) if kind is bool else (None, kind | None)
    return inspect.Parameter(name, KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])


FILES = (
    ".mp4, .mov, .mkv, .webm, .gif, .png (frames) or DIR/ (frames; of many videos: one file each); "
    "default outputs/<time>_<prompt>_s<seed>.mp4."
)
SEEDS = "The same seed gives the same video; several: 1,2,3 or 0-7; default: random, and printed."
PROMPTS = "Make a video of each line of FILE, or of - for stdin; a .jsonl row has fields of the request too."
NUM_VIDEOS = "Make N videos of each prompt, with consecutive seeds."
SHEET = "Also write an image with frames of every video."
CRF = "Quality of .mp4, .mov, .mkv and .webm: lower is better and larger; default 18."
FLAT = "Accept a black, single-coloured or noise video, with a warning."
KEEP = "Also write the latents, as after a failure, to NAME.latents.safetensors."
LATENTS = "Decode the latents that a failed run, or --keep-latents, has kept."
SETTINGS = "Any other setting, for example solver=euler or metadata=false; repeatable."
TIMESTEPS = "Positions of the steps before the shift, for example 1000,750,500,250."
PRESET = f"Settings of distilled weights: {', '.join(PRESETS)}."
NEGATIVE = "Negative prompt; the model's own if omitted, none if empty."
SIZE = "Width and height in pixels: 832x480; default: the model's area in the ratio of --image."
FIT = "Images of another ratio than --size: crop (default), pad or stretch."
ARGS = typer.Argument(
    metavar="[MODEL] PROMPT", hidden=True, autocompletion=completion("MODEL")
)  # explained in the text above the options
PARAMETERS = (
    inspect.Parameter("ctx", KEYWORD_ONLY, annotation=typer.Context),
    inspect.Parameter("args", KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, ARGS]),
    _flag("demo", bool, "Use the small demo model included with ascendit."),
    _flag("output", str, FILES, "FILE", "-o, --output"),  # text: a Path would drop the / of a folder
    _flag("seed", str, SEEDS, "N,.."),
    _flag("num_videos", int, NUM_VIDEOS, "N"),
    _flag("prompts", str, PROMPTS, "FILE"),
    _flag("num_inference_steps", int, "Number of denoising steps.", "N"),
    _flag("size", str, SIZE, "WxH"),
    _flag("num_frames", int, "Number of frames, 4n+1.", "N"),
    _flag("seconds", float, "Length in seconds, instead of --frames.", "S"),
    _flag("fps", str, "Frames per second of the file: 24, 23.976 or 24000/1001.", "N", hidden=True),
    _flag("crf", int, CRF, "N", hidden=True),
    _flag("guidance", str, "Guidance scale, or two: high-noise,low-noise.", "G[,G2]"),
    _flag("flow_shift", float, "Flow shift of the schedule.", "X", hidden=True),
    _flag("solver", str, f"Solver: {one_of(Solver)}.", "NAME", hidden=True),
    _flag("timesteps", str, TIMESTEPS, "T,T,..", hidden=True),
    _flag("preset", str, PRESET, "NAME"),
    _flag("negative_prompt", str, NEGATIVE, "TEXT"),
    _flag("image", str, "First frame, for models that accept an image.", "FILE"),
    _flag("last_image", str, "Last frame, for FLF2V models and Wan2.2 I2V.", "FILE"),
    _flag("fit", str, FIT, "HOW"),
    *(
        _flag(name, list[str] if x.repeatable else str, x.help, x.metavar, hidden=x.hidden)
        for name, x in OPTIONS.items()
        if x.metavar
    ),
    _flag("settings", list[str], SETTINGS, "KEY=VALUE", "--set"),
    _flag("config", Path, "TOML file with the keys of --set, or the .json beside a video.", "FILE"),
    _flag("sheet", str, SHEET, "FILE"),
    _flag("dry_run", bool, "Show the resolved run; load no weights."),
    _flag("as_json", bool, "Print one JSON object and nothing else.", names="--json"),
    _flag("overwrite", bool, "Replace an existing output."),
    _flag("allow_flat", bool, FLAT),
    _flag("keep_latents", bool, KEEP),
    _flag("latents", Path, LATENTS, "FILE"),
)


def generate(ctx: typer.Context, **params: Any) -> None:
    """Make a video from a prompt.

    MODEL is a folder, hf:org/name or ms:org/name; omit it with --demo. Quote the PROMPT.
    Everything else gets the model's defaults.

    ascendit generate --demo "a red circle moves right on a black background"

    More flags: --solver, --shift, --timesteps, --fps, --crf, --defaults, --text-on, --lora-skip, --part,
    --attention, --sub-head, --max-memory; see docs/cli.md.
    """
    _check_length(params)
    from ascendit.cli.generate_options import read_call
    from ascendit.cli.generate_plan import plan_many, plan_one
    from ascendit.cli.prompts import parse_seeds, read_prompts
    from ascendit.pipeline.sheet import Sheet

    out: Output = ctx.obj
    seeds = () if params["seed"] is None else parse_seeds(params["seed"])
    prompts, num_videos, latents = params["prompts"], params["num_videos"], params["latents"]
    many = prompts is not None or num_videos is not None or len(seeds) > 1
    if many and latents is not None:
        _refuse_latents(latents)
    changes = {"allow_flat": params["allow_flat"] or None, "seed": seeds[0] if len(seeds) == 1 else None}
    call = read_call(
        params["args"] or [],
        demo=params["demo"],
        flags=params | changes,
        settings=params["settings"] or [],
        config=params["config"],
        latents=latents,
        prompts=prompts,
    )
    for note in call.notes:
        out.note(note)
    output, checks = params["output"], {"overwrite": params["overwrite"], "keep": params["keep_latents"]}
    with out.work():
        if many:
            rows = None if prompts is None else read_prompts(prompts)
            plan = plan_many(call, rows, seeds, num_videos, output, **checks)
        else:
            plan = [plan_one(call, output, latents=latents, **checks)]
        file, overwrite = params["sheet"], params["overwrite"]
        outputs = [planned.output for planned in plan]
        sheet = None if file is None else Sheet(file, outputs, overwrite=overwrite)
    if params["dry_run"]:
        from ascendit.cli.dry_run import print_dry_run

        print_dry_run(plan, out, many=many)
        return
    from ascendit.cli.generate_run import run_many, run_one

    _warn_about_size(plan, out)
    for line in lora_lines(plan[0].prepared.loras):
        out.note(f"LoRA {line}")
    if many:
        run_many(plan, out, sheet=sheet, **checks)
    else:
        run_one(plan[0], out, sheet=sheet, **checks)


generate.__dict__["__signature__"] = inspect.Signature(PARAMETERS)


def _check_length(params: dict[str, Any]) -> None:
    if params["num_frames"] is not None and params["seconds"] is not None:
        raise UsageError("--frames and --seconds", needs="one of the two", fix="omit --seconds")


def _refuse_latents(latents: Path) -> None:
    """Raise UsageError (E-USE-01) for several videos of one file of latents."""
    raise UsageError(
        f"--latents {latents} with several prompts or seeds",
        needs="the request of the latents, which is one video",
        fix=f"ascendit generate --latents {shell_line([str(latents)])}",
    )


def _warn_about_size(plan: Sequence[Planned], out: Output) -> None:
    from ascendit.pipeline.estimate import size_warning, work_of

    warnings = (size_warning(p.prepared, work_of(p.prepared)) for p in plan if p.prepared.latents is None)
    for warning in dict.fromkeys(filter(None, warnings)):
        out.note(warning)
