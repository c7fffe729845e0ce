"""Quantize the linear layers of any module in place: a transformer of Diffusers, or one of your own.

    report = ascendit.quantize_(pipe.transformer, "mxfp8")
    print(*report.lines(), sep="\\n")

Layer by layer; each float weight is freed once it is quantized, so there is never more in memory than the
module and one layer. A Wan transformer of Diffusers gets the layers that `ascendit.quantize` gives it. Of any
other module these are the linear layers in its repeated blocks, without those that make modulation from a
time step, and without those that no quantized matmul takes: too small, or K no multiple of a block.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ascendit.checkpoint.component import TRANSFORMER
from ascendit.convert.report import QuantizedExpert
from ascendit.errors import UsageError
from ascendit.kernels.kernel import Emulate
from ascendit.model.linear import QuantLinear
from ascendit.model.weight_loader import nbytes
from ascendit.mx.codec import INPUT_DTYPES, Encoded, check_dtype, encode
from ascendit.mx.formats import Format, lookup, resolve_rule
from ascendit.names import all_linears, block_linears, grouped, is_block_linear
from ascendit.ops.operators import bind
from ascendit.quant.layer_rules import OUTSIDE, LayerScheme, LayerSchemes, warn_about_attention
from ascendit.quant.recipe import Recipe, load_recipe
from ascendit.quant.schemes import METHOD, QUANTIZED, SCHEMES
from ascendit.quant.vllm_omni_config import quantization_config_for
from ascendit.report import group_by
from ascendit.weights.applied_recipe import check_kind
from ascendit.weights.engine_formats import model_kind

log = logging.getLogger("ascendit")
MIN_SIZE = 32
"""Smaller matrices gain nothing."""
MULTIPLE = 16
"""Of N, and of K in int8 and fp8: what the matmuls of accelerators take."""
MODULATION = "makes modulation, one row for a sample"
_MODULATION = re.compile(r"norm|mod($|\.)|modulation|adaln|embed|time_|temb|router", re.IGNORECASE)
NAMED_MODULES = "correct the pattern; `*` crosses dots, and the names are those of `module.named_modules()`"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)


# ---- what a recipe makes of each layer: shapes and names only -----------------------------------


@dataclass(frozen=True)
class ModuleSchemes(LayerSchemes):
    """Every linear layer of a module, in its order."""

    layers: tuple[LayerScheme, ...]
    round_to: str
    """`bf16`: everything is rounded first; "": as it is."""
    attention: Mapping[str, str]
    """Attention -> the quantization that the recipe asks for, and that a model of Diffusers does not run."""
    kind: Literal["t2v", "i2v", "ti2v"] | None
    """Of a Wan transformer."""

    @property
    def kept(self) -> dict[str, tuple[str, ...]]:
        """Why -> layers that stay as they are, in few words: `*` for the number of a block."""
        names = [layer.name for layer in self.layers]
        kept = group_by(
            (layer for layer in self.layers if layer.scheme == "bf16"), lambda layer: layer.reason
        )
        return {why: _in_few_words([layer.name for layer in x], names) for why, x in kept.items()}


def as_recipe(recipe_or_scheme: str | Path | Recipe) -> Recipe:
    """A recipe by itself, by name or TOML file, or the default one with a scheme. Errors as `load_recipe`."""
    if isinstance(recipe_or_scheme, Recipe):
        return recipe_or_scheme
    name = str(recipe_or_scheme)
    return load_recipe("default", name) if name in SCHEMES else load_recipe(name)


def module_schemes(
    module: nn.Module, recipe: Recipe, keep: Sequence[str] = (), *, force: bool = False
) -> ModuleSchemes:
    """What `recipe` makes of `module`. `keep`: patterns of layers that stay as they are.

    UsageError: E-QNT-01 if it is quantized already or nothing is left to quantize, E-USE-05 for a pattern
    that matches no layer, E-QNT-02 for FP4 on TI2V-5B without `force`.
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
    inside = block_linears(config) if config else tuple(n for n in blocks if not _MODULATION.search(n))
    whys = dict.fromkeys(every, OUTSIDE) | dict.fromkeys(blocks, MODULATION)
    whys |= dict.fromkeys(inside, "no rule names it")
    layers = {name: LayerScheme(name, "bf16", None, whys[name]) for name in every}
    layers |= recipe.ruled(inside, every, kind, keep, fix=NAMED_MODULES)
    for name, layer in layers.items():
        if why := _unfit(linears[name], layer.scheme, sizes=config is None):
            layers[name] = LayerScheme(name, "bf16", None, why)
    asked = recipe.attention_schemes(config, model_kind=kind) if config and kind else ()
    attention = {a.name: a.quant_type for a in asked if a.quant_type}
    chosen = ModuleSchemes(tuple(layers.values()), recipe.round_to, attention, kind)
    if not chosen.quantized:
        kept = "; ".join(f"{why}: {', '.join(words[:3])}" for why, words in chosen.kept.items())
        raise _refused(module, f"no layer is left ({kept})", "take another recipe")
    if kind:
        check_kind(kind, chosen.schemes, type(module).__name__, force=force, way="force=True")
    warn_about_attention(type(module).__name__, attention.values())
    return chosen


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name, in the order of the module."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear) and name}


