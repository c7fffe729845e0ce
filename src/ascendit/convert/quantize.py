"""BF16 -> quantized: any float checkpoint that `checkpoint.layout` knows becomes a complete folder, streamed.

    report = quantize("Wan2.2-T2V-A14B-Diffusers", "Wan2.2-T2V-A14B-mxfp8", scheme="mxfp8")

Weights go through in blocks of rows, so memory use does not depend on the size of the model. The folder is
written beside its place and renamed at the end: it appears complete or not at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import INDEX_FILE, RECORD_FILE, Layout, recognise
from ascendit.checkpoint.output_folder import Staging, link_or_copy
from ascendit.checkpoint.quant_metadata import MANIFEST_FILE, QUANT_TYPE
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.transformer import num_weights, read_expert
from ascendit.checkpoint.writer import MAX_SHARD_BYTES
from ascendit.convert import provenance
from ascendit.convert.calibration import (
    SAMPLED_ROWS,
    STATISTICS,
    Calibrate,
    ExpertStatistics,
    mul_scales,
    output_quality,
    placeholders,
    smoothable,
)
from ascendit.convert.expert_folder import ExpertOutput, fingerprint, write_expert
from ascendit.convert.report import Outputs, QuantizedExpert, QuantizeReport, calibration_words
from ascendit.errors import UsageError
from ascendit.family import Task
from ascendit.progress import Meter, OnProgress
from ascendit.quant.recipe import Recipe, load_recipe, no_scheme
from ascendit.weights.applied_recipe import AppliedRecipe, apply_recipe, check_kind, warnings_for
from ascendit.weights.engine_formats import Dialect, check_engine, dialect_for, model_kind
from ascendit.weights.lora.fold import Folds, LoraSource, parse_lora
from ascendit.weights.recipe_steps import RecipeSteps

Smoothing = Mapping[str, Mapping[str, torch.Tensor]]
"""Expert -> layer -> mul_scale, float32 [K]."""
SMALL = 1 << 20
"""Bytes; files at the top of a model that are larger than this are no part of it."""
_NOT_COPIED = {provenance.CARD_FILE, RECORD_FILE, MANIFEST_FILE}
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".index.json")


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

    `scheme`: one of `quant.schemes.QUANTIZED`, for a recipe that leaves it open (`default` does).
    `recipe`: a name of `recipe_names()` or a TOML file. `scale_rule`: one of the scheme's in `mx.formats`.
    `keep`: patterns of layers that stay as they are. `loras`: folded in before anything else, in this order.
    `smoothing`: weights are multiplied by 1 / mul_scale, which is stored. `calibrate`: a
    `pipeline.calibrate.Calibrator`, which runs the model to find that smoothing. `engine`: write its dialect.
    `copy`: other components are copied, not linked. `resume`: go on where a killed run with the same
    arguments stopped. `force`: quantize where accuracy is known to suffer. `report`: measure SQNR. `hash`:
    the sha256 of every file goes into `ascendit.json`, which takes as long as all the rest. `dry_run`: check
    only.

    Raises UsageError: E-USE-01 for arguments that do not go together, E-USE-02 for a missing source or
    recipe, E-USE-03 and E-USE-06 for `dst`, E-USE-05 for patterns that match nothing, E-QNT-01 and E-QNT-02,
    E-ENG-01; CheckpointError for damaged sources and LoRA files; EnvironmentProblem E-ENV-04 for a full disk.
    """
    if scheme is None and recipe is None:
        raise no_scheme("quantize")
    if calibrate is not None and smoothing:
        raise UsageError(
            "both smoothing and calibrate",
            needs="one of them: a calibration makes the smoothing",
            fix="leave one out",
        )
    files = tuple(parse_lora(lora) if isinstance(lora, str) else lora for lora in loras)
    flags: list[tuple[str, object]] = [
        ("--scheme", scheme),
        ("--recipe", Path(recipe).name if recipe and recipe.endswith(".toml") else recipe),
        ("--scale-rule", scale_rule),
        ("--keep", list(keep)),
        ("--lora", [f"{f'{x.expert}=' if x.expert else ''}{x.path.name}:{x.weight:g}" for x in files]),
        ("--for", engine),
        ("--copy", copy),
        ("--force", force),
        ("--report", report),
        ("--hash", hash),
    ]
    job = QuantizeJob(
        layout=recognise(model_folder(src)),
        dst=Path(os.path.abspath(Path(dst).expanduser())),
        recipe=load_recipe(recipe or "default", scheme, scale_rule),
        keep=tuple(keep),
        loras=files,
        dialect=dialect_for(engine),
        smoothing=smoothing or {},
        calibrate=calibrate,
        max_shard_bytes=max_shard_bytes,
        copy=copy,
        measure=report,
        hash=hash,
        flags=[*flags, *(calibrate.flags if calibrate else ())],
    )
    job.check(force)
    if dry_run:
        return job.report(0.0, dry_run=True)
    return job.run(resume, on_progress)


