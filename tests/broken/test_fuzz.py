"""Random damage to small complete models: an ascendit error or a valid result, nothing else, and fast."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from broken.models import CONFIG, INDEX, MANIFEST, MODELS, WEIGHTS, header, load, raw, save
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.convert.quantize import quantize
from ascendit.convert.repack import repack
from ascendit.errors import AscenditError, CheckpointError
from ascendit.inspect.checkpoint import inspect
from ascendit.names import expected_tensors
from ascendit.weights.lora.fold import Folds, LoraSource

SECONDS = 10.0
"""Limit for one broken model: each takes some milliseconds, an endless loop reaches the limit."""

numbers = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30, 10**400]),
    st.floats(),
    st.booleans(),
)
strings = st.one_of(
    st.sampled_from(
        ["", "F32", "BF16", "F8_E4M3", "U8", "I8", "F4", "FLOAT", "W8A8_MXFP8", "../x", "/", "\0", "é"]
    ),
    st.sampled_from(
        [WEIGHTS, MANIFEST, "WanModel", "WanTransformer3DModel", "mxfp8", "blocks.0.attn1.to_q.weight"]
    ),
    st.text(max_size=8),
)
keys = st.one_of(
    strings,
    st.sampled_from(
        ["patch_size", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "cross_attn_norm", "eps"]
    ),
    st.sampled_from(["qk_norm", "quantization_config", "_class_name", "num_heads", "in_dim", "out_channels"]),
    st.sampled_from(
        ["boundary_ratio", "expand_timesteps", "vae", "transformer_2", "image_encoder", "metadata"]
    ),
    st.sampled_from(
        ["prediction_type", "use_flow_sigmas", "flow_shift", "z_dim", "latents_mean", "latents_std"]
    ),
    st.sampled_from(
        ["scale_factor_spatial", "scale_factor_temporal", "model_quant_type", "version", "group_size"]
    ),
    st.sampled_from(["quant_method", "ignored_layers", "weight_block_size", "blocks.0.attn1.quant_type"]),
)
"""Keys that a reader looks up, and others."""
dtypes = st.sampled_from(["U8", "I8", "F8_E4M3", "F8_E8M0", "BOOL"])
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), numbers, strings),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(strings, inner, max_size=3)),
    max_leaves=6,
)


@contextmanager
def time_limit() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < SECONDS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in ("single", "sharded", "mxfp8", "int8", "dualscale", "tiles", "export", "cascade", "pipeline"):
        (root / name).mkdir()
        MODELS[name](root / name)
    return {path.name: path for path in root.iterdir()}


def mutate(draw: Any, data: Any) -> Any:
    """`data` with one value at any depth replaced, removed, renamed or added."""
    if isinstance(data, dict) and data and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(data)))
        change = draw(st.sampled_from(["inside", "remove", "rename", "add"]))
        changed = {name: value for name, value in data.items() if name != key or change in ("inside", "add")}
        if change == "inside":
            changed[key] = mutate(draw, data[key])
        elif change == "rename":
            changed[draw(keys)] = data[key]
        elif change == "add":
            changed[draw(keys)] = draw(values)
        return changed
    if isinstance(data, list) and data and draw(st.integers(0, 2)):
        index = draw(st.integers(0, len(data) - 1))
        return [mutate(draw, value) if i == index else value for i, value in enumerate(data)]
    return draw(values)


# ---- one file -----------------------------------------------------------------------------------------

SMALL = {"a.weight": ("BF16", (2, 3), bytes(12)), "b": ("U8", (4,), b"abcd"), "c": ("F32", (), bytes(4))}


def read(content: bytes) -> None:
    """Read `content` as a file; the tensors read must fit the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        try:
            with time_limit():
                infos = read_header(path)
        except CheckpointError as e:
            assert e.code == "E-CKP-02"
            return
        ends = sorted((info.start, info.end) for info in infos.values())
        assert all(0 <= start <= end <= len(content) for start, end in ends)
        assert not ends or ends[-1][1] == len(content)


@settings(max_examples=150)
@given(
    content=st.one_of(st.binary(max_size=200), st.builds(raw, st.binary(max_size=60), st.binary(max_size=20)))
)
def test_any_bytes(content: bytes) -> None:
    read(content)


