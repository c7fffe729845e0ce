"""Linear layers on codes. Two steps: quantize the tokens, multiply; the scheme's operators do both.

    m = QuantLinear.from_encoded(mx.encode(w, "mxfp8"), bias, schemes=bind("cpu").quantized)
    y = m(x)                                   # x's dtype

    tokens = Tokens(x)                         # Q, K and V read the same tokens:
    q, k, v = (linear(ops, m, tokens) for m in (to_q, to_k, to_v))     # one quantization, one matmul

Layers whose weights were joined share a `Joint`: the first that is asked multiplies for all of them, the
others take their part. What was quantized and what is left of a product lives in `Tokens`, not in a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ascendit.errors import UsageError
from ascendit.kernels.kernel import Activation, PreparedWeight
from ascendit.mx.codec import Encoded, decode
from ascendit.mx.smoothing import smooth_input
from ascendit.ops.operators import Ops, Schemes, schemes_on
from ascendit.quant.schemes import SCHEMES
from ascendit.schedule import Precision

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Tokens:
    """What one or more linear layers read: quantized once for each way that they ask for."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self._made: dict[tuple[Any, ...], Any] = {}
        self._products: dict[tuple[Any, ...], list[Tensor | None]] = {}

    def activation(self, schemes: Schemes, scheme: str, mul_scale: Tensor | None) -> Activation:
        """As codes. Layers that are smoothed alike hold the same `mul_scale` object."""
        key = (scheme, id(mul_scale))
        if key not in self._made:
            self._made[key] = schemes.quantize_activation(self.x, scheme, mul_scale)
        found: Activation = self._made[key]
        return found

    def smoothed(self, mul_scale: Tensor) -> Tensor:
        """Times `mul_scale`, in the dtype of the tokens."""
        key = ("smoothed", id(mul_scale))
        if key not in self._made:
            self._made[key] = smooth_input(self.x, mul_scale)
        found: Tensor = self._made[key]
        return found

    def product(self, joint: Joint, scheme: str, member: int, mul_scale: Tensor | None) -> Tensor:
        """The part of one member; computed for all that read the tokens alike, and given away once."""
        key = (id(joint), scheme, id(mul_scale))
        parts = self._products.get(key)
        if parts is None or parts[member] is None:
            a = self.activation(joint.schemes, scheme, mul_scale)
            whole = joint.schemes.quantized_linear(a, joint.weight)
            parts = list(whole.split(joint.sizes, dim=-1)) if len(joint.sizes) > 1 else [whole]
            self._products[key] = parts
        out = parts[member]
        assert out is not None
        parts[member] = None
        return out


@dataclass(eq=False)
class Joint:
    """Weights of one scheme that read the same tokens, joined along N and prepared for a device."""

    weight: PreparedWeight
    sizes: list[int]
    """N of each member."""
    schemes: Schemes
    _moved: tuple[Tensor, Tensor] | None = None

    def moved(self, mul_scale: Tensor, device: torch.device) -> Tensor:
        """On `device`; members that shared it share it again."""
        if mul_scale.device == device:
            return mul_scale
        if self._moved is None or self._moved[0] is not mul_scale or self._moved[1].device != device:
            self._moved = (mul_scale, mul_scale.to(device))
        return self._moved[1]

    def rows(self, member: int) -> slice:
        """Where one member lies along N."""
        start = sum(self.sizes[:member])
        return slice(start, start + self.sizes[member])

    def encoded(self, member: int) -> Encoded:
        """One member as it lies on disk."""
        e, rows = self.schemes.stored(self.weight), self.rows(member)
        dual = None if e.dual_scale is None else e.dual_scale[rows]
        return Encoded(e.codes[rows], e.scale[rows], dual, e.format, -1, (self.sizes[member], e.shape[1]))

    def bias(self, member: int) -> Tensor | None:
        """float32 [N] of one member."""
        return None if self.weight.bias is None else self.weight.bias[self.rows(member)]

    def replace(self, member: int, encoded: Encoded, bias: Tensor | None) -> None:
        """Other numbers for one member."""
        e, rows = self.schemes.stored(self.weight), self.rows(member)
        dual = None if e.dual_scale is None else e.dual_scale.clone()
        whole = Encoded(e.codes.clone(), e.scale.clone(), dual, e.format, e.axis, e.shape)
        whole.codes[rows], whole.scale[rows] = encoded.codes, encoded.scale
        if whole.dual_scale is not None and encoded.dual_scale is not None:
            whole.dual_scale[rows] = encoded.dual_scale
        biases = None if self.weight.bias is None else self.weight.bias.clone()
        if biases is not None and bias is not None:
            biases[rows] = bias
        self.prepare(whole, biases)

    def prepare(self, encoded: Encoded, bias: Tensor | None) -> None:
        """Lay codes and scales out for the device."""
        self.weight = self.schemes.prepare_weight(
            encoded.codes, encoded.scale, encoded.dual_scale, bias, encoded.format
        )

    def to(self, device: torch.device) -> None:
        """Onto another device, in its layout: from the codes as on disk, so that FRACTAL_NZ is made again."""
        encoded, bias = self.schemes.stored(self.weight), self.weight.bias
        self.schemes = schemes_on(str(device), self.schemes)
        self.prepare(encoded, bias)


