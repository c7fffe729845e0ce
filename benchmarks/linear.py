"""Quantized linear layers against bf16 `F.linear`: activations quantized in each call, with bias and scales.

    python benchmarks/linear.py                    # 512 tokens, the linears of Wan 1.3B and 14B, 2 threads
    python benchmarks/linear.py --tokens 1 --shape 5120 5120
    python benchmarks/linear.py --product          # the activation is quantized before, not timed
    python benchmarks/linear.py --plain            # without the compiled kernels

Medians of one interleaved run. `once` stores a dequantized BF16 weight; otherwise weights are dequantized in
each call. The error is that of the output against a float64 product of the dequantized values; rounding to
BF16 alone makes 1.7e-3. Memory is that of the weight with its scales, relative to BF16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from _timing import interleaved
from torch import Tensor

from ascendit import mx
from ascendit.device.device import parse_device
from ascendit.kernels.cpu import linear as cpu_linear
from ascendit.kernels.kernel import Activation, Emulate, PreparedWeight, Wish
from ascendit.native.build import Built
from ascendit.ops.operators import Schemes
from ascendit.quant.schemes import LINEAR_SCHEMES

SHAPES = [(1536, 1536), (1536, 8960), (8960, 1536), (5120, 5120), (5120, 13824), (13824, 5120)]
"""K, N."""
ROWS, BLOCK_ROWS = 8, 128
"""Rows of the activation whose error is measured; rows that share scales in `int8_block`."""


@dataclass
class Row:
    run: Callable[[], Tensor]
    truth: Tensor
    memory: float = 1.0

    def error(self) -> float:
        return float((self.run()[:ROWS] - self.truth).norm() / self.truth.norm())


def truth_of(x: Tensor, scheme: str, weight: Tensor, bias: Tensor) -> Tensor:
    row = LINEAR_SCHEMES[scheme]
    activation = mx.decode(mx.encode(x[:BLOCK_ROWS], row.activation, scale_rule=row.rule))[:ROWS]
    decoded = mx.decode(mx.encode(weight, row.weight))
    return torch.stack([(decoded.double() @ a) for a in activation.double()]) + bias.double()


def layer(ops: Schemes, quantize: Callable[[], Activation], weight: PreparedWeight) -> Tensor:
    return ops.quantized_linear(quantize(), weight)


def rows_of(
    tokens: int, k: int, n: int, schemes: list[str], emulate: list[Emulate], product: bool
) -> dict[str, Row]:
    device = parse_device("cpu")
    x = torch.randn(tokens, k).to(torch.bfloat16)
    weight, bias = (torch.randn(n, k) * 0.02).to(torch.bfloat16), torch.randn(n)
    bf16_bias = bias.to(torch.bfloat16)
    exact = x[:ROWS].double() @ weight.double().t() + bf16_bias.double()
    rows = {"bf16": Row(lambda: F.linear(x, weight, bf16_bias), exact)}
    for scheme in schemes:
        encoded = mx.encode(weight, LINEAR_SCHEMES[scheme].weight)
        truth = truth_of(x, scheme, weight, bias)
        for emulation in emulate:
            ops = Schemes(device, Wish(emulate=emulation))
            if emulation == "decode-once" and ops.kernel(scheme).reason.startswith("native"):
                continue
            prepared = ops.prepare_weight(encoded.qdata, encoded.scale, encoded.dual_scale, bias, scheme)

            quantize: Callable[[], Activation] = partial(ops.quantize_activation, x, scheme)
            if product:
                quantize = cache(quantize)

            name = f"{scheme}, once" if emulation == "decode-once" else scheme
            rows[name] = Row(partial(layer, ops, quantize, prepared), truth, prepared.nbytes / weight.nbytes)
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--shape", type=int, nargs=2, action="append", help="K N")
    parser.add_argument("--schemes", nargs="+", default=list(LINEAR_SCHEMES), choices=list(LINEAR_SCHEMES))
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--product", action="store_true")
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.plain:
        cpu_linear.library = lambda: Built(None, "--plain")  # type: ignore[assignment]
    load, shapes = os.getloadavg()[0], args.shape or SHAPES
    cells: dict[str, list[str]] = {}
    properties: dict[str, str] = {}
    for k, n in shapes:
        rows = rows_of(args.tokens, k, n, args.schemes, ["decode-on-use", "decode-once"], args.product)
        properties |= {name: f"{row.memory:.2f} | {row.error():.1e}" for name, row in rows.items()}
        seconds = interleaved({name: row.run for name, row in rows.items()}, args.reps)
        base, least = statistics.median(seconds["bf16"]), min(seconds["bf16"])
        for name, s in seconds.items():
            ratio = f"{statistics.median(s) / base:.2f} ({min(s) / least:.2f})"
            cells.setdefault(name, []).append(f"{base * 1e3:.1f} ms" if name == "bf16" else ratio)
    print(f"{time.strftime('%Y-%m-%d')} torch {torch.__version__}, {cpu_linear.library().reason}")
    print(f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after; {args.tokens} tokens,")
    print(f"{args.threads} threads, n={args.reps}: median time / that of bf16 (best / best)\n")
    print(f"| scheme | {' | '.join(f'{k} x {n}' for k, n in shapes)} | memory | error |")
    print("|---|" + "---|" * (len(shapes) + 2))
    for name, row in cells.items():
        print(f"| {name} | {' | '.join(row)} | {properties[name]} |")


if __name__ == "__main__":
    main()