@settings(max_examples=150)
@given(head=values, data=st.binary(max_size=12), length=st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_any_json_as_header(head: Any, data: bytes, length: int | None) -> None:
    read(raw(head, data, length))


@settings(max_examples=150)
@given(data=st.data())
def test_headers_with_one_change(data: st.DataObject) -> None:
    read(raw(mutate(data.draw, header(SMALL)), b"".join(t[2] for t in SMALL.values())))


@settings(max_examples=150)
@given(
    flips=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 7)), min_size=1, max_size=4),
    cut=st.integers(0, 20),
)
def test_flipped_bits_and_cut_ends(flips: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(raw(header(SMALL), b"".join(t[2] for t in SMALL.values())))
    for position, bit in flips:
        content[position % len(content)] ^= 1 << bit
    read(bytes(content[: len(content) - cut] if cut else content))


# ---- complete models --------------------------------------------------------------------------------------


def try_all(folder: Path) -> None:
    """Every reader, and both writers with `dry_run`. They may raise ascendit errors only."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    out = folder.parent / "out"
    calls: list[Any] = [
        lambda: [read_expert(expert) for expert in recognise(folder).experts],
        lambda: [str(problem) for problem in inspect(folder).problems],
        lambda: inspect(folder).as_dict(),
        lambda: repack(folder, out, dry_run=True).as_dict(),
        lambda: repack(folder, out, dry_run=True, engine="vllm-omni"),
        lambda: repack(folder, out, dry_run=True, to="wan"),
        lambda: quantize(folder, out, scheme="mxfp8", dry_run=True).as_dict(),
    ]
    for call in calls:
        try:
            with time_limit():
                call()
        except AscenditError as e:
            assert str(e)
        assert not out.exists()
    try:
        with time_limit():
            repack(folder, out, check=True)
    except AscenditError:
        assert not out.exists()
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


JSONS = {
    "single": ("config.json",),
    "sharded": ("config.json", INDEX),
    "mxfp8": ("config.json", MANIFEST),
    "int8": ("config.json", MANIFEST),
    "dualscale": (MANIFEST,),
    "tiles": ("config.json",),
    "export": ("config.json", "quant_model_description_w8a8_mxfp8.json"),
    "cascade": ("low_noise_model/config.json",),
    "pipeline": (
        "model_index.json",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
    ),
}


@contextmanager
def copied(model: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as root:
        yield Path(shutil.copytree(model, Path(root) / "model"))


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in JSONS.items() for file in files])
@settings(max_examples=25)
@given(data=st.data())
def test_json_files_with_random_changes(
    models: dict[str, Path], name: str, file: str, data: st.DataObject
) -> None:
    with copied(models[name]) as folder:
        value = json.loads((folder / file).read_text())
        for _ in range(data.draw(st.integers(1, 2))):
            value = mutate(data.draw, value)
        (folder / file).write_text(json.dumps(value))
        try_all(folder)


@pytest.mark.parametrize("name", ["single", "mxfp8", "int8", "dualscale", "tiles"])
@settings(max_examples=30)
@given(data=st.data())
def test_tensors_with_random_changes(models: dict[str, Path], name: str, data: st.DataObject) -> None:
    """Valid files: a tensor is missing, duplicated, renamed, or has another dtype or shape of equal size."""
    with copied(models[name]) as folder:
        tensors = load(folder / WEIGHTS)
        for _ in range(data.draw(st.integers(1, 2))):
            key = data.draw(st.sampled_from(sorted(tensors)))
            dtype, shape, content = tensors[key]
            change = data.draw(
                st.sampled_from(["drop", "rename", "double", "dtype", "flat", "empty", "scalar"])
            )
            other = data.draw(st.one_of(strings, st.sampled_from(sorted(tensors))))
            if change in ("drop", "rename"):
                del tensors[key]
            if change in ("rename", "double"):
                tensors[other] = (dtype, shape, content)
            if change == "dtype":
                tensors[key] = (
                    data.draw(dtypes),
                    (len(content),),
                    content,
                )
            elif change == "flat":
                tensors[key] = ("U8", (1, len(content), 1), content)
            elif change == "empty":
                tensors[key] = (dtype, (*shape[:-1], 0), b"")
            elif change == "scalar":
                tensors[key] = ("F32", (), bytes(4))
        save(folder / WEIGHTS, tensors)
        try_all(folder)


@pytest.mark.parametrize("name", ["single", "mxfp8"])
@settings(max_examples=30)
@given(data=st.data())
def test_files_with_flipped_bits(models: dict[str, Path], name: str, data: st.DataObject) -> None:
    with copied(models[name]) as folder:
        path = folder / data.draw(st.sampled_from([WEIGHTS, "config.json"]))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, min(len(content), 9000) - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
        path.write_bytes(
            content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
        )
        try_all(folder)


# ---- LoRA files ------------------------------------------------------------------------------------------

LORA = {
    "diffusion_model.blocks.0.self_attn.q.lora_down.weight": ("BF16", (2, 64), bytes(256)),
    "diffusion_model.blocks.0.self_attn.q.lora_up.weight": ("BF16", (64, 2), bytes(256)),
    "diffusion_model.blocks.0.self_attn.q.alpha": ("F32", (), b"\0\0\x80?"),
    "diffusion_model.blocks.0.diff_m": ("F32", (1, 6, 64), bytes(4 * 6 * 64)),
    "lora_unet_blocks_1_ffn_0.lokr_w1": ("F32", (4, 4), bytes(64)),
    "lora_unet_blocks_1_ffn_0.lokr_w2_a": ("F32", (24, 2), bytes(192)),
    "lora_unet_blocks_1_ffn_0.lokr_w2_b": ("F32", (2, 16), bytes(128)),
}
suffixes = st.sampled_from(
    [".weight", ".alpha", ".diff", ".diff_b", ".lora_A.weight", ".hada_w1_a", ".lokr_w2", ".dora_scale", ""]
)


@settings(max_examples=150)
@given(data=st.data())
def test_lora_files_with_random_changes(data: st.DataObject) -> None:
    tensors: dict[str, Any] = dict(LORA)
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(tensors)))
        dtype, shape, content = tensors.pop(key)
        change = data.draw(st.sampled_from(["drop", "rename", "dtype", "flat", "empty", "scalar", "twist"]))
        if change == "rename":
            tensors[key.rpartition(".")[0] + data.draw(suffixes)] = (dtype, shape, content)
        elif change == "dtype":
            tensors[key] = (
                data.draw(dtypes),
                (len(content),),
                content,
            )
        elif change == "flat":
            tensors[key] = (dtype, (1, *shape), content)
        elif change == "empty":
            tensors[key] = (dtype, (*shape[:-1], 0), b"")
        elif change == "scalar":
            tensors[key] = ("F32", (), bytes(4))
        elif change == "twist":
            tensors[key] = (dtype, shape[::-1], content)
        if not tensors:
            break
    shapes = expected_tensors(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "x.safetensors", tensors)
        try:
            folds = Folds.open([LoraSource(Path(folder) / "x.safetensors")], "transformer", shapes)
            import torch

            for name in folds.names:
                assert folds.fold(name, torch.ones(shapes[name]), 0).shape == shapes[name]
        except CheckpointError as e:
            assert e.code == "E-LRA-01"
