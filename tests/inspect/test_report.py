"""The report on quantized transformers in every layout: checkpoints of headers, and real exports."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pipeline.headers import (
    CONFIG,
    WEIGHTS,
    floats,
    manifest,
    quantized,
    write_expert,
    write_export,
    write_json,
    write_pipeline,
    write_weights,
)

from ascendit.inspect.checkpoint import inspect
from ascendit.inspect.report import ModelReport
from ascendit.names import block_linears, to_wan

EXPORTS = Path(__file__).resolve().parents[1] / "fixtures" / "msmodelslim" / "exports"
LINEARS = block_linears(CONFIG)
SHAPES = {
    name.removesuffix(".weight"): shape for name, (_, shape) in floats().items() if name.endswith("weight")
}


def only(report: ModelReport) -> Any:
    """The summary of the only expert of a complete checkpoint."""
    assert report.ok, report.problems
    [part] = report.experts
    assert part.summary is not None
    json.dumps(report.as_dict(layers=True))
    return part.summary


def row(report: ModelReport, title: str) -> list[str]:
    """The lines under one title."""
    sections: dict[str, list[str]] = {}
    current = ""
    for line in report.lines():
        current = line[:9].strip() or current
        sections.setdefault(current, []).append(line[11:])
    return sections.get(title, [])


# Bits of a [N, K] weight with its scales; K = 128 in `to_q`.
BITS = {
    "int8": 8 + 2 * 32 / 128,
    "fp8": 8 + 32 / 128,
    "mxfp8": 8 + 8 / 32,
    "mxfp4": 4 + 8 / 32,
    "mxfp4_dualscale": 4 + 8 / 32 + 32 / 128,
}


@pytest.mark.parametrize("scheme", BITS)
def test_each_scheme_in_a_canonical_folder(tmp_path: Path, scheme: str) -> None:
    layers = {name: scheme for name in LINEARS if name.endswith(".to_q")}
    tensors = quantized(layers)
    write_expert(tmp_path / "transformer", tensors, manifest=manifest(tensors, layers))
    report = inspect(tmp_path)
    assert report.layout.kind == "transformers-only"
    summary = only(report)
    [count] = summary.schemes
    assert (count.scheme, count.layers) == (scheme, len(layers))
    assert count.values == sum(SHAPES[n][0] * SHAPES[n][1] for n in layers)
    assert count.bits == pytest.approx(BITS[scheme])
    assert summary.values == sum(_product(shape) for _, shape in floats().values())
    text = row(report, "Format")[0]
    assert text.startswith(f"{scheme}   8 layers   ") and f"{BITS[scheme]:.2f} bits" in text
    assert {"int8": "W8A8_DYNAMIC", "mxfp4_dualscale": "W4A4_MXFP4_DUALSCALE"}.get(
        scheme, "(manifest: "
    ) in text
    assert row(report, "Checks")[1] == "not a complete pipeline: repack with --base MODEL to run it"


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def test_a_mixed_recipe_and_its_excluded_layers(tmp_path: Path) -> None:
    layers = {n: "mxfp8" if n.startswith("blocks.1.") else "mxfp4" for n in LINEARS if n[7] in "123"}
    del layers["blocks.3.attn2.to_out.0"]
    tensors = quantized(layers)
    write_expert(tmp_path / "transformer", tensors, manifest=manifest(tensors, layers))
    report = inspect(tmp_path)
    counts = {c.scheme: c.layers for c in only(report).schemes}
    assert counts == {"mxfp4": 19, "mxfp8": 10}
    assert row(report, "Excluded") == [
        "bf16: patch_embedding, condition_embedder.*, blocks.0, blocks.3.attn2.to_out.0, proj_out"
    ]
    assert len(row(report, "Format")) == 3
    data = report.as_dict()["parts"][0]["expert"]
    assert data["kept_layers"] == 1 + 5 + 10 + 1 + 1
    assert [s["manifest"] for s in data["schemes"]] == ["W4A4_MXFP4", "W8A8_MXFP8"]


@pytest.mark.parametrize(
    ("packing", "bits", "text"),
    [("packed", 4.25, "packed two per byte"), ("F8_E4M3", 8.25, "unpacked to FP8"), ("BF16", 16.25, "BF16")],
)
def test_fp4_is_counted_with_its_stored_bits(tmp_path: Path, packing: str, bits: float, text: str) -> None:
    layers = dict.fromkeys(LINEARS, "mxfp4")
    tensors = quantized(layers, packing=packing)
    write_expert(tmp_path / "transformer", tensors, manifest=manifest(tensors, layers))
    report = inspect(tmp_path)
    [count] = only(report).schemes
    assert count.bits == pytest.approx(bits)
    assert text in row(report, "Format")[0] and f"{bits:.2f} bits" in row(report, "Format")[0]
    [shape] = {r.shape for r in report.experts[0].rows if r.name == "blocks.0.ffn.net.2"}
    assert shape == (128, 256)


def test_smoothed_rotated_and_attention(tmp_path: Path) -> None:
    layers = {n: "mxfp4" for n in LINEARS if n != "blocks.0.ffn.net.2"}
    smooth = ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v", "blocks.0.ffn.net.2"]
    tensors = quantized(layers, smoothed=smooth)
    for n in (1, 2, 3):
        tensors |= {f"blocks.{n}.attn1.{x}_rot": ("BF16", (64, 64)) for x in "qk"}
    attention = {f"blocks.{n}.attn1.quant_type": "FP8_DYNAMIC" for n in (1, 2, 3)}
    write_expert(tmp_path / "transformer", tensors, manifest=manifest(tensors, layers, attention))
    report = inspect(tmp_path)
    summary = only(report)
    assert summary.attention == {"FP8_DYNAMIC": ("blocks.1-3.attn1",)}
    assert row(report, "Attention") == [
        "fp8: blocks.1-3.attn1   (manifest: FP8_DYNAMIC)",
        "rotated: blocks.1-3.attn1",
    ]
    assert "blocks.0.ffn.net.2" in row(report, "Smoothed")[0]
    assert [c.scheme for c in summary.schemes] == ["mxfp4", "bf16"]
    assert "W*s" in row(report, "Format")[1]
    assert "blocks.0.ffn.net.2" in row(report, "Excluded")[0]
    assert summary.values == sum(_product(shape) for _, shape in floats().values())


def test_fp8_in_tiles(tmp_path: Path) -> None:
    layers = dict.fromkeys(LINEARS, "fp8_128x128")
    quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = CONFIG | {"quantization_config": quantization_config}
    write_expert(tmp_path / "transformer", quantized(layers), config)
    report = inspect(tmp_path)
    [count] = only(report).schemes
    assert (count.scheme, count.manifest) == ("fp8_128x128", None)
    assert count.bits == pytest.approx(8 + 32 / 128**2, rel=1e-2)
    assert row(report, "Origin") == ["FP8 in 128 x 128 tiles, Diffusers names, quantization_config"]
    assert report.as_dict()["parts"][0]["expert"]["marker"] == quantization_config


def test_one_row_for_a_quantized_layer(tmp_path: Path) -> None:
    layers = {"blocks.2.attn1.to_q": "int8"}
    tensors = quantized(layers, smoothed=layers)
    write_expert(tmp_path / "transformer", tensors, manifest=manifest(tensors, layers))
    report = inspect(tmp_path)
    lines = report.layer_lines()
    [line] = [line for line in lines if ".blocks.2.attn1.to_q" in line]
    assert line.split() == [
        *("transformer.blocks.2.attn1.to_q", "int8", "[128,", "128]", str(128 * (128 + 4 + 4 + 4 + 4))),
        *("int8,", "weight_scale", "fp32", "[128,", "1],", "weight_offset", "fp32", "[128,", "1],"),
        *("mul_scale", "fp32", "[128],", "bias", "fp32", "[128]"),
    ]
    assert len(lines) == 1 + len(floats()) - 1  # weight and bias in one row
    rows = report.as_dict(layers=True)["layers"]
    [layer] = [r for r in rows if r["name"] == "blocks.2.attn1.to_q"]
    assert [t["role"] for t in layer["tensors"]] == [
        "weight",
        "weight_scale",
        "weight_offset",
        "mul_scale",
        "bias",
    ]
    assert sum(r["nbytes"] for r in rows) == report.experts[0].nbytes
    assert "layers" not in report.as_dict()


def test_experts_with_different_schemes(tmp_path: Path) -> None:
    write_pipeline(tmp_path, experts=2)
    for name, scheme in (("transformer", "mxfp8"), ("transformer_2", "mxfp4")):
        layers = dict.fromkeys(LINEARS, scheme)
        tensors = quantized(layers)
        write_expert(tmp_path / name, tensors, manifest=manifest(tensors, layers))
    write_json(tmp_path / "ascendit.json", {"made_by": "ascendit 9 quantize", "recipe": {"name": "mine"}})
    report = inspect(tmp_path)
    assert report.ok and report.is_pipeline
    texts = row(report, "Format")
    assert texts[0].startswith("transformer: mxfp8 ") and texts[1].startswith("transformer_2: mxfp4 ")
    assert len(row(report, "Excluded")) == 1  # the same in both, listed once
    assert row(report, "Made by") == ["ascendit 9 quantize, recipe mine"]
    assert [p.expert.origin for p in report.experts if p.expert] == ["ascendit", "ascendit"]
    assert report.as_dict()["ascendit"]["recipe"] == {"name": "mine"}
    assert len(row(report, "Checks")) == 1


def test_a_single_file_a_standalone_transformer_and_the_original_layout(tmp_path: Path) -> None:
    named = {to_wan(name): stored for name, stored in floats().items()}
    assert None not in named
    write_weights(
        tmp_path / "one" / "model.safetensors", {f"model.diffusion_model.{n}": t for n, t in named.items()}
    )
    write_expert(tmp_path / "alone", floats())
    wan = {"_class_name": "WanModel", "dim": 128, "num_heads": 2, "num_layers": 4}
    write_json(tmp_path / "wan" / "config.json", wan)
    write_weights(tmp_path / "wan" / WEIGHTS, {str(n): t for n, t in named.items()})
    reports = [inspect(tmp_path / path) for path in ("one/model.safetensors", "alone", "wan")]
    assert [r.layout.kind for r in reports] == ["file", "transformer", "wan"]
    for report in reports:
        summary = only(report)
        assert (summary.schemes, report.bits_per_weight) == ((), 16)
        assert summary.values == reports[0].experts[0].values
        assert {r.name for r in report.experts[0].rows} == set(floats())
        assert row(report, "Limits") == [] and report.limits == {}
        assert report.as_dict()["pipeline"] is None
    assert row(reports[2], "Origin") == ["original Wan names"]


def test_the_model_is_recognised_by_shape_alone(tmp_path: Path) -> None:
    config = CONFIG | {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 30}
    config |= {"in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "text_dim": 4096, "freq_dim": 256}
    write_expert(tmp_path, floats(config), config)
    assert inspect(tmp_path).spec == "Wan2.2-TI2V-5B"


@pytest.mark.parametrize(
    ("path", "schemes", "excluded"),
    [
        ("W8A8_MXFP8/ti2v_d128_l1__official_w8a8f8", {"mxfp8": 10}, 7),
        ("W4A4_MXFP4/ti2v_d128_l1__minmax", {"mxfp4": 10}, 7),
        ("W8A8_DYNAMIC/ti2v_d128_l1__int8_part_file_size1", {"int8": 10}, 7),
        ("W8A8_DYNAMIC/t2v_d64_l6__legacy_calibrator", {"int8": 65}, 2),
        ("W4A4_MXFP4_DUALSCALE/t2v_d64_l6__dualscale_bf16fallback", {"mxfp4_dualscale": 49}, 18),
        (
            "W4A4_MXFP4_DUALSCALE/t2v_d64_l6__dualscale_smooth_bf16fallback",
            {"mxfp4_dualscale": 49, "bf16": 11},
            18,
        ),
    ],
)
def test_real_exports(path: str, schemes: dict[str, int], excluded: int) -> None:
    report = inspect(EXPORTS / path)
    assert report.ok, report.problems
    assert report.layout.kind == "msmodelslim"
    for part in report.experts:
        assert part.summary is not None and part.expert is not None
        assert {c.scheme: c.layers for c in part.summary.schemes} == schemes
        assert len(part.summary.kept_layers) == excluded
        assert (part.expert.origin, part.expert.naming) == ("msmodelslim", "wan")
    assert row(report, "Origin")[0] == "msModelSlim, original Wan names, manifest"
    if "t2v" in path.split("/")[1][:3]:
        assert "the number of attention heads is unknown" in row(report, "Origin")[1]


def test_a_damaged_export_names_missing_tensors(tmp_path: Path) -> None:
    layers = dict.fromkeys(LINEARS, "mxfp8")
    tensors = quantized(layers)
    del tensors["blocks.1.norm2.bias"]
    report = inspect(write_export(tmp_path / "export", tensors, manifest(tensors, layers)))
    assert not report.ok and report.runs_on is None
    [part] = report.experts
    assert part.missing == ("blocks.1.norm3.bias",)  # the name in the files
    assert "E-CKP-04" in row(report, "Problem")[0]
    assert row(report, "Problem")[1] == f"try  {report.problems[0].fix}"


def test_a_process_imports_no_torch_and_is_fast(tmp_path: Path) -> None:
    """Two experts of a 14B model, quantized, 15.5 GiB each, as headers."""
    big = {"_class_name": "WanTransformer3DModel"}
    layers = {n: "mxfp8" for n in block_linears(big) if int(n.split(".")[1]) >= 5}
    tensors = quantized(layers, big)
    for name in ("transformer", "transformer_2"):
        try:
            write_expert(tmp_path / name, tensors, big, manifest=manifest(tensors, layers))
        except OSError:
            pytest.skip("no sparse files here")
    code = f"""
