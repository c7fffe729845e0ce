"""Quantize the linear layers of any module in place: a Diffusers transformer or your own.

    report = ascendit.quantize_(pipe.transformer, "mxfp8")
    print(*report.lines(), sep="\\n")

Layers are quantized one at a time and each float weight is freed afterwards, so memory holds the module and
one layer. In a Diffusers Wan transformer the same layers are quantized as by `ascendit.quantize`. In any
other module these are the linear layers of its repeated blocks, except modulation layers and layers that no
quantized matmul supports: too small, or K not a multiple of the block size.
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

from ascendit.arguments import checked_call
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
from ascendit.quant.attention_schemes import QUANT_TYPES, warn_about_bf16
from ascendit.quant.layer_rules import OUTSIDE, LayerScheme, LayerSchemes
from ascendit.quant.recipe import Recipe, load_recipe
from ascendit.quant.schemes import METHOD, QUANTIZED, SCHEMES
from ascendit.quant.vllm_omni_config import quantization_config_for
from ascendit.report import group_by
from ascendit.weights.applied_recipe import check_kind
from ascendit.weights.engine_formats import model_kind

log = logging.getLogger("ascendit")
MIN_SIZE = 32
"""Smaller matrices gain nothing from quantization."""
MULTIPLE = 16
"""Matmuls of accelerators need N, and K in int8 and fp8, to be a multiple of this."""
MODULATION = "modulation layer, one row per sample"
_MODULATION = re.compile(r"norm|mod($|\.)|modulation|adaln|embed|time_|temb|router", re.IGNORECASE)
NAMED_MODULES = "correct the pattern; `*` crosses dots, and the names are those of `module.named_modules()`"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)", re.ASCII)


# ---- resolving a recipe by shapes and names -----------------------------------------------------


@dataclass(frozen=True)
class ModuleSchemes(LayerSchemes):
    """The scheme of every linear layer of a module, in module order."""

    layers: tuple[LayerScheme, ...]
    round_to: str
    """`bf16`: round all tensors to bfloat16 first; "": do not."""
    attention: Mapping[str, str]
    """Attention -> its scheme in the recipe, which Diffusers models do not run."""
    kind: Literal["t2v", "i2v", "ti2v"] | None
    """The kind of a Wan transformer, None for other modules."""

    @property
    def kept(self) -> dict[str, tuple[str, ...]]:
        """Reason -> layers that are not quantized, abbreviated: `*` for the number of a block."""
        names = [layer.name for layer in self.layers]
        kept = group_by(
            (layer for layer in self.layers if layer.scheme == "bf16"), lambda layer: layer.reason
        )
        return {reason: _abbreviated([layer.name for layer in x], names) for reason, x in kept.items()}


def as_recipe(recipe_or_scheme: str | Path | Recipe) -> Recipe:
    """Return a `Recipe` unchanged; load one from a name, TOML file or scheme.

    Raises the errors of `load_recipe`.
    """
    if isinstance(recipe_or_scheme, Recipe):
        return recipe_or_scheme
    name = str(recipe_or_scheme)
    return load_recipe("default", name) if name in SCHEMES else load_recipe(name)


def module_schemes(
    module: nn.Module, recipe: Recipe, keep: Sequence[str] = (), *, force: bool = False
) -> ModuleSchemes:
    """Apply `recipe` to the names and shapes of `module`. `keep`: patterns of layers to exclude.

    Raises UsageError: E-QNT-01 if the module is already quantized or no layer can be, E-USE-05 for a pattern
    that matches no layer, E-QNT-02 for FP4 on TI2V-5B without `force`.
    """
    linears = linears_of(module)
    if not linears:
        raise _refused(module, "contains no linear layer", "pass the module that contains it")
    if done := [name for name, m in linears.items() if isinstance(m, QuantLinear)]:
        problem = f"{len(done)} of its layers are already quantized, such as {done[0]}"
        raise _refused(module, problem, "load the float model again")
    config = wan_config_of(module)
    kind = None if config is None else model_kind(config)
    names = tuple(linears) if config is None else all_linears(config)
    if lost := [name for name in names if name not in linears]:
        raise _refused(module, f"{lost[0]} is not a linear layer", "fuse and unload LoRA files first")
    blocks = () if config else _in_blocks(module, linears)
    inside = block_linears(config) if config else tuple(n for n in blocks if not _MODULATION.search(n))
    reasons = dict.fromkeys(names, OUTSIDE) | dict.fromkeys(blocks, MODULATION)
    reasons |= dict.fromkeys(inside, "no rule names it")
    layers = {name: LayerScheme(name, "bf16", None, reasons[name]) for name in names}
    layers |= recipe.ruled(inside, names, kind, keep, fix=NAMED_MODULES)
    for name, layer in layers.items():
        if problem := _unsupported(linears[name], layer.scheme, sizes=config is None):
            layers[name] = LayerScheme(name, "bf16", None, problem)
    requested = recipe.attention_schemes(config, model_kind=kind) if config and kind else ()
    attention = {a.name: QUANT_TYPES[a.quant_type] for a in requested if a.quant_type}
    chosen = ModuleSchemes(tuple(layers.values()), recipe.round_to, attention, kind)
    if not chosen.quantized:
        excluded = "; ".join(f"{reason}: {', '.join(x[:3])}" for reason, x in chosen.kept.items())
        raise _refused(module, f"no layer is left to quantize ({excluded})", "use another recipe")
    if kind:
        check_kind(kind, chosen.schemes, type(module).__name__, force=force, way="force=True")
    warn_about_bf16(type(module).__name__, attention.values())
    return chosen


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name, in the order of the module."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear) and name}


def wan_config_of(module: nn.Module) -> dict[str, Any] | None:
    """The config of a Diffusers Wan transformer; None for other modules."""
    return dict(module.config) if type(module).__name__ == TRANSFORMER else None  # type: ignore[arg-type]


def _in_blocks(module: nn.Module, linears: Mapping[str, nn.Linear]) -> tuple[str, ...]:
    """Linears in the module's own block lists; else those in any outermost block list; else all."""
    # A block list is one whose modules all contain linear layers; `to_out` and `ff.net` are not.
    module_lists = [(name, m) for name, m in module.named_modules() if name and isinstance(m, nn.ModuleList)]
    lists = [name for name, m in module_lists if len(m) and all(linears_of(child) for child in m)]
    own = [name for name in lists if "." not in name]
    outer = own or [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        return tuple(linears)
    return tuple(name for name in linears if any(name.startswith(f"{block}.") for block in outer))


def _unsupported(m: nn.Linear, scheme: str, *, sizes: bool) -> str:
    """Why a layer cannot use `scheme`, or "". `sizes`: check the size too."""
    if scheme == "bf16" or (type(m) is nn.Linear and not sizes):
        return ""
    if type(m) is not nn.Linear:
        return f"a {type(m).__name__}, which does more than multiply"
    n, k, step = m.out_features, m.in_features, SCHEMES[scheme].block or MULTIPLE
    if min(n, k) < MIN_SIZE:
        return f"smaller than {MIN_SIZE}"
    if k % step:
        return f"K is not a multiple of {step}"
    return f"N is not a multiple of {MULTIPLE}" if n % MULTIPLE else ""


def _abbreviated(chosen: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    patterns = {name: _NUMBER.sub("*", name, count=1) for name in names}
    short = dict.fromkeys(patterns[name] for name in chosen)
    if sum(pattern in short for pattern in patterns.values()) == len(chosen):
        return grouped(short, dict.fromkeys(patterns.values()))
    return grouped(chosen, names)


def _refused(module: nn.Module, problem: str, fix: str) -> UsageError:
    return UsageError(
        f"{type(module).__name__}: {problem}",
        needs=f"floating-point linear layers of at least {MIN_SIZE} x {MIN_SIZE}",
        fix=fix,
        code="E-QNT-01",
    )


# ---- in place -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModuleReport(QuantizedExpert):
    """The result of `quantize_`. `kept`: reason -> layers that were not quantized."""

    layers: Mapping[str, str]
    """Every linear layer -> scheme."""

    def lines(self) -> list[str]:
        """The report as lines of text."""
        mib = [f"{n / 2**20:.1f} MiB" for n in (self.bytes_before, self.bytes_after)]
        excluded = [f"  excluded  {', '.join(names)}  ({reason})" for reason, names in self.kept.items()]
        return [f"{self.name}: {self.counts()}   {mib[0]} -> {mib[1]}", *excluded]


@checked_call
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
    """Quantize linear layers of `module` in place; return a report.

    `recipe_or_scheme`: one of `quant.schemes.QUANTIZED`; or a recipe, by name or TOML file. `keep`:
    patterns of layers to exclude. `device`: the device to run on ("cuda", "npu", "twin:a5"); None: the
    current one. `emulate`: as in `load`, for schemes without a matmul on the device. `activation_rule`: scale
    rules of activations. `force`: quantize even if accuracy is known to suffer.

    The module is unchanged if a check fails. Raises UsageError: E-USE-01 and E-USE-02 as `load_recipe`,
    E-USE-05 for patterns that match nothing, E-QNT-01 for a module that cannot be quantized, E-QNT-02 for FP4
    on TI2V-5B; EnvironmentProblem (E-CAP-01) for a scheme without a matmul on the device.
    """
    chosen = module_schemes(module, as_recipe(recipe_or_scheme), keep, force=force)
    linears = linears_of(module)
    aliases = group_by(module.named_modules(remove_duplicate=False), lambda named: id(named[1]))
    for layer in chosen.quantized:
        check_weight(chosen, layer, linears[layer].weight)
    target = device or str(linears[next(iter(chosen.quantized))].weight.device)
    schemes = bind(target, emulate=emulate, activation_rule=activation_rule).quantized
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
        quantized = QuantLinear.from_encoded(encoded, bias, schemes=schemes, compute_dtype=compute_dtype)
        for name, hooks in vars(linear).items():  # forward hooks move to the quantized layer
            if name.startswith("_forward"):
                getattr(quantized, name).update(hooks)
        for name, _ in aliases[id(linear)]:  # a layer may have two names
            module.set_submodule(name, quantized.train(linear.training))
    if device:
        module.to(schemes.device.torch_name)
    layers = {s.name: s.scheme for s in chosen.layers}
    if register := getattr(module, "register_to_config", None):  # Diffusers then refuses casts and saves all
        register(quantization_config=quantization_config_of(layers, wan=chosen.kind is not None))
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
    """Change how the quantized layers of `module` compute, for a model loaded by another library.

    `device`: a name such as "twin:a5"; None: the current device of each layer. Other arguments and errors are
    those of `quantize_`.
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
    """Raise UsageError (E-QNT-01) unless a weight [N, K] is loaded, finite and of a float dtype.

    E-USE-01 if the scale rule does not support the dtype.
    """
    problem = ""
    if weight.is_meta:
        problem = "is on the meta device: not loaded, or offloaded"
    elif weight.dtype not in INPUT_DTYPES:
        problem = f"is {str(weight.dtype)[6:]}"
    elif not bool(torch.isfinite(torch.stack(weight.detach().aminmax())).all()):
        problem = "holds NaN or infinity"
    if problem:
        raise UsageError(
            f"{layer}.weight {problem}",
            needs="finite weights in BF16, float16 or float32, in memory",
            fix=f"quantize before offloading or casting, and from finite weights; or pass keep={layer}",
            code="E-QNT-01",
        )
    fmt, rule = _format_and_rule(chosen, layer)
    check_dtype(torch.bfloat16 if chosen.round_to else weight.dtype, fmt, resolve_rule(fmt, rule))


def encode_weight(chosen: ModuleSchemes, layer: str, weight: Tensor) -> Encoded:
    """Quantize a weight [N, K], bfloat16, float16 or float32, exactly as `ascendit.quantize` does."""
    fmt, rule = _format_and_rule(chosen, layer)
    source = weight.detach().to(torch.bfloat16) if chosen.round_to else weight.detach()
    return encode(source, fmt.name, scale_rule=rule)


def _format_and_rule(chosen: ModuleSchemes, layer: str) -> tuple[Format, str | None]:
    rule = chosen.quantized[layer]
    return lookup(SCHEMES[rule.scheme].weight), rule.scale_rule


def rounded(t: Tensor) -> Tensor:
    """A float tensor [..] rounded to bfloat16 values in its own dtype; other tensors unchanged."""
    return t.to(torch.bfloat16).to(t.dtype) if t.is_floating_point() else t


def quantization_config_of(
    layers: Mapping[str, str], *, smoothed: Sequence[str] = (), wan: bool
) -> dict[str, Any]:
    """`quantization_config` for Diffusers' config.json. `layers`: every linear layer -> scheme."""
    inside = {name: s for name, s in layers.items() if s in QUANTIZED or is_block_linear(name)}
    return (quantization_config_for(inside, smoothed) if wan else None) or {"quant_method": METHOD}
