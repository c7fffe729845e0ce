"""Convert a checkpoint to other names, files and packings without changing a number.

    repack("wan22_w8a8_mxfp8_export", "wan22-mxfp8", base="hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers")

Unchanged bytes are copied between files, by system calls if possible; other tensors are converted a few rows
at a time, see `weights.tensor_steps`. If the engine cannot load the result, an error is raised before
anything is written. torch is imported only for FP8 in tiles and for `check`.

`check` decodes source and output, a few rows at a time, and compares hashes of the values. It shares no code
with `tensor_steps`: it decodes packed values and scales from the stored bytes.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendit.checkpoint.component import read_json
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import KIND_LABELS, RECORD_FILE, Layout, recognise
from ascendit.checkpoint.layout_check import check_experts
from ascendit.checkpoint.output_folder import Staging
from ascendit.checkpoint.reader import RowReader, TensorInfo, as_bytes
from ascendit.checkpoint.sources import recording
from ascendit.checkpoint.transformer import Expert, num_weights, read_expert
from ascendit.checkpoint.trust import Home
from ascendit.checkpoint.writer import Data, TensorSpec
from ascendit.convert import provenance
from ascendit.convert.expert_folder import ExpertOutput, fingerprint, write_expert
from ascendit.convert.other_files import OtherFiles, require_inside
from ascendit.convert.report import RepackedExpert, RepackReport, add_up
from ascendit.errors import CheckpointError
from ascendit.family import Task
from ascendit.foreign import checked_keywords
from ascendit.names import listed
from ascendit.progress import Advance, Meter, OnProgress
from ascendit.weights.decoded_rows import NonFinite, layer_rows, tensor_rows
from ascendit.weights.engine_formats import TargetFormat, check_engine, model_kind, target_format, traits_of
from ascendit.weights.tensor_steps import (
    Piece,
    Sink,
    TensorStep,
    no_progress,
    run_steps,
    schemes_of,
    smoothing_of,
    stored_steps,
)

if TYPE_CHECKING:
    from torch import Tensor

REWRITE_LABELS = {
    "widen": "to float32",
    "repeat": "to one scale for each row",
    "recode": "FP4 in another container",
    "untile": "FP8 tiles to BF16",
    "fill": "added",
}


@checked_keywords
@recording()
def repack(
    src: Path | str,
    dst: Path | str,
    *,
    base: Path | str | None = None,
    to: str | None = None,
    engine: str | None = None,
    check: bool = False,
    copy: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
) -> RepackReport:
    """Write the checkpoint at `src` as the folder `dst`, with the same numbers.

    `src`: a path in any layout of `checkpoint.layout`, hf:org/name or ms:org/name. `base`: the Diffusers
    folder of the model, for the other components and the configs. `to`: `diffusers` (default) or `wan` names.
    `engine`: a key of `ENGINES`, to write its format. `check`: decode source and output and compare. `copy`:
    copy other components instead of linking them. `resume`: continue a killed run. `dry_run`: only check and
    report.

    Raises UsageError: E-ENG-01 if the engine cannot load the checkpoint, E-USE-01, -02, -03 and -06 for
    arguments and paths; CheckpointError (E-CKP-..) for the source and the base; EnvironmentProblem (E-ENV-02,
    E-ENV-04) for the disk.
    """
    started = time.monotonic()
    dst = Path(dst).expanduser()
    target = target_format(engine, to)
    source = recognise(model_folder(src))
    base_layout = None if base is None else provenance.read_base(base, source)
    pipeline = base_layout or (source if source.kind == "diffusers" else None)  # a pipeline is its own base
    pipeline = pipeline if target.naming == "diffusers" else None
    require_inside(source)
    others = None
    if pipeline:
        require_inside(pipeline)
        others = OtherFiles.of(pipeline, copy=copy, licences_only=True)
        others.record()
    outputs = _outputs(source, target, base_layout)
    report = RepackReport(
        path=dst,
        source=provenance.source_name(source),
        layout=KIND_LABELS[source.kind],
        to=target.naming,
        engine=engine,
        experts=tuple(_expert_report(output) for output in outputs),
        linked=others.names if others else (),
        omitted=others.omitted if others else (),
        warnings=_warnings(outputs, target, pipeline),
        dry_run=dry_run,
        seconds=0.0,
    )
    if dry_run:
        return replace(report, seconds=time.monotonic() - started)
    with Staging(
        dst,
        sources=[layout.root for layout in (source, base_layout) if layout],
        fingerprint=fingerprint(outputs, (check, copy), others.copied if others else ()),
        resume=resume,
        needs_bytes=report.bytes_after + (others.nbytes if others else 0),
    ) as staging:
        meter = Meter(sum(step.source_bytes() for output in outputs for step in output.steps), on_progress)
        files: dict[str, str] = {}
        for output in outputs:
            advance = meter.stage_counter(output.source.name)
            files |= write_expert(output, staging, advance, hash=check, align=True)
        if others:
            others.write(staging.path, staging.journal)
        if check:
            report = _check(report, outputs, staging.path, on_progress)
        flags = [("--base", base), ("--to", to), ("--for", engine), ("--check", check)]
        command = provenance.command_line("repack", source, dst, flags)
        record = _record(source, report, command, files, model_kind(outputs[0].config))
        provenance.write_record_and_card(staging.path, record, dst.name, hash=check)
        staging.publish()
    return replace(report, seconds=time.monotonic() - started)


# ---- the plan -----------------------------------------------------------------------------------


def _outputs(source: Layout, target: TargetFormat, base: Layout | None) -> list[ExpertOutput]:
    """Plan the output of every expert. All checks of the source happen here, before anything is written."""
    outputs = []
    for expert in check_experts(source):
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
    report: RepackReport, outputs: list[ExpertOutput], folder: Path, on_progress: OnProgress | None
) -> RepackReport:
    """Compare source and output, and add the digests to the report."""
    read = sum(step.source_bytes() for output in outputs for step in output.steps)
    advance = Meter(read + report.bytes_after, on_progress).stage_counter("check")
    experts = []
    for expert, output, part in zip(report.experts, outputs, recognise(folder).experts, strict=True):
        sums = compare_numbers(output.source, read_expert(part), advance)
        experts.append(replace(expert, decoded_sha256=combined(sums), num_checked=len(sums)))
    return replace(report, experts=tuple(experts))


def _record(
    source: Layout, report: RepackReport, command: str, files: dict[str, str], kind: Task
) -> provenance.ConversionRecord:
    details: dict[str, Any] = {"engine": report.engine} if report.engine else {}
    if report.checked:
        details["decoded_sha256"] = {expert.name: expert.decoded_sha256 for expert in report.experts}
    return provenance.ConversionRecord(
        verb="repack",
        layout=source,
        model_kind=kind,
        command=command,
        files=files,
        schemes=report.schemes,
        bits_per_weight=report.bits_per_weight,
        recipe=_recipe_of(source),
        details=details,
    )


def _recipe_of(source: Layout) -> dict[str, Any]:
    """The recipe in the source's `ascendit.json`, which is still valid."""
    file = source.root / RECORD_FILE
    recipe = read_json(file).get("recipe") if file.is_file() and Home.of(source.root).contains(file) else None
    return recipe if isinstance(recipe, dict) and isinstance(recipe.get("name"), str) else {}