class QuantLinear(nn.Linear):
    """A linear layer on codes. `state_dict` has the tensors of the disk; a cast is refused, a move is not.

    `weight` is decoded each time it is read: for tools that look at it. It has no parameters.
    """

    def __init__(
        self,
        joint: Joint,
        member: int = 0,
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
        mul_scale: Tensor | None = None,
        floats: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        """`mul_scale`: float32 [K] that multiplies the tokens. `floats`: weight and bias before quantization,
        for steps that a policy wants in BF16."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = joint.weight.shape[1], joint.sizes[member]
        self.scheme, self.compute_dtype = joint.weight.scheme, compute_dtype
        self.joint, self.member, self.floats = joint, member, floats
        self.mul_scale = mul_scale

    @classmethod
    def from_encoded(
        cls,
        encoded: Encoded,
        bias: Tensor | None,
        *,
        schemes: Schemes,
        compute_dtype: torch.dtype = torch.bfloat16,
        mul_scale: Tensor | None = None,
    ) -> QuantLinear:
        """One layer by itself. `encoded`: a weight [N, K], blocks along K, as `mx.encode` gives it."""
        weight = schemes.prepare_weight(
            encoded.codes, encoded.scale, encoded.dual_scale, bias, encoded.format
        )
        joint = Joint(weight, [encoded.shape[0]], schemes)
        return cls(joint, compute_dtype=compute_dtype, mul_scale=mul_scale)

    # ---- computing ------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] -> [.., N]."""
        return self.run(Tokens(x))

    def run(self, tokens: Tokens, precision: Precision = "stored", multiply: Multiply = F.linear) -> Tensor:
        """[.., N] of tokens that other layers may read too. `multiply`: for a step in BF16."""
        if precision == "bf16" and self.floats is not None:
            return multiply(tokens.x, *self.floats)
        scheme = "w4a8" if precision == "w4a8" and self.scheme == "mxfp4" else self.scheme
        return tokens.product(self.joint, scheme, self.member, self.mul_scale)

    # ---- what tools see -------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Decoded [N, K] in `compute_dtype`; a new tensor each time."""
        return decode(self.joint.encoded(self.member)).to(self.compute_dtype)

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """float32 [N]."""
        return self.joint.bias(self.member)

    @property
    def device(self) -> torch.device:
        """Where its codes are."""
        return self.joint.weight.codes.device

    @property
    def nbytes(self) -> int:
        """Of codes, scales and what else it keeps; its share of what is joined."""
        share = self.joint.weight.nbytes * self.out_features // self.joint.weight.shape[0]
        kept = [t for t in (*(self.floats or ()), self.mul_scale) if t is not None]
        return int(share + sum(t.nbytes for t in kept))

    def extra_repr(self) -> str:
        joined = f", one of {len(self.joint.sizes)} joined" if len(self.joint.sizes) > 1 else ""
        return f"{self.in_features}, {self.out_features}, {self.scheme}{joined}"

    # ---- as a module ----------------------------------------------------------------------------

    def check_apply(self, fn: Callable[[Tensor], Tensor]) -> torch.device:
        """Where `fn` would move it. UsageError E-QNT-03 for a cast, and for the meta device."""
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.device))
        if probe.dtype != self.compute_dtype or probe.device.type == "meta":
            raise UsageError(
                f"a layer in {self.scheme} to {probe.dtype if probe.device.type != 'meta' else 'meta'}",
                needs=f"another device at most: codes are no numbers that can be cast; it computes in"
                f" {self.compute_dtype}",
                fix="move it without a dtype, and load it with the dtype that you want",
                code="E-QNT-03",
            )
        return probe.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """A move goes to every tensor; a cast of codes is UsageError E-QNT-03."""
        device = self.check_apply(fn)
        if device != self.device:
            self.joint.to(device)
        if self.mul_scale is not None:
            self.mul_scale = self.joint.moved(self.mul_scale, device)
        if self.floats is not None:
            weight, bias = self.floats
            self.floats = fn(weight), None if bias is None else fn(bias)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination |= {f"{prefix}{role}": tensor for role, tensor in self.stored().items()}

    def stored(self) -> dict[str, Tensor]:
        """Role -> tensor, as in a canonical folder."""
        e = self.joint.encoded(self.member)
        found: dict[str, Tensor | None] = {"weight": e.codes, "weight_scale": e.scale}
        if "weight_offset" in SCHEMES[self.scheme].roles:
            found["weight_offset"] = torch.zeros_like(e.scale)
        found |= {"weight_dual_scale": e.dual_scale, "mul_scale": self.mul_scale, "bias": self.bias}
        return {role: tensor for role, tensor in found.items() if tensor is not None}

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        wanted = self.stored()
        here = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        missing += [f"{prefix}{role}" for role in wanted if role not in here]
        unexpected += [f"{prefix}{role}" for role in sorted(here - set(wanted))]
        given = {role: state_dict[f"{prefix}{role}"] for role in wanted if role in here}
        errors += [f"{prefix}{role}: {text}" for role, text in self._misfits(given, wanted)]
        if errors or len(given) < len(wanted) or here - set(wanted):
            return
        shape = (self.out_features, self.in_features)
        dual = given.get("weight_dual_scale")
        encoded = Encoded(given["weight"], given["weight_scale"], dual, self.scheme, -1, shape)
        self.joint.replace(self.member, encoded, given.get("bias"))
        if self.mul_scale is not None and not torch.equal(self.mul_scale, given["mul_scale"].to(self.device)):
            self.mul_scale = given["mul_scale"].to(self.device).clone()

    def _misfits(
        self, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, str]]:
        """What the tensors of a state dict cannot be: other shapes and dtypes, scales that are none."""
        if self.floats is not None:
            yield "weight", "BF16 weights are kept beside the codes; load the model anew"
        for role, tensor in given.items():
            if tensor.shape != wanted[role].shape or tensor.dtype != wanted[role].dtype:
                yield (
                    role,
                    f"{tensor.dtype} {list(tensor.shape)}, not {wanted[role].dtype} "
                    f"{list(wanted[role].shape)}; codes of {self.scheme} are taken as they are",
                )
            elif role == "weight_offset" and bool(tensor.any()):
                yield role, "offsets that are not zero"
            elif role == "weight_scale" and tensor.dtype == torch.uint8 and bool((tensor == 255).any()):
                yield role, "scales of NaN (byte 255)"
            elif tensor.dtype == torch.float32 and not bool(tensor.isfinite().all()):
                yield role, "numbers that are not finite"
            elif role == "mul_scale" and not bool((tensor > 0).all()):
                yield role, "factors that are not above zero"


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
    the scheme has them, weight_dual_scale and bias. `sizes`: N of each member. `width`: K. `mul_scale`:
    float32 [K] on the device. UsageError when the tensors do not fit `scheme`.
    """
    given = (
        tensors["weight"],
        tensors["weight_scale"],
        tensors.get("weight_dual_scale"),
        tensors.get("bias"),
    )
    joint = Joint(schemes.prepare_weight(*given, scheme, width=width), list(sizes), schemes)
    return [
        QuantLinear(joint, member, compute_dtype=compute_dtype, mul_scale=mul_scale)
        for member in range(len(sizes))
    ]


class SmoothLinear(nn.Linear):
    """A linear layer in floating point whose tokens are multiplied by `mul_scale` [K] first."""

    def __init__(self, weight: Tensor, bias: Tensor | None, mul_scale: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        self.register_buffer("mul_scale", mul_scale)
        self.mul_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[.., K] -> [.., N]."""
        return self.run(Tokens(x))

    def run(self, tokens: Tokens, precision: Precision = "stored", multiply: Multiply = F.linear) -> Tensor:
        """As `QuantLinear.run`; there is one precision."""
        return multiply(tokens.smoothed(self.mul_scale), self.weight, self.bias)


def linear(ops: Ops, m: Any, x: Tensor | Tokens, precision: Precision = "stored") -> Tensor:
    """What the layer `m` makes of the tokens, whichever kind of layer it is."""
    if isinstance(m, (QuantLinear, SmoothLinear)):
        return m.run(x if isinstance(x, Tokens) else Tokens(x), precision, ops.linear)
    return ops.linear(x.x if isinstance(x, Tokens) else x, m.weight, m.bias)


def dtype_of(m: Any) -> torch.dtype:
    """Of the tokens that a layer takes."""
    found: torch.dtype = m.compute_dtype if isinstance(m, QuantLinear) else m.weight.dtype
    return found
