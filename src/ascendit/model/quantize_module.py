"""Quantize the linear layers of any module in place: a transformer of Diffusers, or one of your own.

    report = ascendit.quantize_(pipe.transformer, "mxfp8")
    print(*report.lines(), sep="\\n")

Layer by layer; the float weight is given up as soon as there are codes, so there is never more in memory
than the module and one layer.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ascendit.convert.expert_plan import check_kind
from ascendit.convert.recipe import Recipe
from ascendit.convert.report import ExpertReport
from ascendit.errors import UsageError
from ascendit.kernels.kernel import Emulate
from ascendit.model.arrange import nbytes
from ascendit.model.linear import QuantLinear
from ascendit.model.module_plan import ModulePlan, as_recipe, linears_of, marker_of, plan_module
from ascendit.mx.codec import INPUT_DTYPES, check_dtype, encode
from ascendit.mx.encoded import Encoded
from ascendit.mx.formats import Format, lookup, resolve_rule
from ascendit.ops.bind import bind
from ascendit.ops.quant_linear import Schemes
from ascendit.quant.schemes import SCHEMES

log = logging.getLogger("ascendit")


@dataclass(frozen=True, kw_only=True)
class ModuleReport(ExpertReport):
    """What `quantize_` did. `kept` says why a layer was left as it is."""

    layers: Mapping[str, str]
    """Every linear layer -> scheme."""

    def lines(self) -> list[str]:
        """For a terminal."""
        used = ", ".join(f"{count} {scheme}" for scheme, count in self.schemes.items())
        mib = [f"{n / 2**20:.1f} MiB" for n in (self.bytes_before, self.bytes_after)]
        kept = [f"  kept  {', '.join(words)}  ({why})" for why, words in self.kept.items()]
        return [f"{self.name}: {used}   {mib[0]} -> {mib[1]}", *kept]


class DecodedWeight(Tensor):
    """A copy of a weight on codes, to look at. `data` is refused: what is written there would be lost.

    What is computed with one is a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """UsageError E-QNT-03. PEFT and Diffusers fuse through it."""
        raise UsageError(
            "weight.data of a layer on codes",
            needs="a weight in floating point, to fuse a LoRA or projections into it",
            fix="fuse first and quantize then; a LoRA that is not fused works beside the codes",
            code="E-QNT-03",
        )


