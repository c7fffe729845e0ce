"""Checkpoint to checkpoint without a change of one number: other names, files, containers.

    repack("wan22_w8a8_mxfp8_export", "wan22-mxfp8", base="hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers")

Bytes that stay as they are go from file to file, in the kernel where it can; the others are written some rows
at a time by `weights.tensor_steps`. What an engine cannot load is refused before anything is written. torch
is imported for FP8 in tiles and for `check` only.

`check` decodes both sides, some rows at a time, and hashes them. It shares no code with `tensor_steps`:
containers are undone by value, scales are read as stored.
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

from ascendit import mx
from ascendit.checkpoint.component import read_json
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layer_format import FLOAT_DTYPES, Layer
from ascendit.checkpoint.layout import RECORD_FILE, WORDS, Layout, recognise
from ascendit.checkpoint.output_folder import Staging
from ascendit.checkpoint.reader import RowReader, TensorInfo, as_bytes, as_tensor
from ascendit.checkpoint.transformer import Expert, num_weights, read_expert
from ascendit.checkpoint.writer import Data, TensorSpec
from ascendit.convert import provenance
from ascendit.convert.expert_folder import ExpertOutput, fingerprint, write_expert
from ascendit.convert.report import RepackedExpert, RepackReport, add_up
from ascendit.errors import CheckpointError
from ascendit.family import Task
from ascendit.mx.formats import FORMATS
from ascendit.names import listed
from ascendit.progress import Advance, Meter, OnProgress
from ascendit.quant.schemes import FP8_TILES, SCHEMES, STORED_SCHEMES
from ascendit.weights.engine_formats import Dialect, check_engine, dialect_for, model_kind, traits_of
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

WAYS = {
    "widen": "to float32",
    "repeat": "to one scale for each row",
    "recode": "FP4 in another container",
    "untile": "FP8 tiles to BF16",
    "fill": "added",
}


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

    `src`: a path in any layout that `checkpoint.layout` knows, or hf:/ms: and a name. `base`: the Diffusers
    folder of the model, which gives the other parts and the configs. `to`: `diffusers` (default) or `wan`.
    `engine`: a key of `ENGINES`, for its dialect. `check`: decode both sides and compare. `copy`: copy
    other parts instead of linking them. `resume`: go on where a killed run ended. `dry_run`: only report.

    Raises UsageError (E-ENG-01: what the engine cannot load; E-USE-01/02/03/06), CheckpointError (E-CKP-..),
    EnvironmentProblem (E-ENV-02, E-ENV-04).
    """
    started = time.monotonic()
    dst = Path(dst).expanduser()
    dialect = dialect_for(engine, to)
    source = recognise(model_folder(src))
    given = None if base is None else provenance.read_base(base, source)
    parts = given or (source if source.kind == "diffusers" else None)  # a pipeline is its own base
    parts = parts if dialect.naming == "diffusers" else None
    outputs = _outputs(source, dialect, given)
    report = RepackReport(
        path=dst,
        source=provenance.source_name(source),
        layout=WORDS[source.kind],
        to=dialect.naming,
        engine=engine,
        experts=tuple(_expert_report(output) for output in outputs),
        placed=tuple(name for name, part in parts.parts.items() if part not in parts.experts)
        if parts
        else (),
        warnings=_warnings(outputs, dialect, parts),
        dry_run=dry_run,
        seconds=0.0,
    )
    if dry_run:
        return replace(report, seconds=time.monotonic() - started)
    with Staging(
        dst,
        sources=[layout.root for layout in (source, given) if layout],
        fingerprint=fingerprint(outputs, (check, copy)),
        resume=resume,
        needs_bytes=report.bytes_after,
    ) as staging:
        meter = Meter(sum(step.bytes_read() for output in outputs for step in output.steps), on_progress)
        files: dict[str, str] = {}
        for output in outputs:
            advance = meter.advance_in(output.source.name)
            files |= write_expert(output, staging, advance, hash=check, align=True)
        if parts:
            report = replace(report, placed=provenance.place_parts(parts, staging.path, copy=copy))
        if check:
            report = _check(report, outputs, staging.path, on_progress)
        flags = [("--base", base), ("--to", to), ("--for", engine), ("--check", check)]
        command = provenance.command_line("repack", source, dst, flags)
        made = _made(source, report, command, files, model_kind(outputs[0].config))
        provenance.write_made(staging.path, made, dst.name)
        staging.publish()
    return replace(report, seconds=time.monotonic() - started)


