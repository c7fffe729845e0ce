"""Comparing two checkpoints, also of different layouts: exactly the differences are reported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipeline.headers import (
    CONFIG,
    PIPELINE,
    WEIGHTS,
    floats,
    library_tensors,
    manifest,
    quantized,
    write_expert,
    write_export,
    write_json,
    write_pipeline,
    write_weights,
)

from ascendit.inspect.checkpoint import inspect
from ascendit.inspect.diff import NOT_COMPARED, Diff, diff
from ascendit.inspect.values import ValueDiff
from ascendit.names import block_linears, to_wan

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "msmodelslim"
LINEARS = block_linears(CONFIG)
BIASES = {f"{name}.bias" for name in LINEARS}


def model(folder: Path, schemes: dict[str, str], **changes: Any) -> Path:
    """Transformers of a Diffusers folder, one expert."""
    tensors = quantized(
        schemes, smoothed=changes.pop("smoothed", ()), packing=changes.pop("packing", "packed")
    )
    config = CONFIG | changes
    write_expert(folder / "transformer", tensors, config, manifest=manifest(tensors, schemes))
    return folder


def named(result: Diff, kind: str) -> dict[str, tuple[Any, Any]]:
    assert len({(c.part, c.kind, c.name) for c in result.changes}) == len(result.changes)
    return {c.name: (c.a, c.b) for c in result.changes if c.kind == kind}


def kinds(result: Diff) -> set[str]:
    json.dumps(result.as_dict())
    assert result.as_dict()["same"] is result.same
    return {c.kind for c in result.changes}


def test_a_folder_and_its_copy(tmp_path: Path) -> None:
    folder = model(tmp_path / "a", dict.fromkeys(LINEARS, "mxfp8"))
    result = diff(folder, shutil.copytree(folder, tmp_path / "b"))
    assert result.same and result.changes == ()
    assert result.lines()[-1] == "Result     same headers and configs"
    assert f"Values     {NOT_COMPARED} (see --values)" in result.lines()
    command = replace(result, values=ValueDiff(())).page().about["command"]
    assert command.endswith(" --values --report FILE.html")
    assert f"Hashes     {NOT_COMPARED}" in replace(result, values=ValueDiff(())).lines()


def test_the_same_model_in_other_layouts(tmp_path: Path) -> None:
    """Tensor names, wrappers and file names do not count. `diff` accepts a report instead of a path."""
    schemes = dict.fromkeys(LINEARS, "mxfp4")
    ours = model(tmp_path / "a", schemes, smoothed=LINEARS[:2], attention_head_dim=128, num_attention_heads=1)
    tensors = quantized(schemes, smoothed=LINEARS[:2])
    theirs = write_export(tmp_path / "b", tensors, manifest(tensors, schemes))
    result = diff(inspect(ours), theirs)
    assert result.same, result.changes
    assert [side["kind"] for side in (result.as_dict()["a"], result.as_dict()["b"])] == [
        "transformers-only",
        "msmodelslim",
    ]


def test_a_recipe_against_its_source(tmp_path: Path) -> None:
    write_expert(tmp_path / "a" / "transformer", floats())
    schemes = {n: "mxfp4" for n in LINEARS if not n.startswith("blocks.0.")}
    result = diff(tmp_path / "a", model(tmp_path / "b", schemes))
    assert not result.same
    assert kinds(result) == {"scheme", "dtype"}
    assert named(result, "scheme") == dict.fromkeys(schemes, ("bf16", "mxfp4"))
    assert named(result, "dtype") == {f"{n}.bias": ("bf16", "fp32") for n in schemes}
    lines = result.lines()
    assert "  scheme     bf16 -> mxfp4   blocks.1-3   (30)" in lines
    assert any(line.startswith("  dtype      bf16 -> fp32   bias of blocks.1-3") for line in lines)
    assert lines[-1] == "Result     60 differences"


def test_two_recipes(tmp_path: Path) -> None:
    a = dict.fromkeys(LINEARS, "mxfp8")
    b = a | {"blocks.3.ffn.net.2": "mxfp4"}
    result = diff(model(tmp_path / "a", a), model(tmp_path / "b", b))
    assert [(c.kind, c.name, c.a, c.b) for c in result.changes] == [
        ("scheme", "blocks.3.ffn.net.2", "mxfp8", "mxfp4")
    ]
    back = diff(tmp_path / "b", tmp_path / "a")
    assert [(c.a, c.b) for c in back.changes] == [("mxfp4", "mxfp8")]


def test_packing_smoothing_and_attention(tmp_path: Path) -> None:
    schemes = dict.fromkeys(LINEARS, "mxfp4")
    plain = model(tmp_path / "a", schemes)
    other = model(tmp_path / "b", schemes, packing="F8_E4M3", smoothed=LINEARS[:1])
    tensors = quantized(schemes, packing="F8_E4M3", smoothed=LINEARS[:1])
    tensors |= {f"blocks.2.attn1.{x}_rot": ("BF16", (64, 64)) for x in "qk"}
    described = manifest(tensors, schemes, {"blocks.2.attn1.quant_type": "FP8_DYNAMIC"})
    write_expert(other / "transformer", tensors, manifest=described)
    result = diff(plain, other)
    assert kinds(result) == {"scheme", "smoothing", "attention", "tensor"}
    assert set(named(result, "scheme").values()) == {("mxfp4", "mxfp4 unpacked to FP8")}
    assert named(result, "smoothing") == {LINEARS[0]: (None, "mul_scale")}
    assert named(result, "attention") == {"blocks.2.attn1": (None, "FP8_DYNAMIC")}
    assert named(result, "tensor")["blocks.2.attn1.q_rot"] == (None, "bf16 [64, 64]")
    assert "  only in B  q_rot of blocks.2.attn1, k_rot of blocks.2.attn1   (2)" in result.lines()


def test_dtypes_of_scales_of_one_scheme(tmp_path: Path) -> None:
    schemes = {"blocks.0.ffn.net.2": "int8"}
    tensors = quantized(schemes)
    write_expert(tmp_path / "a" / "transformer", tensors, manifest=manifest(tensors, schemes))
    scale = "blocks.0.ffn.net.2.weight_scale"
    tensors[scale] = ("BF16", (128, 1))
    del tensors["blocks.0.ffn.net.2.weight_offset"]
    write_expert(tmp_path / "b" / "transformer", tensors, manifest=manifest(tensors, schemes))
    result = diff(tmp_path / "a", tmp_path / "b")
    assert named(result, "dtype") == {scale: ("fp32", "bf16")}
    assert named(result, "tensor") == {"blocks.0.ffn.net.2.weight_offset": ("fp32 [128, 1]", None)}
    assert kinds(result) == {"dtype", "tensor"}


def test_another_size_of_model(tmp_path: Path) -> None:
    write_expert(tmp_path / "a" / "transformer", floats())
    bigger = CONFIG | {"num_layers": 5, "ffn_dim": 512}
    write_expert(tmp_path / "b" / "transformer", floats(bigger), bigger)
    result = diff(tmp_path / "a", tmp_path / "b")
    assert kinds(result) == {"shape", "tensor", "config"}
    assert named(result, "config") == {"num_layers": (4, 5), "ffn_dim": (256, 512)}
    assert named(result, "shape")["blocks.0.ffn.net.0.proj.weight"] == ([256, 128], [512, 128])
    assert all(a is None and name.startswith("blocks.4.") for name, (a, _) in named(result, "tensor").items())


def test_configs_are_compared_by_meaning(tmp_path: Path) -> None:
    """Absent fields have Diffusers' default; the writing version does not count; quantization_config does."""
    a = model(tmp_path / "a", {}, _diffusers_version="0.30", eps=1e-6, patch_size=[1, 2, 2])
    assert diff(a, model(tmp_path / "b", {})).same
    result = diff(a, model(tmp_path / "c", {}, eps=1e-5, rope_max_seq_len=2048))
    assert named(result, "config") == {"eps": (1e-6, 1e-5), "rope_max_seq_len": (1024, 2048)}
    assert "  config     eps  1e-06 -> 1e-05" in result.lines()
    schemes = dict.fromkeys(LINEARS, "mxfp8")
    quantization_config = {"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": True}
    plain = model(tmp_path / "d", schemes)
    declared = model(tmp_path / "e", schemes, quantization_config=quantization_config)
    assert named(diff(plain, declared), "config") == {
        "quantization_config.quant_method": (None, "mxfp8"),
        "quantization_config.is_checkpoint_mxfp8_serialized": (None, True),
    }


