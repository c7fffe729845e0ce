"""Linear layers on codes: quantize an activation once, then multiply it with each weight that shares it.

    ops = bind("twin:a5").quantized
    weight = ops.prepare_weight(codes, scale, None, bias, "mxfp8")     # once, when it is loaded
    a = ops.quantize_activation(x, "mxfp8", mul_scale)                 # once for Q, K and V
    y = ops.quantized_linear(a, weight)                                # x's dtype, x's leading axes

| scheme          | activation               | weight          | bias    |
|-----------------|--------------------------|-----------------|---------|
| int8            | int8, one scale a token  | int8            | float32 |
| fp8             | e4m3, one scale a token  | fp8             | float32 |
| mxfp8           | mxfp8, rule ceil         | mxfp8           | float32 |
| mxfp4           | mxfp4, rule floor        | mxfp4           | float32 |
| mxfp4_dualscale | mxfp4_dualscale          | mxfp4_dualscale | float32 |
| w4a8            | mxfp8, rule ceil         | mxfp4           | float32 |

W4A8 is no scheme of a weight but of a step: an activation quantized for `w4a8` multiplies a weight that was
prepared for `mxfp4`. The numbers are those of `decode`: values = codes x scales in float32, their products
summed in float32, plus the float32 bias, rounded once to the dtype of the activation. Devices that have the
matmul stay within the order of the sums of it; an NPU also rounds the bias of W4A8 to that dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.mx.codec import decode, encode
from ascendit.mx.encoded import Encoded
from ascendit.mx.formats import lookup, resolve_rule
from ascendit.mx.smooth import smooth_input

if TYPE_CHECKING:
    from ascendit.device.backends import Device

log = logging.getLogger("ascendit")


Emulate = Literal["decode-on-use", "decode-once"]
"""Where there is no matmul for a scheme: codes are decoded on each call, or once, which takes memory."""


@dataclass(frozen=True)
class LinearScheme:
    """How a linear layer computes. `rule`: the default scale rule of the activation."""

    name: str
    activation: str
    weight: str
    rule: str


SCHEMES: Mapping[str, LinearScheme] = {
    s.name: s
    for s in (
        LinearScheme("int8", "int8", "int8", "amax"),
        LinearScheme("fp8", "fp8", "fp8", "amax"),
        LinearScheme("mxfp8", "mxfp8", "mxfp8", "ceil"),
        LinearScheme("mxfp4", "mxfp4", "mxfp4", "floor"),
        LinearScheme("mxfp4_dualscale", "mxfp4_dualscale", "mxfp4_dualscale", "floor"),
        LinearScheme("w4a8", "mxfp8", "mxfp4", "ceil"),
    )
}


@dataclass(frozen=True, eq=False)
class Activation:
    """Tokens as codes, in the layout of the form that made them. For one or more `quantized_linear`."""

    scheme: LinearScheme
    lead: tuple[int, ...]
    """The axes before the last one; the codes have them as one."""
    width: int
    """K, as numbers."""
    dtype: torch.dtype
    """Of the tokens, and so of what comes out."""
    codes: Tensor
    scale: Tensor
    dual_scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """A weight in the layout of the form that prepared it; `stored` of that form gives the disk's back."""

    scheme: str
    """Of the weight: never w4a8."""
    shape: tuple[int, int]
    """N and K, as numbers."""
    codes: Tensor
    scale: Tensor
    dual_scale: Tensor | None = None
    bias: Tensor | None = None
    """float32 [N]."""
    row_bias: Tensor | None = None
    """The bias as W4A8 on an NPU takes it, bfloat16 [1, N]."""
    decoded: Tensor | None = None
    """[N, K], where the form decodes once; any dtype and layout it likes."""

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        parts = (self.codes, self.scale, self.dual_scale, self.bias, self.row_bias, self.decoded)
        return sum(t.nbytes for t in parts if t is not None)


@dataclass(frozen=True)
class LinearForm:
    """One implementation. Arguments as in `Schemes`, which is what the model calls."""

    name: str
    prepare_weight: Callable[..., PreparedWeight]
    quantize_activation: Callable[..., Activation]
    quantized_linear: Callable[[Activation, PreparedWeight], Tensor]
    stored: Callable[[PreparedWeight], Encoded]


@dataclass(frozen=True)
class LinearChoice:
    """Who computes a scheme on a device. `reason` begins with `native: ` or `emulated: `."""

    form: LinearForm
    reason: str


