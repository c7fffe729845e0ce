"""Quantized linear layers of a CUDA card against BF16 F.linear, and dense operators against plain PyTorch.

    python benchmarks/cuda_linear.py                              # the linears of A14B, 512 to 32760 tokens
    python benchmarks/cuda_linear.py --emulate decode-once
    python benchmarks/cuda_linear.py --tokens 64 --width 256 --ffn 512 --device cpu      # does it run?

`quantize` runs once for all layers with the same input, `product` in each of them; `x bf16` is the time of
both relative to F.linear. Medians in milliseconds, interleaved cases, random numbers.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit import mx
from ascendit.kernels import reference
from ascendit.ops.open_device import open_device, synchronize
from ascendit.ops.operators import bind
from ascendit.quant.schemes import LINEAR_SCHEMES

Call = Callable[[], Any]
HEADS = 128


class Clock:
    """Median times of calls on a device, each started after the previous ones have finished."""

    def __init__(self, device: Any, reps: int, inner: int) -> None:
        self.device, self.reps, self.inner = device, reps, inner

    def once(self, call: Call) -> float:
        """Milliseconds of a call, the mean of `inner` consecutive ones."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.inner):
            call()
        synchronize(self.device)
        return (time.perf_counter() - start) * 1e3 / self.inner

    def medians(self, calls: dict[str, Call]) -> dict[str, float]:
        for call in calls.values():
            self.once(call)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.reps):
            for name, call in calls.items():
                times[name].append(self.once(call))
        return {name: statistics.median(each) for name, each in times.items()}


def linear_calls(ops: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[dict[str, Call], dict[str, Any]]:
    """Name -> call; scheme -> (relative error against F.linear, bits of memory per weight)."""
    exact = F.linear(x.float(), weight.float(), bias)
    bf16_bias = bias.to(x.dtype)
    calls: dict[str, Call] = {"bf16": lambda: F.linear(x, weight, bf16_bias)}
    properties: dict[str, Any] = {}
    for name, row in LINEAR_SCHEMES.items():
        e = mx.encode(weight, row.weight)
        prepared = ops.prepare_weight(e.qdata, e.scale, e.dual_scale, bias, row.weight)
        a = ops.quantize_activation(x, name)
        out = ops.quantized_linear(a, prepared)
        properties[name] = (float((out - exact).norm() / exact.norm()), prepared.nbytes * 8 / weight.numel())
        calls[f"{name} quantize"] = lambda name=name: ops.quantize_activation(x, name)  # type: ignore[misc]
        calls[f"{name} product"] = lambda a=a, prepared=prepared: ops.quantized_linear(a, prepared)  # type: ignore[misc]
    return calls, properties


def linears(ops: Any, clock: Clock, device: str, tokens: list[int], shapes: list[tuple[int, int]]) -> None:
    """Print a table for each layer K x N."""
    for k, n in shapes:
        weight, bias = (
            torch.randn(n, k, device=device).to(torch.bfloat16) * k**-0.5,
            torch.randn(n, device=device),
        )
        print(f"\n| {k} x {n} | tokens | quantize ms | product ms | x bf16 | TFLOP/s | error | bits |")
        print("|---|---|---|---|---|---|---|---|")
        for m in tokens:
            x = torch.randn(m, k, device=device).to(torch.bfloat16)
            calls, properties = linear_calls(ops, x, weight, bias)
            ms = clock.medians(calls)
            rate = 2e-9 * m * n * k
            plain = ms["bf16"]
            print(f"| bf16 | {m} | - | {plain:.3f} | 1.00 | {rate / plain:.0f} | - | 16 |")
            for name, (error, bits) in properties.items():
                q, p = ms[f"{name} quantize"], ms[f"{name} product"]
                print(
                    f"| {name} | {m} | {q:.3f} | {p:.3f} | {(q + p) / plain:.2f} | {rate / (q + p):.0f}"
                    f" | {error:.1e} | {bits:.1f} |"
                )


def dense(ops: Any, clock: Clock, device: str, tokens: list[int], width: int) -> None:
    """Print the times of the other operators: the kernels of the device, and plain PyTorch."""
    print("\n| operator | tokens | ms | reference ms | x as fast |\n|---|---|---|---|---|")
    for m in tokens:
        x, y = (torch.randn(1, m, width, device=device).to(torch.bfloat16) for _ in range(2))
        rows = [torch.randn(1, width, device=device) for _ in range(3)]
        angle = torch.rand(m, HEADS // 2, device=device)
        cases: dict[str, tuple[Any, ...]] = {
            "rms_norm": (x, rows[0][0], 1e-6),
            "layer_norm": (x, rows[0][0], rows[1][0], 1e-6),
            "adaln": (x, rows[0], rows[1], (m,), 1e-6),
            "gated_residual": (x, y, rows[2], (m,)),
            "rope": (x.unflatten(2, (-1, HEADS)), angle.cos(), angle.sin()),
            "gelu_tanh": (x,),
        }
        for name, arguments in cases.items():
            kernels = {"fast": getattr(ops, name), "plain": getattr(reference, name)}
            ms = clock.medians({k: lambda f=f: f(*arguments) for k, f in kernels.items()})  # type: ignore[misc] # noqa: B023
            fast, plain = ms["fast"], ms["plain"]
            print(f"| {name} | {m} | {fast:.3f} | {plain:.3f} | {plain / fast:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--emulate", default=None, choices=["decode-on-use", "decode-once"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096, 32760])
    parser.add_argument("--width", type=int, default=5120)
    parser.add_argument("--ffn", type=int, default=13824)
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--inner", type=int, default=5)
    args = parser.parse_args()
    device = open_device(args.device)
    ops = bind(device, emulate=args.emulate)
    card = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor()
    print(f"torch {torch.__version__}, {card}")
    clock = Clock(device, args.reps, args.inner)
    d, ffn = args.width, args.ffn
    with torch.inference_mode():
        linears(
            ops.quantized, clock, device.torch_name, args.tokens, [(d, d), (d, 3 * d), (d, ffn), (ffn, d)]
        )
        dense(ops, clock, device.torch_name, args.tokens, d)
    for scheme in LINEAR_SCHEMES:
        print(f"{scheme}: {ops.quantized.kernel(scheme).reason}")


if __name__ == "__main__":
    main()
