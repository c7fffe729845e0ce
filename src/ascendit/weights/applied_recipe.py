"""A recipe applied to one expert: the scheme of each layer, and checks. Reads only headers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ascendit.checkpoint.component import EXPERTS, noise_of, read_json
from ascendit.checkpoint.kind_table import KINDS
from ascendit.checkpoint.layer_format import FLOAT_DTYPES
from ascendit.checkpoint.layout import RECORD_FILE
from ascendit.checkpoint.quant_metadata import QUANT_TYPE
from ascendit.checkpoint.stored_kinds import kinds_text
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.transformer import Expert, shapes_of
from ascendit.checkpoint.trust import Home
from ascendit.errors import CheckpointError, UsageError
from ascendit.family import Task, WanConfig
from ascendit.names import grouped, is_block_linear, on_disk
from ascendit.quant.attention_schemes import QUANT_TYPES
from ascendit.quant.layer_rules import AttentionScheme, LayerScheme, LayerSchemes
from ascendit.quant.recipe import Recipe
from ascendit.quant.schemes import FP4, FP8_TILES, SCHEMES
from ascendit.report import counted, group_by
from ascendit.weights.engine_formats import traits_of
from ascendit.weights.lora.fold import Folds, LoraSource

STORED_AS = "stored_as"
"""Key of the record."""
TILES = "F8_E4M3"
"""Dtype of FP8 weights in tiles, the only quantized weights that a source may have."""


@dataclass(frozen=True)
class AppliedRecipe(LayerSchemes):
    """One expert and the schemes of its layers, with Diffusers names."""

    expert: Expert
    layers: tuple[LayerScheme, ...]
    """Every linear layer, in the order of the model."""
    attention: tuple[AttentionScheme, ...]
    round_to: str
    """`BF16`, or "" for the dtype of the source."""
    smoothing: Mapping[str, Any] = field(default_factory=dict)
    """Layer -> mul_scale, float32 [K]."""
    folds: Folds | None = None
    """LoRA files, added to the weights first."""

    def weight(self, layer: str) -> TensorInfo:
        """The header entry of the weight [N, K] of a layer in the source."""
        return self.expert.tensors[f"{layer}.weight"]

    def dtype(self, info: TensorInfo) -> str:
        """The dtype of a float tensor after reading: BF16 for FP8 in tiles, or if the recipe rounds."""
        if info.dtype not in (*FLOAT_DTYPES, TILES):
            return info.dtype
        return self.round_to or ("BF16" if info.dtype == TILES else info.dtype)

    @property
    def traits(self) -> frozenset[str]:
        """Properties that engines check, see `traits_of`."""
        shapes = {name: self.weight(name).shape for name in self.quantized}
        smoothing = {name: scale.float().numpy().tobytes() for name, scale in self.smoothing.items()}
        return traits_of(self.layer_schemes, shapes, smoothing)

    @property
    def layer_schemes(self) -> dict[str, str]:
        """Linear layers of the blocks, and others that are quantized or smoothed -> scheme."""
        return {
            layer.name: layer.scheme
            for layer in self.layers
            if is_block_linear(layer.name) or layer.scheme != "bf16" or layer.name in self.smoothing
        }

    @property
    def attention_types(self) -> dict[str, str]:
        """`<attn>.quant_type` -> its value, of the source and of the recipe."""
        return self.expert.attention | {
            f"{a.name}{QUANT_TYPE}": a.quant_type for a in self.attention if a.quant_type
        }

    @property
    def bytes_before(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(info.nbytes for info in self.expert.tensors.values())

    @property
    def excluded(self) -> dict[str, tuple[str, ...]]:
        """Reason -> layers that are not quantized, grouped."""
        names = [layer.name for layer in self.layers]
        reasons = group_by((x for x in self.layers if x.scheme == "bf16"), lambda layer: layer.reason)
        return {reason: grouped((x.name for x in layers), names) for reason, layers in reasons.items()}

    @property
    def quantized_attention(self) -> dict[str, tuple[str, ...]]:
        """Scheme, or a manifest value without one -> the attention modules that it quantizes, grouped."""
        types = {
            key.removesuffix(QUANT_TYPE): QUANT_TYPES.get(x, x) for key, x in self.attention_types.items()
        }
        modules = (layer.name.partition(".to_")[0] for layer in self.layers if ".attn" in layer.name)
        among = dict.fromkeys([*modules, *types])
        return {scheme: grouped(names, among) for scheme, names in group_by(types, types.__getitem__).items()}


def apply_recipe(
    expert: Expert,
    recipe: Recipe,
    kind: Task,
    *,
    keep: Sequence[str] = (),
    smoothing: Mapping[str, Any] | None = None,
    folds: Folds | None = None,
) -> AppliedRecipe:
    """Apply `recipe` to `expert`. `smoothing`: layer -> mul_scale, float32 [K]. `folds`: see `open_folds`.

    Raises UsageError: E-QNT-01 for a source that is already quantized, rotations if the number of heads is
    unknown, or a layer that its scale rule does not support; E-USE-05 for patterns and smoothing that match
    no layer.
    """
    check_source(expert)
    layers = recipe.layer_schemes(expert.config, model_kind=kind, keep=keep)
    attention = recipe.attention_schemes(expert.config, model_kind=kind)
    smoothing = dict(smoothing or {})
    _check_smoothing(expert, smoothing, {layer.name for layer in layers})
    if any(a.rotate for a in attention):
        _check_rotation(expert)
    applied = AppliedRecipe(expert, layers, attention, recipe.round_to.upper(), smoothing, folds)
    for layer in applied.quantized.values():
        _check_layer(applied, layer)
    return applied


def open_folds(
    expert: Expert,
    loras: Sequence[LoraSource],
    *,
    experts: Collection[str] = EXPERTS,
    skip: Sequence[str] = (),
) -> Folds | None:
    """Match the LoRA files with the tensors of `expert`; None if there are no files.

    `experts`: all experts of the model. `skip`: groups of keys to leave out. Raises the errors of
    `Folds.open`.
    """
    if not loras:
        return None
    return Folds.open(loras, expert.name, shapes_of(expert), experts=experts, skip=skip)


def lora_warnings(loras: Sequence[LoraSource], folds: Iterable[Folds]) -> list[str]:
    """Warnings about files for one noise level by their name, which change both experts."""
    folds, texts = list(folds), []
    for i, source in enumerate(loras):
        changed = [own for fold in folds if (own := fold.applied[i]) and own.num_keys]
        if len(changed) > 1 and (noise := noise_of(source.path.stem)):
            texts.append(
                f"{source.path.name} is added to both experts; for the {noise}-noise one: --lora {noise}=FILE"
            )
    return texts


def stored_schemes(expert: Expert) -> set[str]:
    """The schemes of quantized weights, `bf16` for smoothed ones; without FP8 in tiles, a float format."""
    return {layer.scheme for layer in expert.layers.values()} - {FP8_TILES}


def check_source(expert: Expert) -> None:
    """Raise UsageError (E-QNT-01) unless the weights are floats, or FP8 in tiles, which is read as BF16."""
    if not (quantized := stored_schemes(expert)):
        return
    schemes = ", ".join(sorted(quantized - {"bf16"})) or "smoothed weights"
    method = (expert.quantization_config or {}).get("quant_method", expert.origin)
    raise UsageError(
        f"{expert.path} is already quantized ({schemes}, {kinds_text(expert.kinds) or method})",
        needs="weights in BF16, float16 or float32: re-quantizing quantized weights compounds the error",
        fix="pass the BF16 original; `ascendit repack` converts quantized weights to another layout",
        code="E-QNT-01",
    )


def check_kind(
    kind: str | None, schemes: Iterable[str], name: str, *, force: bool, way: str = "--force"
) -> None:
    """Raise UsageError (E-QNT-02) for W4A4 on a TI2V-5B model unless `force`, set by the option `way`."""
    if kind == "ti2v" and (w4a4 := sorted(set(schemes) & set(FP4))) and not force:
        raise UsageError(
            f"{name} is a TI2V-5B model, and {', '.join(w4a4)} is W4A4",
            needs=f"{way}: vLLM-Omni's documentation reports a visible loss of accuracy for this combination",
            fix=f"use the scheme mxfp8, or add {way} to accept the loss",
            code="E-QNT-02",
        )


def warnings_for(experts: Iterable[AppliedRecipe], recipe: Recipe, kind: Task) -> list[str]:
    """Warnings about the result: recipes for other models, unknown config values, problematic shapes."""
    texts = []
    if recipe.kinds and kind not in recipe.kinds:
        published = ", ".join(recipe.kinds)
        texts.append(
            f"recipe {recipe.name} is published for {published}, and was applied to this {kind} model"
        )
    for applied in experts:
        texts += [applied.expert.config_problem] if applied.expert.config_problem else []
        texts += stored_warnings(applied.expert)
        for text, names in _shape_warnings(applied).items():
            texts.append(f"{text}: {', '.join(grouped(names, (layer.name for layer in applied.layers)))}")
    return list(dict.fromkeys(texts))


def stored_warnings(expert: Expert, *, precision: bool = True) -> list[str]:
    """Warnings about the kind of file of a source: lost precision, if `precision`, and unused tensors.

    Raises CheckpointError (E-CKP-06) for a damaged record.
    """
    lost = [KINDS[kind].label for kind in lossy_kinds(expert)] if precision else []
    text = f"the weights of {expert.name} have the precision of their file ({', '.join(lost)}), not of BF16"
    return [*([text] if lost else []), *(f"{expert.name}: {note}" for note in expert.notes)]


def lossy_kinds(expert: Expert) -> tuple[str, ...]:
    """The kinds of its file, and of the file that ascendit wrote it from, whose floats had lost precision.

    The second are in `stored_as` of the record. Raises CheckpointError (E-CKP-06) for a damaged record.
    """
    kinds = [*expert.kinds]
    for folder in (expert.path, expert.path.parent) if expert.path.is_dir() else ():
        record = folder / RECORD_FILE
        if record.is_file() and Home.of(folder).contains(record):
            stored = read_json(record).get(STORED_AS)
            names = stored.get(expert.name) if isinstance(stored, dict) else None
            kinds += [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return tuple(dict.fromkeys(kind for kind in kinds if kind in KINDS and KINDS[kind].requantized))


def recorded_kinds(experts: Iterable[Expert]) -> dict[str, dict[str, list[str]]]:
    """The entry `stored_as` of the record: expert -> kinds that had lost precision; empty without any.

    Raises the errors of `lossy_kinds`.
    """
    kinds = {expert.name: [*lost] for expert in experts if (lost := lossy_kinds(expert))}
    return {STORED_AS: kinds} if kinds else {}


def attention_schemes(expert: Expert, applied: AppliedRecipe | None) -> dict[str, str]:
    """Attention -> its scheme of `ATTENTION_FORMATS`, for those that a manifest or `applied` quantizes.

    Raises CheckpointError (E-CKP-07) for a type that cannot be computed: static scales, mixed formats.
    """
    types = expert.attention if applied is None else applied.attention_types
    if unknown := [name for name, value in types.items() if value not in QUANT_TYPES]:
        first = f"{on_disk(unknown[0], expert.naming)} is {types[unknown[0]]}"
        raise CheckpointError(
            f"{expert.path}: {counted(len(unknown), 'attention')} without a kernel: {first}",
            needs=f"one of {', '.join(QUANT_TYPES)}, not static scales (FAQuant) or mixed formats",
            fix="export the model with one of these; or remove the entries from the manifest, "
            "and these attentions run in BF16",
            code="E-CKP-07",
        )
    return {name.removesuffix(QUANT_TYPE): QUANT_TYPES[value] for name, value in types.items()}


def head_dim(expert: Expert) -> int:
    """Head size D of the attention."""
    size: int = expert.config.get("attention_head_dim", WanConfig.attention_head_dim)
    return size


def _check_rotation(expert: Expert) -> None:
    if expert.config_problem or head_dim(expert) & (head_dim(expert) - 1):
        raise UsageError(
            f"rotated attention in {expert.path}: "
            + (expert.config_problem or f"heads of {head_dim(expert)} values, not a power of two"),
            needs="a config.json with the number of heads, and a head size that is a power of two",
            fix="copy the model's config.json next to the weights, or use a recipe without rotation",
            code="E-QNT-01",
        )


def _check_layer(applied: AppliedRecipe, layer: LayerScheme) -> None:
    dtype = applied.dtype(applied.weight(layer.name))
    if dtype == "F64":
        raise UsageError(
            f"{layer.name} is float64",
            needs="weights in BF16, float16 or float32",
            fix='add round_to = "bf16" to the recipe; and pass this file as the recipe, without --scheme',
            code="E-QNT-01",
        )
    if (layer.scale_rule or "").startswith("msms:") and dtype == "F16":
        raise UsageError(
            f"{layer.name} is float16, and scale rule {layer.scale_rule} is msModelSlim's",
            needs="BF16 or float32 weights: msModelSlim's arithmetic does not support float16",
            fix='add round_to = "bf16" to the recipe, or omit the scale rule',
            code="E-QNT-01",
        )


def _check_smoothing(expert: Expert, smoothing: Mapping[str, Any], layers: set[str]) -> None:
    for name, scale in smoothing.items():
        info = expert.tensors.get(f"{name}.weight")
        if name not in layers or info is None or tuple(scale.shape) != info.shape[1:]:
            raise UsageError(
                f"smoothing of {name!r} with a mul_scale of shape {tuple(scale.shape)}",
                needs="a linear layer of this model, and one factor per input channel",
                fix="use the mul_scale of the same model",
                code="E-USE-05",
            )


def _shape_warnings(applied: AppliedRecipe) -> dict[str, list[str]]:
    """Warning -> layers."""
    warnings: dict[str, list[str]] = {}
    for name, layer in applied.quantized.items():
        k, scheme = applied.weight(name).shape[1], SCHEMES[layer.scheme]
        if scheme.packed and k % 2:
            warnings.setdefault("K is odd, which the NPU's FP4 operators do not support", []).append(name)
        elif scheme.group and k % scheme.group:
            text = f"K is not a multiple of {scheme.group}, so the last group is partial"
            warnings.setdefault(f"{text}: no tensor parallelism over K", []).append(name)
        elif scheme.block and k % scheme.block:
            text = f"K is not a multiple of {scheme.block}, so the last block is partial"
            warnings.setdefault(f"{text}: other engines may reject it", []).append(name)
    return warnings
