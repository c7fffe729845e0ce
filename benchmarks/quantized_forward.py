"""One denoiser forward with quantized linear layers against Diffusers' WanTransformer3DModel in BF16.

    python benchmarks/quantized_forward.py             # 1.3B width, 4 layers, 1536 video + 512 text tokens
    python benchmarks/quantized_forward.py --schemes int8 mxfp8 --emulate decode-once

The same random weights, saved once; ascendit quantizes them while loading. Medians of interleaved runs, a
fixed number of threads, activations quantized in every layer. Memory is that of all weights relative to BF16.
The difference is that to Diffusers in BF16, on untrained weights.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from _timing import interleaved
from diffusers import WanTransformer3DModel

from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.model.loader import load_expert
from ascendit.model.quantize_on_load import Online
from ascendit.model.wan import WanTransformer
from ascendit.model.weight_loader import nbytes
from ascendit.ops.operators import bind
from ascendit.quant.schemes import LINEAR_SCHEMES

GRID = (6, 32, 32)  # latent frames, height, width -> 6 x 16 x 16 = 1536 tokens
Forward = Callable[[], torch.Tensor]


def reference(layers: int, folder: Path) -> Any:
    """Diffusers' model with random weights, saved to `folder`."""
    shape = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": layers}
    torch.manual_seed(0)
    model = WanTransformer3DModel(**shape).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        is_float32 = any(k in name.split(".") for k in WanTransformer.KEEP_FP32)
        p.data = p.data.to(torch.float32 if is_float32 else torch.bfloat16)
    model.save_pretrained(folder)
    return model


def cases(layers: int, schemes: list[str], emulate: Any) -> tuple[dict[str, Forward], dict[str, float]]:
    """Name -> one forward; name -> memory of the weights relative to BF16."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = reference(layers, Path(folder) / "transformer")
        expert = read_expert(recognise(Path(folder) / "transformer").experts[0])
        ops = bind("cpu", emulate=emulate)
        ours = {}
        for scheme in ["bf16", *schemes]:
            online = Online.from_options(scheme, None)
            applied = online.apply(expert) if online else None
            ours[f"ascendit {scheme}"] = load_expert(expert, applied, ops, dtype=torch.bfloat16)
    x, text = torch.randn(1, 16, *GRID).bfloat16(), torch.randn(1, 512, 4096).bfloat16()
    t = torch.tensor([700.0])

    def step(model: WanTransformer) -> Forward:
        grid = model.grid_of(x)
        state = model.prepare(grid, text)

        def run() -> torch.Tensor:
            state.shared.modulation.clear()  # each step has its own timestep
            out: torch.Tensor = model(x, (700.0,), state, (grid[0] * grid[1] * grid[2],))
            return out

        return run

    total = sum(p.nbytes for p in theirs.parameters())
    memory = {name: nbytes(model) / total for name, model in ours.items()}
    peer = f"diffusers {diffusers.__version__} bf16"
    runs = {name: step(model) for name, model in ours.items()}
    return runs | {peer: lambda: theirs(x, t, text, return_dict=False)[0]}, memory | {peer: 1.0}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--schemes", nargs="+", default=[s for s in LINEAR_SCHEMES if s != "w4a8"])
    parser.add_argument("--emulate", choices=["decode-on-use", "decode-once"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs, memory = cases(args.layers, args.schemes, args.emulate)
    outputs = {name: run().float() for name, run in runs.items()}  # warm-up
    peer, load = list(runs)[-1], os.getloadavg()[0]
    seconds = interleaved(runs, args.reps)
    print(
        f"{time.strftime('%Y-%m-%d')} torch {torch.__version__}, {args.layers} layers, {args.threads} threads"
    )
    print(f"{args.emulate or 'decode-on-use'}, load {load:.1f} to {os.getloadavg()[0]:.1f}, n={args.reps}")
    print("| forward | median ms | min ms | x as fast | weights | rel. diff |")
    print("|---|---|---|---|---|---|")
    base = statistics.median(seconds[peer])
    for name, s in seconds.items():
        m, expected = statistics.median(s), outputs[peer]
        diff = float((outputs[name] - expected).norm() / expected.norm())
        cells = f"{m * 1e3:.0f} | {min(s) * 1e3:.0f} | {base / m:.2f} | {memory[name]:.2f} | {diff:.1e}"
        print(f"| {name} | {cells} |")


if __name__ == "__main__":
    main()
