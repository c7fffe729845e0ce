"""Quantized linear layers as modules: quantize the activation, multiply; the operators of the scheme do both.

    m = QuantLinear.from_encoded(mx.encode(w, "mxfp8"), bias, schemes=bind("cpu").quantized)
    y = m(x)                                   # x's dtype

    tokens = Tokens(x)                         # Q, K and V read the same activation:
    q, k, v = (linear(ops, m, tokens) for m in (to_q, to_k, to_v))     # one quantization, one matmul

Codes and scales are parameters of the layer, named and shaped as on disk, so moving, state dicts, offloading
and FSDP2 are PyTorch's own. Layers of a `FusedGroup` hold neighbouring rows of one storage: the first that
is asked multiplies for all of them. Where their rows are elsewhere, each layer multiplies by itself.
"""

from __future__ import annotations

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

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
FUSED_ROLES = ("weight", "weight_scale", "weight_dual_scale", "bias")
"""Parameters whose rows the members of a group share."""


class Tokens:
    """An activation that one or more linear layers read; quantized once for each way that they ask for."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._made: dict[tuple[str, int], Any] = {}
        self._products: dict[tuple[int, str, int], dict[QuantLinear, Tensor]] = {}

    def activation(self, schemes: Schemes, scheme: str, mul_scale: Tensor | None) -> Activation:
        """Quantized. Layers that are smoothed alike share the memory of `mul_scale`."""
        key = (scheme, _address(mul_scale))
        if key not in self._made:
            self._made[key] = schemes.quantize_activation(self.x, scheme, mul_scale)
        quantized: Activation = self._made[key]
        return quantized

    def smoothed(self, mul_scale: Tensor) -> Tensor:
        """Times `mul_scale`, in the dtype of the activation."""
        key = ("smoothed", _address(mul_scale))
        if key not in self._made:
            self._made[key] = smooth_input(self.x, mul_scale)
        product: Tensor = self._made[key]
        return product

    def product(self, layer: QuantLinear, scheme: str) -> Tensor:
        """[.., N] of one layer; computed for all of its group that read alike, and given away once."""
        group, mul_scale = layer.group, layer._parameters["mul_scale"]
        parts = self._products.setdefault((id(group), scheme, _address(mul_scale)), {})
        if layer not in parts:
            weight, members = group.weight_for(layer)
            schemes = group.schemes
            y = schemes.quantized_linear(self.activation(schemes, scheme, mul_scale), weight)
            if len(members) == 1:
                return y
            parts |= zip(members, y.split([m.out_features for m in members], dim=-1), strict=True)
        return parts.pop(layer)


def _address(mul_scale: Tensor | None) -> int:
    return 0 if mul_scale is None else mul_scale.data_ptr()


class FusedGroup:
    """Layers of one scheme and one K that read one activation, multiplied as one matrix.

    `schemes` computes. The prepared weight is kept while the parameters are those that it was made from.
    Parameters that something else has replaced (FSDP2, hooks that offload) are prepared on each call and
    nothing of them is kept: the memory is theirs.
    """

    def __init__(self, members: Sequence[QuantLinear], schemes: Schemes) -> None:
        self.members, self.schemes = tuple(members), schemes
        self.weight: PreparedWeight | None = None
        self._made_from: list[tuple[dict[str, Any], str, int, int]] = []
        self._copied = False
        for m in members:
            m.group = self
        self.fuse()

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`: a copy has other addresses, and is fused when it first computes."""
        weight = self.weight if self.packed else None
        return vars(self) | {"weight": weight, "_made_from": [], "_copied": True}

    @property
    def packed(self) -> bool:
        """The kernel's layout of the codes is another one, as FRACTAL_NZ: it replaces the parameters."""
        return self.weight is not None and self.members[0]._parameters["weight"] is None

    @property
    def extra_nbytes(self) -> int:
        """Of what the prepared weight has beside the parameters."""
        owned = {p.untyped_storage().data_ptr() for m in self.members for p in m.parameters()}
        parts = () if self.weight is None else self.weight.tensors
        return sum(t.nbytes for t in parts if t.untyped_storage().data_ptr() not in owned)

    def weight_for(self, layer: QuantLinear) -> tuple[PreparedWeight, Sequence[QuantLinear]]:
        """A prepared weight, and the layers whose rows it has. UsageError E-QNT-03 for a cast parameter."""
        if self._copied:
            self._copied = False
            self.fuse()
        if self.weight is not None and (self._unchanged() or self.packed):
            return self.weight, self.members
        self.weight = None
        layer.check_dtypes()
        self._follow(layer.device)
        return self._prepare(map(layer._parameters.get, FUSED_ROLES), layer), (layer,)

    def fuse(self, schemes: Schemes | None = None) -> None:
        """Lay the rows of all members out one after another, as the kernel wants them.

        Not while members are on several devices or on the meta device, or FSDP2 shards them. `schemes`: to
        compute with others from now on.
        """
        if schemes is not None:
            self.unpack()
            self.schemes = schemes
        elif self._unchanged():
            return
        tensors = [p for m in self.members for p in map(m._parameters.get, FUSED_ROLES) if p is not None]
        devices = {t.device for t in tensors}
        if len(devices) > 1 or tensors[0].is_meta or any(type(t) is not nn.Parameter for t in tensors):
            return
        self._follow(tensors[0].device)
        self._share_mul_scale()
        joined = [self._joined(role) for role in FUSED_ROLES]
        self.weight, qdata = self._prepare(joined, self.members[0]), joined[0]
        assert qdata is not None
        if self.weight.qdata.untyped_storage().data_ptr() != qdata.untyped_storage().data_ptr():
            for m in self.members:
                m._parameters["weight"] = None
        self._made_from = [
            (m._parameters, role, t.data_ptr(), -1 if t.is_inference() else t._version)
            for m in self.members
            for role in FUSED_ROLES
            if (t := m._parameters[role]) is not None
        ]

    def unpack(self) -> None:
        """Make the codes parameters again, as stored."""
        if self.packed:
            for m, rows in zip(self.members, self._unpacked(), strict=True):
                m._parameters["weight"] = _parameter(rows)
            self.weight = None

    def qdata(self, layer: QuantLinear) -> Tensor:
        """Of one member, as stored."""
        qdata = layer._parameters["weight"]
        return self._unpacked()[self.members.index(layer)] if qdata is None else qdata

    def _unpacked(self) -> tuple[Tensor, ...]:
        assert self.weight is not None
        rows: tuple[Tensor, ...] = self.schemes.stored(self.weight).qdata.split(self._sizes)
        return rows

    @property
    def _sizes(self) -> list[int]:
        return [m.out_features for m in self.members]

    def _unchanged(self) -> bool:
        """Whether the parameters are as prepared; writes by `.data` or to inference tensors are not seen."""
        for parameters, role, address, version in self._made_from:
            t = parameters[role]
            if t is None or t.data_ptr() != address or (version >= 0 and t._version != version):
                return False
        return self.weight is not None

    def _follow(self, device: torch.device) -> None:
        """Compute where the parameters are."""
        bound = torch.device(self.schemes.device.torch_name)  # `cuda` is `cuda:0`
        if (bound.type, bound.index or 0) != (device.type, device.index or 0):
            self.schemes = schemes_on(str(device), self.schemes)

    def _joined(self, role: str) -> Tensor | None:
        """The rows of all members as one tensor; they become views of it."""
        rows = [p for m in self.members if (p := m._parameters[role]) is not None]
        if len(rows) < 2:
            return rows[0].data if rows else None
        sizes = [len(t) for t in rows]
        first, shape = rows[0].data, (sum(sizes), *rows[0].shape[1:])
        one_storage = len({t.untyped_storage().data_ptr() for t in rows}) == 1
        if one_storage and all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(rows)):
            return first.as_strided(shape, first.stride())
        joined = torch.cat([t.data for t in rows])
        for t, view in zip(rows, joined.split(sizes), strict=True):
            t.data = view
        return joined

    def _share_mul_scale(self) -> None:
        """Equal factors become one parameter again: a move may have made copies of it."""
        first = self.members[0]._parameters["mul_scale"]
        for m in self.members[1:]:
            other = m._parameters["mul_scale"]
            if first is not None and other is not None and torch.equal(first, other):
                m._parameters["mul_scale"] = first

    def _prepare(self, tensors: Iterable[Tensor | None], layer: QuantLinear) -> PreparedWeight:
        parts: Any = [None if t is None else t.detach() for t in tensors]
        qdata, scale, dual, bias = parts
        k = layer.in_features
        return self.schemes.prepare_weight(qdata, scale, dual, bias, layer.scheme, width=k)


