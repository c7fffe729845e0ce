"""One denoiser forward against Diffusers' WanTransformer3DModel: same weights, same input, one run.

    python benchmarks/dit_forward.py                # 1.3B width, 4 layers, 1536 video + 512 text tokens, BF16
    python benchmarks/dit_forward.py --per-token    # TI2V: the first frame at timestep 0
    python benchmarks/dit_forward.py --latents 21 30 52    # 8190 video tokens

Medians of interleaved runs, a fixed number of threads. `step` is a forward in the loop, with keys and values
of the text prepared; `first` also computes them, once for each prompt and expert. Diffusers computes them in
each forward.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from _timing import interleaved
from diffusers import WanTransformer3DModel

from ascendit.family import WanConfig
from ascendit.model.wan import WanTransformer
from ascendit.ops.operators import bind

GRID = (6, 32, 32)  # latent frames, height, width -> 6 x 16 x 16 = 1536 tokens
Grid = tuple[int, int, int]


def build(layers: int, dtype: torch.dtype) -> tuple[WanTransformer, WanTransformer3DModel]:
    """Both models with the same random weights. Parameters that Diffusers keeps in float32 are so in both."""
    shape = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": layers}
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(**shape).eval().requires_grad_(False)
    ours = WanTransformer(WanConfig.from_dict(shape), bind("cpu")).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        for name, p in model.named_parameters():
            is_float32 = any(k in name.split(".") for k in WanTransformer.KEEP_FP32)
            p.data = p.data.to(torch.float32 if is_float32 else dtype)
    return ours, theirs


def cases(
    layers: int, dtype: torch.dtype, per_token: bool, latents: Grid
) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> one forward."""
    ours, theirs = build(layers, dtype)
    x, text = torch.randn(1, 16, *latents).to(dtype), torch.randn(1, 512, 4096).to(dtype)
    grid = ours.grid_of(x)
    tokens, frame = grid[0] * grid[1] * grid[2], grid[1] * grid[2]
    timestep: tuple[float, ...]
    spans: tuple[int, ...]
    if per_token:
        timestep, spans = (0.0, 700.0), (frame, tokens - frame)
        t = torch.cat([torch.zeros(frame), torch.full((tokens - frame,), 700.0)])[None]
    else:
        timestep, spans, t = (700.0,), (tokens,), torch.tensor([700.0])
    state = ours.prepare(grid, text)

    def step() -> torch.Tensor:
        state.shared.modulation.clear()  # each step has its own timestep
        out: torch.Tensor = ours(x, timestep, state, spans)
        return out

    return {
        "ascendit step": step,
        "ascendit first": lambda: ours(x, timestep, ours.prepare(grid, text), spans),
        f"diffusers {diffusers.__version__}": lambda: theirs(x, t, text, return_dict=False)[0],
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--latents", type=int, nargs=3, default=GRID, help="frames, height, width")
    parser.add_argument("--per-token", action="store_true")
    parser.add_argument("--float32", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = torch.float32 if args.float32 else torch.bfloat16
    runs = cases(args.layers, dtype, args.per_token, tuple(args.latents))
    outputs = {name: run().float() for name, run in runs.items()}  # warm-up
    peer = list(runs)[-1]
    seconds = interleaved(runs, args.reps)
    print(
        f"{time.strftime('%Y-%m-%d')} torch {torch.__version__} {platform.processor() or platform.machine()}"
    )
    print(
        f"{args.layers} layers, {dtype}, {args.threads} threads, load {os.getloadavg()[0]:.1f}, n={args.reps}"
    )
    print(
        f"| forward{', per-token t' if args.per_token else ''} | median ms | min ms | x as fast | rel. diff |"
    )
    print("|---|---|---|---|---|")
    base = statistics.median(seconds[peer])
    for name, s in seconds.items():
        m, reference = statistics.median(s), outputs[peer]
        diff = float((outputs[name] - reference).norm() / reference.norm())
        print(f"| {name} | {m * 1e3:.0f} | {min(s) * 1e3:.0f} | {base / m:.2f} | {diff:.1e} |")


if __name__ == "__main__":
    main()
