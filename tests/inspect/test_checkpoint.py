"""Folders of zeros made without torch, folders written by Diffusers, and damaged copies of them."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from pipeline.headers import (
    CLASSES,
    CONFIG,
    WEIGHTS,
    floats,
    library_tensors,
    write_expert,
    write_json,
    write_pipeline,
    write_weights,
)

from ascendit.errors import CheckpointError, UsageError
from ascendit.inspect.checkpoint import inspect
from ascendit.inspect.report import ModelReport
from ascendit.names import expected_tensors
from ascendit.report import human_bytes

DEMO: dict[str, Any] = {  # the shape of the row `ascendit-demo`
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "num_layers": 8,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 64,
    "freq_dim": 256,
    "ffn_dim": 16,
    "patch_size": [1, 2, 2],
}


def expert_tensors() -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        name: ("F32" if "norm" in name or "scale_shift" in name else "BF16", shape)
        for name, shape in expected_tensors(DEMO).items()
    }


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo's shape without its weights."""
    root = write_pipeline(tmp_path / "demo", experts=2, config=DEMO)
    for expert in ("transformer", "transformer_2"):
        write_expert(root / expert, expert_tensors(), DEMO)
    return root


def broken(root: Path, code: str, *texts: str) -> ModelReport:
    """The report on a folder with exactly one problem."""
    report = inspect(root)
    assert not report.ok
    assert [p.code for p in report.problems] == [code], [str(p) for p in report.problems]
    assert "NOT OK" in "\n".join(report.lines())
    [line] = [line for line in report.lines() if line.startswith(f"Problem    {code}  ")]
    assert all(text in line for text in texts), line
    json.dumps(report.as_dict())
    return report


def test_a_complete_folder(demo: Path) -> None:
    report = inspect(demo)
    assert report.ok
    assert report.spec == "ascendit-demo"
    parts = {p.name: p for p in report.parts}
    assert list(parts) == list(CLASSES)
    tensors = expert_tensors()
    expert = parts["transformer"]
    assert (expert.class_name, expert.files) == ("WanTransformer3DModel", 1)
    assert {t.name for t in expert.tensors} == set(tensors)
    values = {d: sum(math.prod(s) for dt, s in tensors.values() if dt == d) for d in ("BF16", "F32")}
    assert expert.dtypes == {"BF16": 2 * values["BF16"], "F32": 4 * values["F32"]}
    assert expert.values == sum(values.values())
    assert parts["tokenizer"].tensors == ()
    assert report.bits_per_weight == pytest.approx(8 * expert.nbytes / expert.values)
    assert report.bits_per_weight and 16 < report.bits_per_weight < 32
    assert report.limits == {
        "task": "t2v",
        "frame_stride": 4,
        "num_frames": 17,
        "size_multiple": 16,
        "sizes": ["64x64"],
        "fps": 8,
        "num_inference_steps": 16,
        "flow_shift": 4.0,
        "solver": "unipc",
        "guidance_scale": 2.0,
        "guidance_scale_2": 1.5,
        "boundary_ratio": 0.875,
        "max_sequence_length": 512,
        "negative_prompt": "",
        "difference": "",
        "presets": (),
    }


def test_the_screen(demo: Path) -> None:
    report = inspect(demo)
    lines = report.lines()
    titles = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert titles == "Model Source Matches Parts Format Runs Limits Defaults Checks".split()
    text = "\n".join(lines)
    count = len(expert_tensors())
    others = sum(map(len, library_tensors(DEMO).values()))
    for part in (
        "demo   layout diffusers   WanPipeline",
        "ascendit-demo of the Wan family",
        f"{count} tensors in 1 file",
        "bf16+fp32",
        "bits/weight",
        "frames 4n+1, size multiple of 16",
        "64x64, 17 frames, 8 fps, 16 steps, guidance 2 (high noise) / 1.5 (low noise)",
        "shift 4, unipc, boundary 0.875",
        f"{2 * count + others} tensors in 4 files, 0 missing, 0 unexpected, 0 misshapen, 0 mistyped   ok",
    ):
        assert part in text
    layers = report.layer_lines()
    assert len(layers) == 1 + 2 * count + others
    assert layers[0].split() == ["layer", "or", "tensor", "scheme", "shape", "bytes", "stored"]
    [line] = [x for x in layers if x.startswith("transformer_2.blocks.7.ffn.net.2.weight ")]
    assert line.split()[1:] == ["float", "[192,", "16]", str(192 * 16 * 2), "bf16"]


def test_json_is_plain_data(demo: Path) -> None:
    data = json.loads(json.dumps(inspect(demo).as_dict()))
    assert (data["name"], data["ok"], data["kind"], data["spec"]) == (
        "demo",
        True,
        "diffusers",
        "ascendit-demo",
    )
    [vae] = [p for p in data["parts"] if p["name"] == "vae"]
    tensors = library_tensors(DEMO)[f"vae/{WEIGHTS}"]
    size = 4 * sum(math.prod(shape) for _, shape in tensors.values())
    expected = (size, len(tensors), {"F32": size}, None)
    assert (vae["nbytes"], vae["tensors"], vae["dtypes"], vae["problem"]) == expected


