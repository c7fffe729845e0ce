"""Quantization and LoRA files while a model loads, with the checks of `quantize`. Does not import torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.layout_check import stored_schedule
from ascendit.checkpoint.tensor_info import DTYPE_BITS, common_dtype
from ascendit.checkpoint.transformer import Expert
from ascendit.device.attention_kernels import ATTENTION_KERNELS, AUTOMATIC, attention_name, near_name
from ascendit.device.limits import QuantizedLayer
from ascendit.errors import UsageError
from ascendit.option_text import option
from ascendit.quant.attention_schemes import ATTENTION_FORMATS
from ascendit.quant.recipe import Recipe, load_recipe
from ascendit.quant.schemes import scheme_after_reading
from ascendit.report import shell_line
from ascendit.schedule import Step, StepSchedule
from ascendit.weights.applied_recipe import (
    AppliedRecipe,
    apply_recipe,
    check_kind,
    check_source,
    lora_warnings,
    open_folds,
    stored_schemes,
)
from ascendit.weights.engine_formats import model_kind
from ascendit.weights.lora.fold import Folds, LoraSource, check_groups, require_skipped
from ascendit.weights.tensor_steps import schemes_of

log = logging.getLogger("ascendit")


@dataclass(frozen=True)
class Online:
    """How to change the layers of a checkpoint while they load: quantize them, add LoRA files, or both."""

    recipe: Recipe | None
    """None: do not quantize."""
    keep: tuple[str, ...] = ()
    force: bool = False
    loras: tuple[LoraSource, ...] = ()
    lora_skip: tuple[str, ...] = ()
    """Groups of LoRA keys to leave out."""
    as_stored: bool = False
    """With `recipe` None: accept quantized weights too, unless a LoRA changes them."""

    @classmethod
    def from_options(
        cls,
        scheme: str | None,
        recipe: str | None,
        keep: Sequence[str] | None = (),
        *,
        force: bool = False,
        loras: Sequence[LoraSource] = (),
        lora_skip: Sequence[str] = (),
    ) -> Online | None:
        """Parse the options; None means that weights are loaded as stored.

        Raises UsageError (E-USE-01) for `keep` without a scheme or recipe, and the errors of
        `check_groups` and of `load_recipe`.
        """
        keep = (keep,) if isinstance(keep, str) else tuple(keep or ())
        check_groups(lora_skip, loras)
        files = (tuple(loras), tuple(lora_skip))
        if recipe is None and scheme in (None, "bf16"):
            if keep:
                raise UsageError(
                    f"{option('keep', ' '.join(keep))} without a scheme",
                    needs="a scheme or a recipe: without one, every layer is loaded as stored",
                    fix="add --scheme mxfp8, or omit --keep",
                )
            return None if scheme is None and not loras else cls(None, (), force, *files, scheme is None)
        return cls(load_recipe(recipe or "default", scheme), keep, force, *files)

    def apply_all(self, experts: Sequence[Expert]) -> tuple[tuple[Expert, AppliedRecipe | None], ...]:
        """Each expert of a model with the result of `apply`.

        Raises the errors of `apply`, `Folds.open` and `require_skipped`.
        """
        names = [expert.name for expert in experts]
        folds = [open_folds(x, self.loras, experts=names, skip=self.lora_skip) for x in experts]
        opened = [fold for fold in folds if fold is not None]
        require_skipped(self.lora_skip, opened)
        for text in lora_warnings(self.loras, opened):
            log.warning(text)
        return tuple((x, self.apply(x, fold)) for x, fold in zip(experts, folds, strict=True))

    def apply(self, expert: Expert, folds: Folds | None = None) -> AppliedRecipe | None:
        """Apply the recipe to a checkpoint; None if it is loaded as stored. `folds`: from `open_folds`.

        Raises UsageError: E-QNT-01 for a scheme, and E-QNT-03 for a LoRA, on weights that are already
        quantized, E-QNT-02 for FP4 on TI2V without force, E-USE-05 for a pattern that matches no layer.
        """
        if self.recipe is None:
            return self._unquantized(expert, folds)
        kind = model_kind(expert.config)
        applied = apply_recipe(expert, self.recipe, kind, keep=self.keep, folds=folds)
        name, way = expert.path.parent.name, "--set force=true (in Python force=True)"
        check_kind(kind, applied.schemes, name, force=self.force, way=way)
        return applied

    def _unquantized(self, expert: Expert, folds: Folds | None) -> AppliedRecipe | None:
        """All layers in the dtype of the source, with the LoRA files."""
        if not self.as_stored:
            check_source(expert)
        schemes = stored_schemes(expert)
        if schemes and folds is not None and folds.names:
            raise _on_quantized(expert, schemes, self.loras)
        if schemes or folds is None:
            return None
        return apply_recipe(expert, load_recipe("default", "bf16"), model_kind(expert.config), folds=folds)


def _on_quantized(expert: Expert, schemes: set[str], loras: Sequence[LoraSource]) -> UsageError:
    """The error E-QNT-03 for LoRA files on weights that are stored quantized."""
    names = sorted(schemes - {"bf16"})
    how = f"--scheme {names[0]}" if len(names) == 1 else "the same --recipe"
    files = f"--lora {shell_line([str(loras[0])])}" if len(loras) == 1 else "the same LoRA files"
    return UsageError(
        f"a LoRA for {expert.path}, which is stored quantized ({', '.join(names) or 'smoothed'})",
        needs="float weights: a LoRA is added before quantizing, and quantizing twice compounds the error",
        fix=f"pass the BF16 model with {how} and {files}; `ascendit quantize` takes the same options",
        code="E-QNT-03",
    )


def schemes_in(experts: Sequence[tuple[Expert, AppliedRecipe | None]]) -> set[str]:
    """The schemes of the layers of `experts`, quantized by the applied recipe or as stored."""
    return {
        scheme
        for expert, applied in experts
        for scheme in (applied.schemes if applied else schemes_of(expert).values())
    }


def quantized_layers(expert: Expert, applied: AppliedRecipe | None) -> Iterator[QuantizedLayer]:
    """The quantized layers of one expert, by the applied recipe or as stored after reading."""
    if applied is not None:
        for name, chosen in applied.quantized.items():
            n, k = applied.weight(name).shape
            yield QuantizedLayer(name, chosen.scheme, (n, k))
        return
    for name, layer in expert.layers.items():
        if (scheme := scheme_after_reading(layer.scheme)) != "bf16":
            yield QuantizedLayer(name, scheme, layer.shape)


def policy_for(
    requested: str | None,
    online: Online | None,
    layout: Layout,
    experts: Sequence[tuple[Expert, AppliedRecipe | None]],
) -> StepSchedule:
    """Choose the step schedule: the requested one, else the recipe's, else the one stored in the folder.

    Raises UsageError (E-USE-01) for a precision that the weights of the model do not support, and for an
    unknown attention kernel.
    """
    if requested is not None:
        policy = StepSchedule.parse(requested)
    elif online is not None and not online.as_stored:
        policy = online.recipe.step_policy if online.recipe else StepSchedule()
    else:
        policy = stored_schedule(layout)
    policy = named_attention(policy)
    if policy != StepSchedule():
        policy.check_schemes(schemes_in(experts), floats=all(applied for _, applied in experts))
        log.info("step policy %s", policy)
    return policy


def named_attention(policy: StepSchedule) -> StepSchedule:
    """The schedule with the names that the tables of attention have.

    Raises UsageError (E-USE-01) for an unknown kernel or scheme.
    """

    def change(step: Step, unknown: str | None = None) -> Step:
        if step.attention is None:
            return step
        name = attention_name(step.attention) or unknown
        if name is None:
            near = policy.map(lambda step: change(step, near_name(step.attention or "") or AUTOMATIC))
            raise UsageError(
                f"step policy {policy}: {step.attention!r} is no attention kernel and no scheme",
                needs=", ".join((AUTOMATIC, *ATTENTION_KERNELS, *ATTENTION_FORMATS)),
                fix=f"--step-policy {near}",
            )
        return replace(step, attention=name)

    return policy.map(change)


def stored_dtype(expert: Expert, applied: AppliedRecipe | None) -> str:
    """dtype of the denoiser on a CPU if none is chosen: that of most bytes of its unquantized tensors."""
    smoothed = applied.smoothing if applied else expert.smoothed
    others = {*smoothed, *(layer.name for layer in quantized_layers(expert, applied))}
    sizes = []
    for name, info in expert.tensors.items():
        owner, _, role = name.rpartition(".")
        if owner not in others and role != "weight_scale_inv":
            dtype = applied.dtype(info) if applied else "BF16" if info.dtype == "F8_E4M3" else info.dtype
            sizes.append((dtype, math.prod(info.shape) * DTYPE_BITS[dtype] // 8))
    return common_dtype(sizes)
