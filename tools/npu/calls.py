"""Every way in which ascendit calls an operator of an NPU: `ops/npu/kernels.py`, then `ops/npu/linear.py`.

They are calls of ascendit's own functions, so the same list runs on the twin, where what they pass on is
recorded, and on the real dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ascendit import mx
from ascendit.device.device import Device
from ascendit.ops.npu.linear import NZ_SCHEMES
from ascendit.ops.operators import Ops, bind
from ascendit.quant.schemes import LINEAR_SCHEMES

S, TEXT, HEADS, HEAD = 20, 12, 2, 32
D = HEADS * HEAD
BF16 = torch.bfloat16
OURS = "ops: "
"""Before the names of these calls in reports."""
RULES = {"mxfp8": ("floor", "ceil"), "mxfp4": ("floor", "max:6.0", "max:7.25"), "w4a8": ("floor", "ceil")}


@dataclass(frozen=True)
class Call:
    """`run` calls one of ascendit's functions; `quantized` names the scheme if it is one on codes."""

    name: str
    run: Callable[[], Any]
    scheme: str = "bf16"


def calls(device: Device) -> Iterator[Call]:
    """On the device that is open now."""
    yield from _dense(bind(device), device)
    fast = bind(device, fast_layernorm=True)
    x, row = (t.to(device.torch_name) for t in (rand(1, S, D), rand(D).float()))
    yield Call("layer_norm, fast_layernorm", lambda: fast.layer_norm(x, row, row, 1e-6))
    for scheme in LINEAR_SCHEMES:
        if scheme in device.native_schemes:
            yield from _quantized(bind(device), device, scheme)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(BF16)


def _dense(ops: Ops, device: Device) -> Iterator[Call]:
    def put(*tensors: Tensor) -> Any:
        moved = tuple(t.to(device.torch_name) for t in tensors)
        return moved if len(moved) > 1 else moved[0]

    x, y, weight, bias = put(rand(1, S, D), rand(1, S, D), rand(40, D), rand(40))
    gamma = put(rand(D).float())
    q, k = put(rand(1, S, HEADS, HEAD), rand(1, TEXT, HEADS, HEAD))
    angle = rand(S, HEAD // 2).float()
    cos, sin = ops.prepare("rope", *put(angle.cos(), angle.sin()), dtype=BF16)
    yield Call("linear", lambda: ops.linear(x, weight, bias))
    yield Call("rms_norm", lambda: ops.rms_norm(x, gamma, 1e-6))
    yield Call("layer_norm", lambda: ops.layer_norm(x, gamma, gamma, 1e-6))
    yield Call("rope", lambda: ops.rope(q, cos, sin))
    yield Call("gelu_tanh", lambda: ops.gelu_tanh(x))
    yield Call("gelu", lambda: ops.gelu(x))
    yield Call("attention", lambda: ops.attention(q, q, q))
    yield Call("attention to text", lambda: ops.attention(q, k, k))
    infer = bind(device, attention="fused_infer")
    yield Call("attention, fused_infer", lambda: infer.attention(q, k, k))
    for spans in ((S,), (5, S - 5)):
        rows = put(rand(len(spans), D).float())
        (scale,) = ops.prepare("adaln", rows, dtype=BF16)
        (gate,) = ops.prepare("gated_residual", rows, dtype=BF16)
        name = f"{len(spans)} span" + "s" * (len(spans) > 1)
        yield Call(f"adaln, {name}", lambda s=scale, n=spans: ops.adaln(x, s, s, n, 1e-6))
        yield Call(f"gated_residual, {name}", lambda g=gate, n=spans: ops.gated_residual(x, y, g, n))


def _quantized(ops: Ops, device: Device, scheme: str) -> Iterator[Call]:
    """Prepare a weight, quantize tokens, multiply: in each layout, with and without smoothing and bias."""
    q = ops.quantized
    k, n = (1024 if scheme == "mxfp4_dualscale" else 128), 32
    form = LINEAR_SCHEMES[scheme].weight
    w = mx.encode(rand(n, k), form)
    x, smooth = rand(1, S, k).to(device.torch_name), rand(k).abs().float().to(device.torch_name)
    bias = rand(n).float()
    for nz in (False, True) if form in NZ_SCHEMES else (False,):
        for b in (None, bias):
            given = (w.qdata, w.scale, w.dual_scale, b, form)
            words = f"{scheme}{', NZ' * nz}{', bias' * (b is not None)}"
            yield Call(f"{words}: weight", lambda g=given, z=nz: q.prepare_weight(*g, nz=z), scheme)
            weight, tokens = q.prepare_weight(*given, nz=nz), q.quantize_activation(x, scheme)
            yield Call(f"{words}: matmul", lambda t=tokens, v=weight: q.quantized_linear(t, v), scheme)
            yield Call(f"{words}: weight back", lambda v=weight: q.stored(v), scheme)
    yield Call(f"{scheme}: tokens", lambda: q.quantize_activation(x, scheme), scheme)
    yield Call(f"{scheme}: smoothed tokens", lambda: q.quantize_activation(x, scheme, smooth), scheme)
    for rule in RULES.get(scheme, ()):
        yield Call(
            f"{scheme}: tokens, {rule}", lambda r=rule: q.quantize_activation(x, scheme, None, r), scheme
        )


class Recorder(TorchDispatchMode):
    """The operators of torch.ops.npu and torch.ops.mindiesd that are called: name, arguments, result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("npu", "mindiesd"):
            name = f"{func.namespace}::{func.overloadpacket.__name__}".removeprefix("npu::")
            self.seen.append((name, tuple(args), dict(kwargs or {}), result))
        return result


def described(result: Any) -> list[Any]:
    """Shape and dtype of every tensor in a result; other values as they are."""
    if isinstance(result, Tensor):
        return [[list(result.shape), str(result.dtype).removeprefix("torch.")]]
    if isinstance(result, tuple | list):
        return [one for part in result for one in described(part)]
    return [result]
