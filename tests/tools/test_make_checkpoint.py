"""Synthetic checkpoints: every layout is recognised, has the same numbers, and loads."""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from stored import stored_tensors

from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.names import expected_tensors, to_wan

REPO = Path(__file__).resolve().parents[2]
SHAPE = {"blocks": 2, "dim": 256, "ffn": 320}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", REPO / "tools" / "make_checkpoint.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "layout,cascade,kind,folders",
    [
        ("transformers", False, "transformers-only", ["transformer"]),
        ("transformers", True, "transformers-only", ["transformer", "transformer_2"]),
        ("diffusers", False, "diffusers", ["transformer"]),
        ("diffusers", True, "diffusers", ["transformer", "transformer_2"]),
        ("wan", False, "wan", ["."]),
        ("wan", True, "wan", ["high_noise_model", "low_noise_model"]),
        ("file", False, "file", ["."]),
    ],
)
def test_every_layout_is_recognised(
    tmp_path: Path, tool: ModuleType, layout: str, cascade: bool, kind: str, folders: list[str]
) -> None:
    dst = tmp_path / "out"
    total = tool.make(dst, layout=layout, cascade=cascade, max_shard_bytes=10**7, **SHAPE)
    config = tool.config_for(**SHAPE, demo_parts=layout == "diffusers")
    assert total == len(folders) * 2 * sum(map(math.prod, expected_tensors(config).values()))
    path = dst / "diffusion_pytorch_model.safetensors" if layout == "file" else dst
    recognised = recognise(path)
    assert recognised.kind == kind
    assert [part.path.resolve() for part in recognised.experts] == [
        path if layout == "file" else (dst / f).resolve() for f in folders
    ]
    for part in recognised.experts:
        expert = read_expert(part)
        assert expert.config_problem is None and expert.origin == "float"
        assert {key: expert.config.get(key) for key in config if key != "eps"} == {
            key: value for key, value in config.items() if key != "eps"
        }
        assert {n: info.shape for n, info in expert.tensors.items()} == expected_tensors(config)
        assert {info.dtype for info in expert.tensors.values()} == {"BF16"}


def test_one_seed_gives_the_same_numbers_in_every_layout(tmp_path: Path, tool: ModuleType) -> None:
    tool.make(tmp_path / "a", layout="transformers", cascade=True, **SHAPE)
    tool.make(tmp_path / "b", layout="wan", cascade=True, max_shard_bytes=10**6, **SHAPE)
    tool.make(tmp_path / "c", layout="file", **SHAPE)
    tool.make(tmp_path / "d", layout="transformers", seed=1, **SHAPE)
    high, low = (
        stored_tensors(tmp_path / "a" / "transformer"),
        stored_tensors(tmp_path / "a" / "transformer_2"),
    )
    for noise, expected in (("high_noise_model", high), ("low_noise_model", low)):
        stored = stored_tensors(tmp_path / "b" / noise)
        assert len(list((tmp_path / "b" / noise).glob("*.safetensors"))) > 2
        assert stored.keys() == {to_wan(name) for name in expected}
        assert all(torch.equal(stored[str(to_wan(name))], t) for name, t in expected.items())
    single = load_file(tmp_path / "c" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(single[str(to_wan(name))], tensor) for name, tensor in high.items())
    for other in (low, stored_tensors(tmp_path / "d" / "transformer")):
        assert not any(torch.equal(high[name], other[name]) for name in high)


def test_the_numbers_are_distributed_as_in_a_model(tmp_path: Path, tool: ModuleType) -> None:
    tool.make(tmp_path / "a", blocks=1, dim=512, ffn=2048)
    weights = stored_tensors(tmp_path / "a" / "transformer")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    x = weights["blocks.0.ffn.net.2.weight"].float()
    assert abs(x.mean()) < 1e-4
    assert 0.5 < x.std() * math.sqrt(x.shape[1]) < 1.5
    assert len(x.unique()) > 1000
    kurtosis = (x**4).mean() / (x**2).mean() ** 2
    assert kurtosis > 10, "outliers; a normal distribution has 3"
    zero = (x.reshape(-1, 32) == 0).all(1).sum()
    assert 16 <= zero <= 32 == x.numel() // 32 // 1024
    assert (x == 0).sum() == 32 * zero
    rows = x.abs().median(1).values
    assert rows.max() > 4 * rows.min()
    norm = weights["blocks.0.attn1.norm_q.weight"].float()
    assert abs(norm.mean() - 1) < 0.02 and 0.03 < norm.std() < 0.07
    bias = weights["blocks.0.attn1.to_q.bias"].float()
    assert abs(bias.mean()) < 0.02 and 0.03 < bias.std() < 0.07


def test_diffusers_loads_the_checkpoint(tmp_path: Path, tool: ModuleType) -> None:
    tool.make(tmp_path / "a", layout="diffusers", **SHAPE)
    model = WanTransformer3DModel.from_pretrained(tmp_path / "a" / "transformer", torch_dtype=torch.bfloat16)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == expected_tensors(dict(model.config))
    index = json.loads((tmp_path / "a" / "model_index.json").read_text())
    assert index["transformer_2"] == [None, None] and index["boundary_ratio"] is None
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert (tmp_path / "a" / part).is_symlink() and (tmp_path / "a" / part).is_dir()


def test_sizes(tool: ModuleType) -> None:
    assert [tool.size_of(text) for text in ("2.8GB", "500 mb", "1GiB", "7")] == [2.8e9, 5e8, 2**30, 7]
    for wrong in ("", "GB", "2 bananas", "1.2.3"):
        with pytest.raises(argparse.ArgumentTypeError, match="no size such as 2.8GB"):
            tool.size_of(wrong)
    a14b = {"dim": 5120, "ffn": 13824}
    assert tool.blocks_for(28.6e9, **a14b) == 40
    assert tool.nbytes(tool.config_for(40, **a14b)) == pytest.approx(28.6e9, rel=0.01)
    assert tool.blocks_for(1, **a14b) == 1
    assert 2.4e9 < tool.nbytes(tool.config_for(tool.blocks_for(2.8e9, **a14b), **a14b)) < 3.2e9


def test_on_the_command_line(tmp_path: Path) -> None:
    argv = [sys.executable, str(REPO / "tools" / "make_checkpoint.py"), str(tmp_path / "out")]
    argv += ["--dim", "64", "--ffn", "96", "--size", "3MB", "--layout", "wan", "--max-shard", "1MB"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 'out'}: 0.00 GB, ")
    assert recognise(tmp_path / "out").kind == "wan"
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").exists()
