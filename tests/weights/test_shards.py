"""Loading one rank's shards equals slicing the complete model, and reads no other byte of a weight."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from convert import loras
from convert.models import CONFIG, same, write_transformer
from safetensors.torch import load_file, save_file
from torch import Tensor

from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.reader import ShardSpec
from ascendit.checkpoint.transformer import Expert, read_expert
from ascendit.convert.quantize import quantize
from ascendit.convert.repack import repack
from ascendit.errors import UsageError
from ascendit.model.linear import QuantLinear
from ascendit.model.loader import load_expert
from ascendit.names import expected_tensors
from ascendit.ops.operators import bind
from ascendit.quant.recipe import load_recipe
from ascendit.quant.schemes import FP4, QUANTIZED, SCHEMES
from ascendit.weights.applied_recipe import apply_recipe
from ascendit.weights.lora.fold import Folds
from ascendit.weights.shards import LayerShards

WIDTH, HIDDEN = 64, 1216
"""Channels of the model, and of a feed-forward layer: two groups of 512 and one of 192."""
UP, DOWN, QKV = "blocks.0.ffn.net.0.proj", "blocks.0.ffn.net.2", "blocks.0.attn1.to_"
ROWS = {UP: ShardSpec(0, 300, 500)} | {f"{QKV}{x}": ShardSpec(0, 32, 32) for x in "qkv"}
ROWS |= {f"blocks.0.attn1.norm_{x}": ShardSpec(0, 32, 32) for x in "qk"}
COLUMNS = {DOWN: ShardSpec(1, 512, 704)}
TILE_ROWS = {UP: ShardSpec(0, 256, 512)}
"""For a scheme in tiles of 128 x 128, which are not cut."""
LAYERS = {layer: layer for layer in (UP, DOWN, f"{QKV}q", f"{QKV}k", f"{QKV}v")}


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "model"
    return write_transformer(folder, ffn_dim=HIDDEN, num_layers=1)


@pytest.fixture(scope="module")
def smoothing() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    widths = {UP: WIDTH, DOWN: HIDDEN}
    return {name: torch.rand(k, generator=generator) + 0.5 for name, k in widths.items()}


def expert_in(folder: Path) -> Expert:
    return read_expert(recognise(folder).experts[0])


class Reads:
    """Bytes that `os.preadv` has read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, real = 0, os.preadv

        def counted(*args: Any) -> int:
            count = real(*args)
            self.count += count
            return count

        monkeypatch.setattr(os, "preadv", counted)

    def of(self, load: Any) -> tuple[dict[str, Tensor], int]:
        self.count = 0
        return load().state_dict(), self.count


