"""Smoothing from a calibration: compute `mul_scale` from the maxima of layer inputs, and measure its effect.

Layers that share one input share one smoothing factor s, see `quant.fusion`. `pipeline/calibrate.py` runs the
model. `output_quality` measures the effect of smoothing on sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ascendit.checkpoint.journal import Journal
from ascendit.checkpoint.layout import Layout
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.tensor_info import TORCH_DTYPES
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
"""The value in msModelSlim's recipe for Wan."""
SAMPLED_ROWS = 256
"""Sampled rows of each input, if outputs are measured."""
STATISTICS = "calibration.safetensors"
"""Intermediate statistics in the unfinished output, for `--resume`."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one input and the layers that share it, over all prompts, steps and branches."""

    input_amax: torch.Tensor
    """max|x|, float32 [K]."""
    weight_amax: torch.Tensor
    """max|w| over the rows of all these layers, float32 [K]."""
    rows: torch.Tensor
    """Uniformly sampled rows of the input, [n, K] in the dtype of the run; n is 0 if not requested."""


ExpertStatistics = Mapping[str, Mapping[str, Statistics]]
"""Expert -> first layer of a fused group -> its statistics."""


class Calibrate(Protocol):
    """A callable that runs a model on several prompts."""

    @property
    def alpha(self) -> float: ...

    @property
    def options(self) -> Mapping[str, object]:
        """Its options for the command line in the model card."""

    def record(self, layout: Layout) -> Mapping[str, Any]:
        """Settings of the run for `ascendit.json`. Raises all errors that can be detected without weights."""

    def __call__(
        self,
        layout: Layout,
        loras: Sequence[LoraSource],
        rows: int,
        journal: Journal,
        *,
        lora_skip: Sequence[str] = (),
    ) -> ExpertStatistics:
        """Run the model with the LoRA files folded in, and sample `rows` rows of each input.

        `lora_skip`: groups of LoRA keys to leave out. Intermediate results are saved as `STATISTICS` in the
        root of `journal`.
        """


def smoothable(applied: AppliedRecipe) -> list[str]:
    """The layers that a calibration smooths: quantized linear layers of the blocks."""
    return [name for name in applied.quantized if is_block_linear(name)]


def placeholders(applied: AppliedRecipe) -> dict[str, torch.Tensor]:
    """Layer -> a `mul_scale` of ones, float32 [K], for each layer to smooth, until the model has run."""
    return {name: torch.ones(applied.weight(name).shape[1]) for name in smoothable(applied)}


def mul_scales(
    applied: AppliedRecipe, statistics: Mapping[str, Statistics], alpha: float
) -> dict[str, torch.Tensor]:
    """Return layer -> mul_scale, float32 [K]: msModelSlim's 1 / s, computed in the dtype that is quantized.

    Raises UsageError (E-QNT-01) for a layer that the calibration did not use, or that had non-finite inputs.
    """
    scales: dict[str, torch.Tensor] = {}
    for name in smoothable(applied):
        stats = statistics.get(first_in_group(name))
        if stats is None or not bool(stats.input_amax.isfinite().all()):
            problem = "was not used in the calibration" if stats is None else "has inputs that are not finite"
            raise UsageError(
                f"{applied.expert.name}: {name} {problem}",
                needs="finite inputs of every quantized layer when the float model runs",
                fix="check that `ascendit generate` makes a good video with the source; "
                "--keep PATTERN excludes the layer from quantization",
                code="E-QNT-01",
            )
        stored = TORCH_DTYPES[applied.dtype(applied.weight(name))]
        # Maxima of activations may exceed float16's 65504; the weight rounds s to its own dtype.
        dtype = torch.float32 if stored == "float16" else getattr(torch, stored)
        factors = smoothing_factors(stats.input_amax, stats.weight_amax, alpha, dtype=dtype)
        scales[name] = to_mul_scale(factors)
    return scales


def check_alpha(alpha: float) -> None:
    """Raise UsageError (E-USE-01) unless 0 <= alpha <= 1."""
    if not 0 <= alpha <= 1:
        raise UsageError(
            f"alpha {alpha:g}",
            needs="0 (all outliers stay in the input) to 1 (all of them move into the weight)",
            fix=f"--alpha {ALPHA:g}, the value of msModelSlim",
        )


def output_quality(
    expert: RecipeSteps,
    statistics: Mapping[str, Statistics],
    reader: RowReader,
    advance: Callable[[str, int], None],
) -> Outputs:
    """Measure the SQNR of the output of every smoothed layer of `expert` on the sampled rows.

    Compares y = x W^T in float32 with the product of the quantized and decoded x and W. Calls
    `advance(name, bytes read)` for each weight.
    """
    layers = {}
    for name in smoothable(expert.applied):
        rows = statistics[first_in_group(name)].rows
        if len(rows):
            layers[name] = _quality(expert, name, rows, reader)
        advance(name, expert.applied.weight(name).nbytes)
    return Outputs(layers=layers)


def _quality(expert: RecipeSteps, name: str, x: Tensor, reader: RowReader) -> OutputQuality:
    layer, scale = expert.applied.quantized[name], expert.applied.smoothing[name]
    unsmoothed = RecipeSteps(replace(expert.applied, smoothing={}))

    def decoded(tensor: Tensor, rule: str) -> Tensor:
        return decode(encode(tensor, SCHEMES[layer.scheme].weight, scale_rule=rule))

    inputs = [decoded(rows, SCHEMES[layer.scheme].rule) for rows in (x, smooth_input(x, scale))]
    rules = [recipe.scale_rule(reader, layer) for recipe in (unsmoothed, expert)]
    signal, noise = 0.0, [0.0, 0.0]
    for _, w in unsmoothed.rows(reader, f"{name}.weight", small=True):
        y = x.to(torch.float32) @ w.to(torch.float32).t()
        signal += float(y.square().sum(dtype=torch.float64))
        for i, weight in enumerate((w, smooth_weight(w, scale))):
            error = y - inputs[i] @ decoded(weight, rules[i]).t()
            noise[i] += float(error.square().sum(dtype=torch.float64))
    return OutputQuality(plain=decibels(signal, noise[0]), smoothed=decibels(signal, noise[1]))
