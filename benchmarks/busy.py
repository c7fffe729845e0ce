"""`ascendit generate --demo` beside processes that use all cores, against a plain loop on one thread.

    python benchmarks/busy.py                                            # beside 0, 4 and 8 busy processes
    python benchmarks/busy.py --with OMP_WAIT_POLICY=ACTIVE --with GOMP_SPINCOUNT=300000,OMP_NUM_THREADS=1

The plain loop is slowed down by sharing the cores alone, so it is the peer: `x loop` is the slowdown of the
video against the same video beside no process, divided by the slowdown of the loop in the same minutes. Every
round runs the loop and each set of variables once beside each number of processes. Whole processes, including
their imports.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PROMPT = "a red circle moves right on a black background"
LOOP = "x = 0\nfor i in range(12_000_000): x += i"
BUSY = "while True: pass"
SOURCE = Path(__file__).resolve().parents[1] / "src"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run `count` processes that use one core each as far as they get one."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", BUSY]) for _ in range(count)]
    try:
        time.sleep(0.5 if count else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds(argv: list[str], variables: dict[str, str]) -> float:
    """Time of one process."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), **variables}
    start = time.perf_counter()
    subprocess.run(argv, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 4, 8], help="the first is the base")
    parser.add_argument("--with", dest="sets", action="append", default=[], help="NAME=VALUE,... of one run")
    args = parser.parse_args()
    sets = {"defaults": {}} | {text: dict(v.split("=", 1) for v in text.split(",")) for text in args.sets}
    times: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "ascendit", "-q", "generate", "--demo", PROMPT, "--seed", "1"]
        command += [
            "--steps",
            str(args.steps),
            "--frames",
            str(args.frames),
            "--overwrite",
            "-o",
            f"{work}/x.mp4",
        ]
        seconds(command, {})  # compiles the kernels, fills the page cache
        for _ in range(args.reps):
            for count in args.busy:
                with busy(count):
                    for name, variables in sets.items():
                        times.setdefault((name, count), []).append(seconds(command, variables))
                        loop = seconds([sys.executable, "-S", "-c", LOOP], {})
                        times.setdefault(("loop", count), []).append(loop)
    print_table(times, list(sets), args)


def print_table(
    times: dict[tuple[str, int], list[float]], names: list[str], args: argparse.Namespace
) -> None:
    """One row for each set of variables, beside each number of processes."""
    cores = len(os.sched_getaffinity(0))
    print(f"{time.strftime('%Y-%m-%d')} torch {torch.__version__}, {platform.machine()}, {cores} cores")
    print(
        f"{args.steps} steps, {args.frames} frames, n={args.reps}, load {os.getloadavg()[0]:.1f} at the end"
    )
    medians = {key: statistics.median(values) for key, values in times.items()}
    base = args.busy[0]
    print("| run | busy | median s | min s | max s | slowdown | x loop |")
    print("|---|---|---|---|---|---|---|")
    for name in ("loop", *names):
        for count in args.busy:
            values, slowdown = times[name, count], medians[name, count] / medians[name, base]
            fair = slowdown / (medians["loop", count] / medians["loop", base])
            row = (medians[name, count], min(values), max(values), slowdown, fair)
            print(f"| {name} | {count} | {' | '.join(f'{value:.2f}' for value in row)} |")


if __name__ == "__main__":
    main()
