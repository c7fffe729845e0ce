"""The operators of the denoiser, and its quantized linear layers, bound once for one device.

`bind("twin:a5")` gives an `Ops`: a frozen set of functions that is handed to the model. There is no global
choice and no look at `tensor.device`. `select` chooses; each choice is logged with its reason.
`force="reference"` takes plain PyTorch everywhere. In `Ops.quantized` an activation is quantized once and
multiplied with each weight that shares it:

    ops = bind("twin:a5").quantized
    weight = ops.prepare_weight(codes, scale, None, bias, "mxfp8")     # once, when it is loaded
    a = ops.quantize_activation(x, "mxfp8", mul_scale)                 # once for Q, K and V
    y = ops.quantized_linear(a, weight)                                # x's dtype, x's leading axes
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast, get_args

import torch
from torch import Tensor

from ascendit.device.device import Device, parse_device
from ascendit.errors import UsageError
from ascendit.kernels import reference
from ascendit.kernels.kernel import (
    Activation,
    Emulate,
    Function,
    Prepare,
    PreparedWeight,
    QuantLinearKernel,
    Wish,
)
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import lookup, resolve_rule
from ascendit.ops.open_device import open_device
from ascendit.ops.select import kernels_of, select
from ascendit.quant.schemes import scheme_of

log = logging.getLogger("ascendit")

FAST_LAYERNORM = "fast_layernorm"
"""The kernel of MindIE-SD by its name."""


# ---- quantized linear layers --------------------------------------------------------------------


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
            )

    def prepare_weight(
        self,
        qdata: Tensor,
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
        shape = (qdata.shape[0], width or qdata.shape[1] * (2 if lookup(weight).packed else 1))
        encoded = Encoded(qdata, scale, dual_scale, weight, -1, shape)
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
            )
        return self.kernel(a.scheme.name).call(a, weight)


def schemes_on(device: str, like: Schemes) -> Schemes:
    """The quantized linear layers of another device, chosen as those of `like` were."""
    return replace(like, device=_device(device))


def to_emulate(value: object) -> Emulate | None:
    """True, False, None or a word as `Emulate`. UsageError E-USE-01 for another word."""
    words = get_args(Emulate)
    found: Emulate | None = words[0] if value is True else None if value is False else value  # type: ignore[assignment]
    if found is not None and found not in words:
        raise UsageError(f"emulate={value}", needs=" or ".join(words), fix=f"--emulate {words[0]}")
    return found


def parse_rules(text: str | None) -> dict[str, str]:
    """`mxfp8=floor,mxfp4=max:7` as scheme -> scale rule of the activation. UsageError E-USE-01."""
    found = {}
    if text is not None and not isinstance(text, str):
        raise UsageError(
            f"activation_rule {text!r}",
            needs="text, as mxfp8=floor,mxfp4=max:7",
            fix="leave it out for the defaults",
        )
    for word in text.split(",") if text else ():
        scheme, _, rule = word.partition("=")
        row = scheme_of(scheme.strip())
        found[row.name] = resolve_rule(lookup(row.activation), rule.strip() or "?")
    return found


# ---- all operators ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The operators of the denoiser, by name. Contracts: `ascendit.kernels.reference`."""

    linear: Function
    rms_norm: Function
    layer_norm: Function
    adaln: Function
    gated_residual: Function
    rope: Function
    gelu_tanh: Function
    gelu: Function
    attention: Function
    mean_square: Function = reference.mean_square
    """With `rms_scale`, `rms_norm` in two phases, between which ranks that have some of the heads reduce."""
    rms_scale: Function = reference.rms_scale
    attention_kernels: Mapping[str, Function] = dataclasses.field(default_factory=dict)
    """Name -> a kernel that a step can ask for in the place of `attention`."""
    quantized: Schemes
    """Quantized linear layers: prepare_weight, quantize_activation, quantized_linear."""
    prepared: Mapping[str, Prepare] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Operator -> `backend: reason`."""

    def prepare(self, operator: str, *given: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `operator` takes besides tokens of `dtype`, in the form in which it does least.

        For what is made once and used many times: cos and sin of `rope`, the rows of `adaln` and
        `gated_residual`. The operators take these as they are too, and then do it on every call.
        """
        if operator not in self.prepared:
            return given
        ready: tuple[Tensor, ...] = self.prepared[operator](*given, dtype=dtype)
        return ready


