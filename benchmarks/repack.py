"""`ascendit repack` of an export that needs only renames, against `cp` and against load and save.

    python benchmarks/repack.py         # 1.46 GB: three blocks of A14B width, an MXFP8 export of msModelSlim

Medians of interleaved processes, including their imports. The other rows: `cp` of the same bytes, and
safetensors' `load_file` and `save_file` with the names replaced, as in SGLang 0.5.23's wan_repack.py and
vLLM-Omni 0.30.0's merge tool. Files are in the page cache; nothing is synced to disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ascendit.names import all_linears, expected_tensors, is_block_linear, to_wan

CONFIG = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "ffn_dim": 10752,
    "num_layers": 3,
    "text_dim": 4096,
    "freq_dim": 256,
}
TYPE = "W8A8_MXFP8"
ITEMSIZE = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "U8": 1}

PEAK = """
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
REPACK = f"""
import sys
from ascendit.convert.repack import repack
repack(sys.argv[1], sys.argv[2])
assert not {{"torch", "numpy"}} & set(sys.modules)
{PEAK}"""
LOAD_SAVE = f"""
import json, os, sys
from safetensors.torch import load_file, save_file
source, target = sys.argv[1:]
os.mkdir(target)
names = json.load(open(os.path.join(source, "names.json")))
tensors = load_file(os.path.join(source, "quant_model_weight_w8a8_mxfp8.safetensors"))
renamed = {{names[name]: tensor for name, tensor in tensors.items()}}
save_file(renamed, os.path.join(target, "diffusion_pytorch_model.safetensors"))
{PEAK}"""


def tensors() -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """(Diffusers name, original name, dtype, shape) of every tensor of the export."""
    linears = {name for name in all_linears(CONFIG) if is_block_linear(name)}
    for name, shape in expected_tensors(CONFIG).items():
        layer, _, role = name.rpartition(".")
        dtype = "BF16"
        if layer in linears:
            dtype = "F8_E4M3" if role == "weight" else "F32"
        yield name, str(to_wan(name)), dtype, shape
        if dtype == "F8_E4M3":
            scale = f"{layer}.weight_scale"
            yield scale, str(to_wan(scale)), "U8", (shape[0], shape[1] // 32)


def make(folder: Path) -> int:
    """Write the export with its tensors in the order of the safetensors library. Returns its bytes."""
    folder.mkdir(parents=True)
    rows = list(tensors())
    ordered = sorted(rows, key=lambda row: (-ITEMSIZE[row[2]], row[1]))
    header: dict[str, object] = {}
    offset = 0
    for _, name, dtype, shape in ordered:
        size = int(np.prod(shape)) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 120, 1 << 24, np.uint8)  # finite in every dtype; no scale of 255
    with open(folder / f"quant_model_weight_{TYPE.lower()}.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, len(noise)):
            f.write(noise[: offset - start].tobytes())
    entries = {name: TYPE if dtype in ("F8_E4M3", "U8") else "FLOAT" for _, name, dtype, _ in rows}
    manifest = json.dumps(entries | {"model_quant_type": TYPE}, indent=4)
    (folder / f"quant_model_description_{TYPE.lower()}.json").write_text(manifest)
    (folder / "names.json").write_text(json.dumps({old: new for new, old, _, _ in rows}))
    return offset


def run(argv: list[str]) -> tuple[float, float | None]:
    """(seconds, peak MB of memory if the process prints it) of one process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src")}
    start = time.perf_counter()
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    return seconds, int(done.stdout) / 1024 if done.stdout else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--dir", type=Path, default=None, help="Working folder; 5 GB.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as work:
        source, target = Path(work) / "export", Path(work) / "out"
        size = make(source)
        cases = {
            "cp": ["cp", "-r", "--reflink=never", str(source), str(target)],
            "ascendit repack": [sys.executable, "-c", REPACK, str(source), str(target)],
            "safetensors load_file + save_file": [sys.executable, "-c", LOAD_SAVE, str(source), str(target)],
        }
        results: dict[str, list[tuple[float, float | None]]] = {name: [] for name in cases}
        for _ in range(args.reps + 1):
            for name, argv in cases.items():
                results[name].append(run(argv))
                shutil.rmtree(target)
                os.sync()
    print(f"{time.strftime('%Y-%m-%d')} Python {platform.python_version()} {platform.machine()}")
    print(f"{size / 1e9:.2f} GB, n={args.reps}, load {os.getloadavg()[0]:.1f}")
    print("| process | median s | min s | x cp | peak MB |")
    print("|---|---|---|---|---|")
    base = statistics.median(seconds for seconds, _ in results["cp"][1:])
    for name, runs in results.items():
        times = [seconds for seconds, _ in runs[1:]]  # the first round fills the page cache
        median, peaks = statistics.median(times), [peak for _, peak in runs if peak]
        memory = f"{max(peaks):.0f}" if peaks else "-"
        print(f"| {name} | {median:.2f} | {min(times):.2f} | {median / base:.2f} | {memory} |")


if __name__ == "__main__":
    main()
