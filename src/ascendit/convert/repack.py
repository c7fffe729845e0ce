"""Checkpoint to checkpoint without a change of one number: other names, files, containers.

    repack("wan22_w8a8_mxfp8_export", "wan22-mxfp8", base="hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers")

Bytes that stay as they are go from file to file inside the kernel; the others are written some rows at a time
by `weights.tensor_steps`. What an engine cannot load is refused before anything is written. torch is imported
for FP8 in tiles and for `check` only.

`check` decodes both sides, rows at a time, and hashes them. It shares no code with `tensor_steps`: containers
are undone by value, scales are read as they are stored.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascendit import mx
from ascendit.checkpoint.component import read_json
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layer_format import FLOAT_DTYPES, Layer
from ascendit.checkpoint.layout import RECORD_FILE, WORDS, Layout, recognise
from ascendit.checkpoint.output_folder import Staging
from ascendit.checkpoint.quant_metadata import model_quant_type
from ascendit.checkpoint.reader import RowReader, TensorInfo, as_bytes, as_tensor
from ascendit.checkpoint.transformer import Expert, num_weights, read_expert
from ascendit.checkpoint.writer import MAX_SHARD_BYTES, ShardWriter
from ascendit.convert import provenance
from ascendit.convert.report import RepackedExpert, RepackReport, add_up
from ascendit.errors import CheckpointError
from ascendit.mx.formats import FORMATS
from ascendit.names import listed
from ascendit.progress import Advance, Meter, OnProgress
from ascendit.quant.schemes import FP8_TILES, SCHEMES, STORED_SCHEMES
from ascendit.quant.vllm_omni_config import marker_for
from ascendit.version import __version__
from ascendit.weights.engine_formats import (
    Dialect,
    check_engine,
    dialect_for,
    model_kind,
    task_config,
    traits_of,
)
from ascendit.weights.tensor_steps import (
    TensorStep,
    TensorSteps,
    produce,
    schemes_of,
    steps_for,
    unlike_qkv,
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


@dataclass(frozen=True)
class _Job:
    """One expert and the steps that repack it."""

    expert: Expert
    config: dict[str, Any]
    steps: TensorSteps
    dialect: Dialect
    folder: str

    @property
    def layers(self) -> dict[str, str]:
        return schemes_of(self.expert)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.steps.specs)

    @property
    def quant_type(self) -> str:
        return model_quant_type(self.layers)

    @property
    def quantized(self) -> bool:
        """Whether a manifest is written: something is not plain floats."""
        return bool(self.expert.attention) or any(s.name.endswith("_scale") for s in self.steps.written)


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
    parts_from = provenance.read_base(base, source) if base is not None else _own_parts(source)
    jobs = _jobs_for(source, dialect, parts_from if base is not None else None)
    checked: dict[str, dict[str, str]] = {}
    placed: tuple[str, ...] = ()
    if not dry_run:
        sources = [source.root, *([parts_from.root] if parts_from else [])]
        needed = sum(job.nbytes for job in jobs)
        mark = _fingerprint(jobs, dialect, check=check, copy=copy)
        with Staging(dst, sources=sources, fingerprint=mark, resume=resume, needs_bytes=needed) as staging:
            files = _write(jobs, staging, check, Meter(needed, on_progress).advance_in("write"))
            if parts_from and dialect.naming == "diffusers":
                placed = provenance.place_parts(parts_from, staging.path, copy=copy)
            if check:
                meter = Meter(2 * needed, on_progress)
                checked = _compare(jobs, staging.path, meter.advance_in("check"))
            made = _made(source, dst, jobs, files, checked, base=base, to=to, engine=engine, check=check)
            provenance.write_made(staging.path, made, dst.name)
            staging.publish()
    elif parts_from and dialect.naming == "diffusers":
        placed = tuple(name for name, part in parts_from.parts.items() if part not in parts_from.experts)
    return RepackReport(
        path=dst,
        source=provenance.source_name(source),
        layout=WORDS[source.kind],
        to=dialect.naming,
        engine=engine,
        experts=tuple(_expert_report(job, checked.get(job.expert.name)) for job in jobs),
        placed=placed,
        warnings=_warnings(jobs, dialect, parts_from),
        dry_run=dry_run,
        seconds=time.monotonic() - started,
    )


# ---- what is decided first ----------------------------------------------------------------------


def _own_parts(source: Layout) -> Layout | None:
    """A pipeline folder is its own base."""
    return source if source.kind == "diffusers" else None


def _jobs_for(source: Layout, dialect: Dialect, base: Layout | None) -> list[_Job]:
    """One job for each expert. Raises what can be known before anything is written."""
    jobs = []
    for part in source.experts:
        expert = read_expert(part)
        config = provenance.config_from(base, expert) if base else expert.config
        _check_engine(expert, dialect)
        folder = dialect.folder(expert.name, len(source.experts))
        jobs.append(_Job(expert, config, steps_for(expert, dialect), dialect, folder))
    return jobs


def _check_engine(expert: Expert, dialect: Dialect) -> None:
    if dialect.engine is None:
        return
    layers = schemes_of(expert)
    shapes = {name: layer.shape for name, layer in expert.layers.items()}
    traits = traits_of(layers, shapes, expert.smoothed, unlike_qkv=unlike_qkv(expert))
    check_engine(dialect.engine, traits, expert.name)


def _fingerprint(jobs: list[_Job], dialect: Dialect, **flags: bool) -> str:
    """Changes with the source files and with everything that is written."""
    digest = hashlib.sha256(repr((__version__, dialect, sorted(flags.items()))).encode())
    for job in jobs:
        for file in sorted({info.file for info in job.expert.tensors.values()}):
            stat = file.stat()
            digest.update(repr((str(file), stat.st_size, stat.st_mtime_ns)).encode())
        digest.update(repr((job.folder, job.config, job.steps.specs)).encode())
    return digest.hexdigest()


# ---- writing ------------------------------------------------------------------------------------


def _write(jobs: list[_Job], staging: Staging, check: bool, advance: Advance) -> dict[str, str]:
    """Every expert: weights, manifest, config.json. Returns path in the folder -> sha256, with `check`."""
    hashes: dict[str, str] = {}
    for job in jobs:
        folder = staging.path / job.folder
        folder.mkdir(parents=True, exist_ok=True)
        writer = ShardWriter(
            folder,
            job.steps.specs,
            stem=job.dialect.stem(job.quant_type),
            max_shard_bytes=None if job.dialect.typed_names else MAX_SHARD_BYTES,
            hash=check,
            journal=staging.journal,
        )
        with writer, RowReader() as reader:
            for step in job.steps.written:
                if not (done := writer.done(step.spec.name)):
                    _write_one(step, writer, reader)
                advance(f"{job.expert.name}.{step.name}", step.spec.nbytes, done)
            for step in job.steps.dropped:
                for _ in produce(step, reader):
                    pass
            digests = writer.close()
        hashes |= {str(Path(job.folder) / name): digest for name, digest in digests.items()}
        _write_json(job, folder)
        if job.dialect.mode is not None:
            for shard in writer.shards:
                shard.file.chmod(job.dialect.mode)
    return hashes


def _write_one(step: TensorStep, writer: ShardWriter, reader: RowReader) -> None:
    if step.how == "move":
        writer.move(step.sources[0], step.spec.name)
        return
    for data in produce(step, reader):
        writer.append(step.spec.name, data)


def _write_json(job: _Job, folder: Path) -> None:
    """config.json, and the manifest where something is quantized."""
    dialect, layers = job.dialect, job.layers
    marker = marker_for(layers, job.steps.smoothed)
    provenance.write_json(folder / "config.json", dialect.config(job.config, marker))
    if dialect.task_file:
        provenance.write_json(folder / dialect.task_file, task_config(job.config))
    if not job.quantized:
        return
    lost = job.expert.tensors.keys() - set(job.steps.names)
    found = {name: value for name, value in (job.expert.manifest or {}).items() if name not in lost}
    manifest = dialect.manifest(layers, job.steps.names, job.expert.attention, found)
    file = folder / dialect.manifest_file(job.quant_type)
    file.write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")
    if dialect.mode is not None:
        file.chmod(dialect.mode)


def _compare(jobs: list[_Job], folder: Path, advance: Advance) -> dict[str, dict[str, str]]:
    """Read what was written as anyone would, and compare all numbers with the source."""
    written = recognise(folder)
    return {
        job.expert.name: compare_numbers(job.expert, read_expert(part), advance)
        for job, part in zip(jobs, written.experts, strict=True)
    }


# ---- the report ---------------------------------------------------------------------------------


def _made(
    source: Layout,
    dst: Path,
    jobs: list[_Job],
    files: dict[str, str],
    checked: dict[str, dict[str, str]],
    **flags: Any,
) -> provenance.Made:
    """For ascendit.json and the model card."""
    words = {"base": "--base", "to": "--to", "engine": "--for", "check": "--check"}
    options = [(words[name], value) for name, value in flags.items()]
    details: dict[str, Any] = {"engine": flags["engine"]} if flags["engine"] else {}
    if checked:
        details["decoded_sha256"] = {name: combined(found) for name, found in checked.items()}
    reports = [_expert_report(job, checked.get(job.expert.name)) for job in jobs]
    recipe = _recipe_of(source)
    written = sum(job.nbytes for job in jobs)
    return provenance.Made(
        verb="repack",
        layout=source,
        model_kind=model_kind(jobs[0].config),
        command=provenance.command_line("repack", source, dst, options),
        files=files,
        schemes=add_up(report.schemes for report in reports),
        bits_per_weight=8 * written / max(sum(report.num_weights for report in reports), 1),
        recipe=recipe,
        details=details,
    )


def _recipe_of(source: Layout) -> dict[str, Any]:
    """The recipe in the record of a folder that ascendit wrote: it stays true."""
    file = source.root / RECORD_FILE
    found = read_json(file).get("recipe") if file.is_file() else None
    known = isinstance(found, dict) and isinstance(found.get("name"), str)
    return found if known and isinstance(found, dict) else {}


def _expert_report(job: _Job, checked: dict[str, str] | None) -> RepackedExpert:
    steps = job.steps.written
    names = {job.expert.tensors[step.name].name for step in steps if step.name in job.expert.tensors}
    rewritten = [step for step in steps if step.rewritten]
    return RepackedExpert(
        name=job.expert.name,
        folder=job.folder,
        origin=job.expert.origin,
        schemes=add_up([Counter(job.layers.values())]),
        num_tensors=len(steps),
        num_renamed=len(names - {step.spec.name for step in steps}),
        moved_bytes=sum(step.spec.nbytes for step in steps if not step.rewritten),
        rewritten_bytes=sum(step.spec.nbytes for step in rewritten),
        num_weights=num_weights(job.expert),
        rewritten=Counter(WAYS[step.how] for step in rewritten),
        decoded_sha256=combined(checked) if checked else "",
        num_checked=len(checked or {}),
    )


def _warnings(jobs: list[_Job], dialect: Dialect, parts: Layout | None) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for job in jobs:
        if job.config == job.expert.config and job.expert.config_problem:
            found[job.expert.config_problem] = None
    if dialect.engine == "mindie" and any("bf16" in job.layers.values() for job in jobs):
        found["MindIE-SD takes what is not quantized from the float checkpoint: keep that at hand"] = None
    if parts is None and dialect.naming == "diffusers":
        found["only the transformers were written; --base MODEL adds the other parts"] = None
    return tuple(found)


# ---- the numbers of two experts -----------------------------------------------------------------

_TILE, _GROUP = FORMATS[FP8_TILES].block, SCHEMES["mxfp4_dualscale"].group


def compare_numbers(source: Expert, written: Expert, advance: Advance | None = None) -> dict[str, str]:
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


def digests(expert: Expert, advance: Advance | None = None) -> dict[str, str]:
    """Name -> sha256 of the numbers, as float32, little-endian, by rows.

    A quantized layer has one entry for its decoded weight; its scales are in it, zero offsets in none. A
    `mul_scale` of ones, which changes nothing, has none either. `advance(name, bytes read)` after each.
    """
    found: dict[str, str] = {}
    inside = set()
    with RowReader() as reader:
        for name, layer in expert.layers.items():
            parts = [info for role, info in layer.tensors.items() if role not in ("bias", "mul_scale")]
            inside |= set(parts)
            found[f"{name}.weight"] = _sha256(decoded(layer, reader))
            if advance:
                advance(name, sum(info.nbytes for info in parts))
        for name, info in expert.tensors.items():
            if info not in inside and not (name.endswith(".mul_scale") and _is_ones(info, reader)):
                found[name] = _sha256(_plain(info, reader))
                if advance:
                    advance(name, info.nbytes)
    return found


def combined(digests_by_name: dict[str, str]) -> str:
    """One sha256 over all names and digests, in the order of the names."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests_by_name.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(rows: Iterator[Tensor]) -> str:
    digest = hashlib.sha256()
    for block in rows:
        digest.update(as_bytes(block))
    return digest.hexdigest()


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
    weight = layer.tensors["weight"]
    scales = {role: _whole(info, reader) for role, info in layer.tensors.items() if "scale" in role}
    for start, view in reader.blocks(weight, multiple=_TILE):
        codes = as_tensor(view, weight)
        shape = (codes.shape[0], layer.shape[1])
        rows = slice(start, start + codes.shape[0])
        if layer.scheme == FP8_TILES:
            tiles = scales["weight_scale_inv"][start // _TILE : -(-rows.stop // _TILE)]
            encoded = mx.Encoded(codes, tiles, None, layer.scheme, -1, shape)
            yield mx.decode(encoded, torch.bfloat16).to(torch.float32)
            continue
        scale = scales["weight_scale"]
        if not STORED_SCHEMES[layer.scheme].block:
            scale = scale.reshape(-1, 1).expand(layer.shape[0], 1)
        yield _values(codes, scale[rows], layer, shape, scales.get("weight_dual_scale"), rows)


def _values(
    codes: Tensor, scale: Tensor, layer: Layer, shape: tuple[int, int], dual: Tensor | None, rows: slice
) -> Tensor:
    import torch

    dual_rows = None if dual is None else dual.reshape(layer.shape[0], -1, 1)[rows]
    if layer.container in ("plain", "packed"):
        return mx.decode(mx.Encoded(codes, scale, dual_rows, layer.scheme, -1, shape), torch.float32)
    numbers = mx.Encoded(codes.to(torch.float8_e4m3fn), scale, None, "mxfp8", -1, shape)
    values = mx.decode(numbers, torch.float32)
    if dual_rows is None:
        return values
    return values * dual_rows.squeeze(-1).repeat_interleave(_GROUP, -1)[:, : shape[1]]


def _whole(info: TensorInfo, reader: RowReader) -> Tensor:
    """A scale in memory: E8M0 as uint8, others as float32."""
    import torch

    data = bytearray(reader.whole(info))
    values = as_tensor(memoryview(data), info).reshape(info.shape)
    return values.to(torch.float32) if info.dtype in FLOAT_DTYPES else values.view(torch.uint8)