OPERATOR_NAMES = tuple(
    f.name for f in dataclasses.fields(Ops) if f.type == "Function" and f.default is dataclasses.MISSING
)
PHASES = ("mean_square", "rms_scale")


def bind(
    device: Device | str,
    force: str | None = None,
    *,
    fast_layernorm: bool = False,
    emulate: Emulate | bool | None = None,
    activation_rule: str | None = None,
    attention: str | None = None,
    nz: bool = False,
) -> Ops:
    """The operators for `device` ("cpu", "cuda:1", "twin:a5"). `force`: None or "reference".

    `fast_layernorm`: layer norms by MindIE-SD where the device has it. `emulate`: schemes that the device has
    no matmul for are decoded on each use, or once; a chip refuses them without it. `activation_rule`: scale
    rules of the tokens, as `mxfp8=floor,mxfp4=max:7`, for schemes where it is not the default one.
    `attention`: a kernel of an NPU by its name in `ops/npu/kernels.py`; None: the best. `nz`: weights in
    FRACTAL_NZ where an NPU takes both layouts. UsageError for an `attention` that the device does not have.
    """
    if force not in (None, "reference"):
        raise UsageError(
            f"ops={force}",
            needs="reference, or nothing for the fastest of this device",
            fix="--set ops=reference",
        )
    found = _device(device)
    if attention is not None and (force or not found.has_attention_kernels):
        raise UsageError(
            f"attention={attention} with {'ops=reference' if force else f'device {found}'}",
            needs="an NPU or a twin: it names one of their kernels",
            fix="leave attention out",
        )
    wish = _wish(found, force, to_emulate(emulate), fast_layernorm, attention)
    chosen = {name: select(name, found, wish) for name in OPERATOR_NAMES}
    for reason in dict.fromkeys(k.reason for k in chosen.values()):
        names = ", ".join(n for n, k in chosen.items() if k.reason == reason)
        log.info("operators on %s: %s -> %s (--set ops=reference for the plain ones)", found, names, reason)
    return Ops(
        **{n: k.call for n, k in chosen.items()},
        **{name: select(name, found, wish).call for name in PHASES},
        attention_kernels={
            k.name: k.call
            for k in (() if wish.reference else kernels_of(found, wish))
            if k.operator == "attention" and k.name and not k.missing()
        },
        quantized=Schemes(found, wish, parse_rules(activation_rule), nz),
        prepared={n: k.prepare for n, k in chosen.items() if k.prepare},
        choices={n: k.reason for n, k in chosen.items()},
    )


def _wish(
    device: Device, force: str | None, emulate: Emulate | None, fast_layernorm: bool, attention: str | None
) -> Wish:
    if force:
        return Wish(reference=True, emulate=emulate or "decode-on-use")
    wish, names = Wish(emulate=emulate), {}
    if attention is not None:
        names["attention"] = attention
    if fast_layernorm and FAST_LAYERNORM in [k.name for k in kernels_of(device, wish)]:
        names["layer_norm"] = FAST_LAYERNORM
    elif fast_layernorm:
        log.warning(
            "%s: MindIE-SD has no operators on %s, layer norms stay as they are", FAST_LAYERNORM, device
        )
    return replace(wish, names=names)


def _device(device: Device | str) -> Device:
    """Open, if its operators depend on the chip: an NPU tells its own only then."""
    found = parse_device(device) if isinstance(device, str) else device
    return open_device(found) if found.operators == "npu" else found
