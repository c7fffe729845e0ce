"""The operators of the denoiser, bound once for one device.

`bind("twin:a5")` gives an `Ops`: a frozen set of functions that is handed to the model. There is no global
choice and no look at `tensor.device`. Each choice is logged with its reason; `force="reference"` takes
the plain PyTorch ones everywhere.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ascendit.device.device import Device, parse_device
from ascendit.errors import UsageError
from ascendit.kernels.kernel import Emulate, Function, Prepare, Wish
from ascendit.ops.quant_linear import Schemes, parse_rules, to_emulate
from ascendit.ops.runtime import open_device
from ascendit.ops.select import kernels_of, select

log = logging.getLogger("ascendit")

FAST_LAYERNORM = "fast_layernorm"
"""The kernel of MindIE-SD by its name."""


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


NAMES = tuple(f.name for f in dataclasses.fields(Ops) if f.type == "Function")


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
            code="E-USE-01",
        )
    found = _device(device)
    if attention is not None and (force or not found.has_attention_kernels):
        raise UsageError(
            f"attention={attention} with {'ops=reference' if force else f'device {found}'}",
            needs="an NPU or a twin: it names one of their kernels",
            fix="leave attention out",
            code="E-USE-01",
        )
    wish = _wish(found, force, to_emulate(emulate), fast_layernorm, attention)
    chosen = {name: select(name, found, wish) for name in NAMES}
    for reason in dict.fromkeys(k.reason for k in chosen.values()):
        names = ", ".join(n for n, k in chosen.items() if k.reason == reason)
        log.info("operators on %s: %s -> %s (--set ops=reference for the plain ones)", found, names, reason)
    return Ops(
        **{n: k.call for n, k in chosen.items()},
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


def schemes_on(device: str, like: Schemes) -> Schemes:
    """The quantized linear layers of another device, chosen as those of `like` were."""
    return replace(like, device=_device(device))


def _device(device: Device | str) -> Device:
    """Open, if its operators depend on the chip: an NPU tells its own only then."""
    found = parse_device(device) if isinstance(device, str) else device
    return open_device(found) if found.operators == "npu" else found
