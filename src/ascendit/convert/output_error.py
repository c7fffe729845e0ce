"""How far a layer's output is from that of its float weight, with and without smoothing.

On tokens that a calibration has captured: y = x W^T against the same product of decoded codes of both, summed
in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ascendit.checkpoint.reader import RowReader
from ascendit.convert.calibration import Statistics, smoothable
from ascendit.convert.report import OutputQuality, Outputs
from ascendit.mx.codec import decibels, decode, encode
from ascendit.mx.formats import SEARCH
from ascendit.mx.row_encoder import ScaleSearch
from ascendit.mx.smoothing import smooth_input, smooth_weight
from ascendit.quant.fusion import leader_of
from ascendit.quant.layer_rules import LayerScheme
from ascendit.quant.schemes import SCHEMES
from ascendit.weights.recipe_steps import RecipeSteps

Rows = Callable[[], Iterator[tuple[int, Tensor]]]
"""Reads a weight: (first row, some rows), again and again."""


def output_quality(
    expert: RecipeSteps,
    found: Mapping[str, Statistics],
    reader: RowReader,
    advance: Callable[[str, int], None],
) -> Outputs:
    """Of every smoothed layer of `expert`. `advance` is told the bytes of each weight that is done."""
    applied, layers = expert.applied, {}
    plain = RecipeSteps(replace(applied, smoothing={}), folds=expert.folds)
    for name in smoothable(applied):
        tokens = found[leader_of(name)].rows
        if len(tokens):
            rows = functools.partial(plain.rows, reader, f"{name}.weight", small=True)
            layers[name] = _measure(applied.coded[name], applied.smoothing[name], tokens, rows)
        advance(name, applied.weight(name).nbytes)
    return Outputs(layers=layers)


def _measure(layer: LayerScheme, scale: Tensor, tokens: Tensor, rows: Rows) -> OutputQuality:
    def smoothed(w: Tensor) -> Tensor:
        return smooth_weight(w, scale)

    changes: tuple[Callable[[Tensor], Tensor], ...] = (lambda w: w, smoothed)
    inputs = [_quantized_tokens(x, layer.scheme) for x in (tokens, smooth_input(tokens, scale))]
    rules = [_rule(layer, (change(w) for _, w in rows())) for change in changes]
    x = tokens.to(torch.float32)
    signal, noise = 0.0, [0.0, 0.0]
    for _, w in rows():
        y = x @ w.to(torch.float32).t()
        signal += float(y.square().sum(dtype=torch.float64))
        for i, change in enumerate(changes):
            error = y - inputs[i] @ _coded_and_back(change(w), layer.scheme, rules[i]).t()
            noise[i] += float(error.square().sum(dtype=torch.float64))
    return OutputQuality(plain=decibels(signal, noise[0]), smoothed=decibels(signal, noise[1]))


def _quantized_tokens(x: Tensor, scheme: str) -> Tensor:
    return _coded_and_back(x, scheme, SCHEMES[scheme].rule)


def _coded_and_back(x: Tensor, scheme: str, rule: str | None) -> Tensor:
    return decode(encode(x, SCHEMES[scheme].weight, scale_rule=rule))


def _rule(layer: LayerScheme, blocks: Iterable[Tensor]) -> str | None:
    """The scale rule; of one that is looked for the one that is found in these rows."""
    if layer.scale_rule != SEARCH:
        return layer.scale_rule
    search = ScaleSearch()
    for w in blocks:
        search.add(w)
    return search.best()
