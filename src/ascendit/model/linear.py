"""Quantized linear layers as modules: quantize the activation and multiply, with the operators of the scheme.

    m = QuantLinear.from_encoded(mx.encode(w, "mxfp8"), bias, schemes=bind("cpu").quantized)
    y = m(x)                                   # x's dtype

    shared = LinearInput(x)                    # Q, K and V read the same activation:
    q, k, v = (linear(ops, m, shared) for m in (to_q, to_k, to_v))     # one quantization, one matmul

Quantized weights and scales are parameters of the layer, with the names and shapes they have on disk, so
moving, state dicts, offloading and FSDP2 work as in PyTorch. The layers of a `FusedGroup` hold consecutive
rows of one storage, and the first one called multiplies for all of them. If something has replaced their
parameters, each layer multiplies alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ascendit.checkpoint.layer_format import check_scale_bytes
from ascendit.checkpoint.reader import as_bytes
from ascendit.errors import CheckpointError, UsageError
from ascendit.kernels.kernel import Activation, PreparedWeight
from ascendit.mx.codec import Encoded, decode
from ascendit.mx.formats import Format, lookup
from ascendit.mx.smoothing import smooth_input
from ascendit.ops.operators import Ops, Schemes, schemes_on
from ascendit.quant.schemes import SCHEMES, scheme_of
from ascendit.schedule import Precision
from ascendit.weights.tensor_steps import CHECKS

_FUSING = threading.RLock()
"""Held while a group prepares its weight, which replaces parameters; a module may run in several threads."""
Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
FUSED_ROLES = ("weight", "weight_scale", "weight_dual_scale", "bias")
"""Parameters of a layer that are rows of a tensor of its group."""


class LinearInput:
    """Input of one or more linear layers; quantized once per scheme and smoothing."""

    def __init__(self, x: Tensor) -> None:
        """`x`: hidden states [.., K] in a float dtype."""
        self.x = x
        self._cache: dict[tuple[str, int], Any] = {}
        self._outputs: dict[tuple[int, str, int], dict[QuantLinear, Tensor]] = {}

    def activation(self, schemes: Schemes, scheme: str, mul_scale: Tensor | None) -> Activation:
        """The input times `mul_scale` (float32 [K]), quantized; equal factors share one tensor."""
        key = (scheme, _address(mul_scale))
        if key not in self._cache:
            self._cache[key] = schemes.quantize_activation(self.x, scheme, mul_scale)
        quantized: Activation = self._cache[key]
        return quantized

    def smoothed(self, mul_scale: Tensor) -> Tensor:
        """The input times `mul_scale` (float32 [K]): [.., K] in the dtype of the input."""
        key = ("smoothed", _address(mul_scale))
        if key not in self._cache:
            self._cache[key] = smooth_input(self.x, mul_scale)
        smoothed: Tensor = self._cache[key]
        return smoothed

    def output(self, layer: QuantLinear, scheme: str) -> Tensor:
        """The output [.., N] of `layer` in x's dtype; computed for its group, released on return."""
        group, mul_scale = layer.group, layer._parameters["mul_scale"]
        outputs = self._outputs.setdefault((id(group), scheme, _address(mul_scale)), {})
        if layer not in outputs:
            weight, layers = group.weight_for(layer)
            schemes = group.schemes
            y = schemes.quantized_linear(self.activation(schemes, scheme, mul_scale), weight)
            if len(layers) == 1:
                return y
            outputs |= zip(layers, y.split([m.out_features for m in layers], dim=-1), strict=True)
        return outputs.pop(layer)


def _address(mul_scale: Tensor | None) -> int:
    return 0 if mul_scale is None else mul_scale.data_ptr()


