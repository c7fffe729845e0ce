"""Dense attention on a CPU against the rate of a bf16 matmul, which is its ceiling.

    python benchmarks/attention.py                              # 8,192 and 32,760 tokens, 12 heads, D 128
    python benchmarks/attention.py --tokens 1536 --heads 40
    python benchmarks/attention.py --tokens 8190 --keys 512     # cross-attention
    python benchmarks/attention.py --kernels cpu sdpa           # without the slow `cpu, two`

All candidates and the matmul take turns. Rates count 4 S L H D operations; `of matmul` and `of cpu` are the
median over the rounds of the ratio to the matmul, or to `cpu`, of the same round (best / best). Errors are
against float64, on some queries of all heads, relative to the norm and to the largest value of the exact
output; rounding it to BF16 alone makes 1.7e-3. `cpu, two` uses two BF16 numbers per probability.

Goals, with 2 threads at both lengths: `cpu` at 0.85 of the matmul or more, with no larger error than `sdpa`;
`qk_int8` at 1.15 of `cpu` or more.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _timing import interleaved
from torch import Tensor

from ascendit.device.attention_kernels import Probabilities, attention_probabilities
from ascendit.kernels.cpu import attention, qk_int8
from ascendit.kernels.kernel import Kernel

CHECKED = 64
"""Queries whose error is measured."""
Heads = tuple[Tensor, Tensor, Tensor]


def processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    matches = [
        re.search(rf"^({name})\s*:\s*(.*)$", text, re.M) for name in ("model name", "cpu family", "model")
    ]
    known = " ".join(f"{m[1]} {m[2]}," for m in matches if m) or platform.processor()
    return f"{known} {os.cpu_count()} CPUs"


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float64 attention of [1, S, H, d], one head at a time."""
    out = [
        torch.softmax(a.double() @ b.double().t() / a.shape[-1] ** 0.5, -1) @ c.double()
        for a, b, c in zip(q[0].unbind(1), k[0].unbind(1), v[0].unbind(1), strict=True)
    ]
    return torch.stack(out, 1)[None]


def with_probabilities(numbers: Probabilities, call: Callable[..., Tensor], heads: Heads) -> Tensor:
    with attention_probabilities(numbers):
        return call(*heads)


def kernels() -> tuple[Kernel, ...]:
    """Those that this machine has."""
    return tuple(k for k in (*attention.list_kernels(), qk_int8.kernel()) if not k.missing())


def candidates(heads: Heads, names: list[str] | None) -> dict[str, Callable[[], Tensor]]:
    runs: dict[str, Callable[[], Tensor]] = {}
    for kernel in kernels():
        runs[kernel.name] = partial(kernel.call, *heads)
        if kernel.name == "cpu":
            runs["cpu, two"] = partial(with_probabilities, "two", kernel.call, heads)
    return {name: run for name, run in runs.items() if names is None or name in names}


def errors(run: Callable[[], Tensor], rows: slice, truth: Tensor) -> tuple[float, float]:
    difference = run()[:, rows].double() - truth
    return float(difference.norm() / truth.norm()), float(difference.abs().max() / truth.abs().max())


def ratio(rate: list[float], other: list[float]) -> str:
    """Median over the rounds (best / best)."""
    median = statistics.median(x / y for x, y in zip(rate, other, strict=True))
    return f"{median:.3f} ({max(rate) / max(other):.3f})"


def measure(tokens: int, args: argparse.Namespace) -> None:
    """Print a table."""
    keys, shape = args.keys or tokens, (args.heads, args.head)
    q, k, v = (torch.randn(1, n, *shape).to(torch.bfloat16) for n in (tokens, keys, keys))
    a, b = (torch.randn(args.matmul, args.matmul).to(torch.bfloat16) for _ in range(2))
    runs = candidates((q, k, v), args.kernels)
    rows = slice(None, None, max(1, tokens // CHECKED))
    truth = exact(q[:, rows], k, v)
    measured = {name: errors(run, rows, truth) for name, run in runs.items()}  # and warms up
    seconds = interleaved({"matmul": partial(torch.mm, a, b), **runs}, args.reps)
    work = {name: 4 * tokens * keys * args.heads * args.head / 1e9 for name in runs}
    rates = {
        name: [work.get(name, 2 * args.matmul**3 / 1e9) / s for s in times] for name, times in seconds.items()
    }
    print(f"\n{tokens} queries, {keys} keys, {args.heads} heads, D {args.head}\n")
    print("| kernel | GFLOP/s, median (best) | of matmul | of cpu | rms error | largest error |")
    print("|---|---|---|---|---|---|")
    for name, rate in rates.items():
        cells = [f"{statistics.median(rate):.0f} ({max(rate):.0f})"]
        cells += [ratio(rate, rates[other]) if other in rates else "" for other in ("matmul", "cpu")]
        cells += [f"{e:.2e}" for e in measured[name]] if name in measured else ["", ""]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32760], help="queries")
    parser.add_argument("--keys", type=int, help="default: as many as queries")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head", type=int, default=128, help="D, the size of a head")
    parser.add_argument("--kernels", nargs="+")
    parser.add_argument("--matmul", type=int, default=4096, help="rows and columns of both matrices")
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    print(f"{time.strftime('%Y-%m-%d')} torch {torch.__version__}; {processor()}")
    for kernel in kernels():
        print(f"{kernel.name}: {kernel.reason}")
    for tokens in args.tokens:
        measure(tokens, args)
    print(f"\n{args.threads} threads, n={args.reps}; load {load:.1f} before, {os.getloadavg()[0]:.1f} after")


if __name__ == "__main__":
    main()
