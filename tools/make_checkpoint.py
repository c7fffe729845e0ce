"""Write a Wan-shaped BF16 checkpoint of random numbers, for benchmarks and tests with large files.

    python tools/make_checkpoint.py build/big                          # about 2.8 GB, A14B width
    python tools/make_checkpoint.py build/big --layout wan --cascade   # layout of the original repository
    python tools/make_checkpoint.py build/small --blocks 2 --dim 256 --ffn 512

Layouts: `transformers` (only folders of Diffusers transformers), `diffusers` (a complete pipeline with links
to the demo model's text encoder, tokenizer, scheduler and VAE, and with its channels and text width), `wan`
(original names), `file` (one file, original names). One seed gives the same numbers in every layout of one
shape. They are finite and normally distributed, with rows of different magnitudes, some outliers and some
blocks of zeros.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import statistics
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendit.checkpoint.hub import DEMO
from ascendit.checkpoint.output_folder import Staging, link_or_copy
from ascendit.checkpoint.writer import MAX_SHARD_BYTES, ShardWriter, TensorSpec
from ascendit.names import expected_tensors, to_wan

LAYOUTS = ("transformers", "diffusers", "wan", "file")
EXPERTS = ("transformer", "transformer_2")
WAN_FOLDERS = ("high_noise_model", "low_noise_model")
PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")
CHUNK = 1 << 18  # numbers drawn at a time; fits into the processor's cache
MX_BLOCK = 32
ROW_EXPONENTS = np.array([-2, -1, 0, 0, 1], np.int16).view(np.uint16) << 7
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def config_for(blocks: int, dim: int, ffn: int, *, demo_parts: bool = False) -> dict[str, Any]:
    """Config of a WanTransformer3DModel; heads of 128 as in every Wan model, of 64 or 32 for other widths."""
    head = next(size for size in (128, 64, 32, dim) if dim % size == 0)
    config: dict[str, Any] = {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": head,
        "cross_attn_norm": True,
        "eps": 1e-06,
        "ffn_dim": ffn,
        "freq_dim": 256,
        "image_dim": None,
        "in_channels": 16,
        "num_attention_heads": dim // head,
        "num_layers": blocks,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    }
    if demo_parts:
        demo = json.loads((DEMO / "transformer" / "config.json").read_text(encoding="utf-8"))
        config |= {key: demo[key] for key in ("in_channels", "out_channels", "text_dim")}
    return config


def wan_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same config with the keys of the original repository."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "eps": config["eps"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "model_type": "t2v",
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": 512,
    }


def nbytes(config: dict[str, Any]) -> int:
    """Bytes of the tensors of one expert."""
    return 2 * sum(math.prod(shape) for shape in expected_tensors(config).values())


def blocks_for(size: float, dim: int, ffn: int, *, demo_parts: bool = False) -> int:
    """The number of blocks with which one expert is nearest to `size` bytes."""
    one, two = (nbytes(config_for(n, dim, ffn, demo_parts=demo_parts)) for n in (1, 2))
    return max(1, round((size - one) / (two - one)) + 1)


@functools.cache
def _normal() -> NDArray[np.float32]:
    """65536 quantiles of the normal distribution, float32."""
    inverse = statistics.NormalDist().inv_cdf
    return np.array([inverse((i + 0.5) / 65536) for i in range(65536)], np.float32)


def _bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of `x` rounded to bfloat16, to nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def numbers(name: str, shape: tuple[int, ...], seed: int) -> Iterator[NDArray[np.uint16]]:
    """The bits of random bfloat16 numbers in chunks of at most `CHUNK`, each valid until the next one."""
    draw = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    count, row = math.prod(shape), math.prod(shape[1:])
    matrix = len(shape) > 1 and name.endswith(".weight")
    mean = 1.0 if "norm" in name and name.endswith(".weight") else 0.0
    table = _bfloat16(mean + _normal() * np.float32(1 / math.sqrt(row) if matrix else 0.05))
    out = np.empty(CHUNK, np.uint16)
    step = max(CHUNK // row, 1) * row if row <= CHUNK else CHUNK
    for start in range(0, count, step):
        bits = out[: min(step, count - start)]
        chosen = draw.bit_generator.random_raw(-(-len(bits) // 4)).view(np.uint16)[: len(bits)]
        np.take(table, chosen, out=bits, mode="clip")
        if matrix:
            _like_weights(bits, row, draw)
        yield bits


def _like_weights(bits: NDArray[np.uint16], row: int, draw: np.random.Generator) -> None:
    """Scale rows differently, make one number in 16384 an outlier (32 x) and one block of 32 in 1024 zero."""
    if len(bits) % row == 0:  # 1/4 to 2 x, by the exponent
        bits.reshape(-1, row)[:] += draw.choice(ROW_EXPONENTS, (len(bits) // row, 1))
    bits[draw.integers(0, len(bits), len(bits) >> 14)] += 5 << 7
    if blocks := len(bits) // MX_BLOCK:
        zero = draw.integers(0, blocks, (blocks >> 10) + (draw.random() < (blocks & 1023) / 1024))
        bits[: blocks * MX_BLOCK].reshape(-1, MX_BLOCK)[zero] = 0


def write_expert(
    folder: Path, config: dict[str, Any], expert: str, *, seed: int, wan: bool, max_shard_bytes: int | None
) -> None:
    """Weights and config.json of one transformer."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = expected_tensors(config)
    named = {name: str(to_wan(name)) if wan else name for name in shapes}
    specs = [TensorSpec(named[name], "BF16", shape) for name, shape in shapes.items()]
    with ShardWriter(folder, specs, max_shard_bytes=max_shard_bytes) as writer:
        for name, shape in shapes.items():
            for piece in numbers(f"{expert}.{name}", shape, seed):
                writer.append(named[name], piece.data)
    written = wan_config(config) if wan else config
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def write_pipeline(folder: Path, *, cascade: bool) -> None:
    """model_index.json, and links to the demo's parts."""
    index = json.loads((DEMO / "model_index.json").read_text(encoding="utf-8"))
    if not cascade:
        index |= {"transformer_2": [None, None], "boundary_ratio": None}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for part in PARTS:
        link_or_copy(DEMO / part, folder / part, copy=False)


