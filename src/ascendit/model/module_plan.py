"""What a recipe makes of the linear layers of any module. Shapes and names only, nothing is computed.

A Wan transformer of Diffusers gets the layers that `ascendit.quantize` gives it. Of any other module these
are the linear layers in its repeated blocks, without those that make modulation from a time step, and
without those that no matmul on codes takes: too small, or K no multiple of a block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ascendit.checkpoint.groups import grouped
from ascendit.checkpoint.names import all_linears, block_linears, is_block_linear
from ascendit.checkpoint.part import TRANSFORMER
from ascendit.convert.canonical import METHOD, marker_for
from ascendit.convert.dialects import model_kind
from ascendit.convert.recipe import Recipe, load_recipe
from ascendit.convert.rules import OUTSIDE, LayerPlan, PlannedLayers, ruled
from ascendit.errors import UsageError
from ascendit.model.linear import QuantLinear
from ascendit.quant.schemes import QUANTIZED, SCHEMES

MIN_SIZE = 32
"""Smaller matrices gain nothing."""
MULTIPLE = 16
"""Of N, and of K in int8 and fp8: what the matmuls of accelerators take."""
MODULATION = "makes modulation, one row for a sample"
_MODULATION = re.compile(r"norm|mod$|modulation|adaln|embed|time_|temb|router", re.IGNORECASE)
"""In a part of a name between dots."""
NAMED_MODULES = "correct the pattern; `*` crosses dots, and the names are those of `module.named_modules()`"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)


@dataclass(frozen=True)
class ModulePlan(PlannedLayers):
    """Every linear layer of a module, in its order."""

    layers: tuple[LayerPlan, ...]
    round_to: str
    """`bf16`: everything is rounded first; "": as it is."""
    attention: Mapping[str, str]
    """Attention -> the quantization that the recipe asks for, and that a model of Diffusers does not run."""
    kind: Literal["t2v", "i2v", "ti2v"] | None
    """Of a Wan transformer."""

    @property
    def kept(self) -> dict[str, tuple[str, ...]]:
        """Why -> layers that stay as they are, in few words: `*` for the number of a block."""
        names = [plan.layer for plan in self.layers]
        kept: dict[str, list[str]] = {}
        for plan in self.layers:
            if plan.scheme == "bf16":
                kept.setdefault(plan.why, []).append(plan.layer)
        return {why: _in_few_words(found, names) for why, found in kept.items()}


def as_recipe(recipe_or_scheme: str | Path | Recipe) -> Recipe:
    """A recipe by itself, by name or TOML file, or the default one with a scheme. Errors as `load_recipe`."""
    if isinstance(recipe_or_scheme, Recipe):
        return recipe_or_scheme
    name = str(recipe_or_scheme)
    return load_recipe("default", name) if name in SCHEMES else load_recipe(name)


def plan_module(module: nn.Module, recipe: Recipe, keep: Sequence[str] = ()) -> ModulePlan:
    """What `recipe` makes of `module`. `keep`: patterns of layers that stay as they are.

    UsageError: E-QNT-01 if it is quantized already or nothing is left to quantize, E-USE-05 for a pattern
    that matches no layer.
    """
    linears = linears_of(module)
    if not linears:
        raise _refused(module, "no linear layer inside", "give the module around it")
    if done := [name for name, m in linears.items() if isinstance(m, QuantLinear)]:
        raise _refused(module, f"{len(done)} of its layers are codes already, as {done[0]}", "load it anew")
    config = wan_config_of(module)
    kind = None if config is None else model_kind(config)
    every = tuple(linears) if config is None else all_linears(config)
    if lost := [name for name in every if name not in linears]:
        raise _refused(module, f"{lost[0]} is no linear layer", "fuse and unload LoRA files first")
    blocks = () if config else _in_blocks(module, linears)
    inside = block_linears(config) if config else tuple(n for n in blocks if not _is_modulation(n))
    whys = dict.fromkeys(every, OUTSIDE) | dict.fromkeys(blocks, MODULATION)
    whys |= dict.fromkeys(inside, "no rule names it")
    plans = {name: LayerPlan(name, "bf16", None, whys[name]) for name in every}
    plans |= ruled(recipe.rules_for(kind, keep), inside, every, fix=NAMED_MODULES)
    for name, chosen in plans.items():
        if why := _unfit(linears[name], chosen.scheme, sizes=config is None):
            plans[name] = LayerPlan(name, "bf16", None, why)
    asked = recipe.attention_plan(config, model_kind=kind) if config and kind else ()
    attention = {a.name: a.quant_type for a in asked if a.quant_type}
    plan = ModulePlan(tuple(plans.values()), recipe.round_to, attention, kind)
    if not plan.coded:
        kept = "; ".join(f"{why}: {', '.join(words[:3])}" for why, words in plan.kept.items())
        raise _refused(module, f"no layer is left ({kept})", "take another recipe")
    return plan


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name, in the order of the module."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear) and name}


def wan_config_of(module: nn.Module) -> dict[str, Any] | None:
    """The config of a Wan transformer of Diffusers; None for other modules."""
    return dict(module.config) if type(module).__name__ == TRANSFORMER else None  # type: ignore[arg-type]


def marker_of(layers: Mapping[str, str], *, smoothed: Sequence[str] = (), wan: bool) -> dict[str, Any]:
    """`quantization_config` for Diffusers' config.json. `layers`: every linear layer -> scheme."""
    inside = {name: s for name, s in layers.items() if s in QUANTIZED or is_block_linear(name)}
    return (marker_for(inside, smoothed) if wan else None) or {"quant_method": METHOD}