# ---- what is decided first ----------------------------------------------------------------------


def _outputs(source: Layout, dialect: Dialect, base: Layout | None) -> list[ExpertOutput]:
    """Every expert as it will be written. Raises what can be known before anything is."""
    outputs = []
    for part in source.experts:
        expert = read_expert(part)
        config = provenance.config_from(base, expert) if base else expert.config
        layers, steps = schemes_of(expert), stored_steps(expert, dialect)
        if dialect.engine is not None:
            shapes = {name: layer.shape for name, layer in expert.layers.items()}
            check_engine(dialect.engine, traits_of(layers, shapes, smoothing_of(expert)), expert.name)
        lost = expert.tensors.keys() - {spec.name for step in steps for spec in step.specs}
        outputs.append(
            ExpertOutput(
                source=expert,
                folder=dialect.folder(expert.name, len(source.experts)),
                dialect=dialect,
                steps=steps,
                config=config,
                layers=layers,
                attention=expert.attention,
                more_entries={k: v for k, v in (expert.manifest or {}).items() if k not in lost},
            )
        )
    return outputs


# ---- what was done ------------------------------------------------------------------------------


def _check(
    report: RepackReport, outputs: list[ExpertOutput], folder: Path, on_progress: OnProgress | None
) -> RepackReport:
    """The report with the digests of all numbers, once they are equal on both sides."""
    read = sum(step.bytes_read() for output in outputs for step in output.steps)
    advance = Meter(read + report.bytes_after, on_progress).advance_in("check")
    experts = []
    for expert, output, part in zip(report.experts, outputs, recognise(folder).experts, strict=True):
        sums = compare_numbers(output.source, read_expert(part), advance)
        experts.append(replace(expert, decoded_sha256=combined(sums), num_checked=len(sums)))
    return replace(report, experts=tuple(experts))


def _made(
    source: Layout, report: RepackReport, command: str, files: dict[str, str], kind: Task
) -> provenance.Made:
    """For ascendit.json and the model card."""
    details: dict[str, Any] = {"engine": report.engine} if report.engine else {}
    if report.checked:
        details["decoded_sha256"] = {expert.name: expert.decoded_sha256 for expert in report.experts}
    return provenance.Made(
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
    """The recipe in the record of a folder that ascendit wrote: it stays true."""
    file = source.root / RECORD_FILE
    recipe = read_json(file).get("recipe") if file.is_file() else None
    return recipe if isinstance(recipe, dict) and isinstance(recipe.get("name"), str) else {}


def _expert_report(output: ExpertOutput) -> RepackedExpert:
    source, rewritten = output.source, [step for step in output.steps if step.how in WAYS and step.specs]
    before = {source.tensors[name].name for name in output.disk_names if name in source.tensors}
    rewritten_bytes = sum(step.bytes_made() for step in rewritten)
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
        rewritten=Counter(WAYS[step.how] for step in rewritten),
    )


def _warnings(outputs: list[ExpertOutput], dialect: Dialect, parts: Layout | None) -> tuple[str, ...]:
    unchanged = [output.source for output in outputs if output.config == output.source.config]
    texts = [source.config_problem for source in unchanged if source.config_problem]
    if dialect.engine == "mindie" and any("bf16" in output.layers.values() for output in outputs):
        texts.append("MindIE-SD takes what is not quantized from the float checkpoint: keep that at hand")
    if parts is None and dialect.naming == "diffusers":
        texts.append("only the transformers were written; --base MODEL adds the other parts")
    return tuple(dict.fromkeys(texts))


# ---- the numbers of two experts -----------------------------------------------------------------

Rows = Callable[[RowReader], Iterator["Tensor"]]
_TILE, _GROUP = FORMATS[FP8_TILES].block, SCHEMES["mxfp4_dualscale"].group


def compare_numbers(source: Expert, written: Expert, advance: Advance = no_progress) -> dict[str, str]:
    """The digests of both, if they agree. CheckpointError E-CKP-10, which names the tensors, if not."""
    before, after = digests(source, advance), digests(written, advance)
    wrong = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(before)} tensors of {source.path} came out otherwise: {listed(wrong)}",
            needs="the same numbers before and after",
            fix="run it again; if it happens again, check disk and memory, and report it with this message",
            code="E-CKP-10",
        )
    return before


