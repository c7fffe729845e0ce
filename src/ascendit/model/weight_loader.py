"""Where the tensors of a model go while they arrive: floats into parameters, codes into joint weights.

Weights that read the same tokens are joined along N: Q, K and V of self-attention, K and V of
cross-attention. Only layers of one scheme and one `mul_scale` are; the others stay by themselves. The joint
tensors are made before their rows come, so nothing is held twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ascendit.checkpoint.writer import TensorSpec
from ascendit.errors import CheckpointError, UsageError
from ascendit.model.linear import QuantLinear, SmoothLinear, fused_linears
from ascendit.ops.operators import Schemes
from ascendit.quant.fusion import leader_of
from ascendit.weights.tensor_stream import torch_dtype


@dataclass
class Stack:
    """Layers that become one weight: host tensors for all of them, filled as their rows arrive."""

    layers: list[str]
    scheme: str
    shapes: list[tuple[int, int]]
    """(N, K) of each."""
    mul_scale: Tensor | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    """Names of tensors that have not arrived."""

    def room(self, spec: TensorSpec) -> Tensor | None:
        """The rows of one member in the joint tensor of its role."""
        layer, _, role = spec.name.rpartition(".")
        if role in ("weight_offset", "mul_scale"):
            return None
        rows = sum(n for n, _ in self.shapes)
        if role not in self.tensors:
            self.tensors[role] = torch.empty((rows, *spec.shape[1:]), dtype=torch_dtype(spec))
        at = self.layers.index(layer)
        start = sum(n for n, _ in self.shapes[:at])
        return self.tensors[role][start : start + self.shapes[at][0]]

    def layers_on(self, schemes: Schemes, compute_dtype: torch.dtype) -> list[QuantLinear]:
        """The layers, on their device; the host tensors are given away."""
        got, self.tensors = self.tensors, {}
        if (bias := got.get("bias")) is not None and not bool(bias.isfinite().all()):
            raise CheckpointError(
                f"{', '.join(self.layers)}: a bias that is not finite",
                needs="finite numbers",
                fix="download or export the model again",
                code="E-CKP-08",
            )
        sizes, width = [n for n, _ in self.shapes], self.shapes[0][1]
        try:
            return fused_linears(
                got,
                sizes,
                self.scheme,
                schemes,
                width=width,
                compute_dtype=compute_dtype,
                mul_scale=self.mul_scale,
            )
        except UsageError as e:
            e.got = f"{', '.join(self.layers)}: {e.got}"
            raise


@dataclass(frozen=True)
class Coded:
    """One layer that is not plain floating point."""

    scheme: str
    """bf16: smoothed, not quantized."""
    shape: tuple[int, int]
    mul_scale: Tensor | None = None


class Arrangement:
    """Takes every tensor of an expert into `model`, which lies on the meta device."""

    def __init__(
        self,
        model: nn.Module,
        specs: Iterable[TensorSpec],
        coded: Mapping[str, Coded],
        schemes: Schemes,
        *,
        device: str,
        dtype: torch.dtype,
        wide: tuple[str, ...] = (),
    ) -> None:
        """`wide`: parts of names that stay in float32 whatever `dtype` is."""
        self._model, self._schemes, self._device, self._dtype, self._wide = (
            model,
            schemes,
            device,
            dtype,
            wide,
        )
        self._specs = {spec.name: spec for spec in specs}
        self._floats: dict[str, Tensor] = {}
        self._smoothed: dict[str, dict[str, Tensor]] = {}
        self._alike: dict[bytes, Tensor] = {}
        self._coded = {name: self._on_device(layer) for name, layer in coded.items()}
        self._parameters = {name for name, _ in model.named_parameters()}
        self._stacks = {layer: stack for stack in self._make_stacks() for layer in stack.layers}
        for name in self._specs:
            if stack := self._stacks.get(name.rpartition(".")[0]):
                stack.waiting.add(name)

    # ---- what TensorSink calls ------------------------------------------------------------------

    def room(self, spec: TensorSpec) -> Tensor | None:
        """Where the bytes of a tensor go; None for what the model does not have, as rotations."""
        if stack := self._stacks.get(spec.name.rpartition(".")[0]):
            return stack.room(spec)
        if spec.name not in self._parameters:
            return None
        self._floats[spec.name] = torch.empty(spec.shape, dtype=torch_dtype(spec))
        return self._floats[spec.name]

    def arrived(self, name: str) -> None:
        """A tensor is whole: a float takes its place; the last one of a stack makes the layers."""
        layer = name.rpartition(".")[0]
        if stack := self._stacks.get(layer):
            stack.waiting.discard(name)
            if not stack.waiting:
                self._finish(stack)
        elif name in self._floats:
            self._place(name, self._floats.pop(name))

    # ---- parts ----------------------------------------------------------------------------------

    def _on_device(self, layer: Coded) -> Coded:
        """With its `mul_scale` on the device; layers that are smoothed alike share one tensor."""
        if layer.mul_scale is None:
            return layer
        key = hashlib.sha256(layer.mul_scale.numpy().tobytes()).digest()
        if key not in self._alike:
            self._alike[key] = layer.mul_scale.to(self._device)
        return Coded(layer.scheme, layer.shape, self._alike[key])

    def _make_stacks(self) -> Iterator[Stack]:
        """Members of a family that agree in scheme, K, smoothing and bias are one; else each by itself."""
        stacks: dict[tuple[object, ...], Stack] = {}
        for name, layer in self._coded.items():
            if layer.scheme == "bf16":
                continue
            bias = f"{name}.bias" in self._specs
            key = (leader_of(name), layer.scheme, layer.shape[1], id(layer.mul_scale), bias)
            stack = stacks.setdefault(key, Stack([], layer.scheme, [], layer.mul_scale))
            stack.layers.append(name)
            stack.shapes.append(layer.shape)
        yield from stacks.values()

    def _finish(self, stack: Stack) -> None:
        for name, module in zip(stack.layers, stack.layers_on(self._schemes, self._dtype), strict=True):
            self._model.set_submodule(name, module)

    def _place(self, name: str, value: Tensor) -> None:
        """A float tensor as a parameter; or into the smoothed layer that it belongs to."""
        owner, _, leaf = name.rpartition(".")
        keep = any(part in name.split(".") for part in self._wide)
        value = value.to(self._device, torch.float32 if keep else self._dtype)
        smooth = self._coded.get(owner)
        if smooth is not None and smooth.mul_scale is not None:
            parts = self._smoothed.setdefault(owner, {})
            parts[leaf] = value
            if len(parts) == 1 + (f"{owner}.bias" in self._specs):
                made = SmoothLinear(parts["weight"], parts.get("bias"), smooth.mul_scale)
                self._model.set_submodule(owner, made)
            return
        module = self._model.get_submodule(owner)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def nbytes(model: nn.Module) -> int:
    """Bytes of parameters, buffers, codes and scales."""
    kept = sum(m.extra_nbytes for m in model.modules() if isinstance(m, QuantLinear))
    return kept + sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
