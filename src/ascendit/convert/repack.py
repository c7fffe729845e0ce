"""Convert a checkpoint to other names, files and packings without changing a number.

    repack("wan22_w8a8_mxfp8_export", "wan22-mxfp8", base="hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers")

Unchanged bytes are copied between files, by system calls if possible; other tensors are converted a few rows
at a time, see `weights.tensor_steps`. If the engine cannot load the result, an error is raised before
anything is written. torch is imported only for FP8 in tiles and for `check`.

`check` decodes source and output, a few rows at a time, and compares hashes of the values, see
`compare_numbers`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from ascendit.arguments import checked_call
from ascendit.checkpoint.component import EXPERTS, Part, read_json
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import KIND_LABELS, RECORD_FILE, Layout, recognise
from ascendit.checkpoint.layout_check import check_experts
from ascendit.checkpoint.output_folder import Staging
from ascendit.checkpoint.part_check import check_part
from ascendit.checkpoint.part_files import read_part_files, split_name, with_part_files
from ascendit.checkpoint.replacement import check_replaceable
from ascendit.checkpoint.sources import recording
from ascendit.checkpoint.transformer import num_weights, read_expert
from ascendit.checkpoint.trust import Home
from ascendit.convert import provenance
from ascendit.convert.compare_numbers import combined, compare_numbers
from ascendit.convert.expert_folder import ExpertOutput, fingerprint, write_expert
from ascendit.convert.other_files import OtherFiles, require_inside
from ascendit.convert.part_output import PartOutput, part_outputs
from ascendit.convert.report import RepackedExpert, RepackReport, add_up
from ascendit.errors import UsageError
from ascendit.progress import Meter, OnProgress
from ascendit.report import shell_line
from ascendit.weights.applied_recipe import recorded_kinds, stored_warnings
from ascendit.weights.engine_formats import TargetFormat, check_engine, model_kind, target_format, traits_of
from ascendit.weights.tensor_steps import schemes_of, smoothing_of, stored_steps

REWRITE_LABELS = {
    "widen": "to float32",
    "repeat": "to one scale for each row",
    "recode": "FP4 in another container",
    "untile": "FP8 tiles to BF16",
    "decode": "decoded to BF16",
    "fill": "added",
}


@checked_call
@recording()
def repack(
    src: Path | str | Sequence[Path | str],
    dst: Path | str,
    *,
    base: Path | str | None = None,
    to: str | None = None,
    engine: str | None = None,
    check: bool = False,
    copy: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
) -> RepackReport:
    """Write the checkpoint at `src` as the folder `dst`, with the same numbers.

    `src`: a path in any layout of `checkpoint.layout`, hf:org/name or ms:org/name; or files of components,
    each `[NAME=]FILE`, which replace those of `base`. `base`: the Diffusers folder of the model, for configs
    and the other components. `to`: `diffusers` (default) or `wan` names.
    `engine`: a key of `ENGINES`, to write its format. `check`: decode source and output and compare. `copy`:
    copy other components instead of linking them. `resume`: continue a killed run. `overwrite`: `dst` may be
    an output of ascendit, which is replaced when the new one is complete. `dry_run`: only check and report.

    Raises UsageError: E-ENG-01 if the engine cannot load the checkpoint, E-USE-01, -02, -03 and -06 for
    arguments and paths; CheckpointError (E-CKP-..) for the source and the base; EnvironmentProblem (E-ENV-02,
    E-ENV-04) for the disk.
    """
    started = time.monotonic()
    dst = Path(dst).expanduser()
    target = target_format(engine, to)
    plan = RepackPlan.of(src, base, target, copy=copy)
    report = plan.report(dst, dry_run=dry_run)
    if dry_run:
        if overwrite:
            check_replaceable(dst)
        return replace(report, seconds=time.monotonic() - started)
    with Staging(
        dst,
        sources=plan.roots,
        fingerprint=fingerprint(plan.outputs, (check, copy, plan.parts), plan.other_sources),
        resume=resume,
        needs_bytes=plan.nbytes,
        overwrite=overwrite,
    ) as staging:
        meter = Meter(plan.source_nbytes, on_progress)
        files: dict[str, str] = {}
        for output in plan.outputs:
            advance = meter.stage_counter(output.source.name)
            files |= write_expert(output, staging, advance, hash=check, align=True)
        for part in plan.parts:
            files |= part.write(staging, meter.stage_counter(part.part.name), hash=check)
        if plan.others:
            plan.others.write(staging.path, staging.journal)
        if check:
            report = _check(report, plan, staging.path, on_progress)
        named = provenance.source_argument(plan.base) if plan.base else None
        options = {"base": named, "to": to, "engine": engine, "check": check, "copy": copy}
        command = provenance.command_line("repack", plan.source, dst, options)
        record = _record(plan, report, command, files)
        provenance.write_record_and_card(staging.path, record, dst.name, hash=check)
        staging.publish()
    return replace(report, seconds=time.monotonic() - started)


# ---- the plan -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RepackPlan:
    """Everything that one run writes, after all checks of its sources."""

    source: Layout
    base: Layout | None
    pipeline: Layout | None
    """The Diffusers folder whose layout the output has; None for an output with only transformers."""
    target: TargetFormat
    outputs: list[ExpertOutput]
    parts: list[PartOutput]
    others: OtherFiles | None

    @classmethod
    def of(
        cls,
        src: Path | str | Sequence[Path | str],
        base: Path | str | None,
        target: TargetFormat,
        *,
        copy: bool,
    ) -> Self:
        """Read the headers of source and base, and check them. Raises the errors of `repack`."""
        source, base_layout = _read_sources(src, base)
        # A pipeline is its own base.
        pipeline = base_layout or (source if source.kind == "diffusers" else None)
        pipeline = pipeline if target.naming == "diffusers" else None
        require_inside(source)
        others, parts = None, _part_outputs(source, pipeline, base)
        if pipeline:
            require_inside(pipeline)
            written = source.parts if source.kind == "file" else EXPERTS
            others = OtherFiles.of(pipeline, copy=copy, licences_only=True, written=written)
            _check_linked(pipeline.parts[n] for n in others.components if source.kind == "file")
            others.record()
        return cls(
            source=source,
            base=base_layout,
            pipeline=pipeline,
            target=target,
            outputs=_outputs(source, target, base_layout),
            parts=parts,
            others=others,
        )

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the first transformer."""
        return self.outputs[0].config if self.outputs else (self.base or self.source).experts[0].config

    @property
    def roots(self) -> list[Path]:
        """The folders and files that are read."""
        files = [part.path for part in self.source.parts.values()] if self.source.kind == "file" else []
        return [*files, *(layout.root for layout in (self.source, self.base) if layout)]

    @property
    def other_sources(self) -> list[Path]:
        """Sources besides the transformers that determine the bytes of the output."""
        return [*(self.others.copied if self.others else ()), *(part.path for part in self.parts)]

    @property
    def nbytes(self) -> int:
        """Bytes that are written or copied."""
        written: list[ExpertOutput | PartOutput] = [*self.outputs, *self.parts]
        return sum(x.nbytes for x in written) + (self.others.nbytes if self.others else 0)

    @property
    def source_nbytes(self) -> int:
        """Bytes of all converted tensors in the source."""
        steps = sum(step.source_bytes() for output in self.outputs for step in output.steps)
        return steps + sum(part.source_nbytes for part in self.parts)

    def report(self, dst: Path, *, dry_run: bool) -> RepackReport:
        """The report before anything is written."""
        return RepackReport(
            path=dst,
            source=provenance.source_name(self.source),
            layout=KIND_LABELS[self.source.kind],
            to=self.target.naming,
            engine=self.target.engine,
            experts=tuple(_expert_report(output) for output in self.outputs),
            parts=tuple(part.as_dict() for part in self.parts),
            linked=self.others.names if self.others else (),
            omitted=self.others.omitted if self.others else (),
            warnings=_warnings(self.outputs, self.parts, self.target, self.pipeline),
            dry_run=dry_run,
            seconds=0.0,
            next=provenance.next_command(
                dst,
                self.config,
                self.source,
                is_pipeline=self.others is not None,
                engine=self.target.engine,
            ),
        )