# ---- the reference ------------------------------------------------------------------------------


def prepare_weight(
    encoded: Encoded, bias: Tensor | None, device: Device, *, nz: bool = False
) -> PreparedWeight:
    """As on disk. `nz` is a wish that only an NPU can grant."""
    put = device.torch_name
    dual = None if encoded.dual_scale is None else encoded.dual_scale.to(put)
    n, k = encoded.shape
    wide = None if bias is None else bias.to(put, torch.float32)
    return PreparedWeight(
        encoded.format, (n, k), encoded.codes.to(put), encoded.scale.to(put), dual, bias=wide
    )


def stored(weight: PreparedWeight) -> Encoded:
    """Codes and scales as on disk."""
    return Encoded(weight.codes, weight.scale, weight.dual_scale, weight.scheme, -1, weight.shape)


def quantize_activation(
    x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
) -> Activation:
    """See `Schemes.quantize_activation`."""
    row = scheme_of(scheme)
    tokens = x.reshape(-1, x.shape[-1])
    if mul_scale is not None:
        tokens = smooth_input(tokens, mul_scale)
    e = encode(tokens, row.activation, scale_rule=rule or row.rule)
    return Activation(row, tuple(x.shape[:-1]), x.shape[-1], x.dtype, e.codes, e.scale, e.dual_scale)


def quantized_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """See `Schemes.quantized_linear`. The weight is decoded on every call, so it stays small in memory."""
    shape = (a.codes.shape[0], a.width)
    tokens = decode(Encoded(a.codes, a.scale, a.dual_scale, a.scheme.activation, -1, shape))
    out = tokens @ (decode(stored(weight)) if weight.decoded is None else weight.decoded).t()
    if weight.bias is not None:
        out += weight.bias
    return out.to(a.dtype).view(*a.lead, weight.shape[0])


def _prepare_decoded(
    encoded: Encoded, bias: Tensor | None, device: Device, *, nz: bool = False
) -> PreparedWeight:
    weight = prepare_weight(encoded, bias, device)
    return replace(weight, decoded=decode(stored(weight)))


REFERENCE = LinearForm("reference", prepare_weight, quantize_activation, quantized_linear, stored)
DECODED = LinearForm("reference", _prepare_decoded, quantize_activation, quantized_linear, stored)
"""The same with the weight in float32 too: four to eight times the memory."""


