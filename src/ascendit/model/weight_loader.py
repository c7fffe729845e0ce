"""Weight loader: a `Sink` that fills a model on the meta device with parameters and quantized layers.

Layers that read the same activation are fused along N if they have the same scheme and `mul_scale`: Q, K and
V of self-attention, K and V of cross-attention. The host tensors of a fused group are allocated before its
first rows arrive and passed on after the last, so nothing is held twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ascendit.checkpoint.reader import RowReader, as_bytes
from ascendit.checkpoint.tensor_info import TORCH_DTYPES
from ascendit.checkpoint.writer import Data, TensorSpec
from ascendit.errors import CheckpointError, UsageError
from ascendit.model.linear import QuantLinear, SmoothLinear, fused_linears
from ascendit.model.wan import WanTransformer
from ascendit.ops.operators import Schemes
from ascendit.quant.fusion import first_in_group
from ascendit.quant.schemes import SCHEMES
from ascendit.weights.tensor_steps import Sink, TensorStep


@dataclass(frozen=True)
class StoredLinear:
    """A layer that is quantized, smoothed, or both."""

    scheme: str
    """bf16 if it is only smoothed."""
    width: int
    """K, of this rank's shard."""
    mul_scale: Tensor | None = None
    """float32 [K] on the CPU; None if absent or all ones."""


@dataclass
class _Group:
    """Layers fused into one weight, or a single layer that is only smoothed."""

    layer: StoredLinear
    """The properties that all layers share; its `mul_scale` is on the device."""
    specs: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    """Layer -> role -> expected tensor."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Role -> host tensor of all layers, concatenated along N."""
    missing: set[str] = field(default_factory=set)
    """Names of incomplete tensors."""

    def memory(self, layer: str, role: str) -> Tensor:
        """The rows of one layer in the host tensor of `role`, allocated on first use."""
        sizes = [specs[role].shape[0] for specs in self.specs.values()]
        if role not in self.tensors:
            spec = self.specs[layer][role]
            self.tensors[role] = torch.empty((sum(sizes), *spec.shape[1:]), dtype=torch_dtype(spec))
        index = list(self.specs).index(layer)
        return self.tensors[role][sum(sizes[:index]) : sum(sizes[: index + 1])]

    def linears(self, schemes: Schemes, compute_dtype: torch.dtype) -> list[QuantLinear]:
        """Move the layers to their device and release the host tensors. Raises CheckpointError (E-CKP-08)."""
        tensors, self.tensors = self.tensors, {}
        names = ", ".join(self.specs)
        if (bias := tensors.get("bias")) is not None and not bool(bias.isfinite().all()):
            raise CheckpointError(
                f"{names}: the bias has NaN or infinite values",
                needs="finite values",
                fix="download or export the model again",
                code="E-CKP-08",
            )
        sizes = [specs["weight"].shape[0] for specs in self.specs.values()]
        try:
            return fused_linears(
                tensors,
                sizes,
                self.layer.scheme,
                schemes,
                width=self.layer.width,
                compute_dtype=compute_dtype,
                mul_scale=self.layer.mul_scale,
            )
        except UsageError as e:
            e.got = f"{names}: {e.got}"
            raise


