"""`ascendit quantize` of a BF16 checkpoint, against `cp` of it and against torchao.

    python benchmarks/quantize.py                      # 2.8 GB of A14B width to mxfp8
    python benchmarks/quantize.py --scheme mxfp4
    PYTHONPATH=/path/to/torchao python benchmarks/quantize.py --reps 3

Medians of interleaved processes, including their imports. `work` is the time of the call without imports.
torchao, if it can be imported: safetensors' load_file, `to_mx` (e4m3, FLOOR) of the linear layers of the
blocks, save_file. Files are in the page cache; nothing is synced to disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT = """
peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(json.dumps({"work": work, "peak": peak / 1024, "torch": "torch" in sys.modules}))
"""
QUANTIZE = f"""
import json, sys, time
from ascendit.convert.quantize import quantize
source, target, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
start = time.perf_counter()
quantize(source, target, **options)
work = time.perf_counter() - start
{REPORT}"""
TORCHAO = f"""
import json, os, sys, time
import torch
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.mx_tensor import to_mx
source, target = sys.argv[1], sys.argv[2]
start = time.perf_counter()
os.makedirs(target)
tensors = load_file(os.path.join(source, "transformer", "diffusion_pytorch_model.safetensors"))
out = {{}}
for name, tensor in tensors.items():
    if name.startswith("blocks.") and tensor.ndim == 2 and name.endswith(".weight"):
        scale, qdata = to_mx(tensor, torch.float8_e4m3fn, 32)
        out[name], out[name + "_scale"] = qdata, scale.view(torch.uint8)
    else:
        out[name] = tensor
save_file(out, os.path.join(target, "diffusion_pytorch_model.safetensors"))
work = time.perf_counter() - start
{REPORT}"""
IMPORT = "import torch; print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024)"


def environment() -> dict[str, str]:
    """Environment of a subprocess: ascendit before the folders of PYTHONPATH."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(argv: list[str]) -> tuple[float, dict[str, float]]:
    """(seconds, its report) of one process."""
    start = time.perf_counter()
    done = subprocess.run(argv, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    return seconds, json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def cases(source: Path, target: Path, scheme: str) -> dict[str, list[str]]:
    """Name -> command."""
    options = {"scheme": scheme, "force": True}
    commands = {
        "cp": ["cp", "-r", "--reflink=never", str(source), str(target)],
        f"ascendit quantize, {scheme}": python(QUANTIZE, source, target, json.dumps(options)),
        "the same with --report": python(QUANTIZE, source, target, json.dumps(options | {"report": True})),
    }
    if importlib.util.find_spec("torchao") is not None:
        commands["torchao load_file, to_mx, save_file"] = python(TORCHAO, source, target)
    return commands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", default="mxfp8")
    parser.add_argument("--size", default="2.8GB")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="Working folder; 9 GB.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as work:
        source, target = Path(work) / "model", Path(work) / "out"
        make = [sys.executable, str(ROOT / "tools" / "make_checkpoint.py"), str(source), "--size", args.size]
        subprocess.run(make, env=environment(), stdout=subprocess.DEVNULL, check=True)
        size = sum(p.stat().st_size for p in source.rglob("*") if p.is_file())
        commands = cases(source, target, args.scheme)
        results: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in commands}
        for _ in range(args.reps + 1):  # the first round fills the page cache
            for name, argv in commands.items():
                results[name].append(run(argv))
                shutil.rmtree(target)
                os.sync()
    print_table(results, size)


def print_table(results: dict[str, list[tuple[float, dict[str, float]]]], size: int) -> None:
    torch_alone = float(subprocess.run(python(IMPORT), stdout=subprocess.PIPE, text=True).stdout)
    load = os.getloadavg()[0]
    print(f"{time.strftime('%Y-%m-%d')} Python {platform.python_version()} {platform.machine()}, ", end="")
    print(f"load {load:.1f}; {size / 1e9:.2f} GB, medians of {len(results['cp']) - 1}; ", end="")
    print(f"`import torch` alone: {torch_alone:.0f} MB")
    print("| process | s | min s | x cp | work s | x cp | peak MB |")
    print("|---|---|---|---|---|---|---|")
    base = statistics.median(seconds for seconds, _ in results["cp"][1:])
    for name, runs in results.items():
        times = [seconds for seconds, _ in runs[1:]]
        total = statistics.median(times)
        reports = [report for _, report in runs[1:] if report]
        work = statistics.median(report["work"] for report in reports) if reports else total
        peak = f"{max(report['peak'] for report in reports):.0f}" if reports else "-"
        row = f"| {name} | {total:.2f} | {min(times):.2f} | {total / base:.2f} "
        print(f"{row}| {work:.2f} | {work / base:.2f} | {peak} |")


if __name__ == "__main__":
    main()
