"""`ascendit generate`: make a video file from a prompt."""

from __future__ import annotations

import inspect
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendit.cli.kept_latents import check_latents_file, keep_latents, latents_kept_on_failure
from ascendit.cli.main import completion
from ascendit.cli.output import Output, log_warnings, quiet_libraries
from ascendit.errors import Cancelled, UsageError
from ascendit.family import PRESETS
from ascendit.pipeline.options import OPTIONS
from ascendit.report import shell_line

if TYPE_CHECKING:
    from ascendit.cli.generate_options import Call
    from ascendit.pipeline.job import Prepared
    from ascendit.pipeline.video import Video
    from ascendit.progress import Progress


KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY


def _flag(
    name: str, kind: Any, help: str, metavar: str | None = None, names: str = "", *, hidden: bool = False
) -> inspect.Parameter:
    """Declare a parameter of `generate` with its flag."""
    names = names or f"--{name.replace('_', '-')}"
    complete = completion(names.split()[-1])
    option = typer.Option(*names.split(), metavar=metavar, help=help, hidden=hidden, autocompletion=complete)
    default, hint = (False, bool) if kind is bool else (None, kind | None)
    return inspect.Parameter(name, KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])


FILES = ".mp4, .webm, .gif, .png (frames) or DIR/ (frames); default outputs/<time>_<prompt>_s<seed>.mp4."
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
    _flag("output", str, FILES, "FILE", "-o --output"),  # text: a Path would drop the / of a folder
    _flag("seed", int, "The same seed gives the same video; default: random, and printed.", "N"),
    _flag("num_inference_steps", int, "Number of denoising steps.", "N", "--steps"),
    _flag("size", str, SIZE, "WxH"),
    _flag("num_frames", int, "Number of frames, 4n+1.", "N", "--frames"),
    _flag("seconds", float, "Length in seconds, instead of --frames.", "S"),
    _flag("fps", int, "Frames per second of the file.", "N", hidden=True),
    _flag("guidance", str, "Guidance scale, or two: high-noise,low-noise.", "G[,G2]"),
    _flag("flow_shift", float, "Flow shift of the schedule.", "X", "--shift", hidden=True),
    _flag("solver", str, "Solver: unipc, dpm++, euler or renoise.", "NAME", hidden=True),
    _flag("own_timesteps", str, TIMESTEPS, "T,T,..", "--timesteps", hidden=True),
    _flag("preset", str, PRESET, "NAME"),
    _flag("negative_prompt", str, NEGATIVE, "TEXT", "--negative"),
    _flag("image", str, "First frame, for models that accept an image.", "FILE"),
    _flag("last_image", str, "Last frame, for FLF2V models and Wan2.2 I2V.", "FILE"),
    _flag("fit", str, FIT, "HOW"),
    *(_flag(name, str, x.help, x.metavar, hidden=x.hidden) for name, x in OPTIONS.items() if x.metavar),
    _flag("settings", list[str], SETTINGS, "KEY=VALUE", "--set"),
    _flag("config", Path, "TOML file with the keys of --set, or the .json beside a video.", "FILE"),
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

    More flags: --solver, --shift, --timesteps, --fps, --defaults, --text-on, --max-memory; see docs/cli.md.
    """
    _check_length(params)
    from ascendit.cli.generate_options import read_call

    out: Output = ctx.obj
    call = read_call(
        params["args"] or [],
        demo=params["demo"],
        flags=params | {"allow_flat": params["allow_flat"] or None},
        settings=params["settings"] or [],
        config=params["config"],
        latents=params["latents"],
    )
    for note in call.notes:
        out.note(note)
    with out.work():
        prepared, output = _prepare(
            call, params["output"], overwrite=params["overwrite"], latents=params["latents"]
        )
        if params["keep_latents"]:
            check_latents_file(Path(output), overwrite=params["overwrite"])
    if params["dry_run"]:
        from ascendit.cli.dry_run import print_dry_run

        print_dry_run(prepared, call, output, out)
        return
    _warn_about_size(prepared, out)
    start = time.perf_counter()
    with latents_kept_on_failure(prepared, output, out), log_warnings() as warnings:
        video = _run(prepared, out, allow_flat=call.allow_flat)
        with out.work():
            path = _save(video, output, metadata=call.metadata, overwrite=params["overwrite"])
    if params["keep_latents"]:
        with out.work():
            keep_latents(video.latents, prepared, Path(output))
    _print_result(call, prepared, out, video, path, time.perf_counter() - start, warnings)


generate.__dict__["__signature__"] = inspect.Signature(PARAMETERS)


def _check_length(params: dict[str, Any]) -> None:
    if params["num_frames"] is not None and params["seconds"] is not None:
        raise UsageError("--frames and --seconds", needs="one of the two", fix="omit --seconds")


def _save(video: Video, output: str, *, metadata: bool, overwrite: bool) -> Path:
    """Save the video; an exception gets its latents."""
    try:
        return video.save(output, metadata=metadata, overwrite=overwrite)
    except BaseException as error:
        error.latents = video.latents  # type: ignore[attr-defined]
        raise


def _prepare(
    call: Call, output: str | None, *, overwrite: bool, latents: Path | None = None
) -> tuple[Prepared, str]:
    """Check the call against its model, and choose the output path."""
    from ascendit.pipeline import video

    if output is not None:
        video.check_writable(output)
    if call.model_from is not None:
        _find_model(call, call.model_from)
    prepared = _prepare_request(call, latents)
    request = prepared.request
    output = output or str(video.default_name(request.prompt, request.seed, datetime.now()))
    shape = (request.num_frames, request.height, request.width)
    sidecar = b"" if call.metadata else None
    video.check_output(output, shape, request.fps, sidecar=sidecar, overwrite=overwrite)
    return prepared, output


def _warn_about_size(prepared: Prepared, out: Output) -> None:
    from ascendit.pipeline.estimate import size_warning, work_of

    if prepared.latents is None and (warning := size_warning(prepared, work_of(prepared))):
        out.note(warning)


def _prepare_request(call: Call, latents: Path | None) -> Prepared:
    """Check the request. Raises UsageError (E-USE-01) if it is not the one that `latents` were made for."""
    from ascendit.pipeline.job import prepare, prepare_latents

    if latents is None:
        return prepare(call.options, call.prompt, **call.fields)
    from ascendit.pipeline.latents import read_latents

    kept = read_latents(latents)
    values = vars(kept.request)
    changed = [k for k, v in {**call.fields, "prompt": call.prompt}.items() if v != values.get(k)]
    if others := sorted({*changed} - {"fps"}):
        got = f"--latents {latents} with another {', '.join(others)}"
        needs = "the request of the latents: only the decoding is repeated"
        raise UsageError(got, needs=needs, fix=f"ascendit generate --latents {shell_line([str(latents)])}")
    return prepare_latents(call.options, kept, fps=call.fields.get("fps"))


def _find_model(call: Call, config: Path) -> None:
    """Raise UsageError (E-USE-02) that names the config if its model does not exist."""
    from ascendit.checkpoint.hub import model_folder

    try:
        model_folder(call.options.model)
    except UsageError as e:
        if e.code == "E-USE-02":
            args = shell_line([call.prompt, "--config", str(config)])
            e.got += f", named in {config}"
            e.fix = f"pass MODEL on the command line: ascendit generate MODEL {args}; or add --demo"
        raise


def _run(prepared: Prepared, out: Output, *, allow_flat: bool) -> Video:
    """Load the model and run the request.

    Ctrl-C stops loading immediately, and a run between two steps, or two frames of the VAE.
    """
    from ascendit.cli.interruptions import Interrupt
    from ascendit.cli.progress import progress_view
    from ascendit.pipeline.job import run

    interrupt = Interrupt(silent=out.silent)
    with out.work(), progress_view(silent=out.silent) as view, ExitStack() as stack:
        quiet_libraries()

        def show(event: Progress) -> None:
            if event.stage == "load" and event.step == event.total:
                stack.enter_context(interrupt)
            view(event)

        video = run(prepared, show, interrupt.event, allow_flat=allow_flat)
        try:
            interrupt.check()
        except Cancelled as error:
            error.latents = video.latents
            raise
    return video


def _print_result(
    call: Call,
    prepared: Prepared,
    out: Output,
    video: Video,
    path: Path,
    seconds: float,
    warnings: list[str],
) -> None:
    n, height, width, _ = video.frames.shape
    out.line(str(path))
    out.detail(
        f"  {width}x{height}, {n} frames, {video.fps} fps, {n / video.fps:.2f} s of video; "
        f"took {seconds:.1f} s; seed {prepared.request.seed}"
    )
    record = video.describe()
    warnings = list(dict.fromkeys([*video.warnings, *warnings]))
    record["replay"] = prepared.replay_line(call.replay_flags(allow_flat=bool(video.warnings)))
    out.detail(f"  replay  {record['replay']}")
    out.emit({"output": str(path), **record, "warnings": warnings, "seconds": round(seconds, 3)})
