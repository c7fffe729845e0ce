"""Load a transformer strictly: built on the meta device and filled tensor by tensor.

    expert = read_expert(part)
    model = load_expert(expert, None, bind("cpu"))          # as stored: floats, or quantized layers
    model = load_expert(expert, Online.from_options("mxfp8", None).apply(expert), bind("cpu"))

Names, shapes and dtypes are checked from the headers before any tensor is read. Weights are quantized while
they are read, so memory holds the model and at most one float tensor, or a few rows of one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ascendit.checkpoint.layer_format import check_positive
from ascendit.checkpoint.reader import RowReader, ShardSpec
from ascendit.checkpoint.transformer import Expert, model_config
from ascendit.errors import CheckpointError
from ascendit.model.linear import QuantLinear
from ascendit.model.quantize_on_load import stored_dtype
from ascendit.model.wan import Attention, WanTransformer
from ascendit.model.weight_loader import ModelSink, StoredLinear, nbytes
from ascendit.ops.operators import Ops
from ascendit.progress import Advance
from ascendit.quant.schemes import scheme_after_reading
from ascendit.weights.applied_recipe import AppliedRecipe, attention_schemes, stored_warnings
from ascendit.weights.recipe_steps import RecipeSteps
from ascendit.weights.shards import LayerShards, columns_of, cut_steps, shard_of
from ascendit.weights.tensor_steps import no_progress, run_steps, stored_steps, to_float32

log = logging.getLogger("ascendit")
ROTATIONS = ("q_rot", "k_rot")
ROTATION_ERROR = 0.01
"""Largest entry of q_rot k_rot^T - 1 and q_rot q_rot^T - 1; rounding a random rotation to BF16 gives up to
0.003."""


def load_expert(
    expert: Expert,
    applied: AppliedRecipe | None,
    ops: Ops,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    floats: bool = False,
    shards: LayerShards = MappingProxyType({}),
    advance: Advance = no_progress,
) -> WanTransformer:
    """Load the transformer of `expert`, quantized by `applied` or as stored if `applied` is None.

    `dtype`: dtype of the hidden states and of parameters that are not quantized; None: the stored dtype on a
    CPU, else bfloat16. Parameters that Diffusers keeps in float32 are always float32. `floats`: store BF16
    weights of quantized layers too. `shards`: layer -> the rows or columns of this rank (`weights.shards`);
    only these are read, except for columns of int8 and fp8 (see `RecipeSteps`). Raises CheckpointError:
    E-CKP-06 for a config of another model, E-CKP-07 for a type of quantized attention without a kernel,
    E-CKP-08 for invalid scales and rotations; UsageError (E-USE-05) for a shard outside its layer;
    EnvironmentProblem (E-CAP-01) for a scheme without a matmul on this chip.
    """
    config = model_config(expert)
    attention = attention_schemes(expert, applied)
    for text in stored_warnings(expert, precision=applied is not None):
        log.warning(text)
    with torch.device("meta"):
        model = WanTransformer(config, ops)
    with RowReader() as reader:
        layers = applied_layers(applied) if applied else stored_layers(expert, reader)
        schemes = {name: layer.scheme for name, layer in layers.items()}
        for scheme in set(schemes.values()) - {"bf16"}:
            ops.quantized.kernel(scheme)
        plan = RecipeSteps(applied).plan() if applied else stored_steps(expert)
        plan = [step for step in plan if step.name.removesuffix(".mul_scale") not in layers]  # already read
        prepare_attention(model, attention, [step.name for step in plan])
        steps = cut_steps(plan, expert, schemes, shards)
        layers = {name: sharded(layer, shard_of(shards, name)) for name, layer in layers.items()}
        if dtype is None:
            dtype = getattr(torch, stored_dtype(expert, applied)) if device == "cpu" else torch.bfloat16
        sink = ModelSink(model, reader, steps, layers, device=device, dtype=dtype, float32=model.KEEP_FP32)
        run_steps(steps, reader, sink, advance=advance)
        check_rotations(model, str(expert.path))
        if floats and applied:
            load_floats(model, applied, reader, device=device, dtype=dtype, shards=shards)
    used = ", ".join(f"{n} {s}" for s, n in Counter(x.scheme for x in layers.values()).items())
    log.info(
        "%s: %s%s on %s, %.2f GiB",
        expert.name, str(dtype)[6:], f" and {used} layers" if used else "", device, nbytes(model) / 2**30,
    )  # fmt: skip
    return model.eval()


def prepare_attention(model: WanTransformer, schemes: Mapping[str, str], names: Iterable[str]) -> None:
    """Set the scheme of each attention in `schemes`, and make room for the rotations among tensor `names`.

    The rotations are parameters [d, d] of the attention, in the dtype of the hidden states: BF16 ones are
    exact in float32 and, for heads up to 16384, in float16. Without a scheme they are not used: they change
    no score.
    """
    for name, scheme in schemes.items():
        attention: Any = model.get_submodule(name)
        attention.scheme = scheme
    rotated = {name.rpartition(".")[0] for name in names if name.endswith(ROTATIONS)}
    for name in rotated:
        size = model.config.attention_head_dim
        for role in ROTATIONS:
            empty = nn.Parameter(torch.empty(size, size, device="meta"), requires_grad=False)
            model.get_submodule(name).register_parameter(role, empty)
    if unused := rotated - schemes.keys():
        log.info("rotations of %d attentions in BF16 are not used: they change no score", len(unused))


def check_rotations(model: WanTransformer, path: str) -> None:
    """Raise CheckpointError (E-CKP-08) for rotations that are not one orthogonal matrix; it keeps scores."""
    for name, module in model.named_modules():
        if not isinstance(module, Attention) or module.q_rot is None or module.k_rot is None:
            continue
        q_rot, k_rot = module.q_rot.float().cpu(), module.k_rot.float().cpu()
        error = max(float((q_rot @ r.t() - torch.eye(len(r))).abs().max()) for r in (k_rot, q_rot))
        if not error <= ROTATION_ERROR:
            raise CheckpointError(
                f"{path}: q_rot and k_rot of {name} change the scores: a product is {error:.3g} from 1",
                needs="the same orthogonal matrix twice: q_rot k_rot^T and q_rot q_rot^T are 1, within "
                f"{ROTATION_ERROR}",
                fix="download or export the model again",
                code="E-CKP-08",
            )


def applied_layers(applied: AppliedRecipe) -> dict[str, StoredLinear]:
    """The layers that a recipe quantizes or smooths, by name."""
    smoothing = applied.smoothing
    return {
        layer.name: StoredLinear(layer.scheme, applied.weight(layer.name).shape[1], smoothing.get(layer.name))
        for layer in applied.layers
        if layer.scheme != "bf16" or layer.name in smoothing
    }


def stored_layers(expert: Expert, reader: RowReader) -> dict[str, StoredLinear]:
    """Layers that are stored quantized or smoothed.

    Raises CheckpointError (E-CKP-08) for an invalid `mul_scale`.
    """
    layers = {}
    for name, layer in expert.layers.items():
        scheme, scale = scheme_after_reading(layer.scheme), None
        if (info := layer.tensors.get("mul_scale")) is not None:
            data = reader.read_all(info)
            check_positive(data, info.dtype, info.name)
            scale = torch.frombuffer(bytearray(to_float32(data, info.dtype, info.name)), dtype=torch.float32)
        if scheme != "bf16" or scale is not None:
            layers[name] = StoredLinear(scheme, layer.shape[1], scale)
    return layers


def sharded(layer: StoredLinear, shard: ShardSpec) -> StoredLinear:
    """One rank's shard of a layer. A `mul_scale` of ones is dropped, since it has no effect."""
    columns, scale = columns_of(shard), layer.mul_scale
    if scale is not None:
        scale = None if bool((scale == 1).all()) else scale[columns]
    return StoredLinear(layer.scheme, len(range(layer.width)[columns]), scale)


def load_floats(
    model: WanTransformer,
    applied: AppliedRecipe,
    reader: RowReader,
    *,
    device: str,
    dtype: torch.dtype,
    shards: LayerShards,
) -> None:
    """Store the unquantized weight and bias on every quantized layer, for steps in BF16."""
    with torch.device("meta"):
        unquantized = WanTransformer(model.config, model.ops)
    recipe = RecipeSteps(replace(applied, layers=(), smoothing={}))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    steps = [step for step in recipe.plan() if step.name.rpartition(".")[0] in linears]
    steps = cut_steps(steps, applied.expert, {}, shards)
    run_steps(steps, reader, ModelSink(unquantized, reader, steps, {}, device=device, dtype=dtype))
    for name, module in linears.items():
        linear: Any = unquantized.get_submodule(name)
        module.floats = (linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
