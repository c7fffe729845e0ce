"""Linear layers on codes on a CUDA card against BF16 F.linear, and the dense operators against plain PyTorch.

    python benchmarks/cuda_linear.py                              # the linears of A14B, 512 to 32760 tokens
    python benchmarks/cuda_linear.py --emulate decode-once
    python benchmarks/cuda_linear.py --tokens 64 --width 256 --ffn 512 --device cpu      # does it run?

`quantize` is paid once for all layers that read the same tokens, `product` by each of them; `x bf16` is both
together against F.linear. Milliseconds, medians; cases interleaved; random numbers, several sets of weights.
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
    """Median times of calls on a device, each after the ones before it are done."""

    def __init__(self, device: Any, reps: int, inner: int) -> None:
        self.device, self.reps, self.inner = device, reps, inner

    def once(self, call: Call) -> float:
        """Milliseconds of one of `inner` calls in a row."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.inner):
            call()
        synchronize(self.device)
        return (time.perf_counter() - start) * 1e3 / self.inner

    def medians(self, calls: dict[str, Call]) -> dict[str, float]:
        for call in calls.values():
            self.once(call)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.reps):
            for name, call in calls.items():
                taken[name].append(self.once(call))
        return {name: statistics.median(times) for name, times in taken.items()}


def linear_calls(ops: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[dict[str, Call], dict[str, Any]]:
    """Name -> call; scheme -> (relative error against F.linear, bits of memory for each number)."""
    wide = F.linear(x.float(), weight.float(), bias)
    low = bias.to(x.dtype)
    calls: dict[str, Call] = {"bf16": lambda: F.linear(x, weight, low)}
    about: dict[str, Any] = {}
    for name, row in LINEAR_SCHEMES.items():
        e = mx.encode(weight, row.weight)
        ready = ops.prepare_weight(e.qdata, e.scale, e.dual_scale, bias, row.weight)
        a = ops.quantize_activation(x, name)
        out = ops.quantized_linear(a, ready)
        about[name] = (float((out - wide).norm() / wide.norm()), ready.nbytes * 8 / weight.numel())
        calls[f"{name} quantize"] = lambda name=name: ops.quantize_activation(x, name)  # type: ignore[misc]
        calls[f"{name} product"] = lambda a=a, ready=ready: ops.quantized_linear(a, ready)  # type: ignore[misc]
    return calls, about


def linears(ops: Any, clock: Clock, place: str, tokens: list[int], shapes: list[tuple[int, int]]) -> None:
    """One table for each layer K x N."""
    for k, n in shapes:
        weight, bias = (
            torch.randn(n, k, device=place).to(torch.bfloat16) * k**-0.5,
            torch.randn(n, device=place),
        )
        print(f"\n| {k} x {n} | tokens | quantize ms | product ms | x bf16 | TFLOP/s | error | bits |")
        print("|---|---|---|---|---|---|---|---|")
        for m in tokens:
            x = torch.randn(m, k, device=place).to(torch.bfloat16)
            calls, about = linear_calls(ops, x, weight, bias)
            took = clock.medians(calls)
            rate = 2e-9 * m * n * k
            plain = took["bf16"]
            print(f"| bf16 | {m} | - | {plain:.3f} | 1.00 | {rate / plain:.0f} | - | 16 |")
            for name, (error, bits) in about.items():
                q, p = took[f"{name} quantize"], took[f"{name} product"]
                print(
                    f"| {name} | {m} | {q:.3f} | {p:.3f} | {(q + p) / plain:.2f} | {rate / (q + p):.0f}"
                    f" | {error:.1e} | {bits:.1f} |"
                )


def dense(ops: Any, clock: Clock, place: str, tokens: list[int], width: int) -> None:
    """The operators between the linears: as bound, and plain."""
    print("\n| operator | tokens | ms | reference ms | x as fast |\n|---|---|---|---|---|")
    for m in tokens:
        x, y = (torch.randn(1, m, width, device=place).to(torch.bfloat16) for _ in range(2))
        rows = [torch.randn(1, width, device=place) for _ in range(3)]
        turn = torch.rand(m, HEADS // 2, device=place)
        given: dict[str, tuple[Any, ...]] = {
            "rms_norm": (x, rows[0][0], 1e-6),
            "layer_norm": (x, rows[0][0], rows[1][0], 1e-6),
            "adaln": (x, rows[0], rows[1], (m,), 1e-6),
            "gated_residual": (x, y, rows[2], (m,)),
            "rope": (x.unflatten(2, (-1, HEADS)), turn.cos(), turn.sin()),
            "gelu_tanh": (x,),
        }
        for name, arguments in given.items():
            forms = {"fast": getattr(ops, name), "plain": getattr(reference, name)}
            took = clock.medians({k: lambda f=f: f(*arguments) for k, f in forms.items()})  # type: ignore[misc] # noqa: B023
            fast, plain = took["fast"], took["plain"]
            print(f"| {name} | {m} | {fast:.3f} | {plain:.3f} | {plain / fast:.1f} |")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--device", default="cuda")
    words.add_argument("--emulate", default=None, choices=["decode-on-use", "decode-once"])
    words.add_argument("--tokens", type=int, nargs="+", default=[512, 4096, 32760])
    words.add_argument("--width", type=int, default=5120)
    words.add_argument("--ffn", type=int, default=13824)
    words.add_argument("--reps", type=int, default=9)
    words.add_argument("--inner", type=int, default=5)
    given = words.parse_args()
    device = open_device(given.device)
    ops = bind(device, emulate=given.emulate)
    card = torch.cuda.get_device_name() if given.device.startswith("cuda") else platform.processor()
    print(f"torch {torch.__version__}, {card}")
    clock = Clock(device, given.reps, given.inner)
    d, ffn = given.width, given.ffn
    with torch.inference_mode():
        linears(
            ops.quantized, clock, device.torch_name, given.tokens, [(d, d), (d, 3 * d), (d, ffn), (ffn, d)]
        )
        dense(ops, clock, device.torch_name, given.tokens, d)
    for scheme in LINEAR_SCHEMES:
        print(f"{scheme}: {ops.quantized.kernel(scheme).reason}")


if __name__ == "__main__":
    main()