def make(
    dst: Path,
    *,
    layout: str = "transformers",
    blocks: int = 3,
    dim: int = 5120,
    ffn: int = 13824,
    cascade: bool = False,
    seed: int = 0,
    max_shard_bytes: int | None = MAX_SHARD_BYTES,
) -> int:
    """Write the folder `dst` (with `file`: a folder with one file). Returns the bytes of all tensors."""
    assert layout in LAYOUTS and not (cascade and layout == "file")
    config = config_for(blocks, dim, ffn, demo_parts=layout == "diffusers")
    experts = EXPERTS[: 1 + cascade]
    wan, total = layout in ("wan", "file"), nbytes(config) * len(experts)
    with Staging(dst, sources=[], fingerprint="", needs_bytes=total) as staging:
        for expert, noise in zip(experts, WAN_FOLDERS, strict=False):
            folder = staging.path / (noise if wan else expert)
            if wan and not cascade:
                folder = staging.path
            limit = None if layout == "file" else max_shard_bytes
            write_expert(folder, config, expert, seed=seed, wan=wan, max_shard_bytes=limit)
        if layout == "file":
            (staging.path / "config.json").unlink()
        if layout == "diffusers":
            write_pipeline(staging.path, cascade=cascade)
        staging.publish()
    return total


def size_of(text: str) -> float:
    """Bytes of `2.8GB`, `500MB`, `1GiB`."""
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?I?)B?", text.strip().upper())
    try:
        return float(match[1]) * UNITS[match[2]] if match else float(text)
    except (ValueError, KeyError) as e:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 2.8GB") from e


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dst", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, default="transformers")
    parser.add_argument("--size", type=size_of, default="2.8GB", help="About the size of one expert; 2.8GB.")
    parser.add_argument("--blocks", type=int, help="Instead of --size.")
    parser.add_argument("--dim", type=int, default=5120)
    parser.add_argument("--ffn", type=int, default=13824)
    parser.add_argument("--cascade", action="store_true", help="Two experts.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard", type=size_of, default="5GB")
    args = parser.parse_args()
    blocks = args.blocks or blocks_for(args.size, args.dim, args.ffn, demo_parts=args.layout == "diffusers")
    start = time.perf_counter()
    total = make(
        args.dst,
        layout=args.layout,
        blocks=blocks,
        dim=args.dim,
        ffn=args.ffn,
        cascade=args.cascade,
        seed=args.seed,
        max_shard_bytes=int(args.max_shard),
    )
    seconds = time.perf_counter() - start
    print(f"{args.dst}: {total / 1e9:.2f} GB, {blocks} blocks, in {seconds:.1f} s")


if __name__ == "__main__":
    main()
