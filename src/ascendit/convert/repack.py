"""Checkpoint to checkpoint without a change of one number: other names, files, containers.

    repack("wan22_w8a8_mxfp8_export", "wan22-mxfp8", base="hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers")

Bytes that stay as they are go from file to file inside the kernel; the others are written some rows at a time
by `weights.tensor_steps`. What an engine cannot load is refused before anything is written. torch is imported
for FP8 in tiles and for `check` only.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ascendit.checkpoint.component import read_json
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import RECORD_FILE, WORDS, Layout, recognise
from ascendit.checkpoint.output_folder import Staging
from ascendit.checkpoint.transformer import num_weights, read_expert
from ascendit.convert import provenance
from ascendit.convert.compare_numbers import combined, compare_numbers
from ascendit.convert.expert_folder import ExpertOutput, write_expert
from ascendit.convert.report import RepackedExpert, RepackReport, add_up
from ascendit.progress import Advance, ConversionMeter, OnConversionProgress
from ascendit.quant.vllm_omni_config import marker_for
from ascendit.version import __version__
from ascendit.weights.engine_formats import Dialect, check_engine, dialect_for, model_kind, traits_of
from ascendit.weights.tensor_steps import TensorStep, schemes_of, smoothed_in, stored_steps, unlike_qkv

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
    on_progress: OnConversionProgress | None = None,
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
    outputs = _outputs(source, dialect, parts_from if base is not None else None)
    checked: dict[str, dict[str, str]] = {}
    placed: tuple[str, ...] = ()
    if not dry_run:
        sources = [source.root, *([parts_from.root] if parts_from else [])]
        needed = sum(output.nbytes for output in outputs)
        mark = _fingerprint(outputs, dialect, check=check, copy=copy)
        with Staging(dst, sources=sources, fingerprint=mark, resume=resume, needs_bytes=needed) as staging:
            meter = ConversionMeter(needed, on_progress)
            files = _write(outputs, staging, check, meter.advance_in("write"))
            if parts_from and dialect.naming == "diffusers":
                placed = provenance.place_parts(parts_from, staging.path, copy=copy)
            if check:
                meter = ConversionMeter(2 * needed, on_progress)
                checked = _compare(outputs, staging.path, meter.advance_in("check"))
            made = _made(source, dst, outputs, files, checked, base=base, to=to, engine=engine, check=check)
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
        experts=tuple(_expert_report(output, checked.get(output.source.name)) for output in outputs),
        placed=placed,
        warnings=_warnings(outputs, dialect, parts_from),
        dry_run=dry_run,
        seconds=time.monotonic() - started,
    )


# ---- what is decided first ----------------------------------------------------------------------


def _own_parts(source: Layout) -> Layout | None:
    """A pipeline folder is its own base."""
    return source if source.kind == "diffusers" else None


def _outputs(source: Layout, dialect: Dialect, base: Layout | None) -> list[ExpertOutput]:
    """Every expert as it will be written. Raises what can be known before anything is."""
    outputs = []
    for part in source.experts:
        expert = read_expert(part)
        config = provenance.config_from(base, expert) if base else expert.config
        layers, steps = schemes_of(expert), stored_steps(expert, dialect)
        if dialect.engine is not None:
            shapes = {name: layer.shape for name, layer in expert.layers.items()}
            traits = traits_of(layers, shapes, expert.smoothed, unlike_qkv=unlike_qkv(expert))
            check_engine(dialect.engine, traits, expert.name)
        names = {spec.name for step in steps for spec in step.specs}
        lost = expert.tensors.keys() - names
        outputs.append(
            ExpertOutput(
                source=expert,
                folder=dialect.folder(expert.name, len(source.experts)),
                dialect=dialect,
                steps=steps,
                config=config,
                marker=marker_for(layers, smoothed_in(steps)),
                layers=layers,
                attention=expert.attention,
                more_entries={k: v for k, v in (expert.manifest or {}).items() if k not in lost},
                has_manifest=bool(expert.attention) or any(name.endswith("_scale") for name in names),
            )
        )
    return outputs


def _fingerprint(outputs: list[ExpertOutput], dialect: Dialect, **flags: bool) -> str:
    """Changes with the source files and with everything that is written."""
    digest = hashlib.sha256(repr((__version__, dialect, sorted(flags.items()))).encode())
    for output in outputs:
        for file in sorted({info.file for info in output.source.tensors.values()}):
            stat = file.stat()
            digest.update(repr((str(file), stat.st_size, stat.st_mtime_ns)).encode())
        digest.update(repr((output.folder, output.config, output.specs)).encode())
    return digest.hexdigest()


# ---- writing ------------------------------------------------------------------------------------


def _write(outputs: list[ExpertOutput], staging: Staging, check: bool, advance: Advance) -> dict[str, str]:
    """Every expert: weights, manifest, config.json. Returns path in the folder -> sha256, with `check`."""
    hashes: dict[str, str] = {}
    for output in outputs:

        def named(name: str, count: int, skipped: bool = False, expert: str = output.source.name) -> None:
            advance(f"{expert}.{name}", count, skipped)

        hashes |= write_expert(output, staging, named, weigh=TensorStep.bytes_made, hash=check, align=True)
    return hashes


def _compare(outputs: list[ExpertOutput], folder: Path, advance: Advance) -> dict[str, dict[str, str]]:
    """Read what was written as anyone would, and compare all numbers with the source."""
    written = recognise(folder)
    return {
        output.source.name: compare_numbers(output.source, read_expert(part), advance)
        for output, part in zip(outputs, written.experts, strict=True)
    }


# ---- the report ---------------------------------------------------------------------------------


def _made(
    source: Layout,
    dst: Path,
    outputs: list[ExpertOutput],
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
    reports = [_expert_report(output, checked.get(output.source.name)) for output in outputs]
    recipe = _recipe_of(source)
    written = sum(output.nbytes for output in outputs)
    return provenance.Made(
        verb="repack",
        layout=source,
        model_kind=model_kind(outputs[0].config),
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


def _expert_report(output: ExpertOutput, checked: dict[str, str] | None) -> RepackedExpert:
    source, rewritten = output.source, [step for step in output.steps if step.rewritten and step.specs]
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
        decoded_sha256=combined(checked) if checked else "",
        num_checked=len(checked or {}),
    )


def _warnings(outputs: list[ExpertOutput], dialect: Dialect, parts: Layout | None) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for output in outputs:
        if output.config == output.source.config and output.source.config_problem:
            found[output.source.config_problem] = None
    if dialect.engine == "mindie" and any("bf16" in output.layers.values() for output in outputs):
        found["MindIE-SD takes what is not quantized from the float checkpoint: keep that at hand"] = None
    if parts is None and dialect.naming == "diffusers":
        found["only the transformers were written; --base MODEL adds the other parts"] = None
    return tuple(found)
