"""The operators of the denoiser and its quantized linear layers, bound to one device.

`bind("twin:a5")` returns an `Ops`: an immutable set of functions that is passed to the model. Nothing is
global, and no operator looks at `tensor.device`. `select` chooses each kernel; the choice is logged with its
reason. `force="reference"` uses plain PyTorch everywhere. `Ops.quantized` quantizes an activation once for
all weights that it is multiplied with:

    ops = bind("twin:a5").quantized
    weight = ops.prepare_weight(qdata, scale, None, bias, "mxfp8")     # once, at load
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
from ascendit.device.limits import check_rules, parse_rules
from ascendit.errors import UsageError
from ascendit.kernels import reference
from ascendit.kernels.kernel import (
    Activation,
    Emulate,
    Function,
    Kernel,
    Prepare,
    PreparedWeight,
    QuantLinearKernel,
    Wish,
)
from ascendit.kernels.quantized_attention import operator_of
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import lookup
from ascendit.ops.open_device import open_device
from ascendit.ops.select import kernels_of, select
from ascendit.quant.schemes import scheme_of

log = logging.getLogger("ascendit")

FAST_LAYERNORM = "fast_layernorm"
"""Name of the layer norm kernel of MindIE-SD."""


# ---- quantized linear layers --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Schemes:
    """The quantized linear layers of one device.

    A scheme is native (the device has its matmul) or emulated (the weight is dequantized and multiplied: same
    numbers, slower). On an Ascend chip a scheme is emulated only if `wish.emulate` is set; CPU and CUDA
    emulate schemes without a matmul automatically and log it.
    """

    device: Device
    wish: Wish = Wish()
    rules: Mapping[str, str] = field(default_factory=dict)
    """Scheme -> scale rule of its activation, if it is not the default."""
    nz: bool = False
    """Store weights in FRACTAL_NZ if the NPU supports both layouts for a scheme."""
    _selected: dict[str, QuantLinearKernel] = field(default_factory=dict, init=False)
    _attention: dict[str, Kernel] = field(default_factory=dict, init=False)

    def kernel(self, scheme: str) -> QuantLinearKernel:
        """The kernel of `scheme`.

        Raises UsageError if it is unknown, EnvironmentProblem (E-CAP-01) if this chip does not support it.
        """
        if (kernel := self._selected.get(scheme)) is None:
            scheme_of(scheme)
            kernel = cast(QuantLinearKernel, select(scheme, self.device, self.wish))
            log.info(
                "linear layers in %s on %s -> %s: %s", scheme, self.device, kernel.backend, kernel.reason
            )
            self._selected[scheme] = kernel
        return kernel

    def attention(self, scheme: str) -> Kernel:
        """The kernel of attention in a scheme of `ATTENTION_FORMATS`.

        Raises EnvironmentProblem (E-CAP-01) if this chip does not support it.
        """
        operator = operator_of(scheme)
        if (kernel := self._attention.get(operator)) is None:
            kernel = self._attention[operator] = select(operator, self.device, self.wish)
            log.info("attention in %s on %s -> %s: %s", scheme, self.device, kernel.backend, kernel.reason)
        return kernel

    def check(self, used: Iterable[str]) -> None:
        """Check the schemes `used` by a model (w4a8 included) before it is loaded.

        Raises EnvironmentProblem (E-CAP-01) for a scheme that this chip does not support, UsageError
        (E-USE-01) for a scale rule of an unused scheme.
        """
        schemes = set(used) - {"bf16"}
        for scheme in sorted(schemes):
            self.kernel(scheme)
        check_rules(self.rules, schemes)

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
        """Move a stored weight to the device, in the layout of its kernel.

        `qdata` [N, K] (packed FP4 [N, K / 2]), `scale` and `dual_scale`: shapes and dtypes of `mx.Encoded`;
        `bias` [N] of any float dtype, or None. The rows of Q, K and V may be concatenated along N. `width`:
        K, needed if it is odd and packed. `nz`: FRACTAL_NZ for this weight. Raises UsageError if the tensors
        do not match `scheme`, E-QNT-01 if the kernel does not support the shape.
        """
        weight = scheme_of(scheme).weight
        shape = (qdata.shape[0], width or qdata.shape[1] * (2 if lookup(weight).packed else 1))
        encoded = Encoded(qdata, scale, dual_scale, weight, -1, shape)
        device = torch.device(self.device.torch_name)
        return self.kernel(scheme).prepare(encoded, bias, device, nz=nz or self.nz)

    def stored(self, weight: PreparedWeight) -> Encoded:
        """The inverse of `prepare_weight`: qdata [N, K] and scales, in dtypes and layout as on disk."""
        return self.kernel(weight.scheme).stored(weight)

    def quantize_activation(
        self, x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
    ) -> Activation:
        """Quantize an activation x [.., K] in bfloat16 or float16, and on CPU and CUDA also float32.

        `mul_scale`: float32 [K] that multiplies x first, rounded to x's dtype. `rule`: a scale rule of the
        format; None: the rule in `rules`, else the default of the scheme. Raises UsageError (E-USE-01) for a
        rule or dtype that the kernel does not support.
        """
        rule = rule or self.rules.get(scheme)
        return self.kernel(scheme).quantize_activation(x, scheme, mul_scale, rule)

    def quantized_linear(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """x @ weight.T + bias -> [.., N] in x's dtype.

        Raises UsageError (E-USE-01) if scheme or K do not match.
        """
        if a.scheme.weight != weight.scheme or a.width != weight.shape[1]:
            raise UsageError(
                f"K = {a.width} in {a.scheme.name} with a weight {weight.shape} in {weight.scheme}",
                needs=f"a weight [N, {a.width}] in {a.scheme.weight}",
                fix=f"quantize the activation for {weight.scheme}",
            )
        return self.kernel(a.scheme.name).call(a, weight)


def schemes_on(device: str, like: Schemes) -> Schemes:
    """The quantized linear layers of another device, with the options of `like`."""
    return replace(like, device=_device(device))


def to_emulate(value: object) -> Emulate | None:
    """Parse True, False, None or the name of a mode. Raises UsageError (E-USE-01) for any other value."""
    modes = get_args(Emulate)
    mode: Emulate | None = modes[0] if value is True else None if value is False else value  # type: ignore[assignment]
    if mode is not None and mode not in modes:
        raise UsageError(f"emulate={value}", needs=" or ".join(modes), fix=f"--emulate {modes[0]}")
    return mode


# ---- all operators ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The operators of the denoiser. `kernels/reference.py` documents their shapes and dtypes."""

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
    """With `rms_scale`, `rms_norm` in two phases: ranks that divide the heads can reduce in between."""
    rms_scale: Function = reference.rms_scale
    quantized: Schemes
    """Quantized linear layers: prepare_weight, quantize_activation, quantized_linear."""
    prepared: Mapping[str, Prepare] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Operator -> `backend: reason`."""

    def prepare(self, operator: str, *tensors: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Convert arguments of `operator` once to the layout of its kernel; `dtype`: dtype of the hidden
        states.

        cos and sin [S, d/2] of `rope`; scale and shift [.., D] of `adaln`; gate [.., D] of `gated_residual`.
        Unprepared tensors work too, but are converted on every call.
        """
        if operator not in self.prepared:
            return tensors
        prepared: tuple[Tensor, ...] = self.prepared[operator](*tensors, dtype=dtype)
        return prepared


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
    nz: bool = False,
) -> Ops:
    """Bind the operators to `device` ("cpu", "cuda:1", "twin:a5"). `force`: None or "reference".

    `fast_layernorm`: use MindIE-SD's layer norm if the device has it. `emulate`: dequantize weights of
    schemes without a matmul, which Ascend chips refuse otherwise. `activation_rule`: scale rules that differ
    from the default, such as `mxfp8=floor,mxfp4=max:7`. `nz`: weights in FRACTAL_NZ if the NPU supports both
    layouts. Raises UsageError (E-USE-01) for an invalid option, EnvironmentProblem if the device is missing.
    """
    if force not in (None, "reference"):
        raise UsageError(
            f"ops={force}",
            needs="reference, or nothing for the fastest kernels of this device",
            fix="--set ops=reference",
        )
    device = _device(device)
    wish = _wish(device, force, to_emulate(emulate), fast_layernorm)
    chosen = {name: select(name, device, wish) for name in OPERATOR_NAMES}
    listed = {n: k for n, k in chosen.items() if n != "attention"}  # `attention/` chooses for each call
    for reason in dict.fromkeys(k.reason for k in listed.values()):
        names = ", ".join(n for n, k in listed.items() if k.reason == reason)
        log.info("operators on %s: %s -> %s (--set ops=reference for plain PyTorch)", device, names, reason)
    return Ops(
        **{n: k.call for n, k in chosen.items()},
        **{name: select(name, device, wish).call for name in PHASES},
        quantized=Schemes(device, wish, parse_rules(activation_rule), nz),
        prepared={n: k.prepare for n, k in chosen.items() if k.prepare},
        choices={n: k.reason for n, k in chosen.items()},
    )


def _wish(device: Device, force: str | None, emulate: Emulate | None, fast_layernorm: bool) -> Wish:
    if force:
        return Wish(reference=True, emulate=emulate or "decode-on-use")
    wish, names = Wish(emulate=emulate), {}
    if fast_layernorm and FAST_LAYERNORM in [k.name for k in kernels_of(device, wish)]:
        names["layer_norm"] = FAST_LAYERNORM
    elif fast_layernorm:
        log.warning(
            "%s: MindIE-SD has no operators on %s; using the default layer norm", FAST_LAYERNORM, device
        )
    return replace(wish, names=names)


def _device(device: Device | str) -> Device:
    """Parse a device, and open an NPU or twin, whose operators depend on the chip."""
    device = parse_device(device) if isinstance(device, str) else device
    return open_device(device) if device.operators == "npu" else device
