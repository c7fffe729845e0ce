"""Which engines and chips can run a checkpoint: as it is, after a repack, or not. No torch.

What an engine can run comes from `quant.engines`, how it wants the files from `weights.engine_formats`.
Headers do not tell whether the `mul_scale` of Q, K and V are equal, which vLLM-Omni needs; `repack` does.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ascendit.checkpoint.component import read_json
from ascendit.checkpoint.layer_format import Layer
from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.quant_metadata import find_manifest
from ascendit.checkpoint.transformer import Expert
from ascendit.device.operator_support import Support, chips_for
from ascendit.inspect.transformer_report import ExpertSummary
from ascendit.quant.engines import ENGINES, engines_for
from ascendit.quant.schemes import FP8_TILES, METHOD, STORED_SCHEMES, scheme_after_reading
from ascendit.report import columns, group_by
from ascendit.weights.engine_formats import DIALECTS, Dialect, traits_of

VerdictWord = Literal["runs", "repack", "no"]


@dataclass(frozen=True)
class EngineVerdict:
    """What one engine can do with the checkpoint."""

    engine: str
    version: str
    verdict: VerdictWord
    """`runs`: as it is; `repack`: after `command`; `no`: not at all."""
    reason: str = ""
    command: str = ""

    def text(self) -> str:
        if self.verdict == "runs":
            return "as it is"
        if self.verdict == "no":
            return f"no: {self.reason}"
        flags = self.command.partition(" -o DST ")[2]
        return f"after repack {flags}   ({self.reason})"


@dataclass(frozen=True, kw_only=True)
class RunsOn:
    """Engines, and chips by whether they have the matmul of every scheme in it."""

    engines: tuple[EngineVerdict, ...]
    chips: dict[str, Support]

    def lines(self) -> list[str]:
        """For a terminal."""
        by_support = group_by(sorted(self.chips, key=lambda c: self.chips[c] != "native"), self.chips.get)
        chips = "; ".join(f"{support} on {', '.join(names)}" for support, names in by_support.items())
        return columns([*((f"{e.engine} {e.version}", e.text()) for e in self.engines), ("chips", chips)])


def runs_on(layout: Layout, found: Sequence[ExpertSummary]) -> RunsOn:
    """Judge the experts of a model together: an engine runs all of them or none."""
    experts = [summary.expert for summary in found]
    needs = [engines_for(traits(summary)) for summary in found]
    schemes = {layer.scheme for e in experts for layer in e.layers.values()} | {"bf16"}
    engines = []
    for name, engine in ENGINES.items():
        verdict: VerdictWord = "runs"
        command = ""
        if reason := next(filter(None, (verdicts[name] for verdicts in needs)), ""):
            verdict = "no"
        elif reason := next(_obstacles(DIALECTS[name], layout, experts), ""):
            verdict, command = "repack", _command(layout, name, DIALECTS[name])
        engines.append(EngineVerdict(name, engine.version, verdict, reason, command))
    return RunsOn(engines=tuple(engines), chips=chips_for(schemes))


def traits(summary: ExpertSummary) -> frozenset[str]:
    """What matters to an engine, after tiled FP8 has become BF16."""
    expert = summary.expert
    schemes = {n: scheme_after_reading(layer.scheme) for n, layer in expert.layers.items()}
    blocks = [n for n in summary.linears if n.startswith("blocks.")]
    every = {n: schemes.get(n, "bf16") for n in (*blocks, *schemes)}
    shapes = {n: layer.shape for n, layer in expert.layers.items()}
    return traits_of(every, shapes, dict.fromkeys(expert.smoothed))


def _command(layout: Layout, engine: str, dialect: Dialect) -> str:
    """The line that makes what the engine wants; `--base` where the other parts are missing."""
    base = " --base MODEL" if layout.kind != "diffusers" and dialect.naming == "diffusers" else ""
    return f"ascendit repack {shlex.quote(str(layout.root))} -o DST --for {engine}{base}"


def _obstacles(dialect: Dialect, layout: Layout, experts: Sequence[Expert]) -> Iterator[str]:
    """What must change before the engine reads the files, most important first."""
    layers = [layer for e in experts for layer in e.layers.values()]
    if any(layer.scheme == FP8_TILES for layer in layers):
        yield "FP8 in 128 x 128 tiles becomes BF16"
    if any(e.naming != dialect.naming for e in experts):
        yield f"it wants {'original Wan' if dialect.naming == 'wan' else 'Diffusers'} names"
    if dialect.naming == "diffusers" and layout.kind != "diffusers":
        yield "it wants a whole pipeline folder"
    for layer in layers:
        as_numbers = dialect.unpacked and layer.container == "bf16"  # they fit into E4M3
        if dialect.container(layer.scheme) != layer.container and not as_numbers:
            yield f"it wants FP4 {'one to an element' if dialect.unpacked else 'two to a byte'}"
        yield from _tensor_obstacles(dialect, layer)
    if any(layer.scheme != "bf16" for layer in layers):
        yield from _description_obstacles(dialect, experts)
    if dialect.export:
        yield from _file_obstacles(experts)


def _tensor_obstacles(dialect: Dialect, layer: Layer) -> Iterator[str]:
    has = layer.tensors.keys()
    has_offset = "weight_offset" in STORED_SCHEMES[layer.scheme].roles
    if has_offset and ("weight_offset" in has) != dialect.offset:
        yield f"it wants {layer.scheme} {'with' if dialect.offset else 'without'} weight_offset"
    if layer.scheme in dialect.ones and "mul_scale" not in has:
        yield f"it wants a mul_scale in every {layer.scheme} layer"
    if "mul_scale" not in has:
        return
    wrapped = layer.tensors["mul_scale"].name.endswith(".div.mul_scale")
    if wrapped != dialect.export:
        yield f"it wants smoothed layers {'with' if dialect.export else 'without'} .linear. and .div."


def _description_obstacles(dialect: Dialect, experts: Sequence[Expert]) -> Iterator[str]:
    """vLLM-Omni goes by config.json alone, the others by the manifest."""
    if dialect.engine == "vllm-omni":
        markers = [e.marker for e in experts if e.layers]
        if any(marker is None or marker.get("quant_method") == METHOD for marker in markers):
            yield "it wants its own quantization_config in config.json"
    elif any(e.manifest is None for e in experts):
        yield "it wants quant_model_description.json"
    elif dialect.aliases and any(_lacks_aliases(e) for e in experts):
        yield "it wants <layer>.div.mul_scale in the manifest"


def _lacks_aliases(expert: Expert) -> bool:
    """Whether a smoothed layer is not named in the way that makes SGLang load its `mul_scale`."""
    path = find_manifest(expert.path) if expert.smoothed and expert.path.is_dir() else None
    written = read_json(path) if path else {}
    return any(f"{name}.div.mul_scale" not in written for name in expert.smoothed)


def _file_obstacles(experts: Sequence[Expert]) -> Iterator[str]:
    """MindIE-SD: one file of weights in each folder, by its type, for nobody else to read, and no link."""
    for expert in experts:
        files = sorted({info.file for info in expert.tensors.values()})
        kind = (expert.manifest or {}).get("model_quant_type", "").lower()
        if [f.name for f in files] != [f"quant_model_weight_{kind}.safetensors"]:
            yield f"it wants one file quant_model_weight_{kind or '<type>'}.safetensors in each folder"
        beside = files[0].parent / f"quant_model_description_{kind}.json"
        if not beside.is_file():
            yield f"it wants {beside.name}"
        if any(_refused(f) for f in (*files, beside) if f.exists()):
            yield "it refuses links, and files that anyone may read; else chmod 640"


def _refused(file: Path) -> bool:
    return file.is_symlink() or (os.name == "posix" and bool(file.stat().st_mode & 0o007))
