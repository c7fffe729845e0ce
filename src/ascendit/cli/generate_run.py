"""The run of `ascendit generate`: one load, then one file for each video."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ascendit.cli.generate_plan import Planned
from ascendit.cli.interruptions import Interrupt, cancelled
from ascendit.cli.kept_latents import keep_latents, latents_kept_on_failure
from ascendit.cli.output import Output, internal_error, log_warnings, quiet_libraries
from ascendit.cli.progress import progress_view
from ascendit.errors import AscenditError, Cancelled, EnvironmentProblem, OutOfMemory
from ascendit.geometry import rate_text
from ascendit.pipeline.job import load_model, run
from ascendit.pipeline.sheet import Sheet
from ascendit.progress import Progress
from ascendit.report import beginning, counted, group_by

if TYPE_CHECKING:
    from ascendit.pipeline.generate import Pipeline
    from ascendit.pipeline.video import Video

SHOWN_PATHS = 5


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A video that was saved."""

    video: Video
    path: Path
    seconds: float
    record: dict[str, Any]
    """Its object in the output of `--json`."""


class Runner:
    """Loads the model with the first video and keeps it."""

    def __init__(self, out: Output, *, overwrite: bool, keep: bool) -> None:
        self._out, self._overwrite, self._keep = out, overwrite, keep
        self.pipe: Pipeline | None = None

    def make(self, planned: Planned, title: str = "") -> Finished:
        """Make and save one video. Raises the errors of `job.run` and `Video.save`."""
        start, prepared, output = time.perf_counter(), planned.prepared, planned.output
        with latents_kept_on_failure(prepared, output, self._out), log_warnings() as warnings:
            video = self._run(planned, title)
            with self._out.work():
                path = self._save(video, planned)
        if self._keep:
            with self._out.work():
                keep_latents(video.latents, prepared, Path(output))
        seconds = round(time.perf_counter() - start, 3)
        record = {"output": str(path), **video.describe()}
        record["replay"] = planned.replay(allow_flat=bool(video.warnings))
        record["loras"] = prepared.loras
        record |= {"warnings": list(dict.fromkeys([*video.warnings, *warnings])), "seconds": seconds}
        return Finished(video=video, path=path, seconds=seconds, record=record)

    def _run(self, planned: Planned, title: str) -> Video:
        """Load the model if it is not loaded, and run the request.

        Ctrl-C stops loading immediately, and a run between two steps, or two frames of the VAE.
        """
        interrupt, prepared, silent = Interrupt(silent=self._out.silent), planned.prepared, self._out.silent
        with self._out.work(), progress_view(silent=silent) as view, ExitStack() as stack:
            quiet_libraries()
            view.title = title
            watched = self.pipe is not None
            if watched:
                stack.enter_context(interrupt)

            def show(event: Progress) -> None:
                nonlocal watched
                if not watched and event.stage == "load" and event.step == event.total:
                    watched = True
                    stack.enter_context(interrupt)
                view(event)

            if self.pipe is None and prepared.latents is None:
                self.pipe = load_model(prepared.model, show)
            flat = planned.call.allow_flat
            video = run(prepared, show, interrupt.event, allow_flat=flat, pipe=self.pipe)
            try:
                interrupt.check()
            except Cancelled as error:
                error.latents = video.latents
                raise
        return video

    def _save(self, video: Video, planned: Planned) -> Path:
        """Save the video; an exception gets its latents."""
        call = planned.call
        try:
            return video.save(planned.output, metadata=call.metadata, overwrite=self._overwrite, crf=call.crf)
        except BaseException as error:
            error.latents = video.latents  # type: ignore[attr-defined]
            raise


def run_one(planned: Planned, out: Output, *, overwrite: bool, keep: bool, sheet: Sheet | None) -> None:
    """Make one video and print its path, size and replay line."""
    finished = Runner(out, overwrite=overwrite, keep=keep).make(planned)
    video, record = finished.video, finished.record
    n, height, width, _ = video.frames.shape
    out.line(str(finished.path))
    out.detail(
        f"  {width}x{height}, {n} frames, {rate_text(video.fps)} fps, {n / float(video.fps):.2f} s of video; "
        f"took {finished.seconds:.1f} s; seed {planned.prepared.request.seed}"
    )
    out.detail(f"  replay  {record['replay']}")
    if sheet is not None:
        sheet.add(video)
        record |= _save_sheet(sheet, out)
    out.emit(record)