class ModelSink(Sink):
    """Writes the tensors of a plan into `model`; ignores static scales of attention.

    `layers`: the quantized or smoothed layers. `dtype`: dtype of the other parameters, except those with a
    part of their name in `float32`.
    """

    def __init__(
        self,
        model: WanTransformer,
        reader: RowReader,
        steps: Iterable[TensorStep],
        layers: Mapping[str, StoredLinear],
        *,
        device: str,
        dtype: torch.dtype,
        float32: tuple[str, ...] = (),
    ) -> None:
        self._model, self._reader = model, reader
        self._device, self._dtype, self._float32 = device, dtype, float32
        self._specs = {spec.name: spec for step in steps for spec in step.specs}
        self._groups = self._grouped(layers)
        self._parameters = {name for name, _ in model.named_parameters()}
        self._name, self._tensor, self._remaining = "", torch.empty(0), memoryview(b"")

    def append(self, name: str, data: Data) -> None:
        """Write the next bytes of a tensor."""
        if (buffer := self._buffer(name)) is not None:
            chunk = memoryview(data).cast("B")
            buffer[: len(chunk)] = chunk
            self._advance(len(chunk))

    def move(self, step: TensorStep) -> None:
        """Read a tensor, or its shard, from its file directly into the model's memory."""
        if (buffer := self._buffer(step.name)) is not None:
            self._reader.read_into(step.sources[0], buffer, step.shard)
            self._advance(len(buffer))

    def _grouped(self, layers: Mapping[str, StoredLinear]) -> dict[str, _Group]:
        """Layer -> its group: layers with one input, scheme, K, smoothing and bias, else alone.

        In a scheme with tiles, a tile never holds rows of two layers.
        """
        roles: dict[str, dict[str, TensorSpec]] = {name: {} for name in layers}
        for spec in self._specs.values():
            name, _, role = spec.name.rpartition(".")
            if name in layers and role not in ("weight_offset", "mul_scale"):
                roles[name][role] = spec
        groups: dict[tuple[object, ...], _Group] = {}
        by_layer: dict[str, _Group] = {}
        scales: dict[bytes, Tensor] = {}
        for name, layer in layers.items():
            key: tuple[object, ...] = (name,)
            scale = layer.mul_scale
            if scale is not None:  # equal factors share one tensor
                digest = hashlib.sha256(as_bytes(scale)).digest()
                scale = scales[digest] if digest in scales else scale.to(self._device)
                scales[digest] = scale
            rows = roles[name]["weight"].shape[0] if layer.scheme != "bf16" else 0
            if rows and not rows % (SCHEMES[layer.scheme].tile or 1):
                key = (first_in_group(name), layer.scheme, layer.width, id(scale), "bias" in roles[name])
            group = groups.setdefault(key, _Group(replace(layer, mul_scale=scale)))
            group.specs[name] = roles[name]
            group.missing |= {spec.name for spec in roles[name].values()}
            by_layer[name] = group
        return by_layer

    def _buffer(self, name: str) -> memoryview | None:
        """The unfilled bytes of a tensor; None if the model does not have it."""
        if name != self._name:
            layer, _, role = name.rpartition(".")
            if (group := self._groups.get(layer)) is not None and role in group.specs[layer]:
                self._tensor = group.memory(layer, role)
            elif group is None and name in self._parameters:
                self._tensor = torch.empty(self._specs[name].shape, dtype=torch_dtype(self._specs[name]))
            else:
                return None
            assert not self._remaining, f"{self._name} is not complete"
            self._name, self._remaining = name, as_bytes(self._tensor)
        return self._remaining

    def _advance(self, count: int) -> None:
        """Count written bytes. Register a complete parameter, or the layers of a complete group."""
        self._remaining = self._remaining[count:]
        if self._remaining:
            return
        owner, _, leaf = self._name.rpartition(".")
        if (group := self._groups.get(owner)) is None:
            parameter = nn.Parameter(self._moved(self._name, self._tensor), requires_grad=False)
            self._model.get_submodule(owner).register_parameter(leaf, parameter)
            return
        group.missing.discard(self._name)
        if not group.missing:
            for name, module in zip(group.specs, self._linears(group), strict=True):
                self._model.set_submodule(name, module)

    def _linears(self, group: _Group) -> Sequence[nn.Linear]:
        if group.layer.scheme != "bf16":
            return group.linears(self._model.ops.quantized, self._dtype)
        assert group.layer.mul_scale is not None
        name = next(iter(group.specs))
        tensors = {role: self._moved(f"{name}.{role}", x) for role, x in group.tensors.items()}
        return [SmoothLinear(tensors["weight"], tensors.get("bias"), group.layer.mul_scale)]

    def _moved(self, name: str, value: Tensor) -> Tensor:
        """A float tensor on the device of the model, in its dtype there."""
        float32 = any(component in name.split(".") for component in self._float32)
        return value.to(self._device, torch.float32 if float32 else self._dtype)


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """The torch dtype of the tensor that `spec` describes."""
    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[spec.dtype])
    return dtype


def nbytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, and of weights prepared for kernels."""
    extra = sum(m.extra_nbytes for m in model.modules() if isinstance(m, QuantLinear))
    return extra + sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
