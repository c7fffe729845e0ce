"""The videos of one call of `ascendit generate`, checked against the model, with their output paths."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ascendit.cli.kept_latents import check_latents_file
from ascendit.cli.prompts import Row, combinations
from ascendit.errors import AscenditError, UsageError
from ascendit.report import counted, shell_line

if TYPE_CHECKING:
    from ascendit.cli.generate_options import Call
    from ascendit.pipeline.job import Prepared


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One video to make."""

    prepared: Prepared
    output: str
    call: Call
    base_output: str | None = None
    """The `-o` of the call, from which the names of many videos are made."""

    @property
    def output_without_seed(self) -> str | None:
        """The `-o` for several seeds of this prompt: `a_01.mp4` for `a_01_s7.mp4`; a folder is unchanged."""
        base, path = self.base_output, Path(self.output)
        if base is None or base.endswith("/") or os.path.isdir(base):
            return base
        seed = f"_s{self.prepared.request.seed}"
        return str(path.with_stem(path.stem.removesuffix(seed)))

    def replay(self, *, allow_flat: bool, output: str | None = None, seeds: Sequence[int] = ()) -> str:
        """The command that makes this video. `seeds`: several, instead of its own."""
        flags = self.call.replay_flags(allow_flat=allow_flat)
        return self.prepared.replay_line(flags, output=output, seeds=seeds)


def plan_one(
    call: Call,
    output: str | None,
    *,
    overwrite: bool = False,
    keep: bool = False,
    latents: Path | None = None,
) -> Planned:
    """Check one video against its model, and choose the output path.

    `keep`: its latents are written too. `latents`: kept ones to decode. Raises the errors of
    `job.prepare`, `job.prepare_latents` and `video.check_output`.
    """
    from ascendit.pipeline.output_names import default_name

    _check_model(call, output)
    prepared = _prepare_request(call, latents)
    request = prepared.request
    output = output or str(default_name(request.prompt, request.seed, datetime.now()))
    planned = Planned(prepared=prepared, output=output, call=call)
    _check_output(planned, overwrite=overwrite, keep=keep)
    return planned


def plan_many(
    call: Call,
    rows: Sequence[Row] | None,
    seeds: Sequence[int],
    num_videos: int | None,
    output: str | None,
    *,
    overwrite: bool = False,
    keep: bool = False,
) -> list[Planned]:
    """Check every video of a call before the first step, and choose their paths, as `plan_one` does.

    `rows`: the prompts; None: that of the call. Raises the errors of `prompts.combinations` too, and
    UsageError (E-USE-03) that names the outputs that exist.
    """
    from ascendit.pipeline.images import Pictures
    from ascendit.pipeline.job import prepare_model, prepare_request
    from ascendit.pipeline.output_names import names_of

    videos = list(combinations(rows or [Row(prompt=call.prompt)], call.fields, seeds, num_videos))
    _check_model(call, output)
    model = prepare_model(call.options, {name for _, _, fields in videos for name in fields})
    prepared, calls, pictures = [], [], Pictures()
    for _, row, fields in videos:
        calls.append(replace(call, fields=fields))
        try:
            prepared.append(prepare_request(model, row.prompt, pixels=pictures, **fields))
        except AscenditError as e:
            e.got = f"{row.source}: {e.got}" if row.source else e.got
            raise
    numbers = [number for number, _, _ in videos]
    outputs = names_of(output, [x.request for x in prepared], numbers, datetime.now())
    triples = zip(prepared, outputs, calls, strict=True)
    plan = [Planned(prepared=p, output=o, call=c, base_output=output) for p, o, c in triples]
    existing = []
    for planned in plan:
        try:
            _check_output(planned, overwrite=overwrite, keep=keep)
        except UsageError as e:
            if e.code != "E-USE-03":
                raise
            existing.append((planned.output, e))
    if len(existing) == 1:
        raise existing[0][1]
    if existing:
        shown = ", ".join(path for path, _ in existing[:5]) + (", .." if len(existing) > 5 else "")
        got = f"{len(existing)} of {counted(len(plan), 'output')} exist: {shown}"
        needs = "new names; files are overwritten only with --overwrite"
        raise UsageError(got, needs=needs, fix="--overwrite, or another name with -o", code="E-USE-03")
    return plan


def _check_model(call: Call, output: str | None) -> None:
    """Raise the errors of an output folder that cannot be written, and of a model that does not exist."""
    from ascendit.checkpoint.file_copy import check_writable
    from ascendit.checkpoint.hub import model_folder

    if output is not None:
        check_writable(os.path.join(output, "x") if os.path.isdir(output) else output)
    if call.model_from is None:
        return
    try:
        model_folder(call.options.model)
    except UsageError as e:
        if e.code == "E-USE-02":
            args = shell_line([call.prompt, "--config", str(call.model_from)])
            e.got += f", named in {call.model_from}"
            e.fix = f"pass MODEL on the command line: ascendit generate MODEL {args}; or add --demo"
        raise


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


def _check_output(planned: Planned, *, overwrite: bool, keep: bool) -> None:
    """Raise the errors of saving the video, and its latents with `keep`."""
    from ascendit.pipeline.video import check_output

    prepared, call, request = planned.prepared, planned.call, planned.prepared.request
    load = prepared.model.options.record if prepared.latents is None else dict(prepared.latents.loaded)
    record = {
        "source": prepared.model.options.model,
        "load": load,
        "request": json.loads(request.to_json()),
    }
    check_output(
        planned.output,
        (request.num_frames, request.height, request.width),
        request.fps,
        sidecar=json.dumps(record).encode() if call.metadata else None,
        overwrite=overwrite,
        crf=call.crf,
    )
    if keep:
        check_latents_file(Path(planned.output), overwrite=overwrite)