def _expert_report(output: ExpertOutput) -> RepackedExpert:
    source, rewritten = (
        output.source,
        [step for step in output.steps if step.how in REWRITE_LABELS and step.specs],
    )
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


def _warnings(outputs: list[ExpertOutput], target: TargetFormat, pipeline: Layout | None) -> tuple[str, ...]:
    unchanged = [output.source for output in outputs if output.config == output.source.config]
    texts = [source.config_problem for source in unchanged if source.config_problem]
    if target.engine == "mindie" and any("bf16" in output.layers.values() for output in outputs):
        texts.append("MindIE-SD also needs the float checkpoint, for the layers that are not quantized")
    if pipeline is None and target.naming == "diffusers":
        texts.append("only transformers in the output; --base MODEL adds the other components")
    return tuple(dict.fromkeys(texts))


# ---- comparison of two experts ------------------------------------------------------------------

Rows = Callable[[RowReader], Iterator["Tensor"]]


def compare_numbers(source: Expert, written: Expert, advance: Advance = no_progress) -> dict[str, str]:
    """Return the digests, equal for both.

    Raises CheckpointError, which names the tensors: E-CKP-10 if they differ, E-QNT-01 for NaN and infinity.
    """
    invalid: dict[str, NonFinite] = {}
    before, after = digests(source, advance, invalid), digests(written, advance)
    wrong = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(before)} tensors of {source.path} differ in the output: {listed(wrong)}",
            needs="the same values in source and output",
            fix="run it again; if it fails again, check disk and memory, and report it with this message",
            code="E-CKP-10",
        )
    if invalid:
        texts = [f"{name} has {x.count}, the first at {list(x.first)}" for name, x in invalid.items()]
        raise CheckpointError(
            f"{len(invalid)} of {len(before)} tensors of {source.path} have NaN or infinite values: "
            + listed(texts),
            needs="finite weights, scales and biases: a model with these makes no valid video",
            fix="download the model again, or quantize it again from its float weights; without --check, "
            "repack copies the values unchanged",
            code="E-QNT-01",
        )
    return before