def run_many(
    plan: Sequence[Planned], out: Output, *, overwrite: bool, keep: bool, sheet: Sheet | None
) -> None:
    """Make every video of the plan and print their paths; a failed one does not stop the others.

    Raises typer.Exit with exit code 1 if one has failed, and the errors that stop the run: Cancelled
    (E-CAN-01), an EnvironmentProblem such as a full disk, or a failure of the loading.
    """
    runner = Runner(out, overwrite=overwrite, keep=keep)
    records: list[dict[str, Any]] = []
    paths: list[Path] = []
    end: AscenditError | None = None
    start = time.perf_counter()
    for number, planned in enumerate(plan, 1):
        title, request = f"video {number}/{len(plan)}", planned.prepared.request
        try:
            finished = runner.make(planned, title)
        except (KeyboardInterrupt, Cancelled) as error:
            end = error if isinstance(error, Cancelled) else cancelled()
            break
        except Exception as error:
            if runner.pipe is None and not paths:
                raise
            if isinstance(error, EnvironmentProblem) and not isinstance(error, OutOfMemory):
                end = error
                break
            data = error.as_dict() if isinstance(error, AscenditError) else internal_error(error, out)
            records.append(_not_made(planned, data))
            out.problem(data | {"got": f"{title}, seed {request.seed}: {data['got']}"})
        else:
            records.append(finished.record)
            paths.append(finished.path)
            out.line(str(finished.path))
            out.detail(
                f"  {title}; seed {request.seed}; took {finished.seconds:.1f} s  {beginning(request.prompt)}"
            )
            if sheet is not None:
                sheet.add(finished.video)
    remaining = plan[len(records) :]
    result = {"videos": records + [_not_made(x, None) for x in remaining], "complete": len(paths)}
    result |= {"failed": len(records) - len(paths), "seconds": round(time.perf_counter() - start, 3)}
    if sheet is not None and paths:
        try:
            result |= _save_sheet(sheet, out)
        except AscenditError as error:
            end = end or error
    if end is not None:
        raise _stopped(end, plan, remaining, paths, result)
    out.emit(result)
    if result["failed"]:
        out.warn(f"{result['failed']} of {counted(len(plan), 'video')} failed; the errors are above")
        raise typer.Exit(1)


def _not_made(planned: Planned, error: dict[str, str] | None) -> dict[str, Any]:
    """The object of a video that failed, or was not started."""
    request = planned.prepared.request
    return {
        "output": None,
        "prompt": request.prompt,
        "seed": request.seed,
        "error": error,
        "replay": planned.replay(allow_flat=planned.call.allow_flat, output=planned.output),
    }


def _stopped(
    error: AscenditError,
    plan: Sequence[Planned],
    remaining: Sequence[Planned],
    paths: Sequence[Path],
    result: dict[str, Any],
) -> AscenditError:
    """The error that ends the run, with the videos that are complete and the commands for the others."""
    shown = ", ".join(map(str, paths[:SHOWN_PATHS])) + (", .." if len(paths) > SHOWN_PATHS else "")
    error.got += f"; {len(paths)} of {counted(len(plan), 'video')} are complete" + (shown and f": {shown}")
    error.details = result
    if isinstance(error, Cancelled) and remaining:
        error.needs = "nothing: complete videos are kept, and no other file is left"
        error.fix = "; ".join(_commands(remaining))
    return error


def _commands(remaining: Sequence[Planned]) -> list[str]:
    """The commands for videos: one for those that differ only in their seeds."""
    earlier: Counter[str] = Counter()

    def key(planned: Planned) -> tuple[str, str | None, int]:
        request = planned.prepared.request
        earlier[request.to_json()] += 1
        same = request.model_copy(update={"seed": 0}).to_json()
        return same, planned.output_without_seed, earlier[request.to_json()]

    groups, commands = group_by(remaining, key), []
    for group in groups.values():
        first, requests = group[0], [planned.prepared.request for planned in group]
        seeds = [request.seed for request in requests] if len(group) > 1 else []
        output = first.output_without_seed if seeds else first.output
        commands.append(first.replay(allow_flat=first.call.allow_flat, output=output, seeds=seeds))
    return commands


def _save_sheet(sheet: Sheet, out: Output) -> dict[str, Any]:
    with out.work():
        path = sheet.save()
    out.detail(f"  sheet   {path}")
    return {"sheet": str(path)}
