"""Fill a model from disk: built on the meta device, tensor by tensor, strict.

    expert = read_expert(part)
    model = load_expert(expert, None, bind("cpu"))          # floats, or codes by their manifest
    model = load_expert(expert, Online.of("mxfp8", None).apply(expert), bind("cpu"))

Names, shapes and dtypes are compared from the headers before a byte of a tensor is read. A quantized layer
never exists as floats: beside the model itself there are some rows, or one tensor, at a time.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from ascendit.checkpoint.layer_format import check_positive
from ascendit.checkpoint.reader import RowReader, ShardSpec
from ascendit.checkpoint.transformer import Expert
from ascendit.errors import CheckpointError
from ascendit.family import WanConfig
from ascendit.model.library_component import default_dtype
from ascendit.model.linear import QuantLinear
from ascendit.model.wan import WanTransformer
from ascendit.model.weight_loader import ModelSink, StoredLinear, nbytes
from ascendit.ops.operators import Ops
from ascendit.quant.layer_rules import warn_about_attention
from ascendit.quant.schemes import scheme_after_reading
from ascendit.weights.applied_recipe import AppliedRecipe
from ascendit.weights.recipe_steps import RecipeSteps
from ascendit.weights.shards import LayerShards, columns_of, cut_steps, shard_of
from ascendit.weights.tensor_steps import run_steps, stored_steps, to_float32

log = logging.getLogger("ascendit")


def load_expert(
    expert: Expert,
    applied: AppliedRecipe | None,
    ops: Ops,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    floats: bool = False,
    shards: LayerShards = MappingProxyType({}),
) -> WanTransformer:
    """The transformer of `expert`, quantized by `applied`, or as it is stored.

    `dtype`: of the activation and of what is not quantized; None = as stored, on a CPU, else bfloat16. What
    Diffusers keeps in float32 is kept here too. `floats`: BF16 weights are kept beside the codes. `shards`:
    layer -> the rows or columns that this rank holds, see `weights.shards`; nothing else of it is read, with
    the exception in `RecipeSteps`. Raises CheckpointError E-CKP-06 for a config that is no Wan transformer's,
    E-CKP-08 for invalid scales; UsageError E-USE-05 for a part that a layer does not have; EnvironmentProblem
    E-CAP-01 for a scheme that this chip has no matmul for.
    """
    if expert.config.get("num_attention_heads", 1) is None:
        raise CheckpointError(
            f"{expert.path}: {expert.config_problem or 'config.json does not tell the number of heads'}",
            needs="the config.json of the model",
            fix="ascendit repack it with --base MODEL, or put config.json beside the weights",
            code="E-CKP-06",
        )
    warn_about_attention(expert.name, expert.attention.values(), expert.path)
    with torch.device("meta"):
        model = WanTransformer(WanConfig.from_dict(expert.config), ops)
    with RowReader() as reader:
        layers = applied_layers(applied) if applied else stored_layers(expert, reader)
        schemes = {name: layer.scheme for name, layer in layers.items()}
        for scheme in set(schemes.values()) - {"bf16"}:
            ops.quantized.kernel(scheme)
        plan = RecipeSteps(applied).plan() if applied else stored_steps(expert)
        plan = [step for step in plan if step.name.removesuffix(".mul_scale") not in layers]  # read already
        steps = cut_steps(plan, expert, schemes, shards)
        layers = {name: part_of(layer, shard_of(shards, name)) for name, layer in layers.items()}
        plain = (s for step in steps for s in step.specs if s.name.rpartition(".")[0] not in layers)
        dtype = dtype or default_dtype(plain, device)
        sink = ModelSink(model, reader, steps, layers, device=device, dtype=dtype, wide=model.KEEP_FP32)
        run_steps(steps, reader, sink)
        if floats and applied:
            keep_floats(model, applied, reader, device=device, dtype=dtype, shards=shards)
    used = ", ".join(f"{n} {s}" for s, n in Counter(x.scheme for x in layers.values()).items())
    log.info(
        "%s: %s%s on %s, %.2f GiB",
        expert.name, str(dtype)[6:], f" and {used} layers" if used else "", device, nbytes(model) / 2**30,
    )  # fmt: skip
    return model.eval()


def applied_layers(applied: AppliedRecipe) -> dict[str, StoredLinear]:
    """The layers that a recipe quantizes or smooths."""
    smoothing = applied.smoothing
    return {
        layer.name: StoredLinear(layer.scheme, applied.weight(layer.name).shape[1], smoothing.get(layer.name))
        for layer in applied.layers
        if layer.scheme != "bf16" or layer.name in smoothing
    }


def stored_layers(expert: Expert, reader: RowReader) -> dict[str, StoredLinear]:
    """The layers that are codes on disk, or smoothed, with their `mul_scale`."""
    layers = {}
    for name, layer in expert.layers.items():
        scheme, scale = scheme_after_reading(layer.scheme), None
        if (info := layer.tensors.get("mul_scale")) is not None:
            data = reader.whole(info)
            check_positive(data, info.dtype, info.name)
            scale = torch.frombuffer(bytearray(to_float32(data, info.dtype, info.name)), dtype=torch.float32)
        if scheme != "bf16" or scale is not None:
            layers[name] = StoredLinear(scheme, layer.shape[1], scale)
    return layers


def part_of(layer: StoredLinear, shard: ShardSpec) -> StoredLinear:
    """One rank's part of a layer; a `mul_scale` of ones, which changes nothing, is left out."""
    columns, scale = columns_of(shard), layer.mul_scale
    if scale is not None:
        scale = None if bool((scale == 1).all()) else scale[columns]
    return StoredLinear(layer.scheme, len(range(layer.width)[columns]), scale)


def keep_floats(
    model: WanTransformer,
    applied: AppliedRecipe,
    reader: RowReader,
    *,
    device: str,
    dtype: torch.dtype,
    shards: LayerShards,
) -> None:
    """Give every quantized layer its weight and bias as they were, for steps in BF16."""
    with torch.device("meta"):
        plain = WanTransformer(model.config, model.ops)
    recipe = RecipeSteps(replace(applied, layers=(), smoothing={}))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    steps = [step for step in recipe.plan() if step.name.rpartition(".")[0] in linears]
    steps = cut_steps(steps, applied.expert, {}, shards)
    run_steps(steps, reader, ModelSink(plain, reader, steps, {}, device=device, dtype=dtype))
    for name, module in linears.items():
        kept: Any = plain.get_submodule(name)
        module.floats = (kept.weight.detach(), None if kept.bias is None else kept.bias.detach())
