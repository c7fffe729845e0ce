"""A recipe applied to one expert: schemes of its layers, tensors that are written. Headers only, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ascendit.checkpoint.layer_format import FLOAT_DTYPES
from ascendit.checkpoint.quant_metadata import QUANT_TYPE
from ascendit.checkpoint.reader import TensorInfo
from ascendit.checkpoint.transformer import Expert
from ascendit.checkpoint.writer import TensorSpec
from ascendit.errors import UsageError
from ascendit.family import Task, WanConfig
from ascendit.names import grouped, is_block_linear, sort_names
from ascendit.quant.fusion import fused_with
from ascendit.quant.layer_rules import AttentionScheme, LayerScheme, LayerSchemes
from ascendit.quant.recipe import Recipe
from ascendit.quant.schemes import FP4, FP8_TILES, SCHEMES
from ascendit.quant.vllm_omni_config import marker_for
from ascendit.weights.engine_formats import Dialect, Traits, traits_of

ROTATIONS = ("q_rot", "k_rot")


@dataclass(frozen=True)
class AppliedRecipe(LayerSchemes):
    """One expert and its output. Names are Diffusers' unless something else is said."""

    expert: Expert
    layers: tuple[LayerScheme, ...]
    """Every linear layer, in the order of the model."""
    attention: tuple[AttentionScheme, ...]
    specs: tuple[TensorSpec, ...]
    """Every tensor that is written, in the order in which it is."""
    dialect: Dialect
    round_to: str
    """`BF16`, or "": as the source has it."""
    smoothing: Mapping[str, Any] = field(default_factory=dict)
    """Layer -> mul_scale, float32 [K]."""

    def weight(self, layer: str) -> TensorInfo:
        """Where the weight [N, K] of a layer is stored in the source."""
        return self.expert.tensors[f"{layer}.weight"]

    def dtype(self, info: TensorInfo) -> str:
        """The dtype in which a weight is encoded: BF16 from tiles, and where the recipe rounds."""
        return self.round_to or (info.dtype if info.dtype in FLOAT_DTYPES else "BF16")

    def on_disk(self, name: str) -> str:
        """The name of a tensor in the file."""
        return self.dialect.on_disk(name, self._smoothed)

    @property
    def disk_specs(self) -> list[TensorSpec]:
        """`specs` with the names in the file."""
        smoothed = self._smoothed
        return [replace(spec, name=self.dialect.on_disk(spec.name, smoothed)) for spec in self.specs]

    @property
    def _smoothed(self) -> set[str]:
        return {s.name.removesuffix(".mul_scale") for s in self.specs if s.name.endswith(".mul_scale")}

    @property
    def manifest(self) -> dict[str, str]:
        """`quant_model_description.json`, names as in the file."""
        layers = {layer.name: layer.scheme for layer in self.layers}
        entries = {f"{a.name}{QUANT_TYPE}": a.quant_type for a in self.attention if a.quant_type}
        names = [spec.name for spec in self.specs]
        return self.dialect.manifest(layers, names, self.expert.attention | entries, {})

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`, marked as quantized where the marker can say how."""
        marker = marker_for(self._inside, tuple(self.smoothing))
        return self.dialect.config(self.expert.config, marker)

    @property
    def traits(self) -> Traits:
        """What matters to an engine."""
        shapes = {name: (s[0], s[1]) for name in self.coded for s in [self.weight(name).shape]}
        return traits_of(self._inside, shapes, tuple(self.smoothing), unlike_qkv=self._unlike_qkv())

    @property
    def _inside(self) -> dict[str, str]:
        """Linears of the blocks, and others that are quantized or smoothed -> scheme."""
        return {
            layer.name: layer.scheme
            for layer in self.layers
            if is_block_linear(layer.name) or layer.scheme != "bf16" or layer.name in self.smoothing
        }

    def _unlike_qkv(self) -> bool:
        for name, scale in self.smoothing.items():
            first, *others = fused_with(name)
            scales = [self.smoothing.get(other) for other in others]
            if name == first and any(x is None or not bool((x == scale).all()) for x in scales):
                return True
        return False

    @property
    def num_weights(self) -> int:
        """Parameters of the source."""
        infos = self.expert.tensors.items()
        return sum(math.prod(info.shape) for name, info in infos if not _is_inverse(name))

    @property
    def bytes_before(self) -> int:
        """Of the tensors of the source."""
        return sum(info.nbytes for info in self.expert.tensors.values())

    @property
    def bytes_after(self) -> int:
        """Of the tensors that are written."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def kept(self) -> dict[str, tuple[str, ...]]:
        """Why -> layers that stay as they are, grouped."""
        names = [layer.name for layer in self.layers]
        kept = [layer for layer in self.layers if layer.scheme == "bf16"]
        reasons = dict.fromkeys(layer.why for layer in kept)
        return {why: grouped((x.name for x in kept if x.why == why), names) for why in reasons}


def apply_recipe(
    expert: Expert,
    recipe: Recipe,
    kind: Task,
    *,
    keep: Sequence[str] = (),
    smoothing: Mapping[str, Any] | None = None,
    dialect: Dialect | None = None,
) -> AppliedRecipe:
    """What `recipe` makes of `expert`. `smoothing`: layer -> mul_scale.

    UsageError: E-QNT-01 for a source that is quantized already, one whose heads are unknown where rotations
    are asked for, a layer that its scale rule cannot take; E-USE-05 for patterns and smoothing that fit no
    layer.
    """
    check_source(expert)
    dialect = dialect or Dialect()
    layers = recipe.layer_schemes(expert.config, model_kind=kind, keep=keep)
    attention = recipe.attention_schemes(expert.config, model_kind=kind)
    smoothing = dict(smoothing or {})
    _check_smoothing(expert, smoothing, {layer.name for layer in layers})
    round_to = recipe.round_to.upper()
    specs = _specs(expert, layers, smoothing, round_to, dialect)
    specs |= {spec.name: spec for spec in _rotations(expert, attention)}
    written = tuple(specs[name] for name in sort_names(specs))
    applied = AppliedRecipe(expert, layers, attention, written, dialect, round_to, smoothing)
    for layer in applied.coded.values():
        _check_layer(applied, layer)
    return applied


def check_source(expert: Expert) -> None:
    """UsageError E-QNT-01 unless the weights are floats, or FP8 in tiles, which is read as BF16."""
    found = {layer.scheme for layer in expert.layers.values()} - {FP8_TILES}
    if not found:
        return
    schemes = ", ".join(sorted(found - {"bf16"})) or "smoothed weights"
    raise UsageError(
        f"{expert.path} is quantized already ({schemes}, {expert.origin})",
        needs="weights in BF16, float16 or float32: codes of codes lose twice",
        fix="give the BF16 original; `ascendit repack` takes this one as it is into another layout",
        code="E-QNT-01",
    )


def check_kind(
    kind: str | None, schemes: Iterable[str], name: str, *, force: bool, way: str = "--force"
) -> None:
    """UsageError E-QNT-02 for W4A4 on a TI2V-5B model. `way`: how to ask for it all the same."""
    if kind == "ti2v" and (found := sorted(set(schemes) & set(FP4))) and not force:
        raise UsageError(
            f"{name} is a TI2V-5B model, and {', '.join(found)} is W4A4",
            needs=f"{way}: vLLM-Omni's documentation reports a visible loss of accuracy for this pair",
            fix=f"--scheme mxfp8, or {way} to do it all the same",
            code="E-QNT-02",
        )


def warnings_for(experts: Iterable[AppliedRecipe], recipe: Recipe, kind: Task) -> list[str]:
    """What a user should know before using the result: shapes, kinds, gaps."""
    found: dict[str, None] = {}
    if recipe.kinds and kind not in recipe.kinds:
        published = ", ".join(recipe.kinds)
        found[f"{recipe.name} is published for {published}; its rules were taken for this {kind} model"] = (
            None
        )
    for applied in experts:
        if applied.expert.config_problem:
            found[applied.expert.config_problem] = None
        for text, names in _shape_trouble(applied).items():
            found[f"{text}: {', '.join(grouped(names, (layer.name for layer in applied.layers)))}"] = None
    return list(found)


# ---- the tensors that are written, and checks ---------------------------------------------------


def _specs(
    expert: Expert,
    layers: Sequence[LayerScheme],
    smoothing: Mapping[str, Any],
    round_to: str,
    dialect: Dialect,
) -> dict[str, TensorSpec]:
    coded = {layer.name: layer for layer in layers if layer.scheme != "bf16"}
    specs: dict[str, TensorSpec] = {}
    for name, info in expert.tensors.items():
        layer, _, role = name.rpartition(".")
        if layer in coded or _is_inverse(name):
            continue
        tiled = layer in expert.layers and role == "weight"
        dtype = (round_to or info.dtype) if info.dtype in FLOAT_DTYPES else "BF16" if tiled else info.dtype
        specs[name] = TensorSpec(name, dtype, info.shape)
    for name, layer_scheme in coded.items():
        n, k = expert.tensors[f"{name}.weight"].shape
        bias, smooth = f"{name}.bias" in expert.tensors, name in smoothing
        found = dialect.layer_specs(name, layer_scheme.scheme, (n, k), bias=bias, mul_scale=smooth)
        specs |= {spec.name: spec for spec in found}
    for name, scale in smoothing.items():
        specs.setdefault(f"{name}.mul_scale", TensorSpec(f"{name}.mul_scale", "F32", tuple(scale.shape)))
    return specs


def _rotations(expert: Expert, attention: Sequence[AttentionScheme]) -> list[TensorSpec]:
    rotated = [a.name for a in attention if a.rotate]
    size = expert.config.get("attention_head_dim", WanConfig.attention_head_dim)
    if rotated and (expert.config_problem or size & (size - 1)):
        raise UsageError(
            f"rotated attention in {expert.path}: "
            + (expert.config_problem or f"heads of {size} values, not a power of two"),
            needs="a config.json that tells the heads; a Hadamard matrix has 2^n rows",
            fix="put the model's config.json beside the weights, or take a recipe without rotation",
            code="E-QNT-01",
        )
    return [TensorSpec(f"{name}.{rot}", "BF16", (size, size)) for name in rotated for rot in ROTATIONS]


def _check_layer(applied: AppliedRecipe, layer: LayerScheme) -> None:
    dtype = applied.dtype(applied.weight(layer.name))
    if dtype == "F64":
        raise UsageError(
            f"{layer.name} is float64",
            needs="weights in BF16, float16 or float32",
            fix='add round_to = "bf16" to the recipe',
            code="E-QNT-01",
        )
    if (layer.scale_rule or "").startswith("msms:") and dtype == "F16":
        raise UsageError(
            f"{layer.name} is float16, and scale rule {layer.scale_rule} is msModelSlim's",
            needs="BF16 or float32 weights: msModelSlim's arithmetic has no float16",
            fix='add round_to = "bf16" to the recipe, or leave the scale rule out',
            code="E-QNT-01",
        )


def _check_smoothing(expert: Expert, smoothing: Mapping[str, Any], layers: set[str]) -> None:
    for name, scale in smoothing.items():
        info = expert.tensors.get(f"{name}.weight")
        if name not in layers or info is None or tuple(scale.shape) != info.shape[1:]:
            raise UsageError(
                f"smoothing of {name!r} with a mul_scale of shape {tuple(scale.shape)}",
                needs="a linear layer of this model, and one factor for each of its input channels",
                fix="take the mul_scale of the same model",
                code="E-USE-05",
            )


def _shape_trouble(applied: AppliedRecipe) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, layer in applied.coded.items():
        k, scheme = applied.weight(name).shape[1], SCHEMES[layer.scheme]
        if scheme.packed and k % 2:
            found.setdefault("odd K, which the NPU's FP4 operators do not take", []).append(name)
        elif scheme.group and k % scheme.group:
            text = f"K is no multiple of {scheme.group}, so the last group is short"
            found.setdefault(f"{text}: no tensor parallelism over K", []).append(name)
        elif scheme.block and k % scheme.block:
            text = f"K is no multiple of {scheme.block}, so the last block is short"
            found.setdefault(f"{text}: other engines may refuse it", []).append(name)
    return found


def _is_inverse(name: str) -> bool:
    return name.endswith(".weight_scale_inv")