# ---- parts --------------------------------------------------------------------------------------


def _is_modulation(name: str) -> bool:
    return any(_MODULATION.search(part) for part in name.split("."))


def _in_blocks(module: nn.Module, linears: Mapping[str, nn.Linear]) -> tuple[str, ...]:
    """Those in the module's own lists of blocks; else in any outermost list; else all."""
    lists = [name for name, m in module.named_modules() if name and _repeats(m)]
    own = [name for name in lists if "." not in name]
    outer = own or [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        return tuple(linears)
    return tuple(name for name in linears if any(name.startswith(f"{block}.") for block in outer))


def _repeats(m: nn.Module) -> bool:
    """A list of modules with linear layers inside, such as blocks are, and `to_out` and `ff.net` are not."""
    return isinstance(m, nn.ModuleList) and len(m) > 0 and all(_is_block(child) for child in m)


def _is_block(m: nn.Module) -> bool:
    return not isinstance(m, nn.Linear) and any(isinstance(x, nn.Linear) for x in m.modules())


def _unfit(m: nn.Linear, scheme: str, *, sizes: bool) -> str:
    """Why this layer cannot be in `scheme`, or "". `sizes`: small and odd ones are left out too."""
    if scheme == "bf16":
        return ""
    if type(m) is not nn.Linear:
        return f"a {type(m).__name__}, which does more than multiply"
    n, k = m.out_features, m.in_features
    step = SCHEMES[scheme].block or MULTIPLE
    if not sizes:
        return ""
    if min(n, k) < MIN_SIZE:
        return f"smaller than {MIN_SIZE}"
    if k % step:
        return f"K is no multiple of {step}"
    return f"N is no multiple of {MULTIPLE}" if n % MULTIPLE else ""


def _in_few_words(chosen: Sequence[str], among: Sequence[str]) -> tuple[str, ...]:
    def collapsed(names: Sequence[str]) -> Iterator[tuple[str, str]]:
        return ((_NUMBER.sub("*", name, count=1), name) for name in names)

    words = dict.fromkeys(word for word, _ in collapsed(chosen))
    every = dict.fromkeys(word for word, _ in collapsed(among))
    if sum(word in words for word, _ in collapsed(among)) == len(chosen):
        return grouped(words, every)
    return grouped(chosen, among)


def _refused(module: nn.Module, problem: str, fix: str) -> UsageError:
    return UsageError(
        f"{type(module).__name__}: {problem}",
        needs=f"linear layers in floating point, of {MIN_SIZE} x {MIN_SIZE} at least",
        fix=fix,
        code="E-QNT-01",
    )
