"""Peak memory of loading one expert: quantized weights, and a float checkpoint quantized while loading.

    python tools/make_checkpoint.py big --layout diffusers --size 7.8GB
    ascendit quantize big -o big-mxfp8 --scheme mxfp8
    python benchmarks/load_memory.py big-mxfp8 --online big=mxfp8

Each load runs in its own process. The peak is the increase over that after the imports of torch and ascendit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

LOAD = """
import resource, sys, time
import torch
from pathlib import Path
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.model.loader import load_expert, nbytes
from ascendit.model.quantize_on_load import Online
from ascendit.ops.operators import bind
torch.set_num_threads(2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder, scheme = sys.argv[1:]
ops = bind("cpu")
part, online = recognise(Path(folder)).experts[0], Online.from_options(scheme or None, None)
before, start = peak(), time.perf_counter()
expert = read_expert(part)
model = load_expert(expert, online.apply(expert) if online else None, ops, dtype=torch.bfloat16)
print(nbytes(model), peak() - before, time.perf_counter() - start)
"""


def measure(folder: Path, scheme: str) -> tuple[float, float, float]:
    """Bytes of the model, peak bytes above the start, seconds."""
    command = [sys.executable, "-c", LOAD, str(folder), scheme]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(out[0]), float(out[1]), float(out[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="Quantized folders.")
    parser.add_argument("--online", nargs="*", default=[], metavar="FOLDER=SCHEME")
    args = parser.parse_args()
    work = [(folder, "") for folder in args.folders]
    work += [(Path(folder), scheme) for folder, _, scheme in (w.rpartition("=") for w in args.online)]
    print("| expert | model GB | peak GB | peak / model | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for folder, scheme in work:
        size, peak, seconds = measure(folder, scheme)
        name = f"{folder.name}{f' online {scheme}' if scheme else ''}"
        print(
            f"| {name} | {size / 1e9:.2f} | {peak / 1e9:.2f} | {peak / size:.3f} | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