class DecodedWeight(Tensor):
    """A decoded copy of a quantized weight, to read. `data` is refused: what is written there would be lost.

    What is computed with one is a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """UsageError E-QNT-03. PEFT and Diffusers fuse through it."""
        raise UsageError(
            "weight.data of a layer on codes",
            needs="a weight in floating point, to fuse a LoRA or projections into it",
            fix="fuse first and quantize then; a LoRA that is not fused works beside the codes",
            code="E-QNT-03",
        )


class QuantLinear(nn.Linear):
    """A quantized linear layer; its parameters are as stored on disk. It can be moved, and not be cast."""

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
        activation. A `FusedGroup` must take the layer before it computes."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.scheme, self.compute_dtype = scheme, compute_dtype
        self.floats: tuple[Tensor, Tensor | None] | None = None
        """Weight and bias before quantization, for steps that a schedule wants in BF16."""
        self.take(dict.fromkeys(FUSED_ROLES) | dict(tensors) | {"mul_scale": mul_scale})

    @classmethod
    def from_encoded(
        cls, encoded: Encoded, bias: Tensor | None, *, schemes: Schemes, **options: Any
    ) -> QuantLinear:
        """One layer by itself, of a weight [N, K] with blocks along K. `options`: as in `fused_linears`."""
        (n, k), tensors = encoded.shape, stored_tensors(encoded, bias)
        options = {"compute_dtype": torch.bfloat16} | options
        return fused_linears(tensors, [n], encoded.format, schemes, width=k, **options)[0]

    def take(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Parameters by their roles, as stored."""
        scale = tensors.get("weight_scale")
        if scale is not None and "weight_offset" in SCHEMES[self.scheme].roles:
            tensors = {"weight_offset": torch.zeros_like(scale)} | dict(tensors)
        for role, t in tensors.items():
            # Past `register_parameter`: the property `weight` is the decoded weight, the parameter the codes.
            self._parameters[role] = _parameter(t)

    # ---- computing ------------------------------------------------------------------------------

    def forward(
        self, x: Tensor | Tokens, precision: Precision = "stored", multiply: Multiply = F.linear
    ) -> Tensor:
        """[.., K] -> [.., N]. `multiply`: for a step in BF16. UsageError E-QNT-03 for another device."""
        tokens, precision = x if isinstance(x, Tokens) else Tokens(x), precision_of(self, precision)
        if precision == "bf16" and self.floats is not None:
            return multiply(tokens.x, *self.floats)
        if tokens.x.device != self.device:
            raise UsageError(
                f"tokens on {tokens.x.device} for a layer in {self.scheme} on {self.device}",
                needs="both on one device",
                fix="model.to(device), or pipe.enable_model_cpu_offload()",
                code="E-QNT-03",
            )
        return tokens.product(self, "w4a8" if precision == "w4a8" else self.scheme)

    # ---- what tools see -------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Decoded [N, K] in `compute_dtype`; a new tensor each time, which cannot be written to the layer.

        FSDP2 and the hooks of accelerate look up their parameters by attribute: they get the codes.
        """
        qdata = self._parameters["weight"]
        hooked = qdata is not None and (type(qdata) is not nn.Parameter or "_old_forward" in self.__dict__)
        if qdata is not None and (hooked or qdata.is_meta):
            return qdata
        return decode(self.encoded()).to(self.compute_dtype).as_subclass(DecodedWeight)

    def encoded(self) -> Encoded:
        """Codes and scales as stored."""
        scale, dual = self.weight_scale.data, self._parameters["weight_dual_scale"]
        qdata = self.group.qdata(self).data
        shape = (self.out_features, self.in_features)
        return Encoded(qdata, scale, None if dual is None else dual.data, self.scheme, -1, shape)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        scale: Any = self._parameters["weight_scale"]  # attributes of a module are looked up slowly
        device: torch.device = scale.device
        return device

    @property
    def extra_nbytes(self) -> int:
        """Of what it keeps beside its parameters: floats, and what the kernel of its group prepared."""
        prepared = self.group.extra_nbytes if self is self.group.members[0] else 0
        return prepared + sum(t.nbytes for t in self.floats or () if t is not None)

    def extra_repr(self) -> str:
        members = len(self.group.members)
        joined = f", one of {members} joined" if members > 1 else ""
        return f"{self.in_features}, {self.out_features}, {self.scheme}{joined}"

    # ---- as a module ----------------------------------------------------------------------------

    def check_apply(self, fn: Callable[[Tensor], Tensor]) -> torch.device:
        """Where `fn` would move it. UsageError E-QNT-03 for a cast, and for the meta device."""
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.device))
        as_bytes = fn(torch.empty(0, dtype=torch.uint8, device=self.device))
        if probe.device.type == "meta":
            raise self._refused("meta")
        if probe.dtype != self.compute_dtype or as_bytes.dtype != torch.uint8:
            raise self._refused(probe.dtype)
        return probe.device

    def check_dtypes(self) -> None:
        """UsageError E-QNT-03 if something has cast a parameter, as mixed precision of FSDP2 does."""
        form = lookup(self.scheme)
        names = {"weight": form.qdata_dtype, "weight_scale": form.scale_dtype}
        dtypes = {role: getattr(torch, name) for role, name in names.items()}
        for role, t in self.named_parameters():
            if t.dtype != dtypes.get(role, torch.float32):
                raise self._refused(t.dtype)

    def _refused(self, to: object) -> UsageError:
        return UsageError(
            f"a layer in {self.scheme} to {to}",
            needs=f"another device at most: codes are no numbers that can be cast; it computes in"
            f" {self.compute_dtype}",
            fix="move it without a dtype, and load it with the dtype that you want",
            code="E-QNT-03",
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """A move goes to every tensor, as bytes, so that `fn` casts no scales and no float8 codes."""
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
        """Nothing is taken from a state dict that lacks a tensor of the layer or has an invalid one."""
        wanted = self.state_dict()
        tensors = {role: t for role in wanted if (t := state_dict.get(f"{prefix}{role}")) is not None}
        problems = {
            role: text for role, t in tensors.items() if (text := self._misfit(role, t, wanted[role]))
        }
        if self.floats is not None:
            problems["weight"] = "BF16 weights are kept beside the codes; load the model anew"
        errors += [f"{prefix}{role}: {text}" for role, text in problems.items()]
        if problems or len(tensors) < len(wanted):
            missing += [f"{prefix}{role}" for role in wanted if role not in tensors]
            return
        smooth = self.mul_scale
        if smooth is not None and not torch.equal(smooth, tensors["mul_scale"].to(smooth.device)):
            self.mul_scale = _parameter(torch.empty_like(smooth))  # other layers share the old one
        self.group.unpack()
        self.group.weight = None  # the tensors of inference mode have no version that would tell
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.group.fuse()

    def _misfit(self, role: str, tensor: Tensor, wanted: Tensor) -> str:
        """What is wrong with a tensor of a state dict, or "": another shape or dtype, invalid numbers."""
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            got, needs = (f"{t.dtype} {list(t.shape)}" for t in (tensor, wanted))
            return f"{got}, not {needs}; codes of {self.scheme} are taken as they are"
        if role == "bias":
            return "" if bool(tensor.isfinite().all()) else "numbers that are not finite"
        try:
            check_values(role, tensor)
        except CheckpointError as e:
            return e.got
        return ""


def check_values(name: str, tensor: Tensor) -> None:
    """CheckpointError E-CKP-08 for scales, offsets and factors of a quantized layer that are invalid."""
    role = name.rpartition(".")[2]
    if role in ("weight", "bias"):
        return
    part = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a state dict of FSDP2
    data = as_bytes(part.detach().cpu().contiguous())
    if tensor.dtype == torch.uint8:
        check_scale_bytes(data, name)
    else:
        CHECKS[role](data, "F32", name)


def stored_tensors(encoded: Encoded, bias: Tensor | None = None) -> dict[str, Tensor]:
    """Role -> tensor of an encoded weight [N, K] and its bias."""
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
    """Layers that read one activation and share one matmul, on the device of `schemes`.

    `tensors`: role -> the rows of all members one after another, as stored: weight, weight_scale and, where
    the scheme has them, weight_dual_scale and bias. `sizes`: N of each member, multiples of `Format.tile`.
    `width`: K. `mul_scale`: float32 [K] on the device. UsageError when the tensors do not fit `scheme`.
    """
    form = lookup(scheme_of(scheme).weight)
    dual, shape = tensors.get("weight_dual_scale"), (sum(sizes), width)
    Encoded(tensors["weight"], tensors["weight_scale"], dual, form.name, -1, shape)  # checks
    schemes.kernel(scheme)
    place = torch.device(schemes.device.torch_name)
    tensors = {role: t for role, t in tensors.items() if role in FUSED_ROLES}
    moved = {role: t.to(place, torch.float32 if role == "bias" else t.dtype) for role, t in tensors.items()}
    moved["weight"] = moved["weight"].view(getattr(torch, form.qdata_dtype))
    shared = _parameter(mul_scale)
    heights = [_heights(form, n, width) for n in sizes]
    rows = {role: t.split([height[role] for height in heights]) for role, t in moved.items()}
    layers = [
        QuantLinear(
            form.name,
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
    """A linear layer in floating point whose activation is multiplied by `mul_scale` [K] first."""

    def __init__(self, weight: Tensor, bias: Tensor | None, mul_scale: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        self.mul_scale = nn.Parameter(mul_scale, requires_grad=False)

    def forward(
        self, x: Tensor | Tokens, precision: Precision = "stored", multiply: Multiply = F.linear
    ) -> Tensor:
        """[.., K] -> [.., N], as `QuantLinear.forward`; there is one precision."""
        tokens = x if isinstance(x, Tokens) else Tokens(x)
        return multiply(tokens.smoothed(self.mul_scale), self.weight, self.bias)


def linear(ops: Ops, m: Any, x: Tensor | Tokens, precision: Precision = "stored") -> Tensor:
    """The output of the layer `m`, whichever kind of layer it is; outside of the blocks as stored."""
    if isinstance(m, (QuantLinear, SmoothLinear)):
        out: Tensor = m(x, precision, ops.linear)
        return out
    return ops.linear(x.x if isinstance(x, Tokens) else x, m.weight, m.bias)


def precision_of(m: Any, wanted: Precision) -> Precision:
    """The precision in which a layer computes a step that wants `wanted`."""
    if isinstance(m, QuantLinear):
        if (wanted == "bf16" and m.floats is not None) or (wanted == "w4a8" and m.scheme == "mxfp4"):
            return wanted
    return "stored"