def test_pipelines(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_expert(write_pipeline(tmp_path / name) / "transformer", floats())
    assert diff(tmp_path / "a", tmp_path / "b").same
    tensors = library_tensors()[f"vae/{WEIGHTS}"]
    half = {"quant_conv.bias": ("BF16", tensors["quant_conv.bias"][1])}
    write_weights(tmp_path / "b" / "vae" / WEIGHTS, tensors | half)
    scheduler = PIPELINE["scheduler/scheduler_config.json"] | {"flow_shift": 5.0}
    write_json(tmp_path / "b" / "scheduler" / "scheduler_config.json", scheduler)
    index = json.loads((tmp_path / "b" / "model_index.json").read_text())
    write_json(tmp_path / "b" / "model_index.json", index | {"expand_timesteps": True})
    result = diff(tmp_path / "a", tmp_path / "b")
    by_part = {c.part for c in result.changes}
    assert by_part == {"vae", "scheduler", "model_index.json"}
    assert named(result, "dtype") == {"quant_conv.bias": ("fp32", "bf16")}
    assert named(result, "config")["flow_shift"] == (4.0, 5.0)
    assert named(result, "config")["expand_timesteps"] == (None, True)
    vocabulary = tmp_path / "b" / "tokenizer" / "tokenizer.json"
    vocabulary.write_bytes(vocabulary.read_bytes() + b"\n")
    result = diff(tmp_path / "a", tmp_path / "b")
    (before, after) = named(result, "file")["tokenizer.json"]
    assert before != after and before.startswith("sha256 ")
    assert any(f"tokenizer.json  {before} -> {after}" in line for line in result.lines())
    alone = diff(tmp_path / "a", tmp_path / "a" / "transformer")
    assert {c.name for c in alone.changes} == {"scheduler", "text_encoder", "tokenizer", "vae"}
    assert "  only in A  scheduler, text_encoder, tokenizer, vae   (4)" in alone.lines()


def test_experts_with_the_same_differences_are_listed_together(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        write_expert(tmp_path / "a" / name, floats())
        tensors = quantized(dict.fromkeys(LINEARS, "int8"))
        described = manifest(tensors, dict.fromkeys(LINEARS, "int8"))
        write_expert(tmp_path / "b" / name, tensors, manifest=described)
    result = diff(tmp_path / "a", tmp_path / "b")
    assert result.lines().count("transformer, transformer_2") == 1
    assert len(result.changes) == 2 * 2 * len(LINEARS)


def test_hashes_when_both_have_them(tmp_path: Path) -> None:
    files = {f"transformer/{WEIGHTS}": "aa"}
    for name in ("a", "b"):
        model(tmp_path / name, {})
        write_json(tmp_path / name / "ascendit.json", {"files": files})
    same = diff(tmp_path / "a", tmp_path / "b")
    assert same.same and same.hashes == "same"
    text = "recorded hashes are equal; files not read (see --check and --values)"
    assert f"Values     {text}" in same.lines() and not same.checked
    write_json(tmp_path / "b" / "ascendit.json", {"files": dict.fromkeys(files, "bb")})
    other = diff(tmp_path / "a", tmp_path / "b")
    assert (other.hashes, other.changes, other.same) == ("different", (), False)
    assert other.lines()[-1] == "Result     same headers and configs, different sha256"
    write_json(tmp_path / "b" / "ascendit.json", {"files": {"transformer/other": "aa"}})
    assert diff(tmp_path / "a", tmp_path / "b").hashes == NOT_COMPARED


def test_long_lists_are_cut_on_screen_but_complete_in_json(tmp_path: Path) -> None:
    names = [f"extra_{a}{b}.weight" for a in "abcdefgh" for b in "abcde"]
    for side in (0, 1):
        extra = {name: ("BF16", (n + side,)) for n, name in enumerate(names, 1)}
        write_expert(tmp_path / "ab"[side] / "transformer", floats() | extra, CONFIG)
    result = diff(tmp_path / "a", tmp_path / "b")
    lines = [line for line in result.lines() if "extra_" in line and "Problem" not in line]
    assert len(lines) == 12
    assert any("and 28 more; --json has all" in line for line in result.lines())
    assert len(result.as_dict()["changes"]) == 40


def test_a_real_export_against_its_source() -> None:
    result = diff(
        FIXTURES / "source_models" / "ti2v_d128_l1",
        FIXTURES / "exports/W8A8_MXFP8/ti2v_d128_l1__official_w8a8f8",
    )
    assert named(result, "scheme") == {name: ("bf16", "mxfp8") for name in block_linears({"num_layers": 1})}
    assert set(named(result, "tensor")) == {"blocks.0.attn1.q_rot", "blocks.0.attn1.k_rot"}
    assert kinds(result) == {"scheme", "dtype", "tensor", "attention"}


def test_a_damaged_side_is_still_compared(tmp_path: Path) -> None:
    a = model(tmp_path / "a", {})
    b = model(tmp_path / "b", {})
    tensors = floats()
    del tensors["blocks.0.norm2.bias"]
    write_weights(b / "transformer" / WEIGHTS, tensors)
    result = diff(a, b)
    assert not result.b.ok and not result.same
    assert any(line.startswith("Problem    B  E-CKP-04  ") for line in result.lines())
    assert [(c.kind, c.name, c.b) for c in result.changes] == [("tensor", "blocks.0.norm2.bias", None)]


def test_an_unknown_number_of_heads_is_no_difference(tmp_path: Path) -> None:
    small = CONFIG | {"attention_head_dim": 32}  # a width of 64 has no heads of 128
    write_expert(tmp_path / "a", floats(small), small)
    write_weights(tmp_path / "b.safetensors", {str(to_wan(n)): s for n, s in floats(small).items()})
    result = diff(tmp_path / "a", tmp_path / "b.safetensors")
    assert result.b.experts[0].expert and result.b.experts[0].expert.config_problem
    assert result.same, result.changes


def test_no_torch(tmp_path: Path) -> None:
    folder = model(tmp_path, dict.fromkeys(LINEARS, "mxfp8"))
    code = f"""
import sys
from ascendit.inspect.diff import diff
assert diff({str(folder)!r}, {str(folder)!r}).same
assert not {{"torch", "numpy", "safetensors"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_q.weight", "proj_out.bias"])
def test_wan_names_are_translated(tmp_path: Path, name: str) -> None:
    """A tensor of another dtype is reported by its Diffusers name; the files have original names."""
    config = {"_class_name": "WanModel", "dim": 128, "num_heads": 2, "num_layers": 4}
    for folder, dtype in (("a", "BF16"), ("b", "F32")):
        write_json(tmp_path / folder / "config.json", config)
        stored = floats() | {name: (dtype, floats()[name][1])}
        write_weights(tmp_path / folder / WEIGHTS, {str(to_wan(n)): s for n, s in stored.items()})
    result = diff(tmp_path / "a", tmp_path / "b")
    [change] = result.changes
    assert (change.name.removesuffix(".weight"), change.a, change.b) == (
        name.removesuffix(".weight"),
        "bf16",
        "fp32",
    )
