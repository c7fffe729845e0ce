"""Engines and chips: which load a folder unchanged, after a repack, or not at all. Made of headers alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pipeline.headers import (
    CONFIG,
    Stored,
    floats,
    manifest,
    quantized,
    write_expert,
    write_export,
    write_json,
    write_pipeline,
)

from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.errors import UsageError
from ascendit.inspect.checkpoint import inspect
from ascendit.inspect.engines import Compatibility, RunsOn, runs_on
from ascendit.inspect.transformer_report import ExpertSummary
from ascendit.names import block_linears
from ascendit.quant.engines import ENGINES
from ascendit.report import json_data

LINEARS = block_linears(CONFIG)


def compatibility(path: Path) -> RunsOn:
    report = inspect(path)
    assert report.ok, report.problems
    assert report.runs_on is not None
    assert [e.engine for e in report.runs_on.engines] == list(ENGINES)
    assert [e.version for e in report.runs_on.engines] == [e.version for e in ENGINES.values()]
    return report.runs_on


def by_engine(runs: RunsOn) -> dict[str, str]:
    return {e.engine: e.verdict for e in runs.engines}


def verdicts(path: Path) -> dict[str, str]:
    return by_engine(compatibility(path))


def engine(path: Path, name: str) -> Compatibility:
    return next(e for e in compatibility(path).engines if e.engine == name)


def pipeline(
    root: Path,
    scheme: str,
    *,
    with_config: bool = True,
    with_manifest: bool = True,
    packing: str = "packed",
    smoothed: tuple[str, ...] = (),
) -> Path:
    """A pipeline folder whose block linears all have one scheme."""
    layers = dict.fromkeys(LINEARS, scheme)
    tensors = quantized(layers, packing=packing, smoothed=smoothed)
    config = dict(CONFIG)
    if with_config:
        key = "is_checkpoint_serialized" if "dual" in scheme else f"is_checkpoint_{scheme}_serialized"
        config["quantization_config"] = {"quant_method": scheme, key: True, "ignored_layers": []}
    files = {"manifest": manifest(tensors, layers)} if with_manifest else {}
    write_expert(write_pipeline(root) / "transformer", tensors, config, **files)
    return root


def test_a_float_pipeline(tmp_path: Path) -> None:
    write_expert(write_pipeline(tmp_path) / "transformer", floats())
    runs = compatibility(tmp_path)
    assert {e.engine: e.verdict for e in runs.engines} == {
        "vllm-omni": "runs",
        "sglang": "runs",
        "mindie": "no",
    }
    assert runs.chips == {"a2": "native", "a3": "native", "a5": "native"}
    assert runs.lines()[-1].split(maxsplit=1) == ["chips", "native on a2, a3, a5"]


def test_one_mxfp8_folder_runs_on_two_engines(tmp_path: Path) -> None:
    runs = compatibility(pipeline(tmp_path, "mxfp8"))
    assert by_engine(runs) == {"vllm-omni": "runs", "sglang": "runs", "mindie": "repack"}
    mindie = next(e for e in runs.engines if e.engine == "mindie")
    assert mindie.command == f"ascendit repack {tmp_path} -o DST --for mindie"
    assert mindie.reason == "needs original Wan names"
    assert mindie.text() == "after repack --for mindie   (needs original Wan names)"
    assert runs.chips == {"a2": "emulated", "a3": "emulated", "a5": "native"}
    assert json_data(runs)["engines"][0]["verdict"] == "runs"


def test_quantization_config_and_manifest_are_needed(tmp_path: Path) -> None:
    unmarked = pipeline(tmp_path / "a", "mxfp8", with_config=False)
    assert engine(unmarked, "vllm-omni").reason == "needs its own quantization_config in config.json"
    assert engine(unmarked, "sglang").verdict == "runs"
    undescribed = pipeline(tmp_path / "b", "mxfp8", with_manifest=False)
    assert engine(undescribed, "vllm-omni").verdict == "runs"
    assert engine(undescribed, "sglang").reason == "needs quant_model_description.json"


def test_fp4_packed_and_unpacked(tmp_path: Path) -> None:
    packed = pipeline(tmp_path / "a", "mxfp4")
    assert verdicts(packed) == {"vllm-omni": "repack", "sglang": "runs", "mindie": "repack"}
    assert engine(packed, "vllm-omni").reason == "needs FP4 unpacked to FP8"
    for packing in ("F8_E4M3", "BF16"):
        unpacked = pipeline(tmp_path / packing, "mxfp4", packing=packing)
        assert verdicts(unpacked) == {"vllm-omni": "runs", "sglang": "repack", "mindie": "repack"}
        assert engine(unpacked, "sglang").reason == "needs FP4 packed two per byte"


def test_int8_offsets(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, "int8")
    assert engine(folder, "vllm-omni").reason == "needs int8 without weight_offset"
    assert engine(folder, "sglang").verdict == "runs"
    assert compatibility(folder).chips == {"a2": "native", "a3": "native", "a5": "native"}


def test_chips_with_quantized_attention(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, "int8")
    file = folder / "transformer/quant_model_description.json"
    types = json.loads(file.read_text())
    for value, support in (("FP8_DYNAMIC", "native"), ("INT8_DYNAMIC", "emulated")):
        file.write_text(json.dumps(types | {"blocks.0.attn1.quant_type": value}))
        assert compatibility(folder).chips == {"a2": "emulated", "a3": "emulated", "a5": support}


def test_dual_scale(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, "mxfp4_dualscale", packing="F8_E4M3")
    assert engine(folder, "vllm-omni").reason == "needs a mul_scale in every mxfp4_dualscale layer"
    sglang = engine(folder, "sglang")
    assert sglang.verdict == "no" and sglang.reason == ENGINES["sglang"].refuses["mxfp4_dualscale"]
    assert sglang.command == "" and sglang.text().startswith("no: ")


def export(tmp_path: Path, scheme: str = "mxfp4", smoothed: tuple[str, ...] = ()) -> tuple[Path, Stored]:
    layers = dict.fromkeys(LINEARS, scheme)
    tensors = quantized(layers, smoothed=smoothed)
    return write_export(tmp_path, tensors, manifest(tensors, layers)), tensors


@pytest.mark.skipif(os.name != "posix", reason="file permissions")
def test_an_export_runs_in_mindie_unchanged(tmp_path: Path) -> None:
    folder, _ = export(tmp_path / "a")
    assert verdicts(folder) == {"vllm-omni": "repack", "sglang": "repack", "mindie": "runs"}
    assert engine(folder, "sglang").command == f"ascendit repack {folder} -o DST --for sglang --base MODEL"
    smoothed, _ = export(tmp_path / "b", smoothed=LINEARS[:3])
    assert engine(smoothed, "mindie").verdict == "runs"


@pytest.mark.skipif(os.name != "posix", reason="file permissions")
def test_files_that_mindie_refuses(tmp_path: Path) -> None:
    folder, _ = export(tmp_path / "a")
    [weights] = folder.glob("*.safetensors")
    weights.chmod(0o644)
    assert "others can read" in engine(folder, "mindie").reason
    weights.chmod(0o640)
    moved = weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(moved)
    assert "links" in engine(folder, "mindie").reason
    weights.unlink()
    moved.rename(folder / "quant_model_weight_other.safetensors")
    assert "one file quant_model_weight_w4a4_mxfp4.safetensors" in engine(folder, "mindie").reason


def test_a_second_name_in_the_manifest_of_smoothed_layers(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, "mxfp4", smoothed=LINEARS)
    assert engine(folder, "sglang").reason == "needs <layer>.div.mul_scale in the manifest"
    file = folder / "transformer" / "quant_model_description.json"
    names = json.loads(file.read_text())
    write_json(file, names | {f"{layer}.div.mul_scale": "FLOAT" for layer in LINEARS})
    assert engine(folder, "sglang").verdict == "runs"


def test_reasons_come_from_the_table(tmp_path: Path) -> None:
    layers = {name: "mxfp8" if "ffn" in name else "int8" for name in LINEARS}
    tensors = quantized(layers)
    write_expert(write_pipeline(tmp_path) / "transformer", tensors, manifest=manifest(tensors, layers))
    assert engine(tmp_path, "vllm-omni").reason == ENGINES["vllm-omni"].refuses["mixed"]
    partial = {name: "mxfp8" for name in LINEARS if not name.startswith("blocks.0.")}
    tensors = quantized(partial)
    write_expert(tmp_path / "transformer", tensors, manifest=manifest(tensors, partial))
    assert engine(tmp_path, "sglang").reason == ENGINES["sglang"].refuses["float_block_linears"]


def test_tiled_fp8_is_judged_as_bf16(tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    layers = dict.fromkeys(LINEARS, "fp8_128x128")
    write_expert(write_pipeline(tmp_path) / "transformer", quantized(layers), config)
    runs = compatibility(tmp_path)
    assert {e.engine: e.verdict for e in runs.engines} == {
        "vllm-omni": "repack",
        "sglang": "repack",
        "mindie": "no",
    }
    assert runs.engines[0].reason == "FP8 in 128 x 128 tiles becomes BF16"
    assert runs.chips["a2"] == "emulated"


def test_one_expert_decides_for_both(tmp_path: Path) -> None:
    write_pipeline(tmp_path, experts=2)
    for name, scheme in (("transformer", "mxfp8"), ("transformer_2", "mxfp4_dualscale")):
        layers = dict.fromkeys(LINEARS, scheme)
        tensors = quantized(layers)
        write_expert(tmp_path / name, tensors, manifest=manifest(tensors, layers))
    assert verdicts(tmp_path)["sglang"] == "no"


def test_damaged_models_are_not_judged(tmp_path: Path) -> None:
    write_expert(tmp_path, floats())
    write_json(tmp_path / "config.json", CONFIG | {"num_layers": 5})
    report = inspect(tmp_path)
    assert not report.ok and report.runs_on is None
    assert not any(line.startswith("Runs on") for line in report.lines())


@pytest.mark.parametrize("engine_name", ENGINES)
@pytest.mark.parametrize("scheme", ["int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale"])
def test_quantize_for_an_engine_agrees_with_this_table(tmp_path: Path, engine_name: str, scheme: str) -> None:
    """Folders that `quantize --for` writes run on the engine; refused schemes have the verdict "no"."""
    from convert.models import write_model

    from ascendit.convert.quantize import quantize

    source = write_model(tmp_path / "source", experts=1, ffn_dim=128)
    quantize(source, tmp_path / "ours", scheme=scheme)
    ours = runs_on_of(tmp_path / "ours", engine_name)
    try:
        quantize(source, tmp_path / "theirs", scheme=scheme, engine=engine_name)
    except UsageError as e:
        assert e.code == "E-ENG-01" and ours.verdict == "no"
        assert ours.reason in e.got
    else:
        assert ours.verdict != "no"
        assert runs_on_of(tmp_path / "theirs", engine_name).verdict == "runs"


def runs_on_of(path: Path, name: str) -> Compatibility:
    """The verdict on a folder whose other parts are placeholders."""
    layout = recognise(path)
    runs = runs_on(layout, [ExpertSummary(read_expert(part)) for part in layout.experts])
    return next(e for e in runs.engines if e.engine == name)
