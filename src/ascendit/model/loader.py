"""Fill a model from disk: built on the meta device, tensor by tensor, strict.

    model = load_transformer(part, bind("cpu"))      # floats, or codes by their manifest
    model = load_transformer(part, bind("cpu"), online=Online.of("mxfp8", None))

Names, shapes and dtypes are compared from the headers before a byte of a tensor is read. A quantized layer
never exists as floats: beside the model itself there are some rows, or one tensor, at a time.
"""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch import Tensor, nn

from ascendit.checkpoint.component import Part
from ascendit.checkpoint.layer_format import check_positive
from ascendit.checkpoint.reader import RowReader, TensorInfo
from ascendit.checkpoint.transformer import Expert, read_expert
from ascendit.errors import CheckpointError
from ascendit.family import WanConfig
from ascendit.model.library_component import default_dtype
from ascendit.model.linear import QuantLinear
from ascendit.model.quantize_on_load import Online
from ascendit.model.wan import WanTransformer
from ascendit.model.weight_loader import Arrangement, Coded, nbytes
from ascendit.ops.operators import Ops
from ascendit.quant.layer_rules import QUANT_TYPES
from ascendit.quant.schemes import scheme_after_reading
from ascendit.weights.applied_recipe import AppliedRecipe
from ascendit.weights.quantize_writer import SourceRows
from ascendit.weights.tensor_steps import to_float32
from ascendit.weights.tensor_stream import TensorSink, feed, stored_steps

log = logging.getLogger("ascendit")


def load_transformer(
    part: Part,
    ops: Ops,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    online: Online | None = None,
) -> WanTransformer:
    """The transformer in `part`, on `device`. `online`: a recipe for a float checkpoint.

    Errors as `read_expert`, `Online.apply` and `load_expert`.
    """
    expert = read_expert(part)
    return load_expert(expert, online.apply(expert) if online else None, ops, device=device, dtype=dtype)


def load_expert(
    expert: Expert,
    applied: AppliedRecipe | None,
    ops: Ops,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    floats: bool = False,
) -> WanTransformer:
    """The transformer of `expert`, quantized by `applied`, or as it is stored.

    `dtype`: of the tokens and of what is not quantized; None = as stored, on a CPU, else bfloat16. What
    Diffusers keeps in float32 is kept here too. `floats`: BF16 weights are kept beside the codes.
    Raises CheckpointError E-CKP-06 for a config that is no Wan transformer's, E-CKP-08 for scales that cannot
    be; EnvironmentProblem E-CAP-01 for a scheme that this chip has no matmul for.
    """
    if expert.config.get("num_attention_heads", 1) is None:
        raise CheckpointError(
            f"{expert.path}: {expert.config_problem or 'config.json does not tell the number of heads'}",
            needs="the config.json of the model",
            fix="ascendit repack it with --base MODEL, or put config.json beside the weights",
            code="E-CKP-06",
        )
    say_attention(expert)
    with torch.device("meta"):
        model = WanTransformer(WanConfig.from_dict(expert.config), ops)
    source = applied or stored_steps(expert)
    specs = list(source.specs)
    coded = applied_layers(applied) if applied else coded_layers(expert)
    for scheme in {layer.scheme for layer in coded.values()} - {"bf16"}:
        ops.quantized.kernel(scheme)
    dtype = dtype or default_dtype((s for s in specs if s.name.rpartition(".")[0] not in coded), device)
    put = Arrangement(model, specs, coded, ops.quantized, device=device, dtype=dtype, wide=model.KEEP_FP32)
    feed(source, TensorSink(specs, put.room, put.arrived))
    if floats and applied:
        keep_floats(model, applied, device, dtype)
    used = ", ".join(f"{n} {s}" for s, n in Counter(x.scheme for x in coded.values()).items())
    log.info(
        "%s: %s%s on %s, %.2f GiB",
        expert.name, str(dtype)[6:], f" and {used} layers" if used else "", device, nbytes(model) / 2**30,
    )  # fmt: skip
    return model.eval()


def applied_layers(applied: AppliedRecipe) -> dict[str, Coded]:
    """The layers that a recipe quantizes."""
    shapes = {name: applied.weight(name).shape for name in applied.coded}
    return {
        name: Coded(layer.scheme, (shapes[name][0], shapes[name][1])) for name, layer in applied.coded.items()
    }


def coded_layers(expert: Expert) -> dict[str, Coded]:
    """The layers that are codes on disk, or smoothed, with their `mul_scale`."""
    found = {}
    with RowReader() as reader:
        for name, layer in expert.layers.items():
            scheme = scheme_after_reading(layer.scheme)
            smooth = layer.tensors.get("mul_scale")
            if scheme != "bf16" or smooth is not None:
                scale = None if smooth is None else _mul_scale(smooth, reader)
                found[name] = Coded(scheme, layer.shape, scale)
    return found


def _mul_scale(info: TensorInfo, reader: RowReader) -> Tensor | None:
    """float32 [K]; None for ones, which change nothing."""
    data = reader.whole(info)
    check_positive(data, info.dtype, info.name)
    scale = torch.frombuffer(bytearray(to_float32(data, info.dtype, info.name)), dtype=torch.float32)
    return None if bool((scale == 1).all()) else scale


def keep_floats(model: nn.Module, applied: AppliedRecipe, device: str, dtype: torch.dtype) -> None:
    """Give every quantized layer its weight and bias as they were, for steps in BF16."""
    with RowReader() as reader:
        rows = SourceRows(applied, reader, None)

        def whole(name: str) -> Tensor | None:
            info = applied.expert.tensors.get(name)
            if info is None:
                return None
            value = torch.empty(info.shape, dtype=dtype)
            for start, part in rows.blocks(name, info):
                value[start : start + part.shape[0]] = part
            return value.to(device)

        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                weight = whole(f"{name}.weight")
                assert weight is not None, name
                module.floats = (weight, whole(f"{name}.bias"))


def say_attention(expert: Expert) -> None:
    """Log once what the manifest asks of attentions and is not done; E-CKP-07 for words nobody knows."""
    if unknown := sorted(set(expert.attention.values()) - set(QUANT_TYPES)):
        raise CheckpointError(
            f"{expert.path}: attention of type {', '.join(unknown)} in the manifest",
            needs=f"one of {', '.join(QUANT_TYPES)}",
            fix="correct quant_model_description.json, or export the model again",
            code="E-CKP-07",
        )
    if found := Counter(expert.attention.values()):
        asked = ", ".join(f"{word} for {n}" for word, n in found.items())
        log.warning("%s: quantized attention (%s) runs in BF16 here", expert.name, asked)
