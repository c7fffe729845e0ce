"""`ascendit generate`: a prompt becomes a video file."""

from __future__ import annotations

import inspect
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendit.cli.output import Output, quiet_libraries, two_columns
from ascendit.pipeline.options import OPTIONS

if TYPE_CHECKING:
    from ascendit.cli.generate_options import Call
    from ascendit.pipeline.job import Prepared
    from ascendit.pipeline.video import Video
    from ascendit.progress import Progress

# ---- flags --------------------------------------------------------------------------------------


def _flag(
    name: str, kind: Any, help: str, metavar: str | None = None, *names: str, hidden: bool = False
) -> inspect.Parameter:
    names = names or (f"--{name.replace('_', '-')}",)
    option = typer.Option(*names, metavar=metavar, help=help, hidden=hidden)
    default, hint = (False, bool) if kind is bool else (None, kind | None)
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=default, annotation=Annotated[hint, option])


_WORDS = typer.Argument(metavar="[MODEL] PROMPT", hidden=True)  # the text above the options explains it
PARAMETERS = (
    inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
    inspect.Parameter(
        "words", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, _WORDS]
    ),
    _flag("demo", bool, "Use the small model that comes with ascendit."),
    _flag(
        "output",
        Path,
        ".mp4, .webm, .gif or .png frames; default outputs/<time>_<prompt>_s<seed>.mp4.",
        "FILE",
        "-o",
        "--output",
    ),
    _flag("seed", int, "Same seed, same video; default random, printed.", "N"),
    _flag("steps", int, "Denoising steps.", "N"),
    _flag("size", str, "Pixels, as 832x480 or 832*480.", "WxH"),
    _flag("frames", int, "Number of frames, 4n+1.", "N"),
    _flag("seconds", float, "Length, instead of --frames.", "S"),
    _flag("fps", int, "Frames per second of the file.", "N", hidden=True),
    _flag("guidance", str, "One scale, or high-noise,low-noise.", "G[,G2]"),
    _flag("shift", float, "Flow shift of the schedule.", "X", hidden=True),
    _flag("timesteps", str, "Own schedule, as 1000,750,500,250 for distilled models.", "T,T,..", hidden=True),
    _flag("negative", str, "What the video should not show.", "TEXT"),
    _flag("image", str, "First frame, for models that take one.", "FILE"),
    *(
        _flag(name, str, row.help, row.metavar, hidden=row.hidden)
        for name, row in OPTIONS.items()
        if row.metavar
    ),
    _flag(
        "settings",
        list[str],
        "Anything else, as solver=euler or metadata=false; repeatable.",
        "KEY=VALUE",
        "--set",
    ),
    _flag("config", Path, "TOML with keys as for --set, or the .json beside a video.", "FILE"),
    _flag("dry_run", bool, "Say what would run; load no weights."),
    _flag("as_json", bool, "Print one JSON object and nothing else.", None, "--json"),
    _flag("overwrite", bool, "Replace the output if it exists."),
)


def generate(ctx: typer.Context, **params: Any) -> None:
    """Make a video from a prompt.

    MODEL is a folder, hf:org/name or ms:org/name; --demo needs none. PROMPT goes in quotes.
    What the flags leave out is the model's own default.

    ascendit generate --demo "a red circle moves right on a black background"
    """
    if params["frames"] is not None and params["seconds"] is not None:
        raise typer.BadParameter("give --frames or --seconds, not both", ctx=ctx)
    from ascendit.cli.generate_options import flag_values, read_call

    out: Output = ctx.obj
    call = read_call(
        params["words"] or [],
        demo=params["demo"],
        flags=flag_values(params),
        settings=params["settings"] or [],
        config=params["config"],
    )
    for note in call.notes:
        out.note(note)
    with out.work():
        prepared, output = _prepare(call, params["output"], overwrite=params["overwrite"])
    if params["dry_run"]:
        _print_dry_run(prepared, call, output, out)
        return
    start = time.perf_counter()
    video = _run(prepared, out)
    with out.work():
        path = video.save(output, metadata=call.metadata, overwrite=params["overwrite"])
    _print_result(prepared, out, video, path, time.perf_counter() - start)


generate.__dict__["__signature__"] = inspect.Signature(PARAMETERS)

# ---- the run ------------------------------------------------------------------------------------


def _prepare(call: Call, output: Path | None, *, overwrite: bool) -> tuple[Prepared, Path]:
    """Meet the model, and find a free name for the output."""
    from ascendit.pipeline import video
    from ascendit.pipeline.job import prepare

    if output is not None:
        video.check_writable(output)
    with call.naming_its_model():
        prepared = prepare(call.options, call.prompt, **call.fields)
    request = prepared.request
    output = output or video.default_name(request.prompt, request.seed, datetime.now())
    shape = (request.num_frames, request.height, request.width)
    sidecar = b"" if call.metadata else None
    video.check_output(output, shape, request.fps, sidecar=sidecar, overwrite=overwrite)
    return prepared, output


def _run(prepared: Prepared, out: Output) -> Video:
    """Load the model and run the request. Ctrl-C stops between steps, while loading at once."""
    from ascendit.cli.interruptions import Interrupt
    from ascendit.cli.progress import progress_view
    from ascendit.pipeline.job import run

    silent = out.quiet or out.json
    interrupt = Interrupt(silent=silent)
    with out.work(), progress_view(silent=silent) as view, ExitStack() as stack:
        quiet_libraries()

        def show(event: Progress) -> None:
            if event.stage == "load" and event.step == event.total:
                stack.enter_context(interrupt)
            view(event)

        video = run(prepared, show, interrupt.event)
        interrupt.check()
    return video


# ---- printing -----------------------------------------------------------------------------------


def _print_result(prepared: Prepared, out: Output, video: Video, path: Path, took: float) -> None:
    n, height, width, _ = video.frames.shape
    out.line(str(path))
    out.detail(
        f"  {width}x{height}, {n} frames, {video.fps} fps, {n / video.fps:.2f} s of video; "
        f"took {took:.1f} s; seed {prepared.request.seed}"
    )
    out.detail(f"  replay  {prepared.replay}")
    out.emit({"output": str(path), **video.describe(), "seconds": round(took, 3)})


def _print_dry_run(prepared: Prepared, call: Call, output: Path, out: Output) -> None:
    facts = prepared.as_dict()
    given = {*call.fields} - {"seconds"}
    out.emit({"dry_run": True, "output": str(output), "given": sorted(given), **facts})
    given |= {"prompt"} | ({"num_frames"} if "seconds" in call.fields else set())
    out.line(f"would run  {prepared.model.defaults.model} in {facts['folder']}")
    out.line("request")
    shown = [(k, v) for k, v in facts["request"].items() if v is not None]
    for line in two_columns((k, f"{v}" if k in given else f"{v}  (default)") for k, v in shown):
        out.line(line)
    out.line("defaults from")
    for source in facts["defaults_from"]:
        out.line(f"  {source}")
    passes = "two passes" if prepared.request.do_classifier_free_guidance else "one pass"
    tokens = f"{facts['video_tokens']} video and {facts['text_tokens']} text tokens"
    out.line(f"work       {tokens}, {passes} for each step")
    out.line(f"output     {output}")
    out.line(f"replay     {facts['replay']}")
