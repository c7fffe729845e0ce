"""GGUF files of transformers from end to end: inspected, repacked, quantized and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_files
import pytest
import tiny
import torch
from convert import models
from safetensors.torch import load_file, save_file
from stored import load_transformer, read
from torch import Tensor

import ascendit
from ascendit.checkpoint.layout import recognise
from ascendit.convert.quantize import quantize
from ascendit.convert.repack import repack
from ascendit.errors import CheckpointError
from ascendit.inspect.checkpoint import inspect
from ascendit.names import to_diffusers, to_wan
from ascendit.ops.operators import bind

CONFIG: dict[str, Any] = models.CONFIG | {
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "text_dim": 256,
    "freq_dim": 256,
    "ffn_dim": 256,
    "num_layers": 1,
}


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.rglob("*.safetensors") for k, v in load_file(file).items()}


def write_wan(path: Path, kind: str, prefix: str = "") -> dict[str, Tensor]:
    """Write a transformer under original names. Returns Diffusers name -> the values that the file stores."""
    weights = {f"{prefix}{to_wan(name)}": value for name, value in models.tensors(CONFIG).items()}
    values = gguf_files.write_model(path, weights, kind)
    return {str(to_diffusers(name.removeprefix(prefix))): value for name, value in values.items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    wrong = [
        name
        for name, value in expected.items()
        if actual[name].dtype != value.dtype or not torch.equal(actual[name], value)
    ]
    assert wrong == []


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        *[("Q4_K", "model.diffusion_model."), slow("BF16", ""), slow("Q8_0", ""), slow("Q4_0", "")],
        *[slow("Q5_K", ""), slow("Q6_K", "diffusion_model."), slow("F16", ""), slow("F32", "")],
        *[slow(kind, "") for kind in ("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL")],
    ],
)
def test_repack_writes_the_values_of_the_package(tmp_path: Path, kind: str, prefix: str) -> None:
    (tmp_path / "wan").mkdir()
    expected = write_wan(tmp_path / "wan" / "wan.gguf", kind, prefix)
    repack(tmp_path / "wan", tmp_path / "out", check=True)
    assert_equal(folder_tensors(tmp_path / "out"), expected)


def test_quantizing_and_loading_equal_those_of_the_decoded_weights(tmp_path: Path) -> None:
    expected = write_wan(tmp_path / "wan.gguf", "Q4_K")
    (tmp_path / "float").mkdir()
    save_file(expected, tmp_path / "float" / "wan.safetensors")
    files = (tmp_path / "wan.gguf", tmp_path / "float" / "wan.safetensors")
    for index, file in enumerate(files):
        quantize(file, tmp_path / f"q{index}", scheme="mxfp8")
    assert_equal(folder_tensors(tmp_path / "q0"), folder_tensors(tmp_path / "q1"))
    loaded, reference = (load_transformer(recognise(file).experts[0], bind("cpu")) for file in files)
    assert_equal(loaded.state_dict(), reference.state_dict())


def test_a_file_of_stable_diffusion_cpp(tmp_path: Path) -> None:
    """The 3-D convolution with joined channels, no batch dimension, Q8_0 for it too, and no architecture."""
    weights = models.tensors(CONFIG)
    tensors, expected = {}, {}
    for name, value in weights.items():
        joined = value.flatten(0, 1) if value.ndim == 5 else value.squeeze(0) if value.ndim == 3 else value
        kind = "Q8_0" if value.ndim == 2 else "F16"
        data = gguf_files.stored(joined, kind)
        tensors[f"model.diffusion_model.{to_wan(name)}"] = data, kind
        expected[name] = gguf_files.decoded(data, kind).reshape(value.shape)
    gguf_files.write(tmp_path / "wan.gguf", tensors, arch="pig")
    repack(tmp_path / "wan.gguf", tmp_path / "out")
    assert_equal(folder_tensors(tmp_path / "out"), expected)


def test_inspect_names_types_and_metadata(tmp_path: Path) -> None:
    write_wan(tmp_path / "wan.gguf", "Q6_K")
    report = inspect(tmp_path / "wan.gguf")
    assert report.ok and report.parts[0].as_dict()["metadata"] == {"architecture": "wan"}
    text = "\n".join(report.lines())
    assert "transformer (GGUF): architecture wan" in text and "stored as GGUF, read as BF16" in text
    assert report.parts[0].format == "Q6_K+fp32" and ", read as bf16" in "\n".join(report.layer_lines())


def test_a_file_without_the_3d_convolution_is_refused_by_its_name(tmp_path: Path) -> None:
    """ComfyUI-GGUF's first step leaves it out."""
    weights = {str(to_wan(n)): v for n, v in models.tensors(CONFIG).items() if v.ndim < 5}
    gguf_files.write_model(tmp_path / "wan.gguf", weights, "Q8_0")
    with pytest.raises(CheckpointError) as e:
        repack(tmp_path / "wan.gguf", tmp_path / "out")
    assert e.value.code == "E-CKP-04" and "GGUF" in e.value.got
    assert e.value.got.endswith("1 missing (patch_embedding.weight)") and "fix_5d_tensors" in e.value.fix


def test_a_wrong_original_shape_of_the_patch_embedding_is_named(tmp_path: Path) -> None:
    weights = {f"{to_wan(name)}": value for name, value in models.tensors(CONFIG).items()}
    arrays = {name: (gguf_files.stored(value, "F16"), "F16") for name, value in weights.items()}
    name = "patch_embedding.weight"
    n, channels, *_ = weights[name].shape
    for shape in ((2, channels, 1, 2, n), (channels, n, 1, 2, 2), (2, 2, 1, channels, n)):
        path = tmp_path / f"{shape[0]}-{shape[-1]}.gguf"
        gguf_files.write(path, arrays, original_shapes={name: shape})
        with pytest.raises(CheckpointError, match="patch_embedding.weight has the shape") as e:
            read(path)
        assert e.value.code == "E-CKP-04" and f"{path} (GGUF" in e.value.got
        assert f"{list(shape)}, which does not fit patch_embedding.bias [{n}]" in e.value.got
        assert "fix_5d_tensors" in e.value.fix


@pytest.mark.slow
def test_two_files_and_a_base_make_a_pipeline_that_runs(tmp_path: Path) -> None:
    base = tiny.build_t2v_single(tmp_path / "base")
    weights = load_file(base / "transformer" / tiny.WEIGHTS)
    wan = gguf_files.write_model(tmp_path / "w.gguf", {str(to_wan(n)): w for n, w in weights.items()}, "Q8_0")
    encoder = load_file(base / "text_encoder" / "model.safetensors")
    names = {name: gguf_files.llama_cpp_name(name) for name in encoder}
    umt5 = gguf_files.write_model(
        tmp_path / "u.gguf", {names[n]: w for n, w in encoder.items()}, "Q8_0", arch="t5encoder"
    )
    repack([tmp_path / "w.gguf", tmp_path / "u.gguf"], tmp_path / "out", base=base)
    decoded = tiny.copy(base, tmp_path / "decoded")
    save_file({str(to_diffusers(n)): w for n, w in wan.items()}, decoded / "transformer" / tiny.WEIGHTS)
    save_file({n: umt5[names[n]] for n in encoder}, decoded / "text_encoder" / "model.safetensors")

    def frames(folder: Path) -> Any:
        pipe = ascendit.load(folder)
        return pipe.generate("boat", width=32, height=32, num_frames=5, num_inference_steps=2, seed=1).frames

    assert (frames(tmp_path / "out") == frames(decoded)).all()
    assert (frames(tmp_path / "out") != frames(base)).any()