class FusedGroup:
    """Layers of one scheme and one K that read the same activation, multiplied as one matrix by `schemes`.

    The prepared weight stays valid as long as the parameters it was prepared from are unchanged. Parameters
    that something else has replaced (FSDP2, offloading hooks) are prepared on each call and not cached,
    because that code controls their memory.
    """

    def __init__(self, layers: Sequence[QuantLinear], schemes: Schemes) -> None:
        self.layers, self.schemes = tuple(layers), schemes
        self.weight: PreparedWeight | None = None
        self._sources: list[tuple[dict[str, Any], str, int, int]] = []
        """Parameters that `weight` was prepared from: their dictionary, role, address and version."""
        self._copied = False
        for m in layers:
            m.group = self
        self.fuse()

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`: a copy has new addresses and is fused again at its first call."""
        weight = self.weight if self.packed else None
        return vars(self) | {"weight": weight, "_sources": [], "_copied": True}

    @property
    def packed(self) -> bool:
        """Whether the kernel's layout of the weight differs (FRACTAL_NZ) and has replaced the parameters."""
        return self.weight is not None and self.layers[0]._parameters["weight"] is None

    @property
    def extra_nbytes(self) -> int:
        """Bytes of the prepared weight in addition to the parameters."""
        owned = {p.untyped_storage().data_ptr() for m in self.layers for p in m.parameters()}
        tensors = () if self.weight is None else self.weight.tensors
        return sum(t.nbytes for t in tensors if t.untyped_storage().data_ptr() not in owned)

    def weight_for(self, layer: QuantLinear) -> tuple[PreparedWeight, Sequence[QuantLinear]]:
        """The prepared weight and the layers whose rows it holds.

        See `PreparedWeight`. Raises UsageError (E-QNT-03) if a parameter was cast.
        """
        weight = self.weight
        if not self._copied and weight is not None and (self._unchanged() or self.packed):
            return weight, self.layers
        with _FUSING:
            if self._copied:
                self.fuse()
                self._copied = False
            if self.weight is not None and (self._unchanged() or self.packed):
                return self.weight, self.layers
            self.weight = None
            layer.check_dtypes()
            self._use_device(layer.device)
            return self._prepare(map(layer._parameters.get, FUSED_ROLES), layer), (layer,)

    def fuse(self, schemes: Schemes | None = None) -> None:
        """Make the rows of all layers consecutive and prepare them for the kernel.

        Does nothing while the layers are on several devices, on the meta device, or sharded by FSDP2.
        `schemes`: replaces the operators of the group.
        """
        if schemes is not None:
            self.unpack()
            self.schemes = schemes
        elif self._unchanged():
            return
        tensors = [p for m in self.layers for p in map(m._parameters.get, FUSED_ROLES) if p is not None]
        devices = {t.device for t in tensors}
        if len(devices) > 1 or tensors[0].is_meta or any(type(t) is not nn.Parameter for t in tensors):
            return
        self._use_device(tensors[0].device)
        self._share_mul_scale()
        fused = [self._fused(role) for role in FUSED_ROLES]
        self.weight, qdata = self._prepare(fused, self.layers[0]), fused[0]
        assert qdata is not None
        if self.weight.qdata.untyped_storage().data_ptr() != qdata.untyped_storage().data_ptr():
            for m in self.layers:
                m._parameters["weight"] = None
        self._sources = [
            (m._parameters, role, t.data_ptr(), -1 if t.is_inference() else t._version)
            for m in self.layers
            for role in FUSED_ROLES
            if (t := m._parameters[role]) is not None
        ]

    def unpack(self) -> None:
        """Restore the weights as parameters in their stored layout."""
        if self.packed:
            for m, rows in zip(self.layers, self._unpacked(), strict=True):
                m._parameters["weight"] = _parameter(rows)
            self.weight = None

    def qdata(self, layer: QuantLinear) -> Tensor:
        """The quantized weight [N, K] of one layer in its stored layout and dtype."""
        qdata = layer._parameters["weight"]
        return self._unpacked()[self.layers.index(layer)] if qdata is None else qdata

    def _unpacked(self) -> tuple[Tensor, ...]:
        assert self.weight is not None
        rows: tuple[Tensor, ...] = self.schemes.stored(self.weight).qdata.split(self._sizes)
        return rows

    @property
    def _sizes(self) -> list[int]:
        return [m.out_features for m in self.layers]

    def _unchanged(self) -> bool:
        """Whether the parameters are unchanged; misses writes via `.data` and to inference tensors."""
        for parameters, role, address, version in self._sources:
            t = parameters[role]
            if t is None or t.data_ptr() != address or (version >= 0 and t._version != version):
                return False
        return self.weight is not None

    def _use_device(self, device: torch.device) -> None:
        """Switch to the operators of the parameters' device."""
        bound = torch.device(self.schemes.device.torch_name)  # `cuda` is `cuda:0`
        if (bound.type, bound.index or 0) != (device.type, device.index or 0):
            self.schemes = schemes_on(str(device), self.schemes)

    def _fused(self, role: str) -> Tensor | None:
        """The rows of all layers as one tensor; the parameters become views of it."""
        rows = [p for m in self.layers if (p := m._parameters[role]) is not None]
        if len(rows) < 2:
            return rows[0].data if rows else None
        sizes = [len(t) for t in rows]
        first, shape = rows[0].data, (sum(sizes), *rows[0].shape[1:])
        one_storage = len({t.untyped_storage().data_ptr() for t in rows}) == 1
        if one_storage and all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(rows)):
            return first.as_strided(shape, first.stride())
        fused = torch.cat([t.data for t in rows])
        for t, view in zip(rows, fused.split(sizes), strict=True):
            t.data = view
        return fused

    def _share_mul_scale(self) -> None:
        """Make equal factors one parameter again: a move may have copied them."""
        first = self.layers[0]._parameters["mul_scale"]
        for m in self.layers[1:]:
            other = m._parameters["mul_scale"]
            if first is not None and other is not None and torch.equal(first, other):
                m._parameters["mul_scale"] = first

    def _prepare(self, tensors: Iterable[Tensor | None], layer: QuantLinear) -> PreparedWeight:
        detached: Any = [None if t is None else t.detach() for t in tensors]
        qdata, scale, dual, bias = detached
        k = layer.in_features
        return self.schemes.prepare_weight(qdata, scale, dual, bias, layer.scheme, width=k)


class DecodedWeight(Tensor):
    """A read-only dequantized copy of a quantized weight. Access to `data` is refused: writes would be lost.

    Results of computations with it are plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Always raises UsageError (E-QNT-03): PEFT and Diffusers fuse a LoRA through `data` ([N, K], any
        dtype).
        """
        raise UsageError(
            "access to weight.data of a quantized layer",
            needs="a floating-point weight, to fuse a LoRA or projections into it",
            fix="fuse before quantizing, or use the LoRA without fusing it",
            code="E-QNT-03",
        )


class QuantLinear(nn.Linear):
    """A quantized linear layer whose parameters have their stored layout. It can be moved but not cast."""

    group: FusedGroup
    weight_scale: nn.Parameter
    mul_scale: nn.Parameter | None

    def __init__(
        self,
        scheme: str,
        shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
        mul_scale: Tensor | None = None,
    ) -> None:
        """`shape`: N and K. `tensors`: role -> tensor as stored. `mul_scale`: float32 [K] that multiplies the
        activation. The layer must be added to a `FusedGroup` before its first call."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.scheme, self.compute_dtype = scheme, compute_dtype
        self.floats: tuple[Tensor, Tensor | None] | None = None
        """Weight [N, K] and bias [N] before quantization, for the BF16 steps of a schedule."""
        self.set_tensors(dict.fromkeys(FUSED_ROLES) | dict(tensors) | {"mul_scale": mul_scale})

    @classmethod
    def from_encoded(
        cls, encoded: Encoded, bias: Tensor | None, *, schemes: Schemes, **options: Any
    ) -> QuantLinear:
        """Layer of a weight [N, K] quantized along K, dtypes as in `Encoded`.

        `options`: arguments of `fused_linears`.
        """
        (n, k), tensors = encoded.shape, stored_tensors(encoded, bias)
        options = {"compute_dtype": torch.bfloat16} | options
        return fused_linears(tensors, [n], encoded.format, schemes, width=k, **options)[0]

    def set_tensors(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Set parameters by role: weight [N, K], weight_scale etc. in the stored shapes and dtypes."""
        scale = tensors.get("weight_scale")
        if scale is not None and "weight_offset" in SCHEMES[self.scheme].roles:
            tensors = {"weight_offset": torch.zeros_like(scale)} | dict(tensors)
        for role, t in tensors.items():
            # Not by `register_parameter`: the attribute `weight` is a property.
            self._parameters[role] = _parameter(t)

    # ---- computing ------------------------------------------------------------------------------

    def forward(
        self, x: Tensor | LinearInput, precision: Precision = "stored", multiply: Multiply = F.linear
    ) -> Tensor:
        """x [.., K] -> [.., N] in x's dtype.

        `multiply`: for BF16 steps. Raises UsageError if x is on another device.
        """
        source, precision = x if isinstance(x, LinearInput) else LinearInput(x), precision_of(self, precision)
        if precision == "bf16" and self.floats is not None:
            return multiply(source.x, *self.floats)
        if source.x.device != self.device:
            raise UsageError(
                f"an input on {source.x.device} for a layer in {self.scheme} on {self.device}",
                needs="both on one device",
                fix="model.to(device), or pipe.enable_model_cpu_offload()",
                code="E-QNT-03",
            )
        return source.output(self, "w4a8" if precision == "w4a8" else self.scheme)

    # ---- reading a layer ------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Dequantized [N, K] in `compute_dtype`: a new tensor on each access; writing to it changes nothing.

        FSDP2 and accelerate's hooks look up parameters by attribute; they get the quantized weight.
        """
        qdata = self._parameters["weight"]
        hooked = qdata is not None and (type(qdata) is not nn.Parameter or "_old_forward" in self.__dict__)
        if qdata is not None and (hooked or qdata.is_meta):
            return qdata
        return decode(self.encoded()).to(self.compute_dtype).as_subclass(DecodedWeight)

    def encoded(self) -> Encoded:
        """Quantized weight [N, K] and scales as stored, dtypes as in `Encoded`."""
        scale, dual = self.weight_scale.data, self._parameters["weight_dual_scale"]
        qdata = self.group.qdata(self).data
        shape = (self.out_features, self.in_features)
        return Encoded(qdata, scale, None if dual is None else dual.data, self.scheme, -1, shape)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        scale: Any = self._parameters["weight_scale"]  # attribute access of nn.Module is slow
        device: torch.device = scale.device
        return device

    @property
    def extra_nbytes(self) -> int:
        """Bytes besides the parameters: `floats` and, for the first layer of a group, its prepared weight."""
        prepared = self.group.extra_nbytes if self is self.group.layers[0] else 0
        return prepared + sum(t.nbytes for t in self.floats or () if t is not None)

    def extra_repr(self) -> str:
        size = len(self.group.layers)
        fused = f", one of {size} fused" if size > 1 else ""
        return f"{self.in_features}, {self.out_features}, {self.scheme}{fused}"

    # ---- moving and state dicts -----------------------------------------------------------------

    def check_apply(self, fn: Callable[[Tensor], Tensor]) -> torch.device:
        """The device that `fn` moves tensors [..] to.

        Raises UsageError (E-QNT-03) if it changes the dtype or moves to meta.
        """
        floats = fn(torch.empty(0, dtype=self.compute_dtype, device=self.device))
        integers = fn(torch.empty(0, dtype=torch.uint8, device=self.device))
        if floats.device.type == "meta":
            raise self._refused("meta")
        if floats.dtype != self.compute_dtype or integers.dtype != torch.uint8:
            raise self._refused(floats.dtype)
        return floats.device

    def check_dtypes(self) -> None:
        """Raise UsageError (E-QNT-03) if a parameter was cast, as FSDP2's mixed precision does."""
        fmt = lookup(self.scheme)
        names = {"weight": fmt.qdata_dtype, "weight_scale": fmt.scale_dtype}
        dtypes = {role: getattr(torch, name) for role, name in names.items()}
        for role, t in self.named_parameters():
            if t.dtype != dtypes.get(role, torch.float32):
                raise self._refused(t.dtype)

    def _refused(self, to: object) -> UsageError:
        return UsageError(
            f"a cast of a layer in {self.scheme} to {to}",
            needs=f"a device only: a quantized layer cannot be cast; it computes in {self.compute_dtype}",
            fix="move it without a dtype, and choose the dtype when loading",
            code="E-QNT-03",
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Apply `fn` to the bytes of each tensor, so that it does not cast scales or float8 weights."""
        if self.check_apply(fn) != self.device:
            self.group.unpack()
        super()._apply(  # type: ignore[no-untyped-call]
            lambda t: fn(t.view(torch.uint8)).view(t.dtype), recurse
        )
        if self.floats is not None:
            weight, bias = self.floats
            self.floats = fn(weight), None if bias is None else fn(bias)
        self.group.fuse()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.group.packed:
            destination[f"{prefix}weight"] = self.group.qdata(self).detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """Load nothing if a tensor of the layer is missing from the state dict or invalid."""
        expected = self.state_dict()
        tensors = {role: t for role in expected if (t := state_dict.get(f"{prefix}{role}")) is not None}
        problems = {
            role: text for role, t in tensors.items() if (text := self._problem_of(role, t, expected[role]))
        }
        if self.floats is not None:
            problems["weight"] = "the layer also stores BF16 weights; load the model again instead"
        errors += [f"{prefix}{role}: {text}" for role, text in problems.items()]
        if problems or len(tensors) < len(expected):
            missing += [f"{prefix}{role}" for role in expected if role not in tensors]
            return
        smooth = self.mul_scale
        if smooth is not None and not torch.equal(smooth, tensors["mul_scale"].to(smooth.device)):
            self.mul_scale = _parameter(torch.empty_like(smooth))  # other layers share the old one
        self.group.unpack()
        self.group.weight = None  # inference tensors have no version that shows the change
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.group.fuse()

    def _problem_of(self, role: str, tensor: Tensor, expected: Tensor) -> str:
        """The problem of a tensor of a state dict (shape, dtype or invalid values), "" if it is valid."""
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            got, needs = (f"{t.dtype} {list(t.shape)}" for t in (tensor, expected))
            return f"{got}, not {needs}; {self.scheme} tensors are loaded unchanged"
        if role == "bias":
            return "" if bool(tensor.isfinite().all()) else "values that are not finite"
        try:
            check_values(role, tensor)
        except CheckpointError as e:
            return e.got
        return ""


def check_values(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError (E-CKP-08) for invalid values of a scale, an offset or mul_scale [..], float32 or
    uint8. Weights and biases are not checked.
    """
    role = name.rpartition(".")[2]
    if role in ("weight", "bias"):
        return
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # from a state dict of FSDP2
    data = as_bytes(local.detach().cpu().contiguous())
    if tensor.dtype == torch.uint8:
        check_scale_bytes(data, name)
    else:
        CHECKS[role](data, "F32", name)


def stored_tensors(encoded: Encoded, bias: Tensor | None = None) -> dict[str, Tensor]:
    """Role -> tensor of a quantized weight [N, K] and its bias [N], in their dtypes, without absent roles."""
    tensors = zip(FUSED_ROLES, (encoded.qdata, encoded.scale, encoded.dual_scale, bias), strict=True)
    return {role: t for role, t in tensors if t is not None}


def fused_linears(
    tensors: Mapping[str, Tensor],
    sizes: Sequence[int],
    scheme: str,
    schemes: Schemes,
    *,
    width: int,
    compute_dtype: torch.dtype,
    mul_scale: Tensor | None = None,
) -> list[QuantLinear]:
    """Layers that read the same activation and share one matmul, on the device of `schemes`.

    `tensors`: role -> rows of all layers concatenated, as stored: weight [sum of N, K], weight_scale and, if
    the scheme has them, weight_dual_scale and bias. `sizes`: N of each layer, multiples of `Format.tile`.
    `width`: K. `mul_scale`: float32 [K] on the device. Raises UsageError if the tensors do not match
    `scheme`.
    """
    fmt = lookup(scheme_of(scheme).weight)
    dual, shape = tensors.get("weight_dual_scale"), (sum(sizes), width)
    Encoded(tensors["weight"], tensors["weight_scale"], dual, fmt.name, -1, shape)  # checks
    schemes.kernel(scheme)
    device = torch.device(schemes.device.torch_name)
    tensors = {role: t for role, t in tensors.items() if role in FUSED_ROLES}
    moved = {role: t.to(device, torch.float32 if role == "bias" else t.dtype) for role, t in tensors.items()}
    moved["weight"] = moved["weight"].view(getattr(torch, fmt.qdata_dtype))
    shared = _parameter(mul_scale)
    heights = [_heights(fmt, n, width) for n in sizes]
    rows = {role: t.split([height[role] for height in heights]) for role, t in moved.items()}
    layers = [
        QuantLinear(
            fmt.name,
            (n, width),
            {role: parts[i] for role, parts in rows.items()},
            compute_dtype=compute_dtype,
            mul_scale=shared,
        )
        for i, n in enumerate(sizes)
    ]
    FusedGroup(layers, schemes)
    return layers


def _heights(fmt: Format, n: int, k: int) -> dict[str, int]:
    """Role -> number of rows of that tensor in a layer [n, k]."""
    qdata, scale, dual = fmt.shapes((n, k))
    return {
        "weight": qdata[0],
        "weight_scale": scale[0],
        "weight_dual_scale": dual[0] if dual else 0,
        "bias": n,
    }


def _parameter(t: Tensor | None) -> nn.Parameter | None:
    return t if t is None or isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=False)


class SmoothLinear(nn.Linear):
    """A floating-point linear layer whose input is first multiplied by `mul_scale`, float32 [K]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, mul_scale: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        self.mul_scale = nn.Parameter(mul_scale, requires_grad=False)

    def forward(
        self, x: Tensor | LinearInput, precision: Precision = "stored", multiply: Multiply = F.linear
    ) -> Tensor:
        """x [.., K] -> [.., N], in x's dtype, for any `precision`."""
        source = x if isinstance(x, LinearInput) else LinearInput(x)
        return multiply(source.smoothed(self.mul_scale), self.weight, self.bias)


def linear(ops: Ops, m: Any, x: Tensor | LinearInput, precision: Precision = "stored") -> Tensor:
    """Apply the layer `m`, quantized or not: x [.., K] -> [.., N], in x's dtype."""
    if isinstance(m, (QuantLinear, SmoothLinear)):
        out: Tensor = m(x, precision, ops.linear)
        return out
    return ops.linear(x.x if isinstance(x, LinearInput) else x, m.weight, m.bias)


def precision_of(m: Any, requested: Precision) -> Precision:
    """The precision in which a layer computes a step that requests `requested`."""
    if isinstance(m, QuantLinear):
        if (requested == "bf16" and m.floats is not None) or (requested == "w4a8" and m.scheme == "mxfp4"):
            return requested
    return "stored"
