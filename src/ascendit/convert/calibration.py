"""What a calibration gives to `quantize`: maxima of the inputs of each layer, and `mul_scale` made of them.

Layers that share one input share one s, see `quant.fusion`. `pipeline/calibrate.py` runs the model. On the
rows that it has kept, `output_quality` measures what the smoothing is good for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.output_folder import Journal
from ascendit.checkpoint.reader import TORCH_DTYPES, RowReader
from ascendit.convert.report import OutputQuality, Outputs
from ascendit.errors import UsageError
from ascendit.mx.codec import decibels, decode, encode
from ascendit.mx.smoothing import smooth_input, smooth_weight, smoothing_factors, to_mul_scale
from ascendit.names import is_block_linear
from ascendit.quant.fusion import first_in_group
from ascendit.quant.schemes import SCHEMES
from ascendit.weights.applied_recipe import AppliedRecipe
from ascendit.weights.lora.fold import LoraSource
from ascendit.weights.recipe_steps import RecipeSteps

ALPHA = 0.9
"""msModelSlim's, in the recipe that smooths Wan."""
SAMPLED_ROWS = 256
"""Rows of each input that are kept if outputs are measured."""
STATISTICS = "calibration.safetensors"
"""What has been found so far, in the unfinished output: `--resume` goes on with it."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """One input and the layers that share it, over all prompts, steps and branches."""

    input_amax: torch.Tensor
    """max|x|, float32 [K]."""
    weight_amax: torch.Tensor
    """max|w| over the rows of all its layers, float32 [K]."""
    rows: torch.Tensor
    """Some of its tokens, drawn evenly, [n, K] in the dtype of the run; n is 0 where none are wanted."""


ExpertStatistics = Mapping[str, Mapping[str, Statistics]]
"""Expert -> first layer of a group -> its statistics."""


class Calibrate(Protocol):
    """Runs the model at a layout over some prompts."""

    @property
    def alpha(self) -> float: ...

    @property
    def flags(self) -> Sequence[tuple[str, object]]:
        """For the command line in the model card."""

    def record(self, layout: Layout) -> Mapping[str, Any]:
        """What would be run, for `ascendit.json`. Raises what can be known before a weight is read."""

    def __call__(
        self, layout: Layout, loras: Sequence[LoraSource], rows: int, journal: Journal
    ) -> ExpertStatistics:
        """Run it, with the LoRA files folded in; keep `rows` tokens of each input.

        What has been found so far is kept in `STATISTICS` under the root of `journal`.
        """


def smoothable(applied: AppliedRecipe) -> list[str]:
    """The layers that a calibration smooths: linears of the blocks that are quantized."""
    return [name for name in applied.quantized if is_block_linear(name)]


def placeholders(applied: AppliedRecipe) -> dict[str, torch.Tensor]:
    """A `mul_scale` of ones for each layer that will be smoothed, until the model has run."""
    return {name: torch.ones(applied.weight(name).shape[1]) for name in smoothable(applied)}


def mul_scales(
    applied: AppliedRecipe, found: Mapping[str, Statistics], alpha: float
) -> dict[str, torch.Tensor]:
    """Layer -> mul_scale, float32 [K]: msModelSlim's 1 / s, computed in the dtype that is quantized.

    UsageError E-QNT-01 for an input that was never seen, or whose maxima are not finite.
    """
    made: dict[str, torch.Tensor] = {}
    for name in smoothable(applied):
        stats = found.get(first_in_group(name))
        if stats is None or not bool(stats.input_amax.isfinite().all()):
            why = "was never run" if stats is None else "has inputs that are not finite"
            raise UsageError(
                f"{applied.expert.name}: {name} {why}",
                needs="every quantized layer in a run of the float model, with finite numbers",
                fix="see that ascendit generate makes a good video of the source; "
                "--keep leaves the layer as it is",
                code="E-QNT-01",
            )
        stored = TORCH_DTYPES[applied.dtype(applied.weight(name))]
        # Float16 ends at 65504, and maxima of activations do not; the weight rounds s to its own dtype.
        dtype = torch.float32 if stored == "float16" else getattr(torch, stored)
        factors = smoothing_factors(stats.input_amax, stats.weight_amax, alpha, dtype=dtype)
        made[name] = to_mul_scale(factors)
    return made


def check_alpha(alpha: float) -> None:
    """UsageError E-USE-01 unless 0 <= alpha <= 1."""
    if not 0 <= alpha <= 1:
        raise UsageError(
            f"alpha {alpha:g}",
            needs="0 (all outliers stay in the input) to 1 (all of them move into the weight)",
            fix=f"--alpha {ALPHA:g}, which is msModelSlim's",
        )


def output_quality(
    expert: RecipeSteps,
    found: Mapping[str, Statistics],
    reader: RowReader,
    advance: Callable[[str, int], None],
) -> Outputs:
    """SQNR of the output of every smoothed layer of `expert`, on the rows that were kept.

    y = x W^T, in float32, against the same product of decoded codes of both. Each weight is reported by
    `advance(name, bytes read)`.
    """
    layers = {}
    for name in smoothable(expert.applied):
        rows = found[first_in_group(name)].rows
        if len(rows):
            layers[name] = _quality(expert, name, rows, reader)
        advance(name, expert.applied.weight(name).nbytes)
    return Outputs(layers=layers)


def _quality(expert: RecipeSteps, name: str, x: Tensor, reader: RowReader) -> OutputQuality:
    layer, scale = expert.applied.quantized[name], expert.applied.smoothing[name]
    plain = RecipeSteps(replace(expert.applied, smoothing={}), folds=expert.folds)

    def decoded(tensor: Tensor, rule: str) -> Tensor:
        return decode(encode(tensor, SCHEMES[layer.scheme].weight, scale_rule=rule))

    inputs = [decoded(each, SCHEMES[layer.scheme].rule) for each in (x, smooth_input(x, scale))]
    rules = [recipe.scale_rule(reader, layer) for recipe in (plain, expert)]
    signal, noise = 0.0, [0.0, 0.0]
    for _, w in plain.rows(reader, f"{name}.weight", small=True):
        y = x.to(torch.float32) @ w.to(torch.float32).t()
        signal += float(y.square().sum(dtype=torch.float64))
        for i, weight in enumerate((w, smooth_weight(w, scale))):
            error = y - inputs[i] @ decoded(weight, rules[i]).t()
            noise[i] += float(error.square().sum(dtype=torch.float64))
    return OutputQuality(plain=decibels(signal, noise[0]), smoothed=decibels(signal, noise[1]))
