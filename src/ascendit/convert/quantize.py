"""BF16 -> quantized: any float checkpoint that `layout` knows becomes a complete folder, streamed.

    report = quantize("Wan2.2-T2V-A14B-Diffusers", "Wan2.2-T2V-A14B-mxfp8", scheme="mxfp8")

Weights go through in blocks of rows, so the memory in use does not hang on the size of the model. The folder
is written beside its place and renamed at the end: it is whole or it is not there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ascendit.checkpoint.folder import model_folder
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.write import MAX_SHARD_BYTES
from ascendit.convert.calibration import Calibrate, check_alpha
from ascendit.convert.dialects import dialect_for
from ascendit.convert.job import OnProgress
from ascendit.convert.lora import LoraSource, parse_lora
from ascendit.convert.quantize_job import QuantizeJob, Smoothing
from ascendit.convert.recipe import load_recipe, no_scheme
from ascendit.convert.report import QuantizeReport
from ascendit.errors import UsageError


def quantize(
    src: Path | str,
    dst: Path | str,
    *,
    scheme: str | None = None,
    recipe: str | None = None,
    scale_rule: str | None = None,
    keep: Sequence[str] = (),
    loras: Sequence[LoraSource | str] = (),
    smoothing: Smoothing | None = None,
    calibrate: Calibrate | None = None,
    engine: str | None = None,
    copy: bool = False,
    resume: bool = False,
    force: bool = False,
    report: bool = False,
    hash: bool = False,
    dry_run: bool = False,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    on_progress: OnProgress | None = None,
) -> QuantizeReport:
    """Quantize the transformers of the model at `src` into the new folder `dst`.

    `scheme`: mxfp8, mxfp4, mxfp4_dualscale, int8, fp8, for a recipe that leaves it open (`default` does).
    `recipe`: a name of `recipe_names()` or a TOML file. `scale_rule`: one of the scheme's in `mx.formats`.
    `keep`: patterns of layers that stay as they are. `loras`: folded in before anything else, in this order.
    `smoothing`: weights are multiplied by 1 / mul_scale, which is stored. `calibrate`: a
    `pipeline.calibrate.Calibrator`, which runs the model to find that smoothing. `engine`: write its dialect.
    `copy`: other components are copied, not linked. `resume`: go on where a killed run with the same
    arguments stopped. `force`: quantize where accuracy is known to suffer. `report`: measure SQNR. `hash`:
    the sha256 of every file goes into `ascendit.json`, which takes as long as all the rest. `dry_run`: plan
    only.

    Raises UsageError: E-USE-01 for arguments that do not go together, E-USE-02 for a missing source or
    recipe, E-USE-03 and E-USE-06 for `dst`, E-USE-05 for patterns that match nothing, E-QNT-01 and E-QNT-02,
    E-ENG-01; CheckpointError for damaged sources and LoRA files; EnvironmentProblem E-ENV-04 for a full disk.
    """
    if scheme is None and recipe is None:
        raise no_scheme("quantize")
    if calibrate is not None:
        check_alpha(calibrate.alpha)
        if smoothing:
            raise UsageError(
                "both smoothing and calibrate",
                needs="one of them: a calibration makes the smoothing",
                fix="leave one out",
                code="E-USE-01",
            )
    job = QuantizeJob(
        layout=recognise(model_folder(src)),
        dst=Path(os.path.abspath(Path(dst).expanduser())),
        recipe=load_recipe(recipe or "default", scheme, scale_rule),
        keep=tuple(keep),
        loras=tuple(parse_lora(lora) if isinstance(lora, str) else lora for lora in loras),
        dialect=dialect_for(engine),
        smoothing=smoothing or {},
        max_shard_bytes=max_shard_bytes,
        copy=copy,
        measure=report,
        hash=hash,
        flags=_flags(scheme, recipe, scale_rule, keep, loras, engine, copy, force, report, hash)
        + list(calibrate.flags if calibrate else ()),
        calibrate=calibrate,
    )
    job.check(force)
    if dry_run:
        return job.report(0.0, dry_run=True)
    return job.run(resume, on_progress)


def _flags(
    scheme: str | None,
    recipe: str | None,
    scale_rule: str | None,
    keep: Sequence[str],
    loras: Sequence[LoraSource | str],
    engine: str | None,
    copy: bool,
    force: bool,
    report: bool,
    hash: bool,
) -> list[tuple[str, object]]:
    """The command line of this call, without what names no file of the model; files by their names alone."""
    name = None if recipe is None else Path(recipe).name if recipe.endswith(".toml") else recipe
    sources = [parse_lora(lora) if isinstance(lora, str) else lora for lora in loras]
    words = [f"{f'{x.expert}=' if x.expert else ''}{x.path.name}:{x.weight:g}" for x in sources]
    return [
        ("--scheme", scheme),
        ("--recipe", name),
        ("--scale-rule", scale_rule),
        ("--keep", list(keep)),
        ("--lora", words),
        ("--for", engine),
        ("--copy", copy),
        ("--force", force),
        ("--report", report),
        ("--hash", hash),
    ]