def _read_sources(
    src: Path | str | Sequence[Path | str], base: Path | str | None
) -> tuple[Layout, Layout | None]:
    """The layouts of the source and of the base."""
    sources = [src] if isinstance(src, (str, Path)) else list(src)
    if len(sources) == 1 and split_name(sources[0])[0] is None:
        source = recognise(model_folder(sources[0]))
        if source.kind != "file":
            return source, None if base is None else provenance.read_base(base, source)
        sources = [part.path for part in source.parts.values()]
    if base is None:
        return read_part_files(sources), None
    base_layout = provenance.read_base(base)
    source = read_part_files(sources, len(base_layout.experts))
    if any(name not in source.parts for name in EXPERTS if name in base_layout.parts):
        base_layout = provenance.read_base(base, experts=True)
    with_part_files(base_layout, source)
    return source, base_layout


def _check_linked(parts: Iterable[Part]) -> None:
    """Check the weights of components that stay as they are beside files. Raises the first problem."""
    for part in (part for part in parts if part.has_weights):
        shards = check_part(part)
        if part.name in EXPERTS:
            read_expert(part, shards)


def _part_outputs(source: Layout, pipeline: Layout | None, base: Path | str | None) -> list[PartOutput]:
    """Plan the output of each text encoder and VAE among files. They need a base (E-USE-01)."""
    others = [part for name, part in source.parts.items() if name not in EXPERTS]
    if source.kind != "file" or not others:
        return []
    if pipeline is None:
        got = "with the names or the engine of this call" if base else "without --base"
        raise UsageError(
            f"{others[0].path} is a {others[0].name}, {got}",
            needs="a Diffusers folder as --base and as output, which has such a component",
            fix=f"ascendit repack {shell_line([str(others[0].path)])} --base MODEL -o DST",
        )
    return part_outputs(source, pipeline)