def cut(name: str, tensor: Tensor, shards: dict[str, ShardSpec]) -> Tensor:
    """The shard of a tensor, by the rules of its role."""
    layer, _, role = name.rpartition(".")
    if layer not in shards:
        return tensor
    start, count = shards[layer].start, shards[layer].count
    assert count is not None
    stop = start + count
    if role == "weight_scale" and len(tensor) < WIDTH:  # one per 128 x 128
        tiles = slice(start // 128, -(-stop // 128))
        return tensor[tiles] if shards[layer].axis == 0 else tensor[:, tiles]
    if shards[layer].axis == 0:
        return tensor if role == "mul_scale" else tensor[start:stop]
    if role == "mul_scale":
        return tensor[start:stop]
    if role in ("bias", "weight_offset") or (role == "weight_scale" and tensor.shape[1] == 1):
        return tensor
    unit = {"weight": HIDDEN // tensor.shape[1], "weight_scale": 32, "weight_dual_scale": 512}[role]
    return tensor[:, start // unit : -(-stop // unit)]


def check(load: Any, monkeypatch: pytest.MonkeyPatch, shards: dict[str, ShardSpec]) -> tuple[int, int]:
    """Compare; return the bytes read for the complete model and for the shards."""
    reads = Reads(monkeypatch)
    tensors, total_bytes = reads.of(load)
    shard_tensors, shard_bytes = reads.of(lambda: load(shards=shards))
    assert shard_tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(shard_tensors[name], cut(name, tensor, shards)), name
    return total_bytes, shard_bytes


def unread_bytes(expert: Expert, shards: dict[str, ShardSpec]) -> int:
    """Bytes on disk outside the shards; a `mul_scale` is read and checked completely."""
    count = 0
    for name, info in expert.tensors.items():
        if name.endswith(".mul_scale"):
            continue
        placeholder = torch.empty(info.shape, dtype=torch.uint8)
        count += info.nbytes - info.nbytes * cut(name, placeholder, shards).numel() // placeholder.numel()
    return count


@pytest.mark.parametrize("shards", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("scheme", "engine"),
    [*((s, None) for s in ("bf16", *QUANTIZED)), *((s, "vllm-omni") for s in FP4)],
)
def test_stored_schemes(
    scheme: str,
    engine: str | None,
    shards: dict[str, ShardSpec],
    floats: Path,
    smoothing: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For both packings of FP4, and with `mul_scale` where the engine reads it."""
    shards = TILE_ROWS if SCHEMES[scheme].tile and shards is ROWS else shards
    folder = floats
    if scheme != "bf16":
        folder, smooth = tmp_path / "m", {} if engine else {"transformer": smoothing}
        quantize(floats, folder, scheme=scheme, smoothing=smooth, engine=engine)
    expert = expert_in(folder)

    def load(**kw: Any) -> Any:
        return load_expert(expert, None, bind("cpu"), **kw)

    total_bytes, shard_bytes = check(load, monkeypatch, shards)
    assert total_bytes - shard_bytes == unread_bytes(expert, shards)


@pytest.mark.parametrize("shards", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("changed", [False, True], ids=["plain", "folded and smoothed"])
def test_encoded_during_loading(
    scheme: str,
    shards: dict[str, ShardSpec],
    changed: bool,
    floats: Path,
    smoothing: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A scale per row needs complete rows: for columns of int8 and fp8 all bytes are read."""
    monkeypatch.setattr("ascendit.weights.recipe_steps.BLOCK_BYTES", 100 * 2 * WIDTH)
    shards = TILE_ROWS if SCHEMES[scheme].tile and shards is ROWS else shards
    expert = expert_in(floats)
    folds = None
    if changed:
        shapes = expected_tensors(CONFIG | {"ffn_dim": HIDDEN, "num_layers": 1})
        factors = loras.matrices(shapes, LAYERS)
        source = loras.save(
            tmp_path / "lora.safetensors",
            loras.write(factors, lambda layer: f"transformer.{layer}", ".lora_A.weight", ".lora_B.weight"),
        )
        folds = Folds.open([source], "transformer", shapes)
    applied = apply_recipe(
        expert,
        load_recipe("default", scheme),
        "t2v",
        smoothing=smoothing if changed else None,
        folds=folds,
    )

    def load(shards: LayerShards | None = None) -> Any:
        return load_expert(expert, applied, bind("cpu"), shards=shards or {})

    total_bytes, shard_bytes = check(load, monkeypatch, shards)
    by_rows = shards is COLUMNS and not (SCHEMES[scheme].block or SCHEMES[scheme].tile)
    assert total_bytes - shard_bytes == (0 if by_rows else unread_bytes(expert, shards))


@pytest.mark.parametrize("scheme", ["mxfp8", "int8"])
def test_floats_of_quantized_layers(scheme: str, floats: Path, smoothing: dict[str, Tensor]) -> None:
    """For steps in BF16: the shard of the weight before smoothing."""
    expert, stored = expert_in(floats), load_file(floats / "diffusion_pytorch_model.safetensors")
    applied = apply_recipe(expert, load_recipe("default", scheme), "t2v", smoothing=smoothing)
    shards = {UP: ROWS[UP]} | COLUMNS
    model = load_expert(expert, applied, bind("cpu"), floats=True, shards=shards)
    for name in (UP, DOWN, f"{QKV}q"):
        module = model.get_submodule(name)
        assert isinstance(module, QuantLinear) and module.floats is not None
        weight, bias = module.floats
        assert same(weight, cut(f"{name}.weight", stored[f"{name}.weight"], shards).contiguous())
        assert bias is not None and same(bias, cut(f"{name}.bias", stored[f"{name}.bias"], shards))


def test_the_shards_compute_the_complete_output(floats: Path) -> None:
    """Row shards give slices of the output, column shards sums; the bias is in each shard."""
    expert = expert_in(floats)
    applied = apply_recipe(expert, load_recipe("default", "mxfp8"), "t2v")
    complete = load_expert(expert, applied, bind("cpu"))
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, total = complete.get_submodule(DOWN)(x).float(), torch.zeros(5, WIDTH)
    for start, count in ((0, 608), (608, 608)):
        model = load_expert(expert, applied, bind("cpu"), shards={DOWN: ShardSpec(1, start, count)})
        module: Any = model.get_submodule(DOWN)
        assert (module.in_features, module.out_features) == (count, WIDTH)
        total += module(x[:, start : start + count]).float() - module.bias
    assert torch.allclose(total + module.bias, expected, atol=2e-2)
    model = load_expert(expert, applied, bind("cpu"), shards=lambda name: ROWS.get(name, ShardSpec()))
    module = model.get_submodule(UP)
    assert (module.in_features, module.out_features) == (WIDTH, 500)
    y = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(module(y), complete.get_submodule(UP)(y)[:, 300:800])


@pytest.mark.parametrize("shards", [{DOWN: ShardSpec(1, 192, 320)}, {DOWN: ShardSpec(0, 30, 20)}])
def test_fp8_in_tiles(
    shards: dict[str, ShardSpec], floats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They become BF16, which can be divided anywhere, stored or quantized during loading."""
    source = tmp_path / "model"
    repack(floats, tmp_path / "whole")
    (tmp_path / "whole" / "transformer").rename(source)
    values = load_file(source / "diffusion_pytorch_model.safetensors")
    for name in [n for n in values if n.startswith("blocks.") and values[n].ndim == 2 and "norm" not in n]:
        n, k = values[name].shape
        values[name] = (values[name].float() * 50).to(torch.float8_e4m3fn)
        values[f"{name}_scale_inv"] = torch.rand(-(-n // 128), -(-k // 128)) / 50
    values = {n: t.contiguous() for n, t in values.items()}
    save_file(values, source / "diffusion_pytorch_model.safetensors")
    expert = expert_in(source)
    check(lambda **kw: load_expert(expert, None, bind("cpu"), **kw), monkeypatch, shards)
    applied = apply_recipe(expert, load_recipe("default", "mxfp8"), "t2v")
    check(lambda **kw: load_expert(expert, applied, bind("cpu"), **kw), monkeypatch, shards)


@pytest.mark.parametrize(
    ("scheme", "shard", "message"),
    [
        ("mxfp8", ShardSpec(1, 16, 608), "columns 0 to 1216, in complete blocks of 32"),
        ("mxfp4_dualscale", ShardSpec(1, 512, 512 + 32), "columns 0 to 1216, in complete blocks of 512"),
        ("mxfp4", ShardSpec(1, 1216, 32), "columns 0 to 1216"),
        ("int8", ShardSpec(0, 60, 32), "rows 0 to 64"),
        ("int8_block", ShardSpec(0, 32, 32), "rows 0 to 64, in complete blocks of 128"),
        ("int8_block", ShardSpec(1, 64, 128), "columns 0 to 1216, in complete blocks of 128"),
        ("bf16", ShardSpec(0, 3, 0), "rows 0 to 64"),
    ],
)
def test_invalid_shards_of_a_layer(scheme: str, shard: ShardSpec, message: str, floats: Path) -> None:
    expert = expert_in(floats)
    applied = None if scheme == "bf16" else apply_recipe(expert, load_recipe("default", scheme), "t2v")
    with pytest.raises(UsageError, match=message) as e:
        load_expert(expert, applied, bind("cpu"), shards={DOWN: shard})
    assert e.value.code == "E-USE-05" and DOWN in e.value.got
