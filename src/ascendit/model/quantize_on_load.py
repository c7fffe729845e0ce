"""Quantization while a model loads, with the same checks as `quantize`. Does not import torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.layout_check import stored_schedule
from ascendit.checkpoint.tensor_info import DTYPE_BITS, common_dtype
from ascendit.checkpoint.transformer import Expert
from ascendit.device.limits import QuantizedLayer
from ascendit.errors import UsageError
from ascendit.quant.recipe import Recipe, load_recipe
from ascendit.quant.schemes import scheme_after_reading
from ascendit.schedule import StepSchedule
from ascendit.weights.applied_recipe import AppliedRecipe, apply_recipe, check_kind, check_source
from ascendit.weights.engine_formats import model_kind
from ascendit.weights.tensor_steps import schemes_of

log = logging.getLogger("ascendit")


@dataclass(frozen=True)
class Online:
    """How to quantize the layers of a float checkpoint while they load."""

    recipe: Recipe | None
    """None: load every layer unquantized, which needs a float checkpoint."""
    keep: tuple[str, ...] = ()
    force: bool = False

    @classmethod
    def from_options(
        cls, scheme: str | None, recipe: str | None, keep: Sequence[str] | None = (), *, force: bool = False
    ) -> Online | None:
        """Parse the options; None means that weights are loaded as stored.

        Raises UsageError (E-USE-01) for `keep` without a scheme or recipe, and the errors of `load_recipe`.
        """
        keep = (keep,) if isinstance(keep, str) else tuple(keep or ())
        if recipe is None and scheme in (None, "bf16"):
            if keep:
                raise UsageError(
                    f"keep {' '.join(keep)} without a scheme",
                    needs="a scheme or a recipe: without one, every layer is loaded as stored",
                    fix="add --scheme mxfp8, or omit keep",
                )
            return None if scheme is None else cls(None)
        return cls(load_recipe(recipe or "default", scheme), keep, force)

    def apply(self, expert: Expert) -> AppliedRecipe | None:
        """Apply the recipe to a checkpoint.

        Raises UsageError: E-QNT-01 for weights that are already quantized, E-QNT-02 for FP4 on TI2V without
        force, E-USE-05 for a pattern that matches no layer.
        """
        if self.recipe is None:
            check_source(expert)
            return None
        kind = model_kind(expert.config)
        applied = apply_recipe(expert, self.recipe, kind, keep=self.keep)
        name, way = expert.path.parent.name, "--set force=true (in Python force=True)"
        check_kind(kind, applied.schemes, name, force=self.force, way=way)
        return applied


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

    Raises UsageError (E-USE-01) for a precision that the weights of the model do not support.
    """
    if requested is not None:
        policy = StepSchedule.parse(requested)
    elif online is not None:
        policy = online.recipe.step_policy if online.recipe else StepSchedule()
    else:
        policy = stored_schedule(layout)
    if policy != StepSchedule():
        policy.check_schemes(schemes_in(experts), floats=all(applied for _, applied in experts))
        log.info("step policy %s", policy)
    return policy


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