def _outputs(source: Layout, target: TargetFormat, base: Layout | None) -> list[ExpertOutput]:
    """Plan the output of every expert. All checks of the source happen here, before anything is written."""
    outputs = []
    for expert in check_experts(source) if source.experts else ():
        config = provenance.config_from(base, expert) if base else expert.config
        layers, steps = schemes_of(expert), stored_steps(expert, target)
        if target.engine is not None:
            shapes = {name: layer.shape for name, layer in expert.layers.items()}
            check_engine(target.engine, traits_of(layers, shapes, smoothing_of(expert)), expert.name)
        lost = expert.tensors.keys() - {spec.name for step in steps for spec in step.specs}
        outputs.append(
            ExpertOutput(
                source=expert,
                folder=target.folder(expert.name, len(source.experts)),
                target=target,
                steps=steps,
                config=config,
                layers=layers,
                attention=expert.attention,
                other_entries={k: v for k, v in (expert.manifest or {}).items() if k not in lost},
            )
        )
    return outputs


# ---- the report and the record ------------------------------------------------------------------


def _check(
    report: RepackReport, plan: RepackPlan, folder: Path, on_progress: OnProgress | None
) -> RepackReport:
    """Compare source and output, and add the digests to the report."""
    read = plan.source_nbytes + sum(x.nbytes for x in plan.outputs) + sum(x.nbytes for x in plan.parts)
    advance = Meter(read, on_progress).stage_counter("check")
    experts, written = [], recognise(folder).parts
    for expert, output in zip(report.experts, plan.outputs, strict=True):
        sums = compare_numbers(output.source, read_expert(written[expert.name]), advance)
        experts.append(replace(expert, decoded_sha256=combined(sums), num_checked=len(sums)))
    for part in plan.parts:
        shards = check_part(written[part.part.name])
        assert shards is not None
        compare_numbers(part, replace(part, tensors=shards.tensors), advance)
    return replace(report, experts=tuple(experts))


def _record(
    plan: RepackPlan, report: RepackReport, command: str, files: dict[str, str]
) -> provenance.ConversionRecord:
    details: dict[str, Any] = {"engine": report.engine} if report.engine else {}
    details |= recorded_kinds(output.source for output in plan.outputs)
    if report.checked:
        details["decoded_sha256"] = {expert.name: expert.decoded_sha256 for expert in report.experts}
    return provenance.ConversionRecord(
        verb="repack",
        layout=plan.source,
        model_kind=model_kind(plan.config),
        command=command,
        files=files,
        schemes=report.schemes,
        bits_per_weight=report.bits_per_weight,
        recipe=_recipe_of(plan.source),
        details=details,
    )


def _recipe_of(source: Layout) -> dict[str, Any]:
    """The recipe in the source's `ascendit.json`, which is still valid."""
    file = source.root / RECORD_FILE
    recipe = read_json(file).get("recipe") if file.is_file() and Home.of(source.root).contains(file) else None
    return recipe if isinstance(recipe, dict) and isinstance(recipe.get("name"), str) else {}


def _expert_report(output: ExpertOutput) -> RepackedExpert:
    source = output.source
    rewritten = [step for step in output.steps if step.how in REWRITE_LABELS and step.specs]
    before = {source.tensors[name].name for name in output.disk_names if name in source.tensors}
    rewritten_bytes = sum(step.output_bytes() for step in rewritten)
    return RepackedExpert(
        name=source.name,
        folder=output.folder,
        origin=source.origin,
        schemes=add_up([Counter(output.layers.values())]),
        num_tensors=len(output.specs),
        num_renamed=len(before - set(output.disk_names.values())),
        moved_bytes=output.nbytes - rewritten_bytes,
        rewritten_bytes=rewritten_bytes,
        num_weights=num_weights(source),
        rewritten=Counter(REWRITE_LABELS[step.how] for step in rewritten),
    )


def _warnings(
    outputs: list[ExpertOutput], parts: list[PartOutput], target: TargetFormat, pipeline: Layout | None
) -> tuple[str, ...]:
    unchanged = [output.source for output in outputs if output.config == output.source.config]
    texts = [source.config_problem for source in unchanged if source.config_problem]
    texts += [text for output in outputs for text in stored_warnings(output.source)]
    texts += [f"{part.part.name}: {note}" for part in parts for note in part.notes]
    if target.engine == "mindie" and any("bf16" in output.layers.values() for output in outputs):
        texts.append("MindIE-SD also needs the float checkpoint, for the layers that are not quantized")
    if pipeline is None and target.naming == "diffusers":
        texts.append("only transformers in the output; --base MODEL adds the other components")
    return tuple(dict.fromkeys(texts))
