"""BF16 -> quantized: any float checkpoint that `checkpoint.layout` knows becomes a complete folder, streamed.

    report = quantize("Wan2.2-T2V-A14B-Diffusers", "Wan2.2-T2V-A14B-mxfp8", scheme="mxfp8")

Weights go through in blocks of rows, so memory use does not depend on the size of the model. The folder is
written beside its place and renamed at the end: it appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import INDEX_FILE, RECORD_FILE, Layout, recognise
from ascendit.checkpoint.output_folder import Staging, link_or_copy
from ascendit.checkpoint.quant_metadata import MANIFEST_FILE
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.transformer import Expert, read_expert
from ascendit.checkpoint.writer import MAX_SHARD_BYTES, ShardWriter
from ascendit.convert import provenance
from ascendit.convert.calibration import (
    SAMPLED_ROWS,
    STATISTICS,
    Calibrate,
    ExpertStatistics,
    Save,
    check_alpha,
    mul_scales,
    placeholders,
    smoothable,
)
from ascendit.convert.output_error import output_quality
from ascendit.convert.report import Outputs, QuantizedExpert, QuantizeReport, calibration_words
from ascendit.errors import UsageError
from ascendit.family import Task
from ascendit.progress import Meter, OnProgress
from ascendit.quant.recipe import Recipe, load_recipe, no_scheme
from ascendit.version import __version__
from ascendit.weights.applied_recipe import AppliedRecipe, apply_recipe, check_kind, warnings_for
from ascendit.weights.engine_formats import Dialect, check_engine, dialect_for, model_kind, task_config
from ascendit.weights.lora.fold import Folds, LoraSource, parse_lora
from ascendit.weights.quantize_writer import ExpertWriter, WriteBehind

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

    `scheme`: mxfp8, mxfp4, mxfp4_dualscale, int8, fp8, for a recipe that leaves it open (`default` does).
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


# ---- one run ------------------------------------------------------------------------------------


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
    max_shard_bytes: int | None
    copy: bool
    measure: bool
    hash: bool
    flags: list[tuple[str, object]]
    calibrate: Calibrate | None = None
    """Makes `smoothing`, once everything else is known to be right."""
    applied: list[AppliedRecipe] = field(init=False)
    folds: list[Folds] = field(init=False)
    kind: Task = field(init=False)
    sqnr: dict[str, dict[str, float]] = field(init=False, default_factory=dict)
    outputs: dict[str, Outputs] = field(init=False, default_factory=dict)
    files: dict[str, str] = field(init=False, default_factory=dict)
    """Path in the folder -> sha256, if asked for."""
    calibration: Mapping[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        experts = [read_expert(part) for part in self.layout.experts]
        if unknown := sorted(set(self.smoothing) - {expert.name for expert in experts}):
            raise UsageError(
                f"smoothing for {', '.join(unknown)}",
                needs=f"one of {', '.join(expert.name for expert in experts)}",
                fix="name the experts as the model does",
                code="E-USE-05",
            )
        self.kind = model_kind(experts[0].config)
        self.applied = [self._apply(expert) for expert in experts]
        if self.calibrate is not None:
            self.smoothing = {applied.expert.name: placeholders(applied) for applied in self.applied}
            self.applied = [self._apply(expert) for expert in experts]
        names = [expert.name for expert in experts]
        self.folds = [
            Folds.open(
                self.loras, e.name, {name: info.shape for name, info in e.tensors.items()}, experts=names
            )
            for e in experts
        ]

    def _apply(self, expert: Expert) -> AppliedRecipe:
        return apply_recipe(
            expert,
            self.recipe,
            self.kind,
            keep=self.keep,
            smoothing=self.smoothing.get(expert.name),
            dialect=self.dialect,
        )

    def check(self, force: bool) -> None:
        """Refuse before any work what cannot come out well."""
        used = {scheme for applied in self.applied for scheme in applied.schemes}
        if not used - {"bf16"}:
            raise UsageError(
                f"recipe {self.recipe.name} with --keep {' '.join(self.keep)} quantizes no layer"
                if self.keep
                else f"recipe {self.recipe.name} quantizes no layer",
                needs="at least one layer in another scheme than bf16",
                fix="keep fewer layers; `ascendit repack` changes the layout of a model alone",
                code="E-QNT-01",
            )
        check_kind(self.kind, used, self.layout.name, force=force)
        for applied in self.applied:
            check_engine(self.dialect.engine, applied.traits, f"{self.layout.name}/{applied.expert.name}")
        if self.calibrate is not None:
            self.calibration = self.calibrate.record(self.layout)

    # ---- writing --------------------------------------------------------------------------------

    def run(self, resume: bool, on_progress: OnProgress | None) -> QuantizeReport:
        """Write the folder."""
        start = time.perf_counter()
        sources = [self.layout.root, *(applied.expert.path for applied in self.applied)]
        sources += [lora.path for lora in self.loras]
        needed = sum(applied.bytes_after for applied in self.applied)
        needed += sum(_size(path) for path, _ in self._others() if self.copy or path.is_file())
        with Staging(
            self.dst,
            sources=list(dict.fromkeys(sources)),
            fingerprint=self.fingerprint(),
            resume=resume,
            needs_bytes=needed,
        ) as staging:
            found = self._calibrate(staging, resume)
            meter = Meter(self._total_bytes(), on_progress)
            for applied, folds in zip(self.applied, self.folds, strict=True):
                self._write_expert(staging, applied, folds, meter)
                if self.measure and found:
                    self._measure_outputs(applied, folds, found, meter)
            for source, name in self._others():
                link_or_copy(source, staging.path / name, copy=self.copy or source.is_file())
            provenance.write_made(staging.path, self.made(), self.dst.name)
            (staging.path / STATISTICS).unlink(missing_ok=True)
            staging.publish()
        return self.report(time.perf_counter() - start)

    def _calibrate(self, staging: Staging, resume: bool) -> ExpertStatistics:
        """Run the model, or take what a killed run has found, and put the factors in their places."""
        if self.calibrate is None:
            return {}
        file = staging.path / STATISTICS
        save = Save(
            file=file,
            resume=resume and staging.journal.complete(file) is not None,
            saved=lambda: staging.journal.add(file, file.stat().st_size),
        )
        found = self.calibrate(self.layout, self.loras, SAMPLED_ROWS if self.measure else 0, save)
        for i, applied in enumerate(self.applied):
            made = mul_scales(applied, found.get(applied.expert.name, {}), self.calibrate.alpha)
            self.applied[i] = replace(applied, smoothing=made)
        return found

    def _measure_outputs(
        self, applied: AppliedRecipe, folds: Folds, found: ExpertStatistics, meter: Meter
    ) -> None:
        name = applied.expert.name
        with RowReader() as reader:
            advance = meter.advance_in(f"outputs of {name}")
            self.outputs[name] = output_quality(applied, found[name], reader, folds, advance)

    def _write_expert(self, staging: Staging, applied: AppliedRecipe, folds: Folds, meter: Meter) -> None:
        quant_type = applied.manifest["model_quant_type"]
        folder = staging.path / self.dialect.folder(applied.expert.name, len(self.applied))
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            reader = stack.enter_context(RowReader())
            writer = stack.enter_context(
                ShardWriter(
                    folder,
                    applied.disk_specs,
                    stem=self.dialect.stem(quant_type),
                    max_shard_bytes=None if self.dialect.typed_names else self.max_shard_bytes,
                    hash=self.hash,
                    journal=staging.journal,
                )
            )
            behind = stack.enter_context(WriteBehind(writer))
            advance = meter.advance_in(applied.expert.name)
            work = ExpertWriter(applied, reader, behind, folds=folds, measure=self.measure, advance=advance)
            work.write()
            behind.flush()
            digests = writer.close()
        self.sqnr[applied.expert.name] = work.sqnr
        where = folder.relative_to(staging.path)
        manifest, config = folder / self.dialect.manifest_file(quant_type), folder / "config.json"
        manifest.write_text(json.dumps(applied.manifest, indent=4) + "\n", encoding="utf-8")
        provenance.write_json(config, applied.config)
        written = [manifest, config]
        if self.dialect.task_file:
            written.append(folder / self.dialect.task_file)
            provenance.write_json(written[-1], task_config(applied.expert.config))
        if self.hash:
            written += folder.glob("*.index.json")
            digests |= {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in written}
        self.files |= {(where / name).as_posix(): digest for name, digest in digests.items()}
        if self.dialect.mode is not None:
            for path in (manifest, *(shard.file for shard in writer.shards)):
                path.chmod(self.dialect.mode)

    def _others(self) -> list[tuple[Path, str]]:
        """Components and small files that come along, as (where it lies, name in the folder)."""
        if self.layout.kind != "diffusers" or self.dialect.naming != "diffusers":
            return []
        experts = {part.name for part in self.layout.experts}
        found = [(part.path, part.name) for part in self.layout.parts.values() if part.name not in experts]
        for path in sorted(self.layout.root.iterdir()):
            if not path.is_file() or path.name.startswith(".") or path.name in _NOT_COPIED:
                continue
            if path.name == INDEX_FILE or (not path.name.endswith(_WEIGHTS) and path.stat().st_size <= SMALL):
                found.append((path, path.name))
        return found

    def _total_bytes(self) -> int:
        total = sum(applied.bytes_before for applied in self.applied)
        if self.measure and self.calibrate is not None:  # each smoothed weight is read once more
            total += sum(
                applied.weight(name).nbytes for applied in self.applied for name in smoothable(applied)
            )
        return total

    # ---- what is said about it ------------------------------------------------------------------

    def fingerprint(self) -> str:
        """The same for two runs that write the same bytes."""
        infos = [info for applied in self.applied for info in applied.expert.tensors.values()]
        files = sorted({info.file for info in infos} | {lora.path for lora in self.loras})
        stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        what: list[Any] = [__version__, stamps, self.recipe.as_dict(), self.keep, self.dialect.engine]
        what += [[(str(x.path), x.weight, x.expert) for x in self.loras], self.max_shard_bytes]
        if self.calibrate is not None:  # what it finds is kept, and a run that goes on takes it from there
            what += [dict(self.calibration), self.measure]
        else:
            for expert, layers in self.smoothing.items():
                what += [(expert, name, scale.tolist()) for name, scale in layers.items()]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def made(self) -> provenance.Made:
        """For the card and `ascendit.json`."""
        report = self.report(0.0)
        details: dict[str, Any] = {"keep": list(self.keep), "engine": self.dialect.engine}
        details["calibration"] = dict(self.calibration)
        if self.measure:
            worst = {expert.name: dict(expert.worst) for expert in report.experts}
            details["worst_sqnr_db"] = {k: {n: round(x, 2) for n, x in v.items()} for k, v in worst.items()}
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
        experts = tuple(
            QuantizedExpert(
                name=applied.expert.name,
                schemes=applied.schemes,
                kept=applied.kept,
                bytes_before=applied.bytes_before,
                bytes_after=applied.bytes_after,
                num_weights=applied.num_weights,
                sqnr=self.sqnr.get(applied.expert.name, {}),
                outputs=self.outputs.get(applied.expert.name, Outputs()),
            )
            for applied in self.applied
        )
        loras = tuple(
            {"file": lora.path.name, "weight": lora.weight, "expert": lora.expert or "all"}
            for lora in self.loras
        )
        warnings = warnings_for(self.applied, self.recipe, self.kind)
        if dry_run and os.path.lexists(self.dst):
            warnings.append(f"{self.dst} exists already: a run would stop there")
        return QuantizeReport(
            path=self.dst,
            source=provenance.source_name(self.layout),
            recipe=f"{self.recipe.name}: {self.recipe.about}",
            model_kind=self.kind,
            experts=experts,
            dry_run=dry_run,
            seconds=seconds,
            linked=tuple(name for _, name in self._others()),
            loras=loras,
            calibration=self.calibration,
            engine=self.dialect.engine,
            warnings=tuple(warnings),
        )


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder, links followed."""
    if path.is_file():
        return path.stat().st_size
    return sum(
        os.stat(os.path.join(place, name)).st_size
        for place, _, names in os.walk(path)
        for name in names
        if os.path.exists(os.path.join(place, name))
    )


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
