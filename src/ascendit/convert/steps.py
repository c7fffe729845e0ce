"""From an expert as it lies to an expert as it will lie: one step for each tensor of the output. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ascendit.checkpoint.expert import Expert, Layer
from ascendit.checkpoint.names import is_block_linear, sort_names
from ascendit.checkpoint.store import TensorInfo
from ascendit.checkpoint.write import TensorSpec
from ascendit.convert.dialects import Dialect
from ascendit.convert.rewrite import Check, How, Step, to_float32
from ascendit.convert.stream import RowReader
from ascendit.quant.fusion import fused_with
from ascendit.quant.schemes import FP8_TILES, scheme_after_reading

_CHECKS: dict[str, Check] = {
    "weight_scale": "scale",
    "weight_dual_scale": "scale",
    "weight_offset": "zero",
    "mul_scale": "positive",
}


def schemes_of(expert: Expert) -> dict[str, str]:
    """Every linear of the blocks, and every other layer that is quantized or smoothed -> scheme, in order.

    FP8 in tiles is `bf16` here: that is what becomes of it.
    """
    found = {name.removesuffix(".weight"): "bf16" for name in expert.tensors if name.endswith(".weight")}
    layers = {name: scheme for name, scheme in found.items() if is_block_linear(name)}
    layers |= {name: scheme_after_reading(x.scheme) for name, x in expert.layers.items()}
    return {name: layers[name] for name in sort_names(layers)}


def smoothed_layers(expert: Expert) -> set[str]:
    """Layers with a `mul_scale`."""
    return {name for name, layer in expert.layers.items() if "mul_scale" in layer.tensors}


@dataclass(frozen=True)
class Steps:
    """The way of one expert."""

    written: tuple[Step, ...]
    """One for each tensor of the output, in the order it is written."""
    dropped: tuple[Step, ...]
    """Zeros that the reader does without; they are checked, and not written."""

    @property
    def specs(self) -> list[TensorSpec]:
        return [step.spec for step in self.written]

    @property
    def smoothed(self) -> set[str]:
        """Layers that have a `mul_scale` in the output."""
        return {step.name.removesuffix(".mul_scale") for step in self.written if _is_smoothing(step.name)}

    @property
    def names(self) -> list[str]:
        """Diffusers names, in the order they are written."""
        return [step.name for step in self.written]


def unlike_qkv(expert: Expert) -> bool:
    """Whether the `mul_scale` of a Q, K and V of one self-attention differ, or are not on all three."""
    with RowReader() as reader:
        for name in smoothed_layers(expert):
            group = [expert.layers.get(other) for other in fused_with(name)]
            if len(group) == 1:
                continue
            scales = [layer.tensors.get("mul_scale") if layer else None for layer in group]
            data = {None if x is None else to_float32(reader.whole(x), x.dtype, x.name) for x in scales}
            if len(data) > 1:
                return True
    return False


def steps_for(expert: Expert, dialect: Dialect) -> Steps:
    """Every tensor of the source has its place in one step; names were checked when it was read."""
    steps = {step.name: step for layer in expert.layers.values() for step in _layer(layer, dialect)}
    dropped = () if dialect.offset else tuple(_offsets(expert))
    used = {info for step in (*steps.values(), *dropped) for info in step.sources}
    for name, info in expert.tensors.items():
        if info not in used:
            assert name not in steps, name
            steps[name] = _moved(name, info)
    ordered = Steps(tuple(steps[name] for name in sort_names(steps)), dropped)
    smoothed = ordered.smoothed
    written = tuple(
        replace(step, spec=replace(step.spec, name=dialect.on_disk(step.name, smoothed)))
        for step in ordered.written
    )
    return Steps(written, dropped)


def _is_smoothing(name: str) -> bool:
    return name.endswith(".mul_scale")


def _moved(name: str, info: TensorInfo) -> Step:
    spec = TensorSpec(name, info.dtype, info.shape, info.start)
    return Step(spec=spec, name=name, how="move", sources=(info,))


def _offsets(expert: Expert) -> Iterator[Step]:
    for layer in expert.layers.values():
        if (info := layer.tensors.get("weight_offset")) is not None:
            name = f"{layer.name}.weight_offset"
            spec = TensorSpec(name, info.dtype, info.shape)
            yield Step(spec=spec, name=name, how="copy", sources=(info,), check="zero")


def _layer(layer: Layer, dialect: Dialect) -> Iterator[Step]:
    """The tensors of one linear layer."""
    scheme = scheme_after_reading(layer.scheme)
    weight, bias = layer.tensors["weight"], layer.tensors.get("bias")
    specs = dialect.layer_specs(
        layer.name,
        scheme,
        layer.shape,
        bias=bias is not None,
        mul_scale="mul_scale" in layer.tensors,
        float_dtype=weight.dtype if layer.scheme == "bf16" else "BF16",
    )
    for spec in specs:
        role = spec.name.rpartition(".")[2]
        info = layer.tensors.get(role)
        if role == "weight":
            yield _weight(layer, spec, weight, dialect)
        elif info is None:
            yield Step(spec=spec, name=spec.name, how="fill", value=1.0 if role == "mul_scale" else 0.0)
        elif role == "bias" and scheme == "bf16":
            yield _moved(spec.name, info)
        else:
            yield _scale(spec, info, role)


def _weight(layer: Layer, spec: TensorSpec, info: TensorInfo, dialect: Dialect) -> Step:
    if layer.scheme == FP8_TILES:
        sources = (info, layer.tensors["weight_scale_inv"])
        return Step(spec=spec, name=spec.name, how="untile", sources=sources)
    target = dialect.container(layer.scheme)
    if layer.container == target:
        return Step(spec=replace(spec, source_start=info.start), name=spec.name, how="move", sources=(info,))
    return Step(
        spec=spec, name=spec.name, how="recode", sources=(info,), containers=(layer.container, target)
    )


def _scale(spec: TensorSpec, info: TensorInfo, role: str) -> Step:
    """A scale, offset, smoothing factor, or the bias of a quantized layer."""
    check = _CHECKS.get(role, "")
    if spec.dtype == "U8":
        return Step(spec=spec, name=spec.name, how="copy", sources=(info,), check="scale_bytes")
    if math.prod(info.shape) == 1 != math.prod(spec.shape):
        return Step(spec=spec, name=spec.name, how="repeat", sources=(info,), check=check)
    assert math.prod(info.shape) == math.prod(spec.shape), info
    how: How = "widen" if info.dtype != spec.dtype else "copy" if check else "move"
    return Step(spec=spec, name=spec.name, how=how, sources=(info,), check=check)