# ---- what a device runs -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Schemes:
    """The quantized linear layers of one device. A scheme is native, or decoded and multiplied.

    Where a chip has no matmul for a scheme, decoding is only done when `emulate` asks for it: it is slower,
    and never chosen in silence. Kinds of device without a chip of the table decode what they have no matmul
    for, and log it.
    """

    device: Device
    forms: Mapping[str, LinearChoice] = field(default_factory=dict)
    """Scheme -> who computes it; the plain one does what is left out."""
    emulate: Emulate | None = None
    rules: Mapping[str, str] = field(default_factory=dict)
    """Scheme -> scale rule of its activation, where it is not the default."""
    nz: bool = False
    """Weights in FRACTAL_NZ where an NPU takes both layouts."""
    _told: set[str] = field(default_factory=set)

    def form(self, scheme: str) -> LinearForm:
        """Who computes `scheme`. UsageError: no such one. EnvironmentProblem E-CAP-01: not on this chip."""
        scheme_of(scheme)
        if (choice := self.forms.get(scheme)) is None:
            if self.device.chip and self.emulate is None:
                from ascendit.device.npu import not_here

                raise not_here(self.device, self.device.chip, scheme)
            plain = DECODED if self.emulate == "decode-once" else REFERENCE
            choice = LinearChoice(plain, "emulated: decoded and multiplied, the same numbers, slower")
        if scheme not in self._told:
            self._told.add(scheme)
            form = choice.form.name
            log.info("linear layers in %s on %s -> %s: %s", scheme, self.device, form, choice.reason)
        return choice.form

    def check(self, used: Iterable[str]) -> None:
        """Before anything loads: `used` are the schemes that a model computes in, w4a8 among them.

        EnvironmentProblem E-CAP-01 for one that is not on this chip; UsageError E-USE-01 for a scale rule
        that nothing would follow.
        """
        found = set(used) - {"bf16"}
        for scheme in sorted(found):
            self.form(scheme)
        if idle := sorted(self.rules.keys() - found):
            raise UsageError(
                f"activation_rule for {', '.join(idle)}, which no layer computes in",
                needs=f"rules for {', '.join(sorted(found)) or 'a quantized model'}",
                fix="leave it out, or name the scheme that is there",
                code="E-USE-01",
            )

    def prepare_weight(
        self,
        codes: Tensor,
        scale: Tensor,
        dual_scale: Tensor | None,
        bias: Tensor | None,
        scheme: str,
        *,
        width: int | None = None,
        nz: bool = False,
    ) -> PreparedWeight:
        """Tensors as on disk (`mx.Encoded` for a weight [N, K]), moved to the device in its layout, once.

        `codes` of Q, K and V may be joined along N first, their scales and biases likewise. `width`: K, where
        it is odd and two codes share a byte. `nz`: for this weight, as `Schemes.nz` for all of them.
        UsageError when the tensors do not fit `scheme`.
        """
        weight = scheme_of(scheme).weight
        shape = (codes.shape[0], width or codes.shape[1] * (2 if lookup(weight).packed else 1))
        encoded = Encoded(codes, scale, dual_scale, weight, -1, shape)
        return self.form(scheme).prepare_weight(encoded, bias, self.device, nz=nz or self.nz)

    def stored(self, weight: PreparedWeight) -> Encoded:
        """The codes and scales that `weight` was prepared from, in the layout of the disk."""
        return self.form(weight.scheme).stored(weight)

    def quantize_activation(
        self, x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
    ) -> Activation:
        """Tokens [.., K] in bfloat16 or float16 (float32 where it is emulated) to codes.

        `mul_scale`: float32 [K] that multiplies them first. `rule`: a scale rule of the format; None: as
        `rules` says, else the scheme's.
        """
        return self.form(scheme).quantize_activation(x, scheme, mul_scale, rule or self.rules.get(scheme))

    def quantized_linear(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """[.., N] in the dtype of the tokens. UsageError if the two were not quantized for each other."""
        if a.scheme.weight != weight.scheme or a.width != weight.shape[1]:
            raise UsageError(
                f"tokens of {a.width} for {a.scheme.name} with a weight {weight.shape} in {weight.scheme}",
                needs=f"a weight [N, {a.width}] in {a.scheme.weight}",
                fix=f"quantize the tokens for {weight.scheme}",
                code="E-USE-01",
            )
        return self.form(a.scheme.name).quantized_linear(a, weight)


def to_emulate(value: object) -> Emulate | None:
    """True, False, None or a word as `Emulate`. UsageError E-USE-01 for another word."""
    words = get_args(Emulate)
    found: Emulate | None = words[0] if value is True else None if value is False else value  # type: ignore[assignment]
    if found is not None and found not in words:
        raise UsageError(
            f"emulate={value}", needs=" or ".join(words), fix=f"--emulate {words[0]}", code="E-USE-01"
        )
    return found


def parse_rules(text: str | None) -> dict[str, str]:
    """`mxfp8=floor,mxfp4=max:7` as scheme -> scale rule of the activation. UsageError E-USE-01."""
    found = {}
    if text is not None and not isinstance(text, str):
        raise UsageError(
            f"activation_rule {text!r}",
            needs="text, as mxfp8=floor,mxfp4=max:7",
            fix="leave it out for the defaults",
            code="E-USE-01",
        )
    for word in text.split(",") if text else ():
        scheme, _, rule = word.partition("=")
        row = scheme_of(scheme.strip())
        found[row.name] = resolve_rule(lookup(row.activation), rule.strip() or "?")
    return found


def scheme_of(name: str) -> LinearScheme:
    """The row of this name. UsageError E-USE-01 lists the names if there is none."""
    if name not in SCHEMES:
        raise UsageError(
            f"scheme {name!r} for a linear layer on codes",
            needs=", ".join(SCHEMES),
            fix="check the spelling; bf16 layers are no codes",
            code="E-USE-01",
        )
    return SCHEMES[name]


def native_on(chip: str) -> frozenset[str]:
    """The schemes whose every operator has a kernel on this chip."""
    from ascendit.device.npu import CAPABILITIES

    return frozenset(
        s for s in SCHEMES if all(row.on(chip) == "yes" for row in CAPABILITIES if row.scheme == s)
    )


def native_schemes(device: Device) -> frozenset[str]:
    """The same for a device; none where it has no chip of the table."""
    return native_on(device.chip) if device.chip else frozenset()