import sys
from ascendit.cli.main import main
assert main(["inspect", {str(tmp_path)!r}]) == 0
assert not {{"torch", "numpy", "safetensors", "diffusers"}} & set(sys.modules)
"""
    best = 10.0
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        best = min(best, time.perf_counter() - start)
    assert "350 layers" in done.stdout and "blocks.0-4" in done.stdout
    assert best < 2.0, f"{best:.2f} s"  # 0.25 s on an idle core; test machines are slower


def test_write_export_matches_a_real_export(tmp_path: Path) -> None:
    """The exports made for these tests have the names that msModelSlim writes."""
    real = EXPORTS / "W4A4_MXFP4_DUALSCALE/t2v_d64_l6__dualscale_smooth_bf16fallback/high_noise_model"
    [file] = real.glob("*.json") if len(list(real.glob("*.json"))) == 1 else real.glob("quant_model_d*.json")
    described = json.loads(file.read_text())
    layers = {"blocks.1.ffn.net.0.proj": "mxfp4_dualscale"}
    tensors = quantized(layers, smoothed=layers)
    folder = write_export(tmp_path, tensors, manifest(tensors, layers))
    [mine] = folder.glob("quant_model_d*.json")
    names = [n for n in json.loads(mine.read_text()) if n.startswith("blocks.1.ffn.0")]
    assert sorted(names) == sorted(n for n in described if n.startswith("blocks.1.ffn.0"))
    assert mine.name == file.name
