"""How far a layer's output is from that of its float weight, with and without smoothing.

On tokens that a calibration has captured: y = x W^T against the same product of decoded codes of both, summed
in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
from ascendit.weights.applied_recipe import AppliedRecipe
from ascendit.weights.lora.fold import Folds
from ascendit.weights.quantize_writer import SourceRows


def output_quality(
    applied: AppliedRecipe,
    found: Mapping[str, Statistics],
    reader: RowReader,
    folds: Folds | None,
    advance: Callable[[str, int], None],
) -> Outputs:
    """Of every smoothed layer of `applied`. `advance` is told the bytes of each weight that is done."""
    rows = SourceRows(replace(applied, smoothing={}), reader, folds, small_blocks=True)
    layers = {}
    for name in smoothable(applied):
        tokens = found[leader_of(name)].rows
        if len(tokens):
            layers[name] = _measure(applied, applied.coded[name], tokens, rows)
        advance(name, applied.weight(name).nbytes)
    return Outputs(layers=layers)


def _measure(applied: AppliedRecipe, layer: LayerScheme, tokens: Tensor, rows: SourceRows) -> OutputQuality:
    name, scale = f"{layer.name}.weight", applied.smoothing[layer.name]
    info = applied.weight(layer.name)

    def smoothed(w: Tensor) -> Tensor:
        return smooth_weight(w, scale)

    changes: tuple[Callable[[Tensor], Tensor], ...] = (lambda w: w, smoothed)
    inputs = [_quantized_tokens(x, layer.scheme) for x in (tokens, smooth_input(tokens, scale))]
    rules = [_rule(layer, (change(w) for _, w in rows.blocks(name, info))) for change in changes]
    x = tokens.to(torch.float32)
    signal, noise = 0.0, [0.0, 0.0]
    for _, w in rows.blocks(name, info):
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
