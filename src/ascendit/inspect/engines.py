"""Engines and chips that can run a checkpoint: unchanged, after a repack, or not at all.

Does not import torch.

`quant.engines` lists the schemes that an engine can run, `weights.engine_formats` the files that it expects.
vLLM-Omni needs equal `mul_scale` for Q, K and V; headers do not show that, so only `repack` checks it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ascendit.checkpoint.component import read_json
from ascendit.checkpoint.layer_format import Layer
from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.quant_metadata import find_manifest
from ascendit.checkpoint.stored_kinds import kinds_text
from ascendit.checkpoint.transformer import Expert
from ascendit.device.operator_support import Support, chips_for
from ascendit.inspect.transformer_report import ExpertSummary
from ascendit.names import without_prefix
from ascendit.quant.attention_schemes import QUANT_TYPES
from ascendit.quant.engines import ENGINES, engines_for
from ascendit.quant.schemes import FP8_TILES, METHOD, STORED_SCHEMES, scheme_after_reading
from ascendit.report import columns, group_by, shell_line
from ascendit.weights.engine_formats import ENGINE_FORMATS, TargetFormat, traits_of

Verdict = Literal["runs", "repack", "no"]


@dataclass(frozen=True)
class Compatibility:
    """Whether, and how, one engine can run the checkpoint."""

    engine: str
    version: str
    verdict: Verdict
    """`runs`: unchanged; `repack`: after `command`; `no`: not at all."""
    reason: str = ""
    command: str = ""

    def text(self) -> str:
        if self.verdict == "runs":
            return "unchanged"
        if self.verdict == "no":
            return f"no: {self.reason}"
        flags = self.command.partition(" -o DST ")[2]
        return f"after repack {flags}   ({self.reason})"


@dataclass(frozen=True, kw_only=True)
class RunsOn:
    """Engines that can run the checkpoint, and support of its schemes on each chip."""

    engines: tuple[Compatibility, ...]
    chips: dict[str, Support]

    def lines(self) -> list[str]:
        """Lines for a terminal."""
        by_support = group_by(sorted(self.chips, key=lambda c: self.chips[c] != "native"), self.chips.get)
        chips = "; ".join(f"{support} on {', '.join(names)}" for support, names in by_support.items())
        return columns([*((f"{e.engine} {e.version}", e.text()) for e in self.engines), ("chips", chips)])


def runs_on(layout: Layout, summaries: Sequence[ExpertSummary]) -> RunsOn:
    """Compatibility of a model: an engine must be able to run all its experts."""
    experts = [summary.expert for summary in summaries]
    refusals = [engines_for(traits(summary)) for summary in summaries]
    schemes = {layer.scheme for e in experts for layer in e.layers.values()} | {"bf16"}
    types = {value for e in experts for value in e.attention.values()}
    attention = [QUANT_TYPES.get(value, value) for value in types]
    engines = []
    for name, engine in ENGINES.items():
        verdict: Verdict = "runs"
        command = ""
        if reason := next(filter(None, (by_engine[name] for by_engine in refusals)), ""):
            verdict = "no"
        elif reason := next(_obstacles(ENGINE_FORMATS[name], layout, experts), ""):
            verdict, command = "repack", _command(layout, name, ENGINE_FORMATS[name])
        engines.append(Compatibility(name, engine.version, verdict, reason, command))
    return RunsOn(engines=tuple(engines), chips=chips_for(schemes, attention))


def traits(summary: ExpertSummary) -> frozenset[str]:
    """The traits of `quant.engines.Engine.refuses`, with tiled FP8 counted as BF16."""
    expert = summary.expert
    schemes = {n: scheme_after_reading(layer.scheme) for n, layer in expert.layers.items()}
    blocks = [n for n in summary.linears if n.startswith("blocks.")]
    layer_schemes = {n: schemes.get(n, "bf16") for n in (*blocks, *schemes)}
    shapes = {n: layer.shape for n, layer in expert.layers.items()}
    return traits_of(layer_schemes, shapes, dict.fromkeys(expert.smoothed))


def _command(layout: Layout, engine: str, target: TargetFormat) -> str:
    """The repack command for the engine, with `--base` if the other parts are missing."""
    base = " --base MODEL" if layout.kind != "diffusers" and target.naming == "diffusers" else ""
    return f"ascendit repack {shell_line([str(layout.root)])} -o DST --for {engine}{base}"


def _obstacles(target: TargetFormat, layout: Layout, experts: Sequence[Expert]) -> Iterator[str]:
    """Differences from the files that the engine reads, most important first."""
    layers = [layer for e in experts for layer in e.layers.values()]
    if kinds := [kinds_text(e.kinds) for e in experts if e.kinds]:
        yield f"stored as {kinds[0]}"
    if any(without_prefix(info.name) != info.name for e in experts for info in e.tensors.values()):
        yield "needs names without prefixes"
    if any(layer.scheme == FP8_TILES for layer in layers):
        yield "FP8 in 128 x 128 tiles becomes BF16"
    if any(e.naming != target.naming for e in experts):
        yield f"needs {'original Wan' if target.naming == 'wan' else 'Diffusers'} names"
    if target.naming == "diffusers" and layout.kind != "diffusers":
        yield "needs a complete pipeline folder"
    for layer in layers:
        castable = target.unpacked and layer.packing == "bf16"  # FP4 values are exact in E4M3
        if target.packing(layer.scheme) != layer.packing and not castable:
            yield f"needs FP4 {'unpacked to FP8' if target.unpacked else 'packed two per byte'}"
        yield from _tensor_obstacles(target, layer)
    if any(layer.scheme != "bf16" for layer in layers):
        yield from _description_obstacles(target, experts)
    if target.export:
        yield from _file_obstacles(experts)


def _tensor_obstacles(target: TargetFormat, layer: Layer) -> Iterator[str]:
    roles = layer.tensors.keys()
    has_offset = "weight_offset" in STORED_SCHEMES[layer.scheme].roles
    if has_offset and ("weight_offset" in roles) != target.offset:
        yield f"needs {layer.scheme} {'with' if target.offset else 'without'} weight_offset"
    if layer.scheme in target.unit_mul_scale and "mul_scale" not in roles:
        yield f"needs a mul_scale in every {layer.scheme} layer"
    if "mul_scale" not in roles:
        return
    wrapped = layer.tensors["mul_scale"].name.endswith(".div.mul_scale")
    if wrapped != target.export:
        yield f"needs smoothed layers {'with' if target.export else 'without'} .linear. and .div."


def _description_obstacles(target: TargetFormat, experts: Sequence[Expert]) -> Iterator[str]:
    """vLLM-Omni reads config.json only, the other engines the manifest."""
    if target.engine == "vllm-omni":
        configs = [e.quantization_config for e in experts if e.layers]
        if any(config is None or config.get("quant_method") == METHOD for config in configs):
            yield "needs its own quantization_config in config.json"
    elif any(e.manifest is None for e in experts):
        yield "needs quant_model_description.json"
    elif target.manifest_only and any(_lacks_aliases(e) for e in experts):
        yield "needs <layer>.div.mul_scale in the manifest"


def _lacks_aliases(expert: Expert) -> bool:
    """Whether the manifest lacks a name by which SGLang loads the `mul_scale` of a smoothed layer."""
    path = find_manifest(expert.path) if expert.smoothed and expert.path.is_dir() else None
    manifest = read_json(path) if path else {}
    return any(f"{name}.div.mul_scale" not in manifest for name in expert.smoothed)


def _file_obstacles(experts: Sequence[Expert]) -> Iterator[str]:
    """MindIE-SD: one weight file per folder, named by quant type, not a link and not readable by others."""
    for expert in experts:
        files = sorted({info.file for info in expert.tensors.values()})
        quant_type = (expert.manifest or {}).get("model_quant_type", "").lower()
        if [f.name for f in files] != [f"quant_model_weight_{quant_type}.safetensors"]:
            yield f"needs one file quant_model_weight_{quant_type or '<type>'}.safetensors in each folder"
        manifest = files[0].parent / f"quant_model_description_{quant_type}.json"
        if not manifest.is_file():
            yield f"needs {manifest.name}"
        if any(_is_refused(f) for f in (*files, manifest) if f.exists()):
            yield "refuses links and files that others can read; use chmod 640"


def _is_refused(file: Path) -> bool:
    return file.is_symlink() or (os.name == "posix" and bool(file.stat().st_mode & 0o007))