class Checker(Sink):
    """Keeps the sha256 of each tensor and nothing else."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}

    def append(self, name: str, data: Data) -> None:
        """The next bytes of a tensor."""
        self.sums.setdefault(name, hashlib.sha256()).update(data)


def digests(expert: Expert, advance: Advance = no_progress) -> dict[str, str]:
    """Name -> sha256 of the numbers, as float32, little-endian, by rows.

    A quantized layer has one entry for its decoded weight; its scales are in it, zero offsets in none. A
    `mul_scale` of ones, which changes nothing, has none either. `advance(name, bytes read)` after some rows.
    """
    checker = Checker()
    with RowReader() as reader:
        run_steps(decoded_steps(expert, reader), reader, checker, advance=advance)
    return {name: digest.hexdigest() for name, digest in checker.sums.items()}


def decoded_steps(expert: Expert, reader: RowReader) -> list[TensorStep]:
    """A plan that makes every number of an expert, as float32."""

    def step(name: str, shape: tuple[int, ...], sources: Sequence[TensorInfo], rows: Rows) -> TensorStep:
        def make(step: TensorStep, reader: RowReader) -> Iterator[Piece]:
            return ((name, as_bytes(block)) for block in rows(reader))

        specs = (TensorSpec(name, "F32", shape),)
        return TensorStep(name=name, how="rows", specs=specs, sources=tuple(sources), make=make)

    steps, inside = [], set()
    for name, layer in expert.layers.items():
        parts = [info for role, info in layer.tensors.items() if role not in ("bias", "mul_scale")]
        inside |= set(parts)
        steps.append(step(f"{name}.weight", layer.shape, parts, functools.partial(decoded, layer)))
    for name, info in expert.tensors.items():
        if info not in inside and not (name.endswith(".mul_scale") and _is_ones(info, reader)):
            steps.append(step(name, info.shape, (info,), functools.partial(_plain, info)))
    return steps


def combined(digests_by_name: dict[str, str]) -> str:
    """One sha256 over all names and digests, in the order of the names."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests_by_name.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _plain(info: TensorInfo, reader: RowReader) -> Iterator[Tensor]:
    import torch

    for _, view in reader.blocks(info):
        rows = as_tensor(view, info)
        yield rows.to(torch.float32) if info.dtype in FLOAT_DTYPES else rows


def _is_ones(info: TensorInfo, reader: RowReader) -> bool:
    return all(bool((rows == 1).all()) for rows in _plain(info, reader))


def decoded(layer: Layer, reader: RowReader) -> Iterator[Tensor]:
    """The weight of a layer as float32 rows [n, K]; FP8 in tiles is rounded to bfloat16 on the way."""
    import torch

    if layer.scheme == "bf16":
        yield from _plain(layer.tensors["weight"], reader)
        return
    weight, tiled = layer.tensors["weight"], layer.scheme == FP8_TILES
    scheme = STORED_SCHEMES[layer.scheme]
    wide = layer.container not in ("plain", "packed")  # FP4 as numbers of another type
    scales = {role: _whole(info, reader) for role, info in layer.tensors.items() if "scale" in role}
    format = "mxfp8" if wide else "mxfp4" if "weight_dual_scale" in scales else layer.scheme
    scale, dual = scales["weight_scale_inv" if tiled else "weight_scale"], scales.get("weight_dual_scale")
    if not scheme.block and not scheme.tile:
        scale = scale.reshape(-1, 1).expand(layer.shape[0], 1)
    for start, view in reader.blocks(weight, multiple=_TILE):
        qdata = as_tensor(view, weight)
        stop, step = start + len(qdata), scheme.tile or 1
        part = scale[start // step : -(-stop // step)]
        qdata = qdata.to(torch.float8_e4m3fn) if wide else qdata
        encoded = mx.Encoded(qdata, part, None, format, -1, (len(qdata), layer.shape[1]))
        values = mx.decode(encoded, torch.bfloat16 if tiled else torch.float32).to(torch.float32)
        if dual is not None:
            factors = dual.reshape(layer.shape[0], -1)[start:stop].repeat_interleave(_GROUP, -1)
            values *= factors[:, : layer.shape[1]]
        yield values


def _whole(info: TensorInfo, reader: RowReader) -> Tensor:
    """A scale in memory: E8M0 as uint8, others as float32."""
    import torch

    data = bytearray(reader.whole(info))
    values = as_tensor(memoryview(data), info).reshape(info.shape)
    return values.to(torch.float32) if info.dtype in FLOAT_DTYPES else values.view(torch.uint8)