@dataclass
class QuantizeJob:
    """One run: everything that is decided before the first byte is written."""

    layout: Layout
    dst: Path
    recipe: Recipe
    keep: tuple[str, ...]
    loras: tuple[LoraSource, ...]
    dialect: Dialect
    smoothing: Smoothing
    calibrate: Calibrate | None
    """Makes `smoothing`, once everything else is known to be right."""
    max_shard_bytes: int | None
    copy: bool
    measure: bool
    hash: bool
    flags: list[tuple[str, object]]
    """The command line, without what names no file of the model; files by their names alone."""
    kind: Task = field(init=False)
    experts: list[RecipeSteps] = field(init=False)
    planned: dict[str, ExpertOutput] = field(init=False)
    """Expert -> its output before a calibration, which changes smoothing factors, never a size."""
    outputs: dict[str, Outputs] = field(init=False, default_factory=dict)
    files: dict[str, str] = field(init=False, default_factory=dict)
    """Path in the folder -> sha256, if asked for."""
    calibration: Mapping[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        experts = [read_expert(part) for part in self.layout.experts]
        names = [expert.name for expert in experts]
        if unknown := sorted(set(self.smoothing) - set(names)):
            raise UsageError(
                f"smoothing for {', '.join(unknown)}",
                needs=f"one of {', '.join(names)}",
                fix="name the experts as the model does",
                code="E-USE-05",
            )
        self.kind = model_kind(experts[0].config)
        self.experts = []
        for expert in experts:
            smoothing = self.smoothing.get(expert.name)
            one = apply_recipe(expert, self.recipe, self.kind, keep=self.keep, smoothing=smoothing)
            if self.calibrate is not None:
                one = replace(one, smoothing=placeholders(one))
            shapes = {name: info.shape for name, info in expert.tensors.items()}
            folds = Folds.open(self.loras, expert.name, shapes, experts=names)
            self.experts.append(RecipeSteps(one, self.dialect, folds, measure=self.measure))

    @property
    def applied(self) -> list[AppliedRecipe]:
        """What becomes of each expert."""
        return [expert.applied for expert in self.experts]

    def check(self, force: bool) -> None:
        """Refuse before any work what cannot come out well; plan the rest."""
        used = {scheme for applied in self.applied for scheme in applied.schemes}
        if not used - {"bf16"}:
            keep = f" with --keep {' '.join(self.keep)}" if self.keep else ""
            raise UsageError(
                f"recipe {self.recipe.name}{keep} quantizes no layer",
                needs="at least one layer in another scheme than bf16",
                fix="keep fewer layers; `ascendit repack` changes the layout of a model alone",
                code="E-QNT-01",
            )
        check_kind(self.kind, used, self.layout.name, force=force)
        if (engine := self.dialect.engine) is not None:
            for applied in self.applied:
                check_engine(engine, applied.traits, f"{self.layout.name}/{applied.expert.name}")
        if self.calibrate is not None:
            self.calibration = self.calibrate.record(self.layout)
        self.planned = {expert.applied.expert.name: self.output_of(expert) for expert in self.experts}

    # ---- writing --------------------------------------------------------------------------------

    def output_of(self, expert: RecipeSteps) -> ExpertOutput:
        """What is written of one expert."""
        applied, source = expert.applied, expert.applied.expert
        asked = {f"{a.name}{QUANT_TYPE}": a.quant_type for a in applied.attention if a.quant_type}
        return ExpertOutput(
            source=source,
            folder=self.dialect.folder(source.name, len(self.experts)),
            dialect=self.dialect,
            steps=expert.plan(),
            config=source.config,
            layers=applied.inside,
            attention=source.attention | asked,
        )

    def run(self, resume: bool, on_progress: OnProgress | None) -> QuantizeReport:
        """Write the folder."""
        start = time.perf_counter()
        sources = [self.layout.root, *(x.expert.path for x in self.applied), *(x.path for x in self.loras)]
        needed = sum(output.nbytes for output in self.planned.values())
        needed += sum(_size(path) for path, _ in self._others() if self.copy or path.is_file())
        with Staging(
            self.dst,
            sources=list(dict.fromkeys(sources)),
            fingerprint=self.fingerprint(),
            resume=resume,
            needs_bytes=needed,
        ) as staging:
            found = self._calibrate(staging)
            total = sum(applied.bytes_before for applied in self.applied)
            if self.measure and found:  # each smoothed weight is read once more
                total += sum(x.weight(name).nbytes for x in self.applied for name in smoothable(x))
            meter = Meter(total, on_progress)
            for expert in self.experts:
                self._write(expert, staging, meter, found)
            for source, name in self._others():
                link_or_copy(source, staging.path / name, copy=self.copy or source.is_file())
            provenance.write_made(staging.path, self.made(), self.dst.name)
            (staging.path / STATISTICS).unlink(missing_ok=True)
            staging.publish()
        return self.report(time.perf_counter() - start)

    def _calibrate(self, staging: Staging) -> ExpertStatistics:
        """Run the model, or take what a killed run has found, and put the factors in their places."""
        if self.calibrate is None:
            return {}
        rows = SAMPLED_ROWS if self.measure else 0
        found = self.calibrate(self.layout, self.loras, rows, staging.journal)
        for expert in self.experts:
            made = mul_scales(expert.applied, found.get(expert.applied.expert.name, {}), self.calibrate.alpha)
            expert.applied = replace(expert.applied, smoothing=made)
        return found

    def _write(self, expert: RecipeSteps, staging: Staging, meter: Meter, found: ExpertStatistics) -> None:
        name = expert.applied.expert.name
        self.files |= write_expert(
            self.output_of(expert),
            staging,
            meter.advance_in(name),
            hash=self.hash,
            hash_json=self.hash,
            max_shard_bytes=self.max_shard_bytes,
            encode_all=self.measure,
        )
        if self.measure and found:
            with RowReader() as reader:
                advance = meter.advance_in(f"outputs of {name}")
                self.outputs[name] = output_quality(expert, found[name], reader, advance)

    def _others(self) -> list[tuple[Path, str]]:
        """Components and small files that come along, as (path, name in the folder)."""
        if self.layout.kind != "diffusers" or self.dialect.naming != "diffusers":
            return []
        experts = {part.name for part in self.layout.experts}
        others = [(part.path, part.name) for part in self.layout.parts.values() if part.name not in experts]
        for path in sorted(self.layout.root.iterdir()):
            if not path.is_file() or path.name.startswith(".") or path.name in _NOT_COPIED:
                continue
            if path.name == INDEX_FILE or (not path.name.endswith(_WEIGHTS) and path.stat().st_size <= SMALL):
                others.append((path, path.name))
        return others

    # ---- what is said about it ------------------------------------------------------------------

    def fingerprint(self) -> str:
        """The same for two runs that write the same bytes."""
        parts: list[Any] = [self.recipe.as_dict(), self.keep, self.max_shard_bytes, self.loras]
        if self.calibrate is not None:  # its statistics are kept, and a run that goes on reads them
            parts += [dict(self.calibration), self.measure]
        for expert, layers in self.smoothing.items():
            parts += [(expert, name, scale.tolist()) for name, scale in layers.items()]
        return fingerprint(self.planned.values(), parts, more=[lora.path for lora in self.loras])

    def made(self) -> provenance.Made:
        """For the card and `ascendit.json`."""
        report = self.report(0.0)
        details: dict[str, Any] = {"keep": list(self.keep), "engine": self.dialect.engine}
        details["calibration"] = dict(self.calibration)
        if self.measure:
            details["worst_sqnr_db"] = {
                x.name: {n: round(db, 2) for n, db in x.worst} for x in report.experts
            }
        return provenance.Made(
            verb="quantize",
            layout=self.layout,
            model_kind=self.kind,
            command=provenance.command_line("quantize", self.layout, self.dst, self.flags),
            files=self.files,
            schemes=report.schemes,
            bits_per_weight=report.bits_per_weight,
            recipe=self.recipe.as_dict(),
            loras=report.loras,
            details={key: value for key, value in details.items() if value},
            notes=_notes(report),
        )

    def report(self, seconds: float, *, dry_run: bool = False) -> QuantizeReport:
        """What happened, or would."""
        loras = [{"file": x.path.name, "weight": x.weight, "expert": x.expert or "all"} for x in self.loras]
        warnings = warnings_for(self.applied, self.recipe, self.kind)
        if dry_run and os.path.lexists(self.dst):
            warnings.append(f"{self.dst} exists already: a run would stop there")
        return QuantizeReport(
            path=self.dst,
            source=provenance.source_name(self.layout),
            recipe=f"{self.recipe.name}: {self.recipe.about}",
            model_kind=self.kind,
            experts=tuple(self._expert_report(expert) for expert in self.experts),
            dry_run=dry_run,
            seconds=seconds,
            linked=tuple(name for _, name in self._others()),
            loras=tuple(loras),
            calibration=self.calibration,
            engine=self.dialect.engine,
            warnings=tuple(warnings),
        )

    def _expert_report(self, expert: RecipeSteps) -> QuantizedExpert:
        applied = expert.applied
        return QuantizedExpert(
            name=applied.expert.name,
            schemes=applied.schemes,
            kept=applied.kept,
            bytes_before=applied.bytes_before,
            bytes_after=self.planned[applied.expert.name].nbytes,
            num_weights=num_weights(applied.expert),
            sqnr=expert.sqnr,
            outputs=self.outputs.get(applied.expert.name, Outputs()),
        )


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder, links followed."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _notes(report: QuantizeReport) -> list[str]:
    """Paragraphs of the card: what was kept, what was measured, what to know."""
    notes = []
    if report.calibration:
        notes.append(f"Smoothed as msModelSlim does: {calibration_words(report.calibration)}.")
    for expert in report.experts:
        kept = [f"- {', '.join(f'`{name}`' for name in names)}: {why}" for why, names in expert.kept.items()]
        notes.append("\n".join([f"Kept as they were in `{expert.name}`:", "", *kept]))
        if expert.sqnr:
            rows = [f"| `{layer}` | {value:.2f} |" for layer, value in expert.worst]
            head = [f"Signal to quantization noise of `{expert.name}`, the worst layers in dB:", ""]
            notes.append("\n".join([*head, "| layer | dB |", "|---|---|", *rows]))
        if expert.outputs.layers:
            notes.append(provenance.outputs_table(expert.name, expert.outputs))
    return notes + [f"Note: {warning}" for warning in report.warnings]