def wan_config_of(module: nn.Module) -> dict[str, Any] | None:
    """The config of a Wan transformer of Diffusers; None for other modules."""
    return dict(module.config) if type(module).__name__ == TRANSFORMER else None  # type: ignore[arg-type]


def _in_blocks(module: nn.Module, linears: Mapping[str, nn.Linear]) -> tuple[str, ...]:
    """Those in the module's own lists of blocks; else in any outermost list; else all."""
    # A list of modules with linear layers inside, such as blocks are, and `to_out` and `ff.net` are not.
    parts = [(name, m) for name, m in module.named_modules() if name and isinstance(m, nn.ModuleList)]
    lists = [name for name, m in parts if len(m) and all(linears_of(child) for child in m)]
    own = [name for name in lists if "." not in name]
    outer = own or [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        return tuple(linears)
    return tuple(name for name in linears if any(name.startswith(f"{block}.") for block in outer))


def _unfit(m: nn.Linear, scheme: str, *, sizes: bool) -> str:
    """Why this layer cannot be in `scheme`, or "". `sizes`: small and odd ones are left out too."""
    if scheme == "bf16" or (type(m) is nn.Linear and not sizes):
        return ""
    if type(m) is not nn.Linear:
        return f"a {type(m).__name__}, which does more than multiply"
    n, k, step = m.out_features, m.in_features, SCHEMES[scheme].block or MULTIPLE
    if min(n, k) < MIN_SIZE:
        return f"smaller than {MIN_SIZE}"
    if k % step:
        return f"K is no multiple of {step}"
    return f"N is no multiple of {MULTIPLE}" if n % MULTIPLE else ""


def _in_few_words(chosen: Sequence[str], among: Sequence[str]) -> tuple[str, ...]:
    words = {name: _NUMBER.sub("*", name, count=1) for name in among}
    short = dict.fromkeys(words[name] for name in chosen)
    if sum(word in short for word in words.values()) == len(chosen):
        return grouped(short, dict.fromkeys(words.values()))
    return grouped(chosen, among)


def _refused(module: nn.Module, problem: str, fix: str) -> UsageError:
    return UsageError(
        f"{type(module).__name__}: {problem}",
        needs=f"linear layers in floating point, of {MIN_SIZE} x {MIN_SIZE} at least",
        fix=fix,
        code="E-QNT-01",
    )


# ---- in place -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModuleReport(QuantizedExpert):
    """What `quantize_` did. `kept` says why a layer was left as it is."""

    layers: Mapping[str, str]
    """Every linear layer -> scheme."""

    def lines(self) -> list[str]:
        """For a terminal."""
        mib = [f"{n / 2**20:.1f} MiB" for n in (self.bytes_before, self.bytes_after)]
        kept = [f"  kept  {', '.join(words)}  ({why})" for why, words in self.kept.items()]
        return [f"{self.name}: {self.counts()}   {mib[0]} -> {mib[1]}", *kept]


def quantize_(
    module: nn.Module,
    recipe_or_scheme: str | Path | Recipe,
    *,
    keep: Sequence[str] = (),
    device: str | None = None,
    emulate: Emulate | bool | None = None,
    activation_rule: str | None = None,
    force: bool = False,
) -> ModuleReport:
    """Quantize linear layers of `module` in place, and say which.

    `recipe_or_scheme`: one of `quant.schemes.QUANTIZED`; or a recipe, by name or TOML file. `keep`:
    patterns of layers that stay as they are. `device`: where it is to run ("cuda", "npu", "twin:a5"); None:
    where it lies. `emulate`: as in `load`, for schemes that the device has no matmul for. `activation_rule`:
    scale rules of the tokens. `force`: quantize where accuracy is known to suffer.

    Nothing is changed before all is checked. Raises UsageError: E-USE-01, E-USE-02 as `load_recipe`, E-USE-05
    for patterns that match nothing, E-QNT-01 for a module that cannot be quantized, E-QNT-02 for FP4 on
    TI2V-5B; EnvironmentProblem E-CAP-01 for a scheme that the device has no matmul for.
    """
    chosen = module_schemes(module, as_recipe(recipe_or_scheme), keep, force=force)
    linears = linears_of(module)
    places = group_by(module.named_modules(remove_duplicate=False), lambda named: id(named[1]))
    for layer in chosen.quantized:
        check_weight(chosen, layer, linears[layer].weight)
    where = device or str(linears[next(iter(chosen.quantized))].weight.device)
    schemes = bind(where, emulate=emulate, activation_rule=activation_rule).quantized
    schemes.check(chosen.schemes)
    before, num_weights = nbytes(module), sum(p.numel() for p in module.parameters())
    if chosen.round_to:
        for parameter in module.parameters():
            parameter.data = rounded(parameter.data)
    for layer in chosen.quantized:
        linear = linears.pop(layer)
        compute_dtype = linear.weight.dtype
        bias = None if linear.bias is None else linear.bias.detach()
        encoded = encode_weight(chosen, layer, linear.weight)
        linear.weight = None  # type: ignore[assignment]
        made = QuantLinear.from_encoded(encoded, bias, schemes=schemes, compute_dtype=compute_dtype)
        for name, hooks in vars(linear).items():  # they go on seeing what the layer reads and gives
            if name.startswith("_forward"):
                getattr(made, name).update(hooks)
        for name, _ in places[id(linear)]:  # a layer may have two names
            module.set_submodule(name, made.train(linear.training))
    if device:
        module.to(schemes.device.torch_name)
    layers = {s.name: s.scheme for s in chosen.layers}
    if register := getattr(module, "register_to_config", None):  # Diffusers: casts refused, saves complete
        register(quantization_config=marker_of(layers, wan=chosen.kind is not None))
        module.is_quantized = True  # type: ignore[assignment]
    report = ModuleReport(
        name=type(module).__name__,
        schemes=chosen.schemes,
        kept=chosen.kept,
        bytes_before=before,
        bytes_after=nbytes(module),
        num_weights=num_weights,
        layers=layers,
    )
    log.info("%s", report.lines()[0])
    return report


def bind_(
    module: nn.Module,
    *,
    device: str | None = None,
    emulate: Emulate | bool | None = None,
    activation_rule: str | None = None,
) -> None:
    """Let the quantized layers of `module` compute in another way: for a model that a library has loaded.

    `device`: "twin:a5" and the like; None: the one each layer is on. The rest as in `quantize_`.
    """
    groups = {id(m.group): m.group for m in module.modules() if isinstance(m, QuantLinear)}
    names = dict.fromkeys(device or str(group.schemes.device) for group in groups.values())
    bound = {name: bind(name, emulate=emulate, activation_rule=activation_rule).quantized for name in names}
    if device and groups:
        module.to(bound[device].device.torch_name)
    for group in groups.values():
        group.fuse(bound[device or str(group.schemes.device)])


# ---- one layer, for the integrations too --------------------------------------------------------


def check_weight(chosen: ModuleSchemes, layer: str, weight: Tensor) -> None:
    """UsageError E-QNT-01 for a weight that has no codes: no float, not there, or not finite.

    E-USE-01 for a dtype that the scale rule does not take.
    """
    problem = ""
    if weight.is_meta:
        problem = "is on the meta device: it is not loaded, or it is offloaded"
    elif weight.dtype not in INPUT_DTYPES:
        problem = f"is {str(weight.dtype)[6:]}"
    elif not bool(torch.isfinite(torch.stack(weight.detach().aminmax())).all()):
        problem = "holds NaN or infinity"
    if problem:
        raise UsageError(
            f"{layer}.weight {problem}",
            needs="finite weights in BF16, float16 or float32, in memory",
            fix=f"quantize before offloading or casting, from whole weights; or keep={layer}",
            code="E-QNT-01",
        )
    form, rule = _form(chosen, layer)
    check_dtype(torch.bfloat16 if chosen.round_to else weight.dtype, form, resolve_rule(form, rule))


def encode_weight(chosen: ModuleSchemes, layer: str, weight: Tensor) -> Encoded:
    """The codes of a weight [N, K], as `quantize` writes them."""
    form, rule = _form(chosen, layer)
    source = weight.detach().to(torch.bfloat16) if chosen.round_to else weight.detach()
    return encode(source, form.name, scale_rule=rule)


def _form(chosen: ModuleSchemes, layer: str) -> tuple[Format, str | None]:
    rule = chosen.quantized[layer]
    return lookup(SCHEMES[rule.scheme].weight), rule.scale_rule


def rounded(t: Tensor) -> Tensor:
    """What bfloat16 can hold of a float, in its own dtype; other tensors as they are."""
    return t.to(torch.bfloat16).to(t.dtype) if t.is_floating_point() else t


def marker_of(layers: Mapping[str, str], *, smoothed: Sequence[str] = (), wan: bool) -> dict[str, Any]:
    """`quantization_config` for Diffusers' config.json. `layers`: every linear layer -> scheme."""
    inside = {name: s for name, s in layers.items() if s in QUANTIZED or is_block_linear(name)}
    return (quantization_config_for(inside, smoothed) if wan else None) or {"quant_method": METHOD}
