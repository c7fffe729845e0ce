"""Every way in which ascendit calls an operator of an NPU: `ops/npu/kernels.py`, then `ops/npu/linear.py`.

The list consists of calls of ascendit's own functions. It runs on the twin, where the operators that they
call are recorded, and on the real dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ascendit import mx
from ascendit.device.attention_kernels import ATTENTION_KERNELS
from ascendit.device.device import Device
from ascendit.kernels.kernel import Wish
from ascendit.ops.npu.linear import NZ_SCHEMES
from ascendit.ops.operators import Ops, bind
from ascendit.ops.select import kernels_of
from ascendit.quant.schemes import LINEAR_SCHEMES

S, TEXT, HEADS, HEAD = 20, 12, 2, 32
D = HEADS * HEAD
BF16 = torch.bfloat16
OURS = "ops: "
"""Prefix of the names of these calls in reports."""
ATTENTION = "attention"
MOST = {"fusion": 1, "fused_infer": 1, "laser": 8, "emulated": 0}
"""Attention kernel -> limit of launches without log-sum-exp, if it is not 4: three quantizations and one."""
RULES = {"mxfp8": ("floor", "ceil"), "mxfp4": ("floor", "max:6.0", "max:7.25"), "w4a8": ("floor", "ceil")}


@dataclass(frozen=True)
class Call:
    """`run` calls one of ascendit's functions. `scheme`: of a quantized layer, else bf16.

    `most`: limit of the kernels that it launches, if it is not that of the scheme; 0: no limit.
    """

    name: str
    run: Callable[[], Any]
    scheme: str = "bf16"
    most: int | None = None


def calls(device: Device) -> Iterator[Call]:
    """Calls on the device that is open."""
    yield from _dense(bind(device), device)
    yield from _attention(device)
    fast = bind(device, fast_layernorm=True)
    x, row = (t.to(device.torch_name) for t in (rand(1, S, D), rand(D).float()))
    yield Call("layer_norm, fast_layernorm", lambda: fast.layer_norm(x, row, row, 1e-6))
    for scheme in LINEAR_SCHEMES:
        if scheme in device.native_schemes:
            yield from _quantized(bind(device), device, scheme)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(BF16)


def _dense(ops: Ops, device: Device) -> Iterator[Call]:
    def move(*tensors: Tensor) -> Any:
        moved = tuple(t.to(device.torch_name) for t in tensors)
        return moved if len(moved) > 1 else moved[0]

    x, y, weight, bias = move(rand(1, S, D), rand(1, S, D), rand(40, D), rand(40))
    gamma = move(rand(D).float())
    q = move(rand(1, S, HEADS, HEAD))
    angle = rand(S, HEAD // 2).float()
    cos, sin = ops.prepare("rope", *move(angle.cos(), angle.sin()), dtype=BF16)
    yield Call("linear", lambda: ops.linear(x, weight, bias))
    yield Call("rms_norm", lambda: ops.rms_norm(x, gamma, 1e-6))
    yield Call("layer_norm", lambda: ops.layer_norm(x, gamma, gamma, 1e-6))
    yield Call("rope", lambda: ops.rope(q, cos, sin))
    yield Call("gelu_tanh", lambda: ops.gelu_tanh(x))
    yield Call("gelu", lambda: ops.gelu(x))
    for spans in ((S,), (5, S - 5)):
        rows = move(rand(len(spans), D).float())
        (scale,) = ops.prepare("adaln", rows, dtype=BF16)
        (gate,) = ops.prepare("gated_residual", rows, dtype=BF16)
        name = f"{len(spans)} span" + "s" * (len(spans) > 1)
        yield Call(f"adaln, {name}", lambda s=scale, n=spans: ops.adaln(x, s, s, n, 1e-6))
        yield Call(f"gated_residual, {name}", lambda g=gate, n=spans: ops.gated_residual(x, y, g, n))


def _attention(device: Device) -> Iterator[Call]:
    """Every attention kernel of the chip: self- and cross-attention, with and without log-sum-exp."""
    for kernel in kernels_of(device, Wish(emulate="decode-on-use")):
        if not kernel.operator.startswith(ATTENTION) or kernel.missing():
            continue
        row = ATTENTION_KERNELS.get(kernel.name)
        s = max(S, row.shortest + 2 if row else 0)
        q, k = (rand(1, n, HEADS, HEAD).to(device.torch_name) for n in (s, TEXT))
        scheme = kernel.operator.removeprefix(ATTENTION).removeprefix("_") or "bf16"
        most = MOST.get(kernel.name, 4)
        if most == 0:
            kernel.call(q, q, q)  # copies the table of the format to the device
        for kind, keys in (("self", q), ("cross", k)):
            if row and kind == "cross" and row.kinds == ("self",):
                continue
            for suffix, options in (("", {}), (" + LSE", {"return_lse": True})):
                name = f"{ATTENTION} {scheme}, {kernel.name}: {kind}{suffix}"
                run = partial(kernel.call, q, keys, keys, **options)
                yield Call(name, run, scheme, most + 2 * len(options) if most else 0)


def _quantized(ops: Ops, device: Device, scheme: str) -> Iterator[Call]:
    """Prepare a weight, quantize an activation, multiply: each layout, with and without smoothing, bias."""
    q = ops.quantized
    k, n = (1024 if scheme == "mxfp4_dualscale" else 128), 32
    fmt = LINEAR_SCHEMES[scheme].weight
    w = mx.encode(rand(n, k), fmt)
    x, smooth = rand(1, S, k).to(device.torch_name), rand(k).abs().float().to(device.torch_name)
    bias = rand(n).float()
    for nz in (False, True) if fmt in NZ_SCHEMES else (False,):
        for b in (None, bias):
            args = (w.qdata, w.scale, w.dual_scale, b, fmt)
            label = f"{scheme}{', NZ' * nz}{', bias' * (b is not None)}"
            yield Call(f"{label}: weight", lambda a=args, z=nz: q.prepare_weight(*a, nz=z), scheme)
            weight, activation = q.prepare_weight(*args, nz=nz), q.quantize_activation(x, scheme)
            yield Call(f"{label}: matmul", lambda a=activation, w=weight: q.quantized_linear(a, w), scheme)
            yield Call(f"{label}: weight back", lambda w=weight: q.stored(w), scheme)
    yield Call(f"{scheme}: quantize", lambda: q.quantize_activation(x, scheme), scheme)
    yield Call(f"{scheme}: quantize, smoothed", lambda: q.quantize_activation(x, scheme, smooth), scheme)
    for rule in RULES.get(scheme, ()):
        yield Call(
            f"{scheme}: quantize, {rule}", lambda r=rule: q.quantize_activation(x, scheme, None, r), scheme
        )


class Recorder(TorchDispatchMode):
    """Record calls of torch.ops.npu and torch.ops.mindiesd: name, arguments, keyword arguments, result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("npu", "mindiesd"):
            name = f"{func.namespace}::{func.overloadpacket.__name__}".removeprefix("npu::")
            self.calls.append((name, tuple(args), dict(kwargs or {}), result))
        return result


def described(result: Any) -> list[Any]:
    """Shape and dtype of every tensor in a result; other values unchanged."""
    if isinstance(result, Tensor):
        return [[list(result.shape), str(result.dtype).removeprefix("torch.")]]
    if isinstance(result, tuple | list):
        return [item for part in result for item in described(part)]
    return [result]
