"""What is lost in each layer: its output on codes against that of the floats, on tokens of a real run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ascendit.checkpoint.names import is_block_linear
from ascendit.model.linear import QuantLinear, Tokens
from ascendit.pipeline.calibrate import experts_of, inputs_of, recorded
from ascendit.pipeline.generate import Pipeline, Stop, denoise
from ascendit.pipeline.request import GenerateRequest
from ascendit.pipeline.similarity import sqnr
from ascendit.quant.fusion import leader_of

LAYER_TOKENS = 512
"""How many tokens of each input a layer is measured on."""


def layer_inputs(
    pipe: Pipeline, request: GenerateRequest, cancel: Stop | None = None
) -> dict[str, dict[str, Tensor]]:
    """Expert -> first of the layers that share an input -> some of its tokens [n, K], over all steps."""
    generator = torch.Generator().manual_seed(0)
    inputs = {name: inputs_of(expert, LAYER_TOKENS) for name, expert in experts_of(pipe).items()}
    with ExitStack() as stack:
        for name, expert in experts_of(pipe).items():
            stack.enter_context(recorded(expert, inputs[name], generator))
        denoise(pipe, request, None, lambda event: None, cancel)
    return {name: {layer: seen.rows for layer, seen in found.items()} for name, found in inputs.items()}


@torch.inference_mode()
def layer_sqnr(
    plain: Pipeline, pipe: Pipeline, inputs: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float]:
    """`expert/layer` -> dB: what a layer on codes makes of the tokens, against x W^T of the floats.

    In the precision that the step policy has for most steps. The bias is in neither.
    """
    found = {}
    floats = experts_of(plain)
    for name, expert in experts_of(pipe).items():
        for layer, module in expert.named_modules():
            if not isinstance(module, QuantLinear) or leader_of(layer) not in inputs[name]:
                continue
            x = inputs[name][leader_of(layer)]
            weight: Any = floats[name].get_submodule(layer).weight
            y = module.run(Tokens(x.to(module.device)), pipe.policy.default).float().cpu()
            bias = 0 if module.bias is None else module.bias.cpu()
            found[f"{name}/{layer}"] = sqnr(y - bias, x.float() @ weight.float().cpu().t())
    return found


def bits_per_weight(pipe: Pipeline) -> float:
    """Of the linears of the blocks, scales included, biases left out."""
    size = count = 0
    for expert in pipe.experts:
        for layer, module in expert.named_modules():
            if not isinstance(module, nn.Linear) or not is_block_linear(layer):
                continue
            count += module.in_features * module.out_features
            if isinstance(module, QuantLinear):
                e = module.joint.encoded(module.member)
                parts = [t for t in (e.codes, e.scale, e.dual_scale) if t is not None]
                size += sum(t.nbytes for t in parts)
            else:
                size += module.weight.nbytes
    return 8 * size / max(count, 1)