def test_no_torch_and_no_tensor_bytes(demo: Path) -> None:
    """No torch and no library that could decode a tensor is imported, and no data are read."""
    code = f"""
import os, sys
from ascendit.inspect.checkpoint import inspect
os.preadv = None
assert inspect({str(demo)!r}).ok
heavy = {{"torch", "diffusers", "transformers", "numpy", "safetensors"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_headers_of_a_large_model_are_read(demo: Path) -> None:
    """Two experts of 26.6 GiB each, sparse on disk: reading them would be slow."""
    big = {**DEMO, "num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40, "ffn_dim": 13824}
    big |= {"in_channels": 16, "out_channels": 16, "text_dim": 4096}
    write_pipeline(demo, experts=2, config=big)
    for expert in ("transformer", "transformer_2"):
        write_json(demo / expert / "config.json", big)
        try:
            write_weights(
                demo / expert / WEIGHTS, {n: ("BF16", shape) for n, shape in expected_tensors(big).items()}
            )
        except OSError:
            pytest.skip("no sparse files here")
    report = inspect(demo)
    assert report.ok
    assert report.spec == "Wan2.2-T2V-A14B"
    assert report.bits_per_weight == 16
    [expert_report] = [p for p in report.parts if p.name == "transformer_2"]
    assert expert_report.values == 14_288_491_584  # equals `sum(p.numel())` of Diffusers' model
    assert human_bytes(expert_report.nbytes) == "26.6 GiB"
    text = "\n".join(report.lines())
    assert "81 frames, 16 fps, 40 steps, guidance 4 (high noise) / 3 (low noise), shift 12" in text
    assert "sizes 1280x720 720x1280 832x480 480x832" in text


def change_weights(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors: dict[str, Any] = expert_tensors()
    change(tensors)
    write_weights(root / "transformer_2" / WEIGHTS, tensors)


LAYER, NORM = "blocks.3.ffn.net.0.proj.weight", "blocks.3.attn1.norm_q.weight"


def test_a_missing_tensor(demo: Path) -> None:
    change_weights(demo, lambda t: t.pop(LAYER))
    report = broken(demo, "E-CKP-04", "transformer_2", "1 missing", LAYER)
    assert [p.missing for p in report.parts if p.name == "transformer_2"] == [(LAYER,)]
    assert [p.missing for p in report.parts if p.name == "transformer"] == [()]
    assert any("transformer_2" in line and "DAMAGED" in line for line in report.lines())


def test_a_missing_block(demo: Path) -> None:
    write_json(demo / "transformer_2" / "config.json", {**DEMO, "num_layers": 9})
    report = broken(demo, "E-CKP-04", "27 missing", "blocks.8.attn1.norm_k.weight", "and 22 more")
    assert report.defaults is not None


def test_an_unexpected_tensor(demo: Path) -> None:
    change_weights(demo, lambda t: t.update({"blocks.9.x": ("BF16", (2,))}))
    broken(demo, "E-CKP-04", "1 unexpected (blocks.9.x)")


def test_a_misshapen_tensor(demo: Path) -> None:
    change_weights(demo, lambda t: t.update({LAYER: ("BF16", (16, 191))}))
    broken(demo, "E-CKP-04", f"1 misshapen ({LAYER} [16, 191], not [16, 192])")


def test_a_mistyped_tensor(demo: Path) -> None:
    change_weights(demo, lambda t: t.update({NORM: ("I64", (192,))}))
    report = broken(demo, "E-CKP-04", f"1 mistyped ({NORM} I64)")
    assert [p.mistyped for p in report.parts if p.name == "transformer_2"] == [(f"{NORM} I64",)]


def test_quantized_weights_without_a_scale(demo: Path) -> None:
    change_weights(demo, lambda t: t.update({LAYER: ("I8", (16, 192))}))
    broken(demo, "E-CKP-08", f"{LAYER} (I8) has no scale")


def test_a_weight_with_a_dtype_of_no_scheme(demo: Path) -> None:
    change_weights(demo, lambda t: t.update({LAYER: ("I64", (16, 192))}))
    broken(demo, "E-CKP-04", f"1 mistyped ({LAYER} I64)")


def test_a_tensor_that_diffusers_ignores_is_accepted(demo: Path) -> None:
    change_weights(demo, lambda t: t.update({"blocks.0.attn2.norm_added_q.weight": ("BF16", (192,))}))
    assert inspect(demo).ok


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_without_weights(demo: Path, part: str) -> None:
    next((demo / part).glob("*.safetensors")).unlink()
    broken(demo, "E-CKP-02", f"in {demo / part}")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_missing_from_the_model_index(demo: Path, part: str) -> None:
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875, **CLASSES, part: [None, None]}
    write_json(demo / "model_index.json", index)
    report = broken(demo, "E-CKP-02", f"has no {part}")
    assert (report.defaults is None) == (part == "vae")


def test_image_tokens_need_an_image_encoder(tiny_i2v_21: Path, tmp_path: Path) -> None:
    assert inspect(tiny_i2v_21).ok
    copy = shutil.copytree(tiny_i2v_21, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    write_json(copy / "model_index.json", index | {"image_encoder": [None, None]})
    broken(copy, "E-CKP-02", "has no image_encoder")


@pytest.mark.parametrize(
    ("file", "changes", "code"),
    [
        ("transformer_2/config.json", {"num_layers": "eight"}, "E-CKP-06"),
        ("vae/config.json", {"scale_factor_spatial": "x"}, "E-CKP-06"),
        ("vae/config.json", {"scale_factor_spatial": []}, "E-CKP-06"),
    ],
)
def test_a_config_with_invalid_values(demo: Path, file: str, changes: dict[str, object], code: str) -> None:
    write_json(demo / file, json.loads((demo / file).read_text()) | changes)
    broken(demo, code)


def test_folders_that_are_not_recognised_raise(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        inspect(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no model recognised"):
        inspect(demo / "text_encoder")


@pytest.mark.parametrize("build", sorted(tiny.BUILDERS))
def test_folders_written_by_diffusers_are_complete(tiny_folder: Callable[[str], Path], build: str) -> None:
    report = inspect(tiny_folder(build))
    assert report.ok, report.problems
    assert report.bits_per_weight == 32
    assert report.spec is None
    assert "no known model of the Wan family" in "\n".join(report.lines())


DAMAGES = {
    "truncate_shard": ("E-CKP-02", "truncated"),
    "not_safetensors": ("E-CKP-02", "a web page, not weights"),
    "no_weights": ("E-CKP-02", "no diffusion_pytorch_model.safetensors"),
    "drop_tensor": ("E-CKP-04", "1 missing"),
    "extra_tensor": ("E-CKP-04", "1 unexpected"),
    "wrong_shape": ("E-CKP-04", "1 misshapen"),
    "wrong_dtype": ("E-CKP-04", "1 mistyped"),
    "index_missing_file": ("E-CKP-03", "00009-of-00003"),
    "index_outside": ("E-CKP-03", "outside"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_copies(tiny_t2v_cascade: Path, tmp_path: Path, damage: str) -> None:
    folder = tiny.damage(tiny.copy(tiny_t2v_cascade, tmp_path / "copy"), damage, "transformer_2")
    code, text = DAMAGES[damage]
    report = broken(folder, code, text, "transformer_2")
    assert [p.name for p in report.parts if p.problem] == ["transformer_2"]


def test_shards_are_counted(tiny_t2v_single: Path, tmp_path: Path) -> None:
    folder = tiny.shard(tiny.copy(tiny_t2v_single, tmp_path / "copy"), count=3)
    report = inspect(folder)
    assert report.ok
    assert [p.files for p in report.parts if p.name == "transformer"] == [3]


def calls_of_inspect(folder: Path) -> int:
    """Number of Python and C calls of `inspect` and its report, without the first call's imports."""
    count = 0

    def trace(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(trace)
    try:
        report = inspect(folder)
        report.lines()
    finally:
        sys.setprofile(None)
    assert report.ok
    return count


@pytest.mark.parametrize(
    ("small", "large"),
    [((10, 10), (40, 10)), ((10, 10), (10, 200)), ((10, 50), (40, 200))],
    ids=["tensors", "files", "both"],
)
def test_the_work_is_linear_in_tensors_and_files(
    small: tuple[int, int], large: tuple[int, int], tmp_path: Path
) -> None:
    """Calls for each tensor and file: a product of the two would be 5 x as many or more."""

    def calls(layers: int, files: int) -> tuple[int, int]:
        tensors = floats(CONFIG | {"num_layers": layers})
        folder = tmp_path / f"{layers}-{files}"
        groups = [dict(list(tensors.items())[n::files]) for n in range(files)]
        names = [f"diffusion_pytorch_model-{n + 1:05d}-of-{files:05d}.safetensors" for n in range(files)]
        for name, group in zip(names, groups, strict=True):
            write_weights(folder / name, group)
        index = {t: name for name, group in zip(names, groups, strict=True) for t in group}
        write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": index})
        write_json(folder / "config.json", CONFIG | {"num_layers": layers})
        inspect(folder)
        return calls_of_inspect(folder), len(tensors) + 4 * files

    (few, work), (many, more_work) = calls(*small), calls(*large)
    assert many / few < 1.3 * more_work / work