class Checker(Sink):
    """A sink that computes the sha256 of each tensor."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}

    def append(self, name: str, data: Data) -> None:
        """Hash the next bytes of a tensor."""
        self.sums.setdefault(name, hashlib.sha256()).update(data)


def digests(
    expert: Expert, advance: Advance = no_progress, invalid: dict[str, NonFinite] | None = None
) -> dict[str, str]:
    """Return name -> sha256 of the decoded values, as little-endian float32 in row order.

    A quantized layer has one entry for its decoded weight, which includes its scales. Offsets, which are
    zero, and a `mul_scale` of ones have no entry. Calls `advance(name, bytes read)` as rows are read. Tensors
    with NaN or infinite values are added to `invalid`.
    """
    checker = Checker()
    with RowReader() as reader:
        run_steps(decoded_steps(expert, reader, invalid), reader, checker, advance=advance)
    return {name: digest.hexdigest() for name, digest in checker.sums.items()}


def decoded_steps(
    expert: Expert, reader: RowReader, invalid: dict[str, NonFinite] | None = None
) -> list[TensorStep]:
    """Plan the steps that decode all tensors of an expert to float32. `invalid`: see `digests`."""

    def step(name: str, shape: tuple[int, ...], sources: Sequence[TensorInfo], rows: Rows) -> TensorStep:
        def make(step: TensorStep, reader: RowReader) -> Iterator[Piece]:
            counts = NonFinite()
            for block in rows(reader):
                if invalid is not None:
                    counts.add(block)
                yield name, as_bytes(block)
            if invalid is not None and counts.count:
                invalid[name] = counts

        specs = (TensorSpec(name, "F32", shape),)
        return TensorStep(name=name, how="rows", specs=specs, sources=tuple(sources), make=make)

    steps, used = [], set()
    for name, layer in expert.layers.items():
        sources = [info for role, info in layer.tensors.items() if role not in ("bias", "mul_scale")]
        used |= set(sources)
        steps.append(step(f"{name}.weight", layer.shape, sources, functools.partial(layer_rows, layer)))
    for name, info in expert.tensors.items():
        if info not in used and not (name.endswith(".mul_scale") and _is_ones(info, reader)):
            steps.append(step(name, info.shape, (info,), functools.partial(tensor_rows, info)))
    return steps


def combined(digests_by_name: dict[str, str]) -> str:
    """One sha256 of all names and digests, in the order of the names."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests_by_name.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _is_ones(info: TensorInfo, reader: RowReader) -> bool:
    return all(bool((rows == 1).all()) for rows in tensor_rows(info, reader))
