"""Quantized linear layers: quantize an activation once, then multiply it with each weight that shares it.

    ops = bind("twin:a5").quantized
    weight = ops.prepare_weight(codes, scale, None, bias, "mxfp8")     # once, when it is loaded
    a = ops.quantize_activation(x, "mxfp8", mul_scale)                 # once for Q, K and V
    y = ops.quantized_linear(a, weight)                                # x's dtype, x's leading axes

The schemes are those of `quant/schemes.py`, the numbers those of `kernels/reference.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast, get_args

import torch
from torch import Tensor

from ascendit.device.chip import native_on
from ascendit.errors import UsageError
from ascendit.kernels.kernel import Activation, Emulate, PreparedWeight, QuantLinearKernel, Wish
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import lookup, resolve_rule
from ascendit.ops.select import select
from ascendit.quant.schemes import scheme_of

if TYPE_CHECKING:
    from ascendit.device.device import Device

log = logging.getLogger("ascendit")


@dataclass(frozen=True, eq=False)
class Schemes:
    """The quantized linear layers of one device. A scheme is native, or decoded and multiplied.

    Where a chip has no matmul for a scheme, decoding is only done when `emulate` asks for it: it is slower,
    and never chosen in silence. Kinds of device without a chip of the table decode what they have no matmul
    for, and log it.
    """

    device: Device
    wish: Wish = Wish()
    rules: Mapping[str, str] = field(default_factory=dict)
    """Scheme -> scale rule of its activation, where it is not the default."""
    nz: bool = False
    """Weights in FRACTAL_NZ where an NPU takes both layouts."""
    _selected: dict[str, QuantLinearKernel] = field(default_factory=dict, init=False)

    def kernel(self, scheme: str) -> QuantLinearKernel:
        """The one for `scheme`. UsageError: no such scheme. EnvironmentProblem E-CAP-01: not on this chip."""
        if (kernel := self._selected.get(scheme)) is None:
            scheme_of(scheme)
            kernel = cast(QuantLinearKernel, select(scheme, self.device, self.wish))
            log.info(
                "linear layers in %s on %s -> %s: %s", scheme, self.device, kernel.backend, kernel.reason
            )
            self._selected[scheme] = kernel
        return kernel

    def check(self, used: Iterable[str]) -> None:
        """Before anything loads: `used` are the schemes that a model computes in, w4a8 among them.

        EnvironmentProblem E-CAP-01 for one that is not on this chip; UsageError E-USE-01 for a scale rule
        that nothing would follow.
        """
        found = set(used) - {"bf16"}
        for scheme in sorted(found):
            self.kernel(scheme)
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
        place = torch.device(self.device.torch_name)
        return self.kernel(scheme).prepare(encoded, bias, place, nz=nz or self.nz)

    def stored(self, weight: PreparedWeight) -> Encoded:
        """The codes and scales that `weight` was prepared from, in the layout of the disk."""
        return self.kernel(weight.scheme).stored(weight)

    def quantize_activation(
        self, x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
    ) -> Activation:
        """Tokens [.., K] in bfloat16 or float16 (float32 where it is emulated) to codes.

        `mul_scale`: float32 [K] that multiplies them first. `rule`: a scale rule of the format; None: as
        `rules` says, else the scheme's.
        """
        rule = rule or self.rules.get(scheme)
        return self.kernel(scheme).quantize_activation(x, scheme, mul_scale, rule)

    def quantized_linear(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """[.., N] in the dtype of the tokens. UsageError if the two were not quantized for each other."""
        if a.scheme.weight != weight.scheme or a.width != weight.shape[1]:
            raise UsageError(
                f"tokens of {a.width} for {a.scheme.name} with a weight {weight.shape} in {weight.scheme}",
                needs=f"a weight [N, {a.width}] in {a.scheme.weight}",
                fix=f"quantize the tokens for {weight.scheme}",
                code="E-USE-01",
            )
        return self.kernel(a.scheme.name).call(a, weight)


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


# ---- which chip has a matmul for which scheme ---------------------------------------------------


def native_schemes(device: Device) -> frozenset[str]:
    """The schemes that a device has a matmul for; none where it has no chip of the table."""
    return native_on(device.chip) if device.chip else frozenset()
