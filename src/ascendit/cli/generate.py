"""`ascendit generate`: a prompt becomes a video file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendit.cli.generate_options import (
    Prepared,
    parse_guidance,
    parse_size,
    parse_timesteps,
    prepare,
    read_call,
)
from ascendit.cli.output import Output, quiet_libraries
from ascendit.report import columns

if TYPE_CHECKING:
    from ascendit.cli.progress import ProgressView
    from ascendit.pipeline.video import Video

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL] PROMPT",
        hidden=True,  # the text above the options explains it
    ),
]
Demo = Annotated[bool, typer.Option("--demo", help="Use the small model that comes with ascendit.")]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help=".mp4, .webm, .gif or .png frames; default outputs/<time>_<prompt>_s<seed>.mp4.",
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Same seed, same video; default random, printed.")
]
Steps = Annotated[int | None, typer.Option("--steps", metavar="N", help="Denoising steps.")]
Size = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Pixels, as 832x480 or 832*480.")]
Frames = Annotated[int | None, typer.Option("--frames", metavar="N", help="Number of frames, 4n+1.")]
Seconds = Annotated[float | None, typer.Option("--seconds", metavar="S", help="Length, instead of --frames.")]
Fps = Annotated[
    int | None, typer.Option("--fps", hidden=True, metavar="N", help="Frames per second of the file.")
]
Guidance = Annotated[
    str | None, typer.Option("--guidance", metavar="G[,G2]", help="One scale, or high-noise,low-noise.")
]
Shift = Annotated[
    float | None, typer.Option("--shift", hidden=True, metavar="X", help="Flow shift of the schedule.")
]
Timesteps = Annotated[
    str | None,
    typer.Option(
        "--timesteps",
        hidden=True,
        metavar="T,T,..",
        help="Own schedule, as 1000,750,500,250 for distilled models.",
    ),
]
Negative = Annotated[
    str | None, typer.Option("--negative", metavar="TEXT", help="What the video should not show.")
]
Image = Annotated[
    str | None, typer.Option("--image", metavar="FILE", help="First frame, for models that take one.")
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="cpu (default), cuda:1, npu:0, or an NPU's twin on the CPU: twin:a5."
    ),
]
Scheme = Annotated[
    str | None,
    typer.Option(
        "--scheme", metavar="NAME", help="Quantize a BF16 model while it loads: mxfp8, mxfp4, int8, ..."
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME", help="The same by a recipe, or a TOML file of your own."),
]
Policy = Annotated[
    str | None,
    typer.Option(
        "--step-policy", metavar="STEPS:HOW,..", help='Precision by step, as "0-1:w4a8,default:w4a4".'
    ),
]
Emulation = Annotated[
    str | None,
    typer.Option(
        "--emulate",
        metavar="HOW",
        help="Where a chip lacks the scheme: decode-on-use, or decode-once (faster).",
    ),
]
TextOn = Annotated[
    str | None,
    typer.Option(
        "--text-on",
        hidden=True,
        metavar="WHERE",
        help="Text encoder on cpu, on device (default), or drop it after use.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Anything else, as solver=euler or metadata=false; repeatable."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="TOML with keys as for --set, or the .json beside a video."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run; load no weights.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]


def generate(
    ctx: typer.Context,
    words: Words = None,
    demo: Demo = False,
    output: OutputFile = None,
    seed: Seed = None,
    steps: Steps = None,
    size: Size = None,
    frames: Frames = None,
    seconds: Seconds = None,
    fps: Fps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    timesteps: Timesteps = None,
    negative: Negative = None,
    image: Image = None,
    device: Device = None,
    scheme: Scheme = None,
    recipe: RecipeName = None,
    step_policy: Policy = None,
    emulate: Emulation = None,
    text_on: TextOn = None,
    settings: Set = None,
    config: Config = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Make a video from a prompt.

    MODEL is a folder, hf:org/name or ms:org/name; --demo needs none. PROMPT goes in quotes.
    What the flags leave out is the model's own default.

    ascendit generate --demo "a red circle moves right on a black background"
    """
    if frames is not None and seconds is not None:
        raise typer.BadParameter("give --frames or --seconds, not both", ctx=ctx)
    out: Output = ctx.obj
    call = read_call(
        words or [], demo=demo, flags=flag_values(ctx.params), settings=settings or [], config=config
    )
    for note in call.notes:
        out.note(note)
    with out.work():
        prepared = prepare(call, output, overwrite=overwrite)
    if dry_run:
        _print_dry_run(prepared, out)
    else:
        _run(prepared, out, overwrite=overwrite)


def flag_values(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of `generate` as a layer of options; None where a flag was not given."""
    size, guidance, timesteps = params["size"], params["guidance"], params["timesteps"]
    return {
        "seed": params["seed"],
        "num_inference_steps": params["steps"],
        "num_frames": params["frames"],
        "seconds": params["seconds"],
        "fps": params["fps"],
        "flow_shift": params["shift"],
        "negative_prompt": params["negative"],
        "image": params["image"],
        "device": params["device"],
        **{name: params[name] for name in ("scheme", "recipe", "step_policy", "emulate")},
        "text_on": params["text_on"],
        **(parse_size(size) if size is not None else {}),
        **(parse_guidance(guidance) if guidance is not None else {}),
        **(parse_timesteps(timesteps) if timesteps is not None else {}),
    }


def _run(prepared: Prepared, out: Output, *, overwrite: bool) -> None:
    from ascendit.cli.progress import progress_view

    start = time.perf_counter()
    with out.work(), progress_view(silent=out.quiet or out.json) as view:
        video = _make(prepared, out, view)
        path = video.save(prepared.output, metadata=prepared.call.metadata, overwrite=overwrite)
    took = time.perf_counter() - start
    _print_result(prepared, out, video, path, took)


def _make(prepared: Prepared, out: Output, view: ProgressView) -> Video:
    """Load the model and run the request. Ctrl-C stops between steps; out of memory says in which stage."""
    import ascendit
    from ascendit.cli.interruptions import Interrupt, is_out_of_memory, out_of_memory

    quiet_libraries()
    try:
        pipe = ascendit.load(prepared.call.model, on_progress=view, **prepared.load_options)
        with Interrupt(silent=out.quiet or out.json) as interrupt:
            video: Video = pipe.run(prepared.request, on_progress=view, cancel=interrupt.event)
            interrupt.check()
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(error, view.stage, prepared.call.device) from error
        raise
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


def _print_dry_run(prepared: Prepared, out: Output) -> None:
    told = prepared.as_dict()
    out.emit(told)
    given = {*prepared.call.fields, "prompt"} | (
        {"num_frames"} if prepared.call.seconds is not None else set()
    )
    out.line(f"would run  {prepared.defaults.model} in {told['folder']}")
    out.line("request")
    shown = [(k, v) for k, v in told["request"].items() if v is not None]
    for line in columns(((k, f"{v}" if k in given else f"{v}  (default)") for k, v in shown), indent="  "):
        out.line(line)
    out.line("defaults from")
    for source in prepared.defaults.sources:
        out.line(f"  {source}")
    passes = "two passes" if prepared.request.do_classifier_free_guidance else "one pass"
    tokens = f"{told['video_tokens']} video and {told['text_tokens']} text tokens"
    out.line(f"work       {tokens}, {passes} for each step")
    out.line(f"output     {prepared.output}")
    out.line(f"replay     {prepared.replay}")
