"""A recipe that is applied while a model loads, with the same checks that `quantize` makes. No torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ascendit.checkpoint.component import read_json
from ascendit.checkpoint.layout import RECORD_FILE, Layout
from ascendit.checkpoint.transformer import Expert
from ascendit.errors import UsageError
from ascendit.quant.recipe import Recipe, load_recipe
from ascendit.schedule import StepSchedule
from ascendit.weights.applied_recipe import AppliedRecipe, apply_recipe, check_kind, check_source
from ascendit.weights.engine_formats import model_kind
from ascendit.weights.tensor_steps import schemes_of

log = logging.getLogger("ascendit")


@dataclass(frozen=True)
class Online:
    """What becomes of each layer of a float checkpoint on its way into memory."""

    recipe: Recipe | None
    """None: every layer stays a float, which codes cannot."""
    keep: tuple[str, ...] = ()
    force: bool = False

    @classmethod
    def of(
        cls, scheme: str | None, recipe: str | None, keep: Sequence[str] | None = (), *, force: bool = False
    ) -> Online | None:
        """From what a user says; None where a model is taken as it is. Errors as `load_recipe`."""
        keep = (keep,) if isinstance(keep, str) else tuple(keep or ())
        if recipe is None and scheme in (None, "bf16"):
            if keep:
                raise UsageError(
                    f"keep {' '.join(keep)} without a scheme",
                    needs="a scheme or a recipe: without one every layer stays as it is stored",
                    fix="add --scheme mxfp8, or leave it out",
                )
            return None if scheme is None else cls(None)
        return cls(load_recipe(recipe or "default", scheme), keep, force)

    def apply(self, expert: Expert) -> AppliedRecipe | None:
        """UsageError: E-QNT-01 for weights that are codes already, E-QNT-02 for FP4 on TI2V without force,
        E-USE-05 for a pattern that fits no layer."""
        if self.recipe is None:
            check_source(expert)
            return None
        kind = model_kind(expert.config)
        applied = apply_recipe(expert, self.recipe, kind, keep=self.keep)
        name, way = expert.path.parent.name, "--set force=true (in Python force=True)"
        check_kind(kind, applied.schemes, name, force=self.force, way=way)
        return applied


def schemes_in(found: Sequence[tuple[Expert, AppliedRecipe | None]]) -> set[str]:
    """Those of the quantized layers: by the recipe that is applied, or as stored."""
    return {
        scheme
        for expert, applied in found
        for scheme in (applied.schemes if applied else schemes_of(expert).values())
    }


def policy_for(
    asked: str | None,
    online: Online | None,
    layout: Layout,
    found: Sequence[tuple[Expert, AppliedRecipe | None]],
) -> StepSchedule:
    """What was asked for, else the recipe's: of this load, or of the `quantize` that wrote the folder.

    UsageError E-USE-01 for a precision that no weight of the model has.
    """
    if asked is not None:
        policy = StepSchedule.parse(asked)
    elif online is not None:
        policy = online.recipe.step_policy if online.recipe else StepSchedule()
    else:
        record = layout.root / RECORD_FILE
        recipe = read_json(record).get("recipe") if record.is_file() else None
        text = recipe.get("step_policy") if isinstance(recipe, dict) else None
        policy = StepSchedule.parse(text) if isinstance(text, str) and text else StepSchedule()
    if policy != StepSchedule():
        policy.check_schemes(schemes_in(found), floats=all(applied for _, applied in found))
        log.info("step policy %s", policy)
    return policy
