"""A model on the meta device as a `Sink`: floats become parameters, codes become quantized layers.

Layers that read the same activation are fused along N: Q, K and V of self-attention, K and V of
cross-attention, if they agree in scheme and `mul_scale`. The host tensors of a fused group are made before
its first rows come and handed over with the last, so nothing is held twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ascendit.checkpoint.reader import TORCH_DTYPES, RowReader, as_bytes
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
    """One layer that is quantized, smoothed, or both."""

    scheme: str
    """bf16: smoothed only."""
    width: int
    """K, of its part if it is divided."""
    mul_scale: Tensor | None = None
    """float32 [K] on the CPU; None: none, or ones, which change nothing."""


@dataclass
class _Group:
    """Layers that become one weight; a layer that is only smoothed is alone."""

    layer: StoredLinear
    """What all of them are like; its `mul_scale` is on the device."""
    specs: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    """Layer -> role -> the tensor that will come."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Role -> host tensor of all layers, one after the other along N."""
    missing: set[str] = field(default_factory=set)
    """Names of tensors that are not complete."""

    def memory(self, layer: str, role: str) -> Tensor:
        """The rows of one layer in the host tensor of `role`."""
        sizes = [specs[role].shape[0] for specs in self.specs.values()]
        if role not in self.tensors:
            spec = self.specs[layer][role]
            self.tensors[role] = torch.empty((sum(sizes), *spec.shape[1:]), dtype=torch_dtype(spec))
        member = list(self.specs).index(layer)
        return self.tensors[role][sum(sizes[:member]) : sum(sizes[: member + 1])]

    def linears(self, schemes: Schemes, compute_dtype: torch.dtype) -> list[QuantLinear]:
        """The layers on their device; the host tensors are given away. CheckpointError E-CKP-08."""
        tensors, self.tensors = self.tensors, {}
        names = ", ".join(self.specs)
        if (bias := tensors.get("bias")) is not None and not bool(bias.isfinite().all()):
            raise CheckpointError(
                f"{names}: a bias that is not finite",
                needs="finite numbers",
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
    """Takes every tensor of a plan into `model`; what the model does not have, as rotations, is passed over.

    `layers`: those that are quantized or smoothed. `dtype`: of the other parameters, but those with a part of
    their name in `wide` stay in float32.
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
        wide: tuple[str, ...] = (),
    ) -> None:
        self._model, self._reader = model, reader
        self._device, self._dtype, self._wide = device, dtype, wide
        self._specs = {spec.name: spec for step in steps for spec in step.specs}
        self._groups = self._grouped(layers)
        self._parameters = {name for name, _ in model.named_parameters()}
        self._filling, self._tensor, self._left = "", torch.empty(0), memoryview(b"")

    def append(self, name: str, data: Data) -> None:
        """The next bytes of a tensor."""
        if (room := self._room(name)) is not None:
            piece = memoryview(data).cast("B")
            room[: len(piece)] = piece
            self._filled(len(piece))

    def move(self, step: TensorStep) -> None:
        """A tensor, or its part, read from its file into its place."""
        if (room := self._room(step.name)) is not None:
            self._reader.into(step.sources[0], room, step.shard)
            self._filled(len(room))

    def _grouped(self, layers: Mapping[str, StoredLinear]) -> dict[str, _Group]:
        """Layer -> its group: members of a family that agree in scheme, K, smoothing and bias, else alone.

        In a scheme with tiles, rows of two members must not meet in one tile.
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
            if scale is not None:  # layers that are smoothed alike share one tensor
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

    def _room(self, name: str) -> memoryview | None:
        """What is left to fill of a tensor; None for one that the model does not have."""
        if name != self._filling:
            layer, _, role = name.rpartition(".")
            if (group := self._groups.get(layer)) is not None and role in group.specs[layer]:
                self._tensor = group.memory(layer, role)
            elif group is None and name in self._parameters:
                self._tensor = torch.empty(self._specs[name].shape, dtype=torch_dtype(self._specs[name]))
            else:
                return None
            assert not self._left, f"{self._filling} is not complete"
            self._filling, self._left = name, as_bytes(self._tensor)
        return self._left

    def _filled(self, count: int) -> None:
        """Count bytes. A complete float takes its place; the last tensor of a group makes its layers."""
        self._left = self._left[count:]
        if self._left:
            return
        owner, _, leaf = self._filling.rpartition(".")
        if (group := self._groups.get(owner)) is None:
            parameter = nn.Parameter(self._placed(self._filling, self._tensor), requires_grad=False)
            self._model.get_submodule(owner).register_parameter(leaf, parameter)
            return
        group.missing.discard(self._filling)
        if not group.missing:
            for name, module in zip(group.specs, self._linears(group), strict=True):
                self._model.set_submodule(name, module)

    def _linears(self, group: _Group) -> Sequence[nn.Linear]:
        if group.layer.scheme != "bf16":
            return group.linears(self._model.ops.quantized, self._dtype)
        assert group.layer.mul_scale is not None
        name = next(iter(group.specs))
        parts = {role: self._placed(f"{name}.{role}", x) for role, x in group.tensors.items()}
        return [SmoothLinear(parts["weight"], parts.get("bias"), group.layer.mul_scale)]

    def _placed(self, name: str, value: Tensor) -> Tensor:
        """A float tensor on the device, in its dtype there."""
        keep = any(part in name.split(".") for part in self._wide)
        return value.to(self._device, torch.float32 if keep else self._dtype)


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """Of a tensor that is to hold `spec`."""
    found: torch.dtype = getattr(torch, TORCH_DTYPES[spec.dtype])
    return found


def nbytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers, codes and scales."""
    kept = sum(m.extra_nbytes for m in model.modules() if isinstance(m, QuantLinear))
    return kept + sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
