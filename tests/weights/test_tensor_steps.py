"""Variants without a real export (other dtypes, single files, FP8 by rows, tiles in a pipeline), and
packings of FP4. ml_dtypes is the oracle of values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from convert import exports
from hypothesis import given, settings
from hypothesis import strategies as st
from kill import contents
from safetensors.torch import save_file
from torch import Tensor

from ascendit import mx
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.transformer import read_expert
from ascendit.checkpoint.writer import TensorSpec
from ascendit.convert.repack import repack
from ascendit.errors import CheckpointError, UsageError
from ascendit.mx.codec import Encoded
from ascendit.weights.engine_formats import TargetFormat, target_format, traits_of
from ascendit.weights.tensor_steps import (
    Piece,
    Sink,
    TensorStep,
    recode,
    run_steps,
    schemes_of,
    smoothing_of,
    stored_steps,
    tile_values,
    to_float32,
)


def test_each_tensor_has_one_step() -> None:
    for source in exports.ALL:
        for expert_part in recognise(source).experts:
            expert = read_expert(expert_part)
            for target in (TargetFormat(), target_format("vllm-omni"), target_format("mindie")):
                steps = stored_steps(expert, target)
                used = [info for step in steps for info in step.sources]
                assert sorted(x.name for x in used) == sorted(x.name for x in expert.tensors.values())
                assert all(step.name == step.specs[0].name for step in steps if step.specs)


class Nowhere(Sink):
    def append(self, name: str, data: Any) -> None:
        pass

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(("length", "pieces"), [(0, [b""]), (4, [b"abcd", b"ef"]), (8, [b"abc"])])
def test_the_progress_sums_to_the_bytes_of_the_sources(length: int, pieces: list[bytes]) -> None:
    def make(step: TensorStep, reader: RowReader) -> Iterator[Piece]:
        yield from (("x", piece) for piece in pieces)

    source = TensorInfo("x", "U8", (10,), Path("x"), 0, 10)
    specs = (TensorSpec("x", "U8", (length,)),)
    step = TensorStep(name="x", how="rows", specs=specs, sources=(source,), make=make)
    counts: list[int] = []
    with RowReader() as reader:
        run_steps([step], reader, Nowhere(), advance=lambda name, count, skipped=False: counts.append(count))
    assert sum(counts) == 10 and min(counts) >= 0


def test_schemes_and_smoothing_of_an_expert() -> None:
    expert = read_expert(recognise(exports.SMOOTH).experts[0])
    schemes = schemes_of(expert)
    assert len(schemes) == 60 and list(schemes)[:2] == ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k"]
    assert sorted(n for n, s in schemes.items() if s == "bf16" and ".0." not in n.removesuffix(".0")) == [
        "blocks.3.attn2.to_out.0"
    ]
    assert set(expert.smoothed) == set(schemes)
    shapes = {name: layer.shape for name, layer in expert.layers.items()}
    assert "unlike_qkv" not in traits_of(schemes, shapes, smoothing_of(expert))
    legacy = schemes_of(read_expert(recognise(exports.LEGACY).experts[0]))
    assert len(legacy) == 65 and legacy["condition_embedder.time_proj"] == "int8"


def test_scales_of_dtype_e8m0(tmp_path: Path) -> None:
    def retype(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name] = tensors[name].view(torch.float8_e8m0fnu)

    source = exports.changed(exports.MXFP8, tmp_path / "source", retype)
    report = repack(source, tmp_path / "out", check=True)
    repack(exports.MXFP8, tmp_path / "plain")
    name = "transformer/diffusion_pytorch_model.safetensors"
    files = [exports.without_padding(contents(tmp_path / x))[name] for x in ("out", "plain")]
    assert files[0] == files[1] and report.experts[0].rewritten_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_scales_and_biases_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    def retype(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.startswith("blocks.0.ffn.2.") and not n.endswith("weight")]:
            tensors[name] = tensors[name].to(dtype)

    source = exports.changed(exports.LEGACY, tmp_path / "source", retype)
    repack(source, tmp_path / "out", check=True)
    written, source_tensors = (
        exports.tensors(tmp_path / "out" / "transformer"),
        exports.tensors(source / "high_noise_model"),
    )
    for role in ("weight_scale", "weight_offset", "bias"):
        tensor = written[f"blocks.0.ffn.net.2.{role}"]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.double(), source_tensors[f"blocks.0.ffn.2.{role}"].double())


def test_fp8_by_rows(tmp_path: Path) -> None:
    def by_rows(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        for name in [n.removesuffix(".weight_scale") for n in tensors if n.endswith("weight_scale")]:
            n = tensors[f"{name}.weight"].shape[0]
            tensors[f"{name}.weight_scale"] = torch.rand(n, 1).bfloat16()
            types |= dict.fromkeys((f"{name}.weight", f"{name}.weight_scale"), "WFP8AFP8_DYNAMIC")
        types["model_quant_type"] = "WFP8AFP8_DYNAMIC"

    source = exports.changed(exports.MXFP8, tmp_path / "source", by_rows)
    report = repack(source, tmp_path / "out", check=True)
    assert report.schemes == {"fp8": 10} and report.experts[0].rewritten == {"to float32": 10}
    scale = exports.tensors(tmp_path / "out" / "transformer")["blocks.0.ffn.net.2.weight_scale"]
    assert scale.dtype == torch.float32 and scale.shape == (128, 1)
    repack(tmp_path / "out", tmp_path / "wan", to="wan")
    repack(tmp_path / "wan", tmp_path / "again")
    assert contents(tmp_path / "again" / "transformer") == contents(tmp_path / "out" / "transformer")
    for engine in ("vllm-omni", "sglang", "mindie"):
        with pytest.raises(UsageError, match="does not read FP8 with float scales"):
            repack(tmp_path / "out", tmp_path / engine, engine=engine)


def test_a_single_float_file_of_comfyui(tmp_path: Path) -> None:
    source = exports.tensors(exports.EXPORTS.parent / "source_models" / exports.SINGLE)
    file = tmp_path / "wan.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in source.items()}, file)
    report = repack(file, tmp_path / "out", check=True)
    written = exports.tensors(tmp_path / "out" / "transformer")
    assert written.keys() == {exports.diffusers_name(name) for name in source}
    for name, tensor in source.items():
        assert torch.equal(written[exports.diffusers_name(name)], tensor)
    assert report.experts[0].rewritten_bytes == 0 and report.experts[0].origin == "float"
    assert not list((tmp_path / "out" / "transformer").glob("quant*"))


def test_tiles_in_a_pipeline_folder_with_other_components(tmp_path: Path) -> None:
    """Like published FP8 checkpoints: a Diffusers folder whose transformer has `weight_scale_inv`."""
    repack(exports.EXPORTS.parent / "source_models" / exports.SINGLE, tmp_path / "float")
    config = json.loads((tmp_path / "float" / "transformer" / "config.json").read_bytes())
    quantization_config = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    source = exports.pipeline(
        tmp_path / "source", {"transformer": config | {"quantization_config": quantization_config}}
    )
    tensors = exports.tensors(tmp_path / "float" / "transformer")
    linears = [
        n for n in tensors if n.startswith("blocks.") and n.endswith(".weight") and tensors[n].ndim == 2
    ]
    for name in linears:
        n, k = tensors[name].shape
        tensors[name] = tensors[name].float().mul(100).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((-(-n // 128), -(-k // 128)), 0.01)
    save_file(tensors, source / "transformer" / "diffusion_pytorch_model.safetensors")
    report = repack(source, tmp_path / "out", check=True)
    assert report.experts[0].rewritten == {"FP8 tiles to BF16": len(linears)} and report.warnings == ()
    assert (tmp_path / "out" / "vae").resolve() == (source / "vae").resolve()
    written = json.loads((tmp_path / "out" / "transformer" / "config.json").read_bytes())
    assert written == config
    name = "blocks.0.ffn.net.2.weight"
    again = exports.tensors(tmp_path / "out" / "transformer")[name]
    assert torch.equal(again, (tensors[name].float() * 0.01).bfloat16())


def test_the_recipe_of_a_folder_is_preserved_in_its_record(tmp_path: Path) -> None:
    repack(exports.MXFP8, tmp_path / "first")
    file = tmp_path / "first" / "ascendit.json"
    recipe = {"name": "default", "about": "all alike", "rules": [{"layers": "*"}]}
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"recipe": recipe}))
    repack(tmp_path / "first", tmp_path / "second")
    assert json.loads((tmp_path / "second" / "ascendit.json").read_bytes())["recipe"] == recipe
    assert "default: all alike" in (tmp_path / "second" / "README.md").read_text()


# ---- packings of FP4 and wider floats ------------------------------------------------------------

NUMBERS = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32))
def test_every_packing_has_the_same_values(rows: int, length: int, seed: int) -> None:
    qdata = np.random.default_rng(seed).integers(0, 16, (rows, length)).astype(np.uint8)
    values = NUMBERS[qdata]
    e4m3 = values.astype(ml_dtypes.float8_e4m3fn).tobytes()
    bf16 = values.astype(ml_dtypes.bfloat16).tobytes()
    padded = np.pad(qdata, ((0, 0), (0, length % 2)))
    packed = (padded[:, ::2] | padded[:, 1::2] << 4).tobytes()
    assert recode(e4m3, length, "e4m3", "packed") == packed == recode(bf16, length, "bf16", "packed")
    assert recode(packed, length, "packed", "e4m3") == e4m3 == recode(bf16, length, "bf16", "e4m3")


@pytest.mark.parametrize(
    ("packing", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("bf16", ml_dtypes.bfloat16)]
)
def test_values_outside_fp4_are_refused(packing: str, dtype: type) -> None:
    bits = np.arange(256, dtype=np.uint8) if packing == "e4m3" else np.arange(65536, dtype=np.uint16)
    values = bits.view(dtype).astype(np.float32)
    invalid = ~np.isin(values, NUMBERS)
    for pattern in np.flatnonzero(invalid)[:: 1 if packing == "e4m3" else 997]:
        with pytest.raises(CheckpointError, match="x has 1 values that FP4 cannot represent") as e:
            recode(bits[[pattern, 0]].tobytes(), 2, packing, "packed", "x")
        assert e.value.code == "E-CKP-04"
    valid = bits[~invalid]
    assert len(valid) == 16 and len(recode(valid.tobytes(), 16, packing, "packed")) == 8


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_floats_are_converted_exactly(dtype: str) -> None:
    dtypes = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
    bits = np.arange(65536, dtype=np.uint16)
    values = bits.view(np.float16 if dtype == "F16" else ml_dtypes.bfloat16)
    values = values[np.isfinite(values.astype(np.float32))].astype(dtypes[dtype])
    converted = np.frombuffer(to_float32(values.tobytes(), dtype, "x"), np.float32)
    assert np.array_equal(converted, values.astype(np.float32))
    assert np.array_equal(np.signbit(converted), np.signbit(values))


@pytest.mark.parametrize("value", [0.1, 1e300, 1e-60])
def test_float64_that_float32_cannot_represent(value: float) -> None:
    with pytest.raises(CheckpointError, match="scale has float64 values that float32 cannot represent") as e:
        to_float32(np.array([1.0, value]).tobytes(), "F64", "scale")
    assert e.value.code == "E-CKP-04"


@pytest.mark.parametrize("shape", [(300, 70), (128, 128), (256, 300), (5, 129)])
def test_tiles_equal_mx_decode(shape):
    qdata = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128))
    decoded = mx.decode(Encoded(qdata, scale, None, "fp8_128x128", -1, shape), torch.float32)
    blocks = [tile_values(qdata[i : i + 256], scale, i) for i in range(0, shape[0], 256)]
    assert torch.equal(torch.cat(blocks), decoded)
