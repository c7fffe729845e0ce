"""`ascendit generate`: a prompt becomes a video file."""

from __future__ import annotations

import inspect
import shlex
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendit.cli.output import Output, quiet_libraries
from ascendit.errors import UsageError
from ascendit.pipeline.options import FLAGS, OPTIONS
from ascendit.report import columns

if TYPE_CHECKING:
    from ascendit.cli.generate_options import Call
    from ascendit.pipeline.job import Prepared
    from ascendit.pipeline.video import Video
    from ascendit.progress import Progress


KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY


def _flag(
    name: str, kind: Any, help: str, metavar: str | None = None, names: str = "", *, hidden: bool = False
) -> inspect.Parameter:
    """A parameter of `generate`: a key of `--set` with its flag, or what is no key."""
    names = names or f"--{name.replace('_', '-')}"
    option = typer.Option(*names.split(), metavar=metavar, help=help, hidden=hidden)
    default, hint = (False, bool) if kind is bool else (None, kind | None)
    return inspect.Parameter(name, KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])


FILES = ".mp4, .webm, .gif or .png frames; default outputs/<time>_<prompt>_s<seed>.mp4."
SETTINGS = "Anything else, as solver=euler or metadata=false; repeatable."
TIMESTEPS = "Own schedule, as 1000,750,500,250 for distilled models."
WORDS = typer.Argument(metavar="[MODEL] PROMPT", hidden=True)  # the text above the options explains it
PARAMETERS = (
    inspect.Parameter("ctx", KEYWORD_ONLY, annotation=typer.Context),
    inspect.Parameter("words", KEYWORD_ONLY, default=None, annotation=Annotated[list[str] | None, WORDS]),
    _flag("demo", bool, "Use the small model that comes with ascendit."),
    _flag("output", Path, FILES, "FILE", "-o --output"),
    _flag("seed", int, "Same seed, same video; default random, printed.", "N"),
    _flag("num_inference_steps", int, "Denoising steps.", "N", "--steps"),
    _flag("size", str, "Pixels, as 832x480 or 832*480.", "WxH"),
    _flag("num_frames", int, "Number of frames, 4n+1.", "N", "--frames"),
    _flag("seconds", float, "Length, instead of --frames.", "S"),
    _flag("fps", int, "Frames per second of the file.", "N", hidden=True),
    _flag("guidance", str, "One scale, or high-noise,low-noise.", "G[,G2]"),
    _flag("flow_shift", float, "Flow shift of the schedule.", "X", "--shift", hidden=True),
    _flag("own_timesteps", str, TIMESTEPS, "T,T,..", "--timesteps", hidden=True),
    _flag("negative_prompt", str, "What the video should not show.", "TEXT", "--negative"),
    _flag("image", str, "First frame, for models that take one.", "FILE"),
    *(_flag(name, str, x.help, x.metavar, hidden=x.hidden) for name, x in OPTIONS.items() if x.metavar),
    _flag("settings", list[str], SETTINGS, "KEY=VALUE", "--set"),
    _flag("config", Path, "TOML with keys as for --set, or the .json beside a video.", "FILE"),
    _flag("dry_run", bool, "Say what would run; load no weights."),
    _flag("as_json", bool, "Print one JSON object and nothing else.", names="--json"),
    _flag("overwrite", bool, "Replace the output if it exists."),
)


def generate(ctx: typer.Context, **params: Any) -> None:
    """Make a video from a prompt.

    MODEL is a folder, hf:org/name or ms:org/name; --demo needs none. PROMPT goes in quotes.
    What the flags leave out is the model's own default.

    ascendit generate --demo "a red circle moves right on a black background"
    """
    if params["num_frames"] is not None and params["seconds"] is not None:
        raise typer.BadParameter("give --frames or --seconds, not both", ctx=ctx)
    from ascendit.cli.generate_options import read_call

    out: Output = ctx.obj
    call = read_call(
        params["words"] or [],
        demo=params["demo"],
        flags=params,
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


def _prepare(call: Call, output: Path | None, *, overwrite: bool) -> tuple[Prepared, Path]:
    """Meet the model, and find a free name for the output."""
    from ascendit.pipeline import video
    from ascendit.pipeline.job import prepare

    if output is not None:
        video.check_writable(output)
    if call.model_from is not None:
        _find_model(call, call.model_from)
    prepared = prepare(call.options, call.prompt, **call.fields)
    request = prepared.request
    output = output or video.default_name(request.prompt, request.seed, datetime.now())
    shape = (request.num_frames, request.height, request.width)
    sidecar = b"" if call.metadata else None
    video.check_output(output, shape, request.fps, sidecar=sidecar, overwrite=overwrite)
    return prepared, output


def _find_model(call: Call, config: Path) -> None:
    """UsageError E-USE-02 that names the config, where the model that it names is not found."""
    from ascendit.checkpoint.hub import model_folder

    try:
        model_folder(call.options.model)
    except UsageError as e:
        if e.code == "E-USE-02":
            again = shlex.join([call.prompt, "--config", str(config)])
            e.got += f", which {config} names"
            e.fix = f"name MODEL on the command line: ascendit generate MODEL {again}; or add --demo"
        raise


def _run(prepared: Prepared, out: Output) -> Video:
    """Load the model and run the request. Ctrl-C stops between steps, while loading at once."""
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

        video = run(prepared, show, interrupt.event)
        interrupt.check()
    return video


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
    request, options, model = prepared.request, prepared.model.options, prepared.model
    facts = {
        "dry_run": True,
        "model": options.model,
        "folder": str(model.layout.root),
        "output": str(output),
        "request": request.model_dump(),
        "given": sorted({*call.fields} - {"seconds"}),
        "defaults_from": list(model.defaults.sources),
        "video_tokens": prepared.video_tokens,
        "text_tokens": request.max_sequence_length,
        **{name: getattr(options, name) for name in FLAGS},
        "replay": prepared.replay,
    }
    given = {*call.fields, "prompt"} | ({"num_frames"} if "seconds" in call.fields else set())
    shown = [(k, v) for k, v in request.model_dump().items() if v is not None]
    passes = "two passes" if request.do_classifier_free_guidance else "one pass"
    tokens = f"{prepared.video_tokens} video and {request.max_sequence_length} text tokens"
    lines = [
        f"would run  {model.defaults.model} in {model.layout.root}",
        "request",
        *columns(((k, f"{v}" if k in given else f"{v}  (default)") for k, v in shown), indent="  "),
        "defaults from",
        *(f"  {source}" for source in model.defaults.sources),
        f"work       {tokens}, {passes} for each step",
        f"output     {output}",
        f"replay     {prepared.replay}",
    ]
    out.result(facts, lines)
