"""`quantize` against real exports of msModelSlim 26.1.0: the same BF16 weights in, the same bytes out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ascendit.convert.quantize import quantize

DATA = Path(__file__).parents[1] / "fixtures" / "msmodelslim"
T2V, TI2V = DATA / "source_models" / "t2v_d64_l6", DATA / "source_models" / "ti2v_d128_l1"
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
KEEP = ["blocks.0.*", "blocks.3.cross_attn.o"]
EMBEDDERS = """
[[rules]]
layers = ["*", "condition_embedder.*"]
scheme = "int8"
scale_rule = "msms:int8_legacy"
"""
# Written by hand from Diffusers' WanTransformer3DModel, to reveal a wrong table in ascendit.
NAMES = {
    "self_attn": "attn1",
    "cross_attn": "attn2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "head.modulation": "scale_shift_table",
    "modulation": "scale_shift_table",
    "head.head": "proj_out",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
}


def diffusers_name(name: str) -> str:
    for old, new in NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\1{new}", name)
    name = re.sub(r"(attn[12])\.([qkv])(?=\.)", r"\1.to_\2", name)
    name = re.sub(r"(attn[12])\.o(?=\.)", r"\1.to_out.0", name)
    return name.replace(".linear.", ".").replace(".div.", ".")


def exported(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and manifest of one expert, by Diffusers names."""
    (weights,) = folder.glob("*.safetensors")
    (manifest,) = folder.glob("quant_model_description*.json")
    tensors = {diffusers_name(name): tensor for name, tensor in load_file(weights).items()}
    return tensors, {diffusers_name(k): v for k, v in json.loads(manifest.read_text()).items()}


def written(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    manifest = json.loads((folder / "quant_model_description.json").read_text())
    return load_file(folder / "diffusion_pytorch_model.safetensors"), manifest


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Every tensor, byte for byte; the legacy calibrator's BF16 scales and biases are compared in float32."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.dtype != ours[name].dtype:
            assert (tensor.dtype, ours[name].dtype) == (torch.bfloat16, torch.float32), name
            tensor = tensor.to(torch.float32)
        assert tensor.shape == ours[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), ours[name].view(torch.uint8)), name


def check_cascade(dst: Path, export: Path) -> None:
    for name, folder in EXPERTS.items():
        ours, manifest = written(dst / name)
        theirs, their_manifest = exported(export / folder)
        compare(ours, theirs)
        assert manifest == their_manifest


def check_single(dst: Path, export: Path) -> None:
    ours, manifest = written(dst / "transformer")
    theirs, their_manifest = exported(export)
    compare(ours, theirs)
    assert manifest == their_manifest


def test_the_official_recipe_of_ti2v(tmp_path):
    export = DATA / "exports/W8A8_MXFP8/ti2v_d128_l1__official_w8a8f8"
    report = quantize(TI2V, tmp_path / "out", recipe="ascend-w8a8f8")
    check_single(tmp_path / "out", export)
    ours, manifest = written(tmp_path / "out" / "transformer")
    assert ours["blocks.0.attn1.q_rot"].shape == (32, 32)
    assert manifest["blocks.0.attn1.quant_type"] == "FP8_DYNAMIC"
    assert report.schemes == {"mxfp8": 10, "bf16": 6} and report.warnings == ()


def test_mxfp4_minmax(tmp_path):
    quantize(TI2V, tmp_path / "out", scheme="mxfp4", scale_rule="msms:minmax", force=True)
    check_single(tmp_path / "out", DATA / "exports/W4A4_MXFP4/ti2v_d128_l1__minmax")


def test_int8(tmp_path):
    quantize(TI2V, tmp_path / "ti2v", scheme="int8", scale_rule="msms:int8")
    check_single(tmp_path / "ti2v", DATA / "exports/W8A8_DYNAMIC/ti2v_d128_l1__int8_part_file_size1")
    quantize(T2V, tmp_path / "t2v", scheme="int8", scale_rule="msms:int8")
    check_cascade(tmp_path / "t2v", DATA / "exports/W8A8_DYNAMIC/t2v_d64_l6__int8")


def test_the_legacy_calibrator_with_its_embedders(tmp_path):
    recipe = tmp_path / "legacy.toml"
    recipe.write_text(EMBEDDERS)
    report = quantize(T2V, tmp_path / "out", recipe=str(recipe))
    check_cascade(tmp_path / "out", DATA / "exports/W8A8_DYNAMIC/t2v_d64_l6__legacy_calibrator")
    assert report.experts[0].schemes == {"int8": 65, "bf16": 1}


def test_dual_scale_with_bf16_fallback(tmp_path):
    quantize(T2V, tmp_path / "out", scheme="mxfp4_dualscale", scale_rule="msms:dualscale", keep=KEEP)
    check_cascade(tmp_path / "out", DATA / "exports/W4A4_MXFP4_DUALSCALE/t2v_d64_l6__dualscale_bf16fallback")


def test_dual_scale_with_smoothing(tmp_path):
    export = DATA / "exports/W4A4_MXFP4_DUALSCALE/t2v_d64_l6__dualscale_smooth_bf16fallback"
    smoothing = {}
    for name, folder in EXPERTS.items():
        scales = {n: t for n, t in exported(export / folder)[0].items() if n.endswith(".mul_scale")}
        smoothing[name] = {n.removesuffix(".mul_scale"): t for n, t in scales.items()}
    report = quantize(
        T2V,
        tmp_path / "out",
        scheme="mxfp4_dualscale",
        scale_rule="msms:dualscale",
        keep=KEEP,
        smoothing=smoothing,
    )
    check_cascade(tmp_path / "out", export)
    assert report.experts[1].schemes == {"mxfp4_dualscale": 49, "bf16": 17}


def test_another_rule_gives_other_bytes(tmp_path):
    """Otherwise the tests above would prove little."""
    quantize(TI2V, tmp_path / "out", scheme="mxfp8", scale_rule="msms:mse_round")
    ours, theirs = (
        written(tmp_path / "out" / "transformer")[0],
        exported(DATA / "exports/W8A8_MXFP8/ti2v_d128_l1__official_w8a8f8")[0],
    )
    scale = "blocks.0.ffn.net.2.weight_scale"
    assert (ours[scale] != theirs[scale]).float().mean() > 0.1
    with pytest.raises(AssertionError):
        compare(ours, theirs)
