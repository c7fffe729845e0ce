"""Choose one implementation of each operator, once, for one device.

`bind("twin:a5")` gives an `Ops`: a frozen set of functions that is handed to the model. There is no global
choice and no look at `tensor.device`. Each choice is logged with its reason; `force="reference"` takes
the plain PyTorch ones everywhere.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.kernels import reference
from ascendit.ops.quant_linear import Emulate, LinearChoice, Schemes, parse_rules, to_emulate

if TYPE_CHECKING:
    from ascendit.device.backends import Device

log = logging.getLogger("ascendit")

Function = Callable[..., Tensor]
Prepare = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Choice:
    """One operator as it was chosen. `reason` begins with the backend. `prepare`: see `Ops.prepare`."""

    function: Function
    reason: str
    prepare: Prepare | None = None


@dataclass(frozen=True)
class Form:
    """One way to compute the operator `name` on an NPU. `calls`: operators of torch.ops that it needs."""

    name: str
    calls: str
    function: Function
    why: str
    prepare: Prepare | None = None
    asked: bool = False
    """Taken only when it is asked for."""
    word: str = ""
    """What it is asked for by."""


def in_dtype(*rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Prepares rows of a modulation: in the dtype of the tokens."""
    return tuple(t.to(dtype) for t in rows)


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
    """Linear layers on codes: prepare_weight, quantize_activation, quantized_linear."""
    prepared: Mapping[str, Prepare] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Operator -> `backend: reason`."""

    def prepare(self, operator: str, *given: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `operator` takes besides tokens of `dtype`, in the form in which it does least.

        For what is made once and used many times: cos and sin of `rope`, the rows of `adaln` and
        `gated_residual`. The operators take these as they are too, and then do it on every call.
        """
        return self.prepared[operator](*given, dtype=dtype) if operator in self.prepared else given


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
    `attention`: the kernel of an NPU by its word in `ops/npu/attention.py`; None: the best. `nz`: weights in
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
    if attention is not None and (force or found.operators != "npu"):
        raise UsageError(
            f"attention={attention} with {'ops=reference' if force else f'device {found}'}",
            needs="an NPU or a twin: it names one of their kernels",
            fix="leave attention out",
            code="E-USE-01",
        )
    chosen = {} if force else _fast_forms(found, fast_layernorm, attention)
    plain = "asked for" if force else f"{found.operators} has no faster form"
    chosen = {n: chosen.get(n) or Choice(getattr(reference, n), f"reference: {plain}") for n in NAMES}
    for reason in dict.fromkeys(c.reason for c in chosen.values()):
        names = ", ".join(n for n, c in chosen.items() if c.reason == reason)
        log.info("operators on %s: %s -> %s (--set ops=reference for the plain ones)", found, names, reason)
    wish = to_emulate(emulate)
    if force and wish is None:
        wish = "decode-on-use"
    return Ops(
        **{n: c.function for n, c in chosen.items()},
        quantized=Schemes(
            found, {} if force else _linear_forms(found, wish), wish, parse_rules(activation_rule), nz
        ),
        prepared={n: c.prepare for n, c in chosen.items() if c.prepare},
        choices={n: c.reason for n, c in chosen.items()},
    )


def schemes_on(device: str, like: Schemes) -> Schemes:
    """The quantized linear layers of another device, chosen as those of `like` were."""
    found, plain = _device(device), not like.forms and bool(_linear_forms(like.device, like.emulate))
    return replace(like, device=found, forms={} if plain else _linear_forms(found, like.emulate), _told=set())


_LINEAR = {
    "cpu": "ascendit.kernels.cpu.linear",
    "cuda": "ascendit.ops.cuda.linear",
    "npu": "ascendit.ops.npu.linear",
}
_FUSED = {"cpu": "ascendit.kernels.cpu.elementwise", "cuda": "ascendit.ops.cuda.fused"}


def _device(device: Device | str) -> Device:
    """Open, if its operators depend on the chip: an NPU tells its own only then."""
    from ascendit.device.backends import open_device, parse_device

    found = parse_device(device) if isinstance(device, str) else device
    return open_device(found) if found.operators == "npu" else found


def _linear_forms(device: Device, emulate: Emulate | None) -> Mapping[str, LinearChoice]:
    """Scheme -> how this kind of device computes a linear layer on codes."""
    family: Any = importlib.import_module(_LINEAR[device.operators])
    found: Mapping[str, LinearChoice] = family.forms(device, emulate)
    return found


def _fast_forms(device: Device, fast_layernorm: bool, attention: str | None) -> dict[str, Choice]:
    """Operator -> what this device has for it; the native ones before the fused ones."""
    if device.operators == "npu":
        from ascendit.ops.npu import dense as npu

        return npu.choose(str(device.chip), fast_layernorm=fast_layernorm, attention=attention)
    if fast_layernorm:
        log.warning("fast_layernorm: MindIE-SD has no operators on %s, layer norms stay as they are", device)
    kind = device.operators
    module: Any = importlib.import_module(_FUSED[kind])
    forms = {
        name: Choice(getattr(module, name), f"{kind}: fused PyTorch kernel")
        for name in NAMES
        if hasattr(module, name)
    }
    if kind == "cuda":
        from ascendit.ops.cuda import dense as cuda_dense

        forms |= {
            name: Choice(function, f"cuda: {reason}")
            for name, (function, reason) in cuda_dense.forms(device).items()
        }
    if kind == "cpu":
        from ascendit.kernels.cpu import attention as cpu_native

        forms |= {
            name: Choice(function, f"native: {reason}, for BF16 tokens")
            for name, (function, reason) in cpu_native.forms().items()
        }
        forms |= {name: replace(forms[name], prepare=in_dtype) for name in module.ROUNDED_ROWS}
    return forms
