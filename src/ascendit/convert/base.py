"""The model that a repacked transformer belongs to: where its other parts come from. JSON only, no torch."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

from ascendit.checkpoint.expert import Expert
from ascendit.checkpoint.folder import model_folder
from ascendit.checkpoint.layout import INDEX_FILE, WORDS, Layout, recognise
from ascendit.checkpoint.names import TOLERATED, expected_tensors
from ascendit.checkpoint.staging import link_or_copy
from ascendit.checkpoint.store import listed
from ascendit.errors import CheckpointError, UsageError

_LICENCE = re.compile(r"(?:LICEN[CS]E|NOTICE)\b", re.IGNORECASE)


def read_base(base: Path | str, source: Layout) -> Layout:
    """The layout of `--base`. UsageError E-USE-01 unless it is a pipeline folder with as many experts."""
    layout = recognise(model_folder(base, experts=False))
    if layout.kind != "diffusers":
        raise UsageError(
            f"--base {base} is {WORDS[layout.kind]}",
            needs=f"a Diffusers folder with {INDEX_FILE}, text encoder and VAE",
            fix="give the published folder of the model, for example hf:Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            code="E-USE-01",
        )
    if len(layout.experts) != len(source.experts):
        raise _other_model(
            f"{source.root} has {_experts(source)}, --base {layout.root} has {_experts(layout)}",
        )
    return layout


def _experts(layout: Layout) -> str:
    return "two experts" if len(layout.experts) > 1 else "one transformer"


def shapes_of(expert: Expert) -> dict[str, tuple[int, ...]]:
    """Every weight, bias and table by its Diffusers name, weights as they are when decoded."""
    coded = {
        info.name
        for layer in expert.layers.values()
        for role, info in layer.tensors.items()
        if role not in ("weight", "bias")
    }
    shapes = {name: info.shape for name, info in expert.tensors.items() if info.name not in coded}
    return shapes | {f"{name}.weight": layer.shape for name, layer in expert.layers.items()}


def num_weights(expert: Expert) -> int:
    """Numbers of the model, scales not counted."""
    return sum(math.prod(shape) for shape in shapes_of(expert).values())


def config_from(base: Layout, expert: Expert) -> dict[str, Any]:
    """The config of this expert in `base`.

    Raises CheckpointError E-CKP-04, which names both, if the base is of another shape.
    """
    config = base.part(expert.name).config
    wanted, found = expected_tensors(config), shapes_of(expert)
    unlike = [f"{n} {list(found[n])} is {list(s)} there" for n, s in wanted.items() if found.get(n, s) != s]
    lacking = [name for name in wanted if name not in found]
    model = {n for n in found if n.endswith((".weight", ".bias", "scale_shift_table", ".pos_embed"))}
    extra = [n for n in model - wanted.keys() if not any(part in n for part in TOLERATED)]
    problems = [f"{len(unlike)} of other shapes: {listed(unlike, 2)}"] if unlike else []
    problems += [f"{len(lacking)} that it lacks: {listed(lacking, 2)}"] if lacking else []
    problems += [f"{len(extra)} that the base lacks: {listed(extra, 2)}"] if extra else []
    if problems:
        raise _other_model(f"{expert.path} does not fit --base {base.root}: {'; '.join(problems)}")
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _other_model(got: str) -> CheckpointError:
    return CheckpointError(
        got,
        needs="a base of the same model: as many experts, the same layers and shapes",
        fix="give the Diffusers folder of the model that was quantized, or leave --base out",
        code="E-CKP-04",
    )


def place_parts(base: Layout, folder: Path, *, copy: bool) -> tuple[str, ...]:
    """Put everything but the transformers into `folder`, linked unless `copy`. Returns what was placed.

    Its index and its licences are copied in any case.
    """
    placed = []
    for name, part in base.parts.items():
        if part not in base.experts:
            link_or_copy(part.path, folder / name, copy=copy)
            placed.append(name)
    for file in [INDEX_FILE, *licences(base.root)]:
        shutil.copyfile(base.root / file, folder / file)
        placed.append(file)
    return tuple(placed)


def licences(root: Path) -> list[str]:
    """Files at the top of a model that must go with it."""
    found = [p.name for p in root.iterdir() if p.is_file() and _LICENCE.match(p.name)]
    return sorted(found)
