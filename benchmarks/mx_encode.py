"""Encoding one weight: the compiled kernels and PyTorch without a compiler, against memcpy and torchao.

    python benchmarks/mx_encode.py                          # [13824, 5120] BF16, 2 threads
    PYTHONPATH=/path/to/torchao python benchmarks/mx_encode.py --reps 31

Medians of one interleaved run. `kernel` writes into existing tensors, as `quantize` does; `mx.encode` also
allocates them. `memcpy` is the faster of torch's copy and an OpenMP memcpy. Slow rows are timed once in every
`--peer-every` repetitions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ascendit import mx
from ascendit.mx import encoder as encoder_module
from ascendit.mx import native_encoder
from ascendit.mx.formats import lookup, resolve_rounding, resolve_rule
from ascendit.mx.row_encoder import RowEncoder, ScaleSearch

FORMATS = ("mxfp8", "mxfp4", "mxfp4_dualscale", "int8")
OTHERS = (
    *(("mxfp8_e5m2", None), ("fp8", None), ("mxfp8", "msms:mse_round"), ("mxfp4", "msms:ceil_x:7.25")),
    *(("mxfp4_dualscale", "msms:dualscale"), ("int8", "msms:int8")),
)
PEERS = ("mxfp8", "mxfp4")
"""Formats that torchao has too; ratios are to its first row of the format."""
MEMCPY = ("memcpy, OpenMP", "memcpy, torch")


@dataclass
class Row:
    run: Callable[[], object]
    moved: int
    """Bytes read and written."""
    slow: bool = False
    peer: str = ""
    """The row of torchao that does the same work."""


def moved_by(x: Tensor, fmt: str) -> int:
    out = encoder_module.empty_parts(lookup(fmt), *x.shape)
    return x.nbytes + sum(p.nbytes for p in out if p is not None)


def kernel(x: Tensor, fmt: str, rule: str | None = None, measure: bool = False) -> Row:
    encoder = RowEncoder(
        fmt, x.shape[1], max_rows=x.shape[0], scale_rule=rule, measure=measure, dtype=x.dtype
    )
    return Row(lambda: encoder(x), moved_by(x, fmt))


def without_compiler(x: Tensor, name: str) -> Row | None:
    fmt = lookup(name)
    rule = resolve_rule(fmt, None)
    encode = encoder_module.piece_encoder(fmt, rule, resolve_rounding(fmt, rule, None), x.dtype)
    out = encoder_module.empty_parts(fmt, *x.shape)
    return encode and Row(lambda: encode(x, out), moved_by(x, name), slow=True)


def torchao_rows(x: Tensor) -> dict[str, Row] | str:
    """A row for each format and scale mode, or the reason why there are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.prototype.mx_formats.config import ScaleCalculationMode as Mode
            from torchao.prototype.mx_formats.mx_tensor import to_mx
    except ImportError as e:
        return f"torchao is not installed ({e})"
    version = importlib.metadata.version("torchao")
    fp4 = getattr(torch, "float4_e2m1fn_x2", torch.uint8)
    cases = dict(zip(PEERS, ((torch.float8_e4m3fn, ("RCEIL", "FLOOR")), (fp4, ("FLOOR",))), strict=True))
    return {
        f"torchao, {fmt}, {mode}, {version}": Row(
            partial(to_mx, x, dtype, 32, Mode[mode]), moved_by(x, fmt), slow=True
        )
        for fmt, (dtype, modes) in cases.items()
        for mode in modes
    }


def rows_of(x: Tensor) -> tuple[dict[str, Row], str]:
    """All rows, and a remark on missing ones."""
    rows, remarks = {}, "with torchao"
    to, lib = torch.empty_like(x), native_encoder.library().library
    if lib is not None:
        args = x.data_ptr(), to.data_ptr(), x.nbytes, torch.get_num_threads()
        rows[MEMCPY[0]] = Row(lambda: lib.copy_bytes(*args), 2 * x.nbytes)
    rows[MEMCPY[1]] = Row(lambda: to.copy_(x), 2 * x.nbytes)
    peers = torchao_rows(x)
    if isinstance(peers, str):
        remarks, peers = peers, {}
    if lib is not None:
        rows |= {f"kernel, {fmt}": kernel(x, fmt) for fmt in FORMATS}
        rows |= {f"kernel, {fmt}, {rule or 'default'}": kernel(x, fmt, rule) for fmt, rule in OTHERS}
        rows["kernel, mxfp8, measured"] = kernel(x, "mxfp8", measure=True)
        rows["msms:ceil_x:search, errors of 25"] = Row(lambda: ScaleSearch().add(x), x.nbytes)
    rows |= {f"mx.encode, {fmt}": Row(partial(mx.encode, x, fmt), moved_by(x, fmt)) for fmt in FORMATS}
    for fmt in FORMATS:
        if plain := without_compiler(x, fmt):
            rows[f"no compiler, {fmt}"] = plain
    for name, row in rows.items():
        work = next((f"torchao, {fmt}," for fmt in PEERS if f", {fmt}," in f"{name},"), "none")
        row.peer = next((peer for peer in peers if peer.startswith(work)), "")
    return rows | peers, remarks


def time_rows(rows: dict[str, Row], reps: int, peer_every: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for row in rows.values():
        row.run()  # warm-up
    for rep in range(reps):
        for name, row in rows.items():
            if row.slow and rep % peer_every:
                continue
            start = time.perf_counter()
            row.run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(13824, 5120))
    parser.add_argument("--reps", type=int, default=21)
    parser.add_argument("--peer-every", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    x = (torch.randn(*args.shape) * 0.02).to(torch.bfloat16)
    load = os.getloadavg()[0]
    rows, remarks = rows_of(x)
    seconds = time_rows(rows, args.reps, args.peer_every)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    base = min(median[name] for name in MEMCPY if name in median)
    print(f"{time.strftime('%Y-%m-%d')} torch {torch.__version__} {platform.machine()}, {remarks}")
    print(
        f"encoder: {native_encoder.library().reason}; load {load:.1f} before, {os.getloadavg()[0]:.1f} after"
    )
    print(f"{list(x.shape)} bfloat16, {args.threads} threads, n={args.reps}\n")
    print("| row | median ms | min ms | x memcpy | GB/s moved | % of memcpy's | x as fast as torchao |")
    print("|---|---|---|---|---|---|---|")
    stream = 2 * x.nbytes / base
    for name, row in rows.items():
        m = median[name]
        peer = f"{median[row.peer] / m:.1f}" if row.peer else ""
        print(
            f"| {name} | {m * 1e3:.2f} | {min(seconds[name]) * 1e3:.2f} | {m / base:.2f} | "
            f"{row.moved / m / 1e9:.1f} | {row.moved / m / stream * 100:.0f} | {peer} |"
        )


if __name__ == "__main__":
    main()
