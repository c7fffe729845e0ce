"""Loading is strict: names, shapes and dtypes are checked first, then tensors are read one at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from stored import load_transformer

import ascendit
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.checkpoint.weight_files import Shards
from ascendit.errors import CheckpointError
from ascendit.model.library_component import load_library_part
from ascendit.model.loader import load_expert
from ascendit.model.quantize_on_load import Online
from ascendit.model.wan import Attention
from ascendit.model.weight_loader import ModelSink
from ascendit.mx.smoothing import rotation
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


# ---- quantized attention ------------------------------------------------------------------------

FP8_ATTENTION = """
[[attention]]
layers = "*.attn1"
quant_type = "FP8_DYNAMIC"
rotate = true

[[attention]]
layers = "blocks.0.attn1"
quant_type = ""
"""


def attentions(model: Any) -> dict[str, Attention]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Attention)}


@pytest.fixture
def fp8_attention(tiny_t2v_single: Path, tmp_path: Path) -> Path:
    """A BF16 model that is stored with FP8 self-attention after the first block, and rotations in all."""
    recipe = tmp_path / "fp8.toml"
    recipe.write_text(FP8_ATTENTION)
    ascendit.quantize(tiny_t2v_single, tmp_path / "m", recipe=str(recipe))
    return tmp_path / "m"


def edit_tensors(folder: Path, **changed: Any) -> None:
    file = folder / "transformer" / tiny.WEIGHTS
    save_file(load_file(file) | changed, file, metadata={"format": "pt"})


def edit_manifest(folder: Path, edit: Callable[[dict[str, str]], dict[str, str]]) -> None:
    file = folder / "transformer/quant_model_description.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_recipe_quantizes_attention_in_a_file_and_while_loading(
    tiny_t2v_single: Path, fp8_attention: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    online = Online.from_options(None, str(tmp_path / "fp8.toml"))
    models = load(fp8_attention, dtype=dtype), load(tiny_t2v_single, online=online, dtype=dtype)
    for model in models:
        modules = attentions(model)
        for name, m in modules.items():
            own = name.endswith("attn1")
            assert m.scheme == ("fp8" if own and not name.startswith("blocks.0.") else None), name
            for rotation_of in (m.q_rot, m.k_rot):
                if not own:
                    assert rotation_of is None
                    continue
                expected = rotation(m.head_dim).to(dtype)
                assert rotation_of is not None and rotation_of.dtype == dtype
                assert torch.equal(rotation_of, expected)
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_rotations_without_a_scheme_are_loaded_and_change_nothing(
    tiny_t2v_single: Path, fp8_attention: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As repacked by SGLang, without the entries of attention."""
    edit_manifest(fp8_attention, lambda d: {k: v for k, v in d.items() if not k.endswith(".quant_type")})
    with caplog.at_level("INFO", logger="ascendit"):
        model = load(fp8_attention, dtype=torch.bfloat16)
    count = len(model.blocks)
    assert f"rotations of {count} attentions in BF16 are not used" in caplog.text
    assert {m.scheme for m in attentions(model).values()} == {None}
    plain = load(tiny_t2v_single, dtype=torch.bfloat16)
    x, text = torch.randn(1, plain.config.in_channels, 1, 4, 4), torch.randn(1, 5, plain.config.text_dim)
    outputs = [m(x.bfloat16(), 500.0, m.prepare((1, 2, 2), text)) for m in (model, plain)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("role", ["q_rot", "k_rot"])
@pytest.mark.parametrize("how", ["another", "scaled", "nan"])
def test_rotations_that_change_scores_are_refused(fp8_attention: Path, role: str, how: str) -> None:
    name = f"blocks.1.attn1.{role}"
    matrix = load_file(fp8_attention / "transformer" / tiny.WEIGHTS)[name]
    changed = {"another": matrix.t(), "scaled": matrix * 1.1, "nan": matrix * torch.nan}[how]
    edit_tensors(fp8_attention, **{name: changed.contiguous()})
    with pytest.raises(CheckpointError, match=r"q_rot and k_rot of blocks\.1\.attn1 change the scores") as e:
        load(fp8_attention)
    assert e.value.code == "E-CKP-08"


def test_rotations_that_are_not_orthogonal_are_refused(fp8_attention: Path) -> None:
    """Their product is 1, but one scales the numbers that are quantized."""
    matrix = load_file(fp8_attention / "transformer" / tiny.WEIGHTS)["blocks.1.attn1.q_rot"]
    edit_tensors(
        fp8_attention, **{"blocks.1.attn1.q_rot": matrix * 4, "blocks.1.attn1.k_rot": matrix.clone() / 4}
    )
    with pytest.raises(CheckpointError, match="change the scores: a product is 15 from 1"):
        load(fp8_attention)


@pytest.mark.parametrize("name", ["blocks.1.ffn", "blocks.1", "blocks.1.attn1.to_q", "blocks.9.attn1"])
def test_a_type_for_a_module_that_is_no_attention_is_refused(fp8_attention: Path, name: str) -> None:
    edit_manifest(fp8_attention, lambda d: {**d, f"{name}.quant_type": "INT8_DYNAMIC"})
    with pytest.raises(CheckpointError, match=f"1 entries without a tensor: {name}") as e:
        load(fp8_attention)
    assert e.value.code == "E-CKP-04"


@pytest.mark.parametrize("value", ["QK_FP8_DYNAMIC_V_MXFP4_DYNAMIC", "FP8"])
def test_a_type_without_a_kernel_is_refused_and_its_entry_can_be_removed(
    fp8_attention: Path, value: str
) -> None:
    key = "blocks.1.attn1.quant_type"
    edit_manifest(fp8_attention, lambda d: {**d, key: value})
    with pytest.raises(CheckpointError, match=f"1 attention without a kernel: {key} is {value}") as e:
        load(fp8_attention)
    assert e.value.code == "E-CKP-07" and "MXFP8_DYNAMIC" in e.value.needs
    edit_manifest(fp8_attention, lambda d: {k: v for k, v in d.items() if k != key})
    assert attentions(load(fp8_attention))["blocks.1.attn1"].scheme is None