class PlacedLinear(QuantLinear):
    """A quantized layer in a module of another library, whose offloading may move parameters alone."""

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] -> [.., N]. UsageError E-QNT-03 for tokens on another device than the codes."""
        if x.device != self.device:
            raise UsageError(
                f"tokens on {x.device} for a layer in {self.scheme} on {self.device}",
                needs="the module moved as a whole: its codes are no parameters, which is what hooks move",
                fix="pipe.enable_model_cpu_offload() in place of group or sequential offloading",
                code="E-QNT-03",
            )
        return super().forward(x)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Decoded [N, K] in `compute_dtype`; a new tensor each time, which cannot be written to the layer."""
        return super().weight.as_subclass(DecodedWeight)


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

    `recipe_or_scheme`: mxfp8, mxfp4, mxfp4_dualscale, int8, fp8; or a recipe, by name or TOML file. `keep`:
    patterns of layers that stay as they are. `device`: where it is to run ("cuda", "npu", "twin:a5"); None:
    where it lies. `emulate`: as in `load`, for schemes that the device has no matmul for. `activation_rule`:
    scale rules of the tokens. `force`: quantize where accuracy is known to suffer.

    Nothing is changed before all is checked. Raises UsageError: E-USE-01, E-USE-02 as `load_recipe`, E-USE-05
    for patterns that match nothing, E-QNT-01 for a module that cannot be quantized, E-QNT-02 for FP4 on
    TI2V-5B; EnvironmentProblem E-CAP-01 for a scheme that the device has no matmul for.
    """
    plan = plan_module(module, as_recipe(recipe_or_scheme), keep)
    if plan.kind:
        check_kind(plan.kind, plan.schemes, type(module).__name__, force=force, way="force=True")
    linears, names = linears_of(module), _names(module)
    for layer in plan.coded:
        check_weight(plan, layer, linears[layer].weight)
    where = device or str(linears[next(iter(plan.coded))].weight.device)
    schemes = bind(where, emulate=emulate, activation_rule=activation_rule).quantized
    schemes.check(plan.schemes)
    before, weights = nbytes(module), sum(p.numel() for p in module.parameters())
    if plan.round_to:
        for parameter in module.parameters():
            parameter.data = rounded(parameter.data)
    for layer in plan.coded:
        linear = linears.pop(layer)
        compute_dtype = linear.weight.dtype
        bias = None if linear.bias is None else linear.bias.detach()
        encoded = encode_weight(plan, layer, linear.weight)
        linear.weight = None  # type: ignore[assignment]
        made = PlacedLinear.from_encoded(encoded, bias, schemes=schemes, compute_dtype=compute_dtype)
        keep_hooks(linear, made)
        for name in names[id(linear)]:
            module.set_submodule(name, made.train(linear.training))
    if device:
        module.to(schemes.device.torch_name)
    mark(module, plan)
    layers = {p.layer: p.scheme for p in plan.layers}
    report = ModuleReport(
        name=type(module).__name__,
        schemes=plan.schemes,
        kept=plan.kept,
        bytes_before=before,
        bytes_after=nbytes(module),
        num_weights=weights,
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
    joints = {id(m.joint): m.joint for m in module.modules() if isinstance(m, QuantLinear)}
    found: dict[str, Schemes] = {}
    for joint in joints.values():
        where = device or str(joint.schemes.device)
        if where not in found:
            found[where] = bind(where, emulate=emulate, activation_rule=activation_rule).quantized
        encoded, bias = joint.schemes.stored(joint.weight), joint.weight.bias
        joint.schemes = found[where]
        joint.prepare(encoded, bias)
    if device and found:
        module.to(found[device].device.torch_name)


# ---- parts, for the integrations too ------------------------------------------------------------


def check_weight(plan: ModulePlan, layer: str, weight: Tensor) -> None:
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
    form, rule = _form(plan, layer)
    check_dtype(torch.bfloat16 if plan.round_to else weight.dtype, form, resolve_rule(form, rule))


def encode_weight(plan: ModulePlan, layer: str, weight: Tensor) -> Encoded:
    """The codes of a weight [N, K], as `quantize` writes them."""
    form, rule = _form(plan, layer)
    source = weight.detach().to(torch.bfloat16) if plan.round_to else weight.detach()
    return encode(source, form.name, scale_rule=rule)


def rounded(t: Tensor) -> Tensor:
    """What bfloat16 can hold of a float, in its own dtype; other tensors as they are."""
    return t.to(torch.bfloat16).to(t.dtype) if t.is_floating_point() else t


def _names(module: nn.Module) -> dict[int, list[str]]:
    """`id` of each part -> all its names: a layer may stand in two places."""
    found: dict[int, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        found.setdefault(id(part), []).append(name)
    return found


def _form(plan: ModulePlan, layer: str) -> tuple[Format, str | None]:
    chosen = plan.coded[layer]
    return lookup(SCHEMES[chosen.scheme].weight), chosen.scale_rule


def mark(module: nn.Module, plan: ModulePlan) -> None:
    """Tell Diffusers that a model of it is quantized, so that it refuses casts and saves what it needs."""
    say_attention_kept(module, plan)
    if register := getattr(module, "register_to_config", None):
        layers = {p.layer: p.scheme for p in plan.layers}
        register(quantization_config=marker_of(layers, wan=plan.kind is not None))
        module.is_quantized = True  # type: ignore[assignment]


def say_attention_kept(module: nn.Module, plan: ModulePlan) -> None:
    """Log what the recipe asks of attentions and is not done."""
    if found := Counter(plan.attention.values()):
        asked = ", ".join(f"{word} for {n}" for word, n in found.items())
        log.warning("%s: quantized attention (%s) runs in BF16 here", type(module).__name__, asked)


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """The forward hooks of `old` go on seeing what the layer reads and gives."""
    for name in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    ):
        getattr(new, name).update(getattr(old, name))
