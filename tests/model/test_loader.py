"""Loading is strict: names, shapes and dtypes are checked first, then tensors are read one at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from stored import load_transformer

from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.checkpoint.weight_files import Shards
from ascendit.errors import CheckpointError
from ascendit.model.library_component import load_library_part
from ascendit.model.loader import load_expert
from ascendit.model.weight_loader import ModelSink
from ascendit.ops.operators import bind


def load(folder: Path, **kw: Any) -> Any:
    return load_transformer(recognise(folder).parts["transformer"], bind("cpu"), **kw)


def test_single_file_and_shards_give_the_same_weights(tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    whole = load(tiny_t2v_cascade).state_dict()
    parts = load(tiny.shard(tiny.copy(tiny_t2v_cascade, tmp_path / "m"))).state_dict()
    stored = load_file(tiny_t2v_cascade / "transformer/diffusion_pytorch_model.safetensors")
    assert set(whole) == set(parts) == set(stored)
    assert all(torch.equal(whole[k], stored[k]) and torch.equal(parts[k], stored[k]) for k in stored)


def test_dtype_is_stored_or_requested_and_float32_for_sensitive_tensors(tiny_t2v_cascade: Path) -> None:
    assert {p.dtype for p in load(tiny_t2v_cascade).parameters()} == {torch.float32}
    model = load(tiny_t2v_cascade, dtype=torch.bfloat16)
    in_float32 = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert in_float32 == {
        n
        for n, _ in model.named_parameters()
        if "time_embedder" in n or "scale_shift_table" in n or "norm2." in n
    }
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("drop_tensor", "E-CKP-04", "1 missing (blocks"),
        ("extra_tensor", "E-CKP-04", "1 unexpected (blocks.9.extra.weight)"),
        ("wrong_shape", "E-CKP-04", "misshapen"),
        ("wrong_dtype", "E-CKP-04", "I64"),
        ("truncate_shard", "E-CKP-02", "truncated"),
        ("not_safetensors", "E-CKP-02", "safetensors"),
        ("no_weights", "E-CKP-02", "diffusion_pytorch_model"),
        ("index_missing_file", "E-CKP-03", "00009-of-00003"),
        ("index_outside", "E-CKP-03", "outside"),
        ("other_class", "E-CKP-05", "FluxTransformer2DModel"),
        ("no_config", "E-CKP-06", "config.json"),
        ("config_no_json", "E-CKP-06", "config.json"),
    ],
)
def test_a_damaged_folder_is_refused_before_a_tensor_is_read(
    how: str, code: str, text: str, tiny_t2v_cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.damage(tiny.copy(tiny_t2v_cascade, tmp_path / "m"), how)
    monkeypatch.setattr(ModelSink, "_buffer", lambda *a: pytest.fail("read a tensor of a damaged model"))
    with pytest.raises(CheckpointError) as e:
        load(folder)
    assert e.value.code == code and text in str(e.value), str(e.value)


def test_unknown_config_key_is_an_error(tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    folder = tiny.copy(tiny_t2v_cascade, tmp_path / "m")
    config = folder / "transformer/config.json"
    config.write_text(config.read_text().replace('"text_dim"', '"vace_layers": [0], "text_dim"'))
    with pytest.raises(CheckpointError, match="vace_layers"):
        load(folder)


@pytest.mark.parametrize(("part", "file"), [("vae", "diffusion_pytorch_model"), ("text_encoder", "model")])
@pytest.mark.parametrize("how", ["missing", "extra", "shape"])
def test_library_components_are_checked_too(
    part: str, file: str, how: str, tiny_t2v_cascade: Path, tmp_path: Path
) -> None:
    folder = tiny.copy(tiny_t2v_cascade, tmp_path / "m")
    path = folder / part / f"{file}.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith("weight") and weights[n].ndim > 1 and "shared" not in n)
    if how == "missing":
        del weights[name]
    elif how == "extra":
        weights["no.such.weight"] = torch.zeros(3)
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as e:
        loaded = recognise(folder).parts[part]
        load_library_part(loaded, Shards.from_part(loaded), torch.float32)
    assert e.value.code == "E-CKP-04" and ("no.such.weight" if how == "extra" else name) in str(e.value)


@pytest.mark.slow
def test_peak_memory_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    """A 200 MB transformer in 8 shards: loading needs at most 20 % more memory than the model."""
    from diffusers import WanTransformer3DModel

    big = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=128, text_dim=64, ffn_dim=2048, num_layers=12
    )
    root = tiny.build_t2v_single(tmp_path / "m")
    big.save_pretrained(root / "transformer", max_shard_size="30MB")
    (root / "transformer" / tiny.WEIGHTS).unlink(missing_ok=True)
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from ascendit.checkpoint.transformer import read_expert\n"
        "from ascendit.model.loader import load_expert\n"
        "from ascendit.model.weight_loader import nbytes\n"
        "from ascendit.checkpoint.layout import recognise\n"
        "from ascendit.ops.operators import bind\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); part = recognise(Path(sys.argv[1])).parts['transformer']\n"
        "m = load_expert(read_expert(part), None, bind('cpu'))\n"
        "print((peak() - before) / nbytes(m))\n"
    )
    out = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 1.2


def test_a_transformer_in_float64_runs_in_float32(tiny_t2v_single: Path, tmp_path: Path) -> None:
    folder = tiny.copy(tiny_t2v_single, tmp_path / "m")
    file = folder / "transformer" / tiny.WEIGHTS
    weights = {name: tensor.double() for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    model = load_expert(read_expert(recognise(folder).experts[0]), None, bind("cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
