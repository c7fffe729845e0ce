"""Quantize a float checkpoint in any layout of `checkpoint.layout` into a new, complete folder.

    report = quantize("Wan2.2-T2V-A14B-Diffusers", "Wan2.2-T2V-A14B-mxfp8", scheme="mxfp8")
    report = quantize("Wan2.2-T2V-A14B-Diffusers", "Wan2.2-style", scheme="bf16", loras=["style.safetensors"])

Weights are processed in blocks of rows, so memory use does not depend on the size of the model. The folder is
written under a temporary name and renamed at the end: it appears complete or not at all.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ascendit.arguments import checked_call
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import Layout, recognise
from ascendit.checkpoint.layout_check import check_experts
from ascendit.checkpoint.output_folder import Staging
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.replacement import check_replaceable
from ascendit.checkpoint.sources import record_source, recording
from ascendit.checkpoint.transformer import num_weights
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
from ascendit.convert.other_files import OtherFiles, require_inside
from ascendit.convert.report import Outputs, QuantizedExpert, QuantizeReport, StoredLayer, calibration_text
from ascendit.convert.report_page import quantize_page
from ascendit.errors import UsageError
from ascendit.family import Task
from ascendit.pages.page import check_report_file, is_page, write_report
from ascendit.progress import Meter, OnProgress
from ascendit.quant.recipe import Recipe, load_recipe, no_scheme
from ascendit.weights.applied_recipe import (
    AppliedRecipe,
    apply_recipe,
    check_kind,
    lora_warnings,
    open_folds,
    recorded_kinds,
    warnings_for,
)
from ascendit.weights.engine_formats import TargetFormat, check_engine, model_kind, target_format
from ascendit.weights.lora.fields import ADAPTER_CONFIG
from ascendit.weights.lora.fold import (
    Folds,
    LoraSource,
    check_groups,
    lora_report,
    lora_sources,
    require_skipped,
)
from ascendit.weights.recipe_steps import RecipeSteps

Smoothing = Mapping[str, Mapping[str, torch.Tensor]]
"""Expert -> layer -> mul_scale, float32 [K]."""
FLOAT_RECIPE = "none: float weights in the dtype of the source"
"""Shown as the recipe of a float folder."""


@checked_call
@recording()
def quantize(
    src: Path | str,
    dst: Path | str,
    *,
    scheme: str | None = None,
    recipe: str | None = None,
    scale_rule: str | None = None,
    keep: Sequence[str] = (),
    loras: Sequence[LoraSource | Path | str] | LoraSource | Path | str = (),
    lora_skip: Sequence[str] | str = (),
    smoothing: Smoothing | None = None,
    calibrate: Calibrate | None = None,
    engine: str | None = None,
    copy: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    report: bool | Path | str = False,
    hash: bool = False,
    dry_run: bool = False,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
    on_progress: OnProgress | None = None,
) -> QuantizeReport:
    """Quantize the transformers of the model at `src` into the new folder `dst`.

    `scheme`: one of `quant.schemes.QUANTIZED`, for a recipe that does not fix one (such as `default`); or
    `bf16` with `loras`, for a float folder in the dtype of the source. `recipe`: a name of `recipe_names()`
    or a TOML file. `scale_rule`: one of the scheme's in `mx.formats`. `keep`: patterns of layers that are not
    quantized. `loras`: LoRA files that are folded first, see `lora_sources`. `lora_skip`: groups of their
    keys to leave out, such as `image`. `smoothing`: expert -> layer -> mul_scale, float32 [K], which is
    stored; weights are multiplied by 1 / mul_scale. `calibrate`: a `pipeline.calibrate.Calibrator`, which
    runs the model to compute the smoothing. `engine`: write the format of this engine. `copy`: copy other
    components instead of linking them. `resume`: continue a killed run with the same arguments. `overwrite`:
    replace an output of ascendit. `force`: quantize even if a loss of accuracy is known. `report`: measure
    SQNR; with a path, also write it to this .html or .json file. `hash`: store the sha256 of every file;
    doubles the run time. `dry_run`: only check and report.

    Raises UsageError: E-USE-01 for incompatible arguments, E-USE-02 for a missing source or recipe, E-USE-03
    and E-USE-06 for `dst`, E-USE-05 for patterns that match nothing, E-QNT-01 for a model or layer that
    cannot be quantized, E-QNT-02 for a known loss of accuracy without `force`, E-ENG-01 for the engine;
    CheckpointError for damaged sources and LoRA files; EnvironmentProblem (E-ENV-04) for a full disk.
    """
    if scheme is None and recipe is None:
        raise no_scheme("quantize")
    files, skip = lora_sources(loras), (lora_skip,) if isinstance(lora_skip, str) else tuple(lora_skip)
    options: dict[str, object] = {"scheme": scheme, "recipe": _recipe_name(recipe), "scale_rule": scale_rule}
    options |= {"keep": list(keep), "loras": [str(replace(x, path=Path(x.path.name))) for x in files]}
    options |= {"lora_skip": list(skip), "engine": engine, "copy": copy, "force": force}
    options |= {"report": report is not False, "hash": hash}
    job = QuantizeJob(
        layout=recognise(model_folder(src)),
        dst=Path(os.path.abspath(Path(dst).expanduser())),
        recipe=load_recipe(recipe or "default", scheme, scale_rule),
        keep=tuple(keep),
        loras=files,
        lora_skip=skip,
        target=target_format(engine),
        smoothing=smoothing or {},
        calibrate=calibrate,
        max_shard_bytes=max_shard_bytes,
        copy=copy,
        measure=report is not False,
        report_file=None if isinstance(report, bool) else Path(os.path.abspath(Path(report).expanduser())),
        hash=hash,
        options={**options, **(calibrate.options if calibrate else {})},
    )
    job.check(force)
    job.check_report(overwrite)
    if dry_run:
        return job.report(0.0, dry_run=True, overwrite=overwrite)
    return job.run(resume, on_progress, overwrite)


def _recipe_name(recipe: str | None) -> str | None:
    """The name for the model card. A file is recorded as a source of the run."""
    if not recipe or not recipe.endswith(".toml"):
        return recipe
    if Path(recipe).is_file():
        record_source(Path(os.path.abspath(recipe)))
    return Path(recipe).name


@dataclass
class QuantizeJob:
    """One run of `quantize`, with everything that is decided before the first byte is written."""

    layout: Layout
    dst: Path
    recipe: Recipe
    keep: tuple[str, ...]
    loras: tuple[LoraSource, ...]
    lora_skip: tuple[str, ...]
    target: TargetFormat
    smoothing: Smoothing
    calibrate: Calibrate | None
    """Computes `smoothing`, after all other checks."""
    max_shard_bytes: int | None
    copy: bool
    measure: bool
    report_file: Path | None
    hash: bool
    options: Mapping[str, object]
    """Keyword -> value for the command line in the model card, with file names instead of paths."""
    kind: Task = field(init=False)
    experts: list[RecipeSteps] = field(init=False)
    others: OtherFiles | None = field(init=False, default=None)
    """None if the output has only transformers."""
    planned: dict[str, ExpertOutput] = field(init=False)
    """Expert -> its output before a calibration, which changes smoothing factors but not sizes."""
    outputs: dict[str, Outputs] = field(init=False, default_factory=dict)
    files: dict[str, str] = field(init=False, default_factory=dict)
    """Path in the folder -> sha256, with `hash`."""
    calibration: Mapping[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.calibrate is not None and self.smoothing:
            needs = "only one of them: a calibration computes the smoothing"
            raise UsageError("both smoothing and calibrate", needs=needs, fix="omit one of them")
        check_groups(self.lora_skip, self.loras)
        require_inside(self.layout)
        if self.layout.kind == "diffusers" and self.target.naming == "diffusers":
            self.others = OtherFiles.of(self.layout, copy=self.copy)
        experts = check_experts(self.layout)
        names = [expert.name for expert in experts]
        if unknown := sorted(set(self.smoothing) - set(names)):
            raise UsageError(
                f"smoothing for {', '.join(unknown)}",
                needs=f"one of {', '.join(names)}",
                fix="use the expert names of the model",
                code="E-USE-05",
            )
        self.kind = model_kind(experts[0].config)
        self.experts = []
        for expert in experts:
            smoothing = self.smoothing.get(expert.name)
            applied = apply_recipe(
                expert,
                self.recipe,
                self.kind,
                keep=self.keep,
                smoothing=smoothing,
                folds=open_folds(expert, self.loras, experts=names, skip=self.lora_skip),
            )
            if self.calibrate is not None:
                applied = replace(applied, smoothing=placeholders(applied))
            self.experts.append(RecipeSteps(applied, self.target, measure=self.measure))
        require_skipped(self.lora_skip, self.folds.values())
        if self.others:
            self.others.record()

    @property
    def applied(self) -> list[AppliedRecipe]:
        """The applied recipe of each expert."""
        return [expert.applied for expert in self.experts]

    def check(self, force: bool) -> None:
        """Check the run and plan its outputs.

        Raises UsageError: E-QNT-01 if nothing would be quantized or changed by a LoRA, E-QNT-02 for a known
        loss of accuracy without `force`, E-ENG-01 if the engine cannot run the output, E-USE-01 for an
        option that only affects quantized layers, and the errors of `calibrate.record`.
        """
        used = {scheme for applied in self.applied for scheme in applied.schemes}
        if self.is_float:
            self._check_float()
        elif not used - {"bf16"} and not any(applied.attention for applied in self.applied):
            keep = f" with --keep {' '.join(self.keep)}" if self.keep else ""
            raise UsageError(
                f"recipe {self.recipe.name}{keep} quantizes no layer",
                needs="at least one layer with a scheme other than bf16, or --scheme bf16 and a LoRA",
                fix="exclude fewer layers; to change only the layout of a model, use `ascendit repack`",
                code="E-QNT-01",
            )
        check_kind(self.kind, used, self.layout.name, force=force)
        if (engine := self.target.engine) is not None:
            for applied in self.applied:
                check_engine(engine, applied.traits, f"{self.layout.name}/{applied.expert.name}")
        if self.calibrate is not None:
            self.calibration = self.calibrate.record(self.layout)
        self.planned = {expert.applied.expert.name: self.output_of(expert) for expert in self.experts}

    def check_report(self, overwrite: bool) -> None:
        """Check report and existing output. Raises UsageError (E-USE-01, -03, -06), EnvironmentProblem."""
        if overwrite:
            check_replaceable(self.dst)
        if (file := self.report_file) is None:
            return
        check_report_file(file, overwrite=overwrite)
        if file.is_relative_to(self.dst) and not is_page(file):
            raise UsageError(
                f"the report {file} is inside the output, where it could be taken for a file of the model",
                needs="a .json report outside the output, or a .html report",
                fix=f"for example --report {self.dst.with_name(f'{self.dst.name}-report.json')}",
                code="E-USE-06",
            )

    def save_report(self, report: QuantizeReport, staging: Staging | None = None) -> None:
        """Write the report: one inside the output before it is published (`staging`), others after that."""
        if (file := self.report_file) is None or file.is_relative_to(self.dst) != (staging is not None):
            return
        target = file if staging is None else staging.path / file.relative_to(self.dst)
        if staging:
            staging.keep = True  # an error of the report loses no weights
        write_report(target, report.as_dict(), lambda: quantize_page(report))
        if staging:
            staging.keep = False

    @property
    def folds(self) -> dict[str, Folds]:
        """Expert -> its changes by LoRA files; empty without files."""
        return {x.expert.name: x.folds for x in self.applied if x.folds is not None}

    @property
    def is_float(self) -> bool:
        """Whether the output is the source with LoRA files and nothing else: no rule quantizes a layer."""
        changed = any(folds.names for folds in self.folds.values())
        return changed and all(rule.scheme == "bf16" for rule in self.recipe.rules)

    def _check_float(self) -> None:
        """Raise UsageError (E-USE-01) for an option that has no effect without quantized layers."""
        options = {
            "--keep": self.keep,
            "--calibrate": self.calibrate is not None,
            "smoothing": self.smoothing,
            "--report": self.measure,
        }
        if unused := [name for name, value in options.items() if value]:
            raise UsageError(
                f"{unused[0]} with scheme bf16",
                needs="quantized layers: scheme bf16 writes the float weights with the LoRA",
                fix=f"omit {unused[0]}, or use --scheme mxfp8",
            )

    # ---- writing --------------------------------------------------------------------------------

    def output_of(self, expert: RecipeSteps) -> ExpertOutput:
        """The planned output of one expert."""
        applied, source = expert.applied, expert.applied.expert
        return ExpertOutput(
            source=source,
            folder=self.target.folder(source.name, len(self.experts)),
            target=self.target,
            steps=expert.plan(),
            config=source.config,
            layers=applied.layer_schemes,
            attention=applied.attention_types,
        )

    def run(self, resume: bool, on_progress: OnProgress | None, overwrite: bool = False) -> QuantizeReport:
        """Write the folder. Raises the errors of `Staging`, `Calibrate` and `write_expert`."""
        start = time.perf_counter()
        sources = [self.layout.root, *(x.expert.path for x in self.applied), *(x.path for x in self.loras)]
        needed = sum(output.nbytes for output in self.planned.values())
        needed += self.others.nbytes if self.others else 0
        with Staging(
            self.dst,
            sources=list(dict.fromkeys(sources)),
            fingerprint=self.fingerprint(),
            resume=resume,
            needs_bytes=needed,
            overwrite=overwrite,
        ) as staging:
            statistics = self._calibrate(staging)
            total = sum(applied.bytes_before for applied in self.applied)
            if self.measure and statistics:  # each smoothed weight is read a second time
                total += sum(x.weight(name).nbytes for x in self.applied for name in smoothable(x))
            meter = Meter(total, on_progress)
            for expert in self.experts:
                self._write(expert, staging, meter, statistics)
            if self.others:
                self.others.write(staging.path, staging.journal)
            staging.journal.remove(staging.path / STATISTICS)
            self.save_report(self.report(time.perf_counter() - start), staging)
            provenance.write_record_and_card(staging.path, self.record(), self.dst.name, hash=self.hash)
            staging.publish()
        report = self.report(time.perf_counter() - start)
        self.save_report(report)
        return report

    def _calibrate(self, staging: Staging) -> ExpertStatistics:
        """Run the model, or read the statistics of a killed run, and set the smoothing of each expert."""
        if self.calibrate is None:
            return {}
        rows = SAMPLED_ROWS if self.measure else 0
        statistics = self.calibrate(self.layout, self.loras, rows, staging.journal, lora_skip=self.lora_skip)
        for expert in self.experts:
            inputs = statistics.get(expert.applied.expert.name, {})
            smoothing = mul_scales(expert.applied, inputs, self.calibrate.alpha)
            expert.applied = replace(expert.applied, smoothing=smoothing)
        return statistics

    def _write(
        self, expert: RecipeSteps, staging: Staging, meter: Meter, statistics: ExpertStatistics
    ) -> None:
        name = expert.applied.expert.name
        self.files |= write_expert(
            self.output_of(expert),
            staging,
            meter.stage_counter(name),
            hash=self.hash,
            hash_json=self.hash,
            max_shard_bytes=self.max_shard_bytes,
            encode_all=self.measure,
        )
        if self.measure and statistics:
            with RowReader() as reader:
                advance = meter.stage_counter(f"outputs of {name}")
                self.outputs[name] = output_quality(expert, statistics[name], reader, advance)

    # ---- reports --------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """A hash that is the same for two runs that write the same bytes."""
        parts: list[Any] = [self.recipe.as_dict(), self.keep, self.lora_skip, self.max_shard_bytes]
        parts += [self.loras, lora_report(self.loras, self.folds)]
        if self.calibrate is not None:  # a resumed run reads the saved statistics
            parts += [dict(self.calibration), self.measure]
        for expert, layers in self.smoothing.items():
            parts += [(expert, name, scale.tolist()) for name, scale in layers.items()]
        more = [path for lora in self.loras for path in (lora.path, lora.path.parent / ADAPTER_CONFIG)]
        more += self.others.copied if self.others else ()
        return fingerprint(self.planned.values(), parts, more=more)

    def record(self) -> provenance.ConversionRecord:
        """The record of this run for `ascendit.json` and the model card."""
        report = self.report(0.0)
        details: dict[str, Any] = {"keep": list(self.keep), "engine": self.target.engine}
        details["calibration"] = dict(self.calibration)
        details |= recorded_kinds(applied.expert for applied in self.applied)
        if self.measure:
            details["worst_sqnr_db"] = {
                x.name: {n: round(db, 2) for n, db in x.worst} for x in report.experts
            }
        return provenance.ConversionRecord(
            verb="quantize",
            layout=self.layout,
            model_kind=self.kind,
            command=report.command,
            files=self.files,
            schemes=report.schemes,
            bits_per_weight=report.bits_per_weight,
            recipe={} if self.is_float else self.recipe.as_dict(),
            loras=report.loras,
            details={key: value for key, value in details.items() if value},
            notes=[] if self.is_float else _notes(report),
        )

    def report(self, seconds: float, *, dry_run: bool = False, overwrite: bool = False) -> QuantizeReport:
        """The report of the run, or of the planned run with `dry_run`."""
        warnings = warnings_for(self.applied, self.recipe, self.kind)
        warnings += lora_warnings(self.loras, self.folds.values())
        if dry_run and os.path.lexists(self.dst):
            end = "it would be replaced" if overwrite else "without --dry-run this is an error"
            warnings.append(f"{self.dst} already exists: {end}")
        return QuantizeReport(
            path=self.dst,
            source=provenance.source_name(self.layout),
            recipe=FLOAT_RECIPE if self.is_float else f"{self.recipe.name}: {self.recipe.about}",
            model_kind=self.kind,
            experts=tuple(self._expert_report(expert) for expert in self.experts),
            dry_run=dry_run,
            seconds=seconds,
            linked=self.others.names if self.others else (),
            omitted=self.others.omitted if self.others else (),
            loras=tuple(lora_report(self.loras, self.folds)),
            report_file=self.report_file,
            command=provenance.command_line("quantize", self.layout, self.dst, self.options),
            calibration=self.calibration,
            engine=self.target.engine,
            warnings=tuple(warnings),
            next=provenance.next_command(
                self.dst,
                self.applied[0].expert.config,
                self.layout,
                is_pipeline=self.others is not None,
                engine=self.target.engine,
            ),
        )

    def _expert_report(self, expert: RecipeSteps) -> QuantizedExpert:
        applied = expert.applied
        return QuantizedExpert(
            name=applied.expert.name,
            schemes=applied.schemes,
            kept={} if self.is_float else applied.excluded,
            attention=applied.quantized_attention,
            bytes_before=applied.bytes_before,
            bytes_after=self.planned[applied.expert.name].nbytes,
            num_weights=num_weights(applied.expert),
            sqnr=expert.sqnr,
            outputs=self.outputs.get(applied.expert.name, Outputs()),
            stored=_stored_layers(applied, self.planned[applied.expert.name]),
        )


def _stored_layers(applied: AppliedRecipe, output: ExpertOutput) -> dict[str, StoredLayer]:
    """Linear layer -> its format in the output."""
    nbytes: Counter[str] = Counter()
    for spec in output.specs:
        layer, _, role = spec.name.rpartition(".")
        nbytes[layer] += 0 if role == "bias" else spec.nbytes
    return {
        name: StoredLayer(scheme, 8 * nbytes[name] / math.prod(applied.weight(name).shape))
        for name, scheme in applied.layer_schemes.items()
    }


def _notes(report: QuantizeReport) -> list[str]:
    """Paragraphs of the model card: layers that are not quantized, measurements, warnings."""
    notes = []
    if report.calibration:
        notes.append(f"Smoothed with msModelSlim's method: {calibration_text(report.calibration)}.")
    for expert in report.experts:
        excluded = [
            f"- {', '.join(f'`{name}`' for name in names)}: {reason}" for reason, names in expert.kept.items()
        ]
        notes.append("\n".join([f"Layers of `{expert.name}` that are not quantized:", "", *excluded]))
        if expert.sqnr:
            rows = [f"| `{layer}` | {value:.2f} |" for layer, value in expert.worst]
            head = [f"Signal to quantization noise ratio of the worst layers of `{expert.name}`, in dB:", ""]
            notes.append("\n".join([*head, "| layer | dB |", "|---|---|", *rows]))
        if expert.outputs.layers:
            notes.append(provenance.outputs_table(expert.name, expert.outputs))
    return notes + [f"Note: {warning}" for warning in report.warnings]
