"""Files of other tools: their kinds, and their values against a float64 oracle."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf_files
import owned
import pytest
import torch
from owned import INPUTS, REFUSED, Owned
from safetensors.torch import load_file, save_file
from stored import read, refused

from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.hub import model_folder
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.part_check import check_part
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.transformer import Expert
from ascendit.convert.quantize import quantize
from ascendit.convert.repack import repack
from ascendit.errors import CheckpointError, UsageError
from ascendit.inspect.checkpoint import inspect
from ascendit.model.library_component import load_library_part
from ascendit.model.loader import load_expert
from ascendit.ops.operators import bind
from ascendit.weights.decoded_rows import layer_rows, tensor_rows


def values(expert: Expert) -> dict[str, torch.Tensor]:
    """All weights as the checker of `repack` decodes them, float32."""
    weights = {f"{name}.weight": layer for name, layer in expert.layers.items()}
    scales = {
        info.name
        for layer in expert.layers.values()
        for role, info in layer.tensors.items()
        if "scale" in role or role == "weight_offset"
    }
    tensors = {}
    with RowReader() as reader:
        for name, info in expert.tensors.items():
            if info.name not in scales:
                rows = layer_rows(weights[name], reader) if name in weights else tensor_rows(info, reader)
                tensors[name] = torch.cat([block.clone() for block in rows]).reshape(
                    weights[name].shape if name in weights else info.shape
                )
    return tensors


@pytest.mark.parametrize("name", INPUTS)
def test_values(tmp_path: Path, name: str) -> None:
    file: Owned = INPUTS[name]()
    expert = read(file.write(tmp_path / "wan.safetensors"))
    assert expert.kinds == file.kinds
    assert {n: layer.scheme for n, layer in expert.layers.items()} == file.schemes
    decoded = values(expert)
    assert decoded.keys() == file.values.keys()
    for tensor, expected in file.values.items():
        assert torch.equal(decoded[tensor], expected.float()), tensor
        if tensor.removesuffix(".weight") not in file.schemes:
            assert expert.tensors[tensor].dtype == {
                torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"
            }[expected.dtype]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    make, code, text = REFUSED[name]
    assert text in refused(make().write(tmp_path / "wan.safetensors"), code)


DEMO = recognise(model_folder("demo"))
SCALES = {"NaN": float("nan"), "infinite": float("inf"), "zero": 0.0, "negative": -0.5}


@pytest.mark.parametrize("value", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("make", [owned.scaled, owned.comfy], ids=["scaled", "comfy_quant"])
def test_an_invalid_scale_names_the_kind(tmp_path: Path, make: Callable[[], Owned], value: float) -> None:
    file = make()
    (scale,) = [n for n in file.tensors if n.startswith("blocks.0.attn2.to_v.") and "scale" in n]
    file.tensors[scale] = torch.tensor(value)
    expert = read(file.write(tmp_path / "wan.safetensors"))
    with pytest.raises(CheckpointError, match="ComfyUI") as e:
        values(expert)
    assert e.value.code == "E-CKP-08" and scale in e.value.got


def test_nan_in_fp8_is_kept_and_refused_by_check(tmp_path: Path) -> None:
    file = owned.plain()
    name = "blocks.0.attn2.to_v.weight"
    file.tensors[name] = file.tensors[name].clone()
    file.tensors[name].view(torch.uint8)[3, 5] = 0x7F
    source = file.write(tmp_path / "wan.safetensors")
    repack(source, tmp_path / "kept")
    assert bool(load_file(tmp_path / "kept" / "transformer" / owned.WEIGHTS)[name][3, 5].isnan())
    with pytest.raises(CheckpointError, match=name) as e:
        repack(source, tmp_path / "r", check=True)
    assert e.value.code == "E-QNT-01"
    with pytest.raises(CheckpointError, match=name) as e:
        quantize(source, tmp_path / "q", scheme="int8")
    assert e.value.code == "E-QNT-01"


def test_reports_name_the_kind_and_the_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = INPUTS["all in one, scaled"]().write(tmp_path / "wan.safetensors")
    kinds = "all-in-one checkpoint, ComfyUI scaled fp8, read as BF16"
    report = inspect(source)
    text, data = "\n".join(report.lines()), report.as_dict()["parts"][0]
    assert f"stored as {kinds}" in text and "the file also has text_encoder (1 tensor) and vae (1" in text
    assert data["stored_as"] == ["all-in-one", "comfy-scaled-fp8"]
    assert data["dtypes"].keys() == {"BF16", "F8_E4M3", "F32"}
    assert report.runs_on is not None and report.runs_on.engines[0].reason == f"stored as {kinds}"
    done = quantize(source, tmp_path / "q", scheme="int8", dry_run=True)
    copied = repack(source, tmp_path / "r", dry_run=True)
    for warnings in (done.as_dict()["warnings"], copied.as_dict()["warnings"]):
        assert any("precision of their file (ComfyUI scaled fp8), not of BF16" in x for x in warnings)
        assert any("which are not read from it" in x for x in warnings)
    load_expert(read(source), None, bind("cpu"))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "vae (1 tensor), which are not read from it" in warning
    assert copied.experts[0].rewritten == {"decoded to BF16": 10}


def test_the_loss_is_still_reported_after_repack(tmp_path: Path) -> None:
    source = INPUTS["all in one, scaled"]().write(tmp_path / "wan.safetensors")
    repack(source, tmp_path / "r")
    repack(tmp_path / "r", tmp_path / "again")
    for folder in ("r", "again", "again/transformer"):
        report = quantize(tmp_path / folder, tmp_path / "q", scheme="int8", dry_run=True)
        assert any("their file (ComfyUI scaled fp8), not of BF16" in x for x in report.as_dict()["warnings"])
    record = json.loads((tmp_path / "again" / "ascendit.json").read_text())
    assert record["stored_as"] == {"transformer": ["comfy-scaled-fp8"]}
    repack(owned.floats(str).write(tmp_path / "floats.safetensors"), tmp_path / "f")
    assert "stored_as" not in json.loads((tmp_path / "f" / "ascendit.json").read_text())


def test_a_quantized_file_of_another_tool_is_named_when_it_is_refused(tmp_path: Path) -> None:
    source = owned.turbodiffusion().write(tmp_path / "wan.safetensors")
    with pytest.raises(UsageError, match="quantized .int8_block, TurboDiffusion or rCM, read as") as e:
        quantize(source, tmp_path / "q", scheme="mxfp8")
    assert e.value.code == "E-QNT-01"


@pytest.mark.parametrize("name", ["all of it.safetensors", "train.pth"])
def test_the_command_that_drops_the_rest_of_a_training_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file, source = REFUSED["weights and ema"][0](), tmp_path / name
    if source.suffix == ".pth":
        torch.save({"model": file.tensors, "step": 3}, source)
    else:
        file.write(source)
    with pytest.raises(CheckpointError) as e:
        read(source)
    command = shlex.split(e.value.fix.removeprefix("write one: "))
    assert command[:2] == ["python", "-c"]
    monkeypatch.setattr(sys, "argv", command[2:])
    exec(command[2], {})
    assert values(read(tmp_path / f"{source.stem}-model.safetensors")).keys() == owned.base().keys()


def test_the_first_bytes_of_a_file_say_what_it_is(tmp_path: Path) -> None:
    """Not its name: the label and the metadata of a pickle and of a GGUF file named `.safetensors`."""
    torch.save(owned.base(), tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors").kinds == ("pickle",)
    gguf_files.write_model(tmp_path / "b.gguf", owned.base(), "F32")
    (tmp_path / "b.gguf").rename(tmp_path / "b.safetensors")
    assert read(tmp_path / "b.safetensors").kinds == ("gguf-floats",)
    (part,) = inspect(tmp_path / "b.safetensors").parts
    assert part.metadata


@pytest.mark.parametrize(
    ("name", "needs"),
    [("a.pth", "torch.save, or of safetensors"), ("a.gguf", "GGUF"), ("a.safetensors", "safetensors")],
)
def test_a_missing_file_needs_one_of_its_own_format(tmp_path: Path, name: str, needs: str) -> None:
    with pytest.raises(CheckpointError, match="missing") as e:
        read_header(tmp_path / name)
    assert e.value.needs == f"a complete file of {needs}"


@pytest.mark.parametrize("kind", ["plain", "plain e5m2", "scaled", "comfy_quant", "rows e4m3", "rows int8"])
def test_a_text_encoder(tmp_path: Path, kind: str) -> None:
    """The loaded encoder has exactly the values of the oracle; its embedding is plain fp8."""
    tensors = load_file(DEMO.root / "text_encoder" / "model.safetensors")
    stored: dict[str, torch.Tensor] = {"spiece_model": torch.zeros(9, dtype=torch.uint8)}
    expected = dict(tensors)
    for name, tensor in tensors.items():
        stored[name] = tensor
        if tensor.ndim == 2:
            dtype = torch.float8_e5m2 if "e5m2" in kind else torch.float8_e4m3fn
            table = "plain" in kind or "shared" in name or "embed" in name or "bias" in name
            scale = 1.0 if table else float(tensor.abs().max() / 448)
            stored[name] = (tensor.float() / scale).to(dtype)
            factor = torch.tensor(scale)
            expected[name] = owned.bf16(stored[name], factor)
            layer = name.removesuffix(".weight")
            if "rows" in kind and not table:
                rows = tensor.float().abs().amax(1, keepdim=True) / (127 if "int8" in kind else 448)
                stored[name] = (tensor.float() / rows).to(torch.int8 if "int8" in kind else dtype)
                stored |= {f"{layer}.weight_scale": rows}
                expected[name] = owned.bf16(stored[name], rows)
            elif "rows" in kind:
                stored[name], expected[name] = tensor, tensor
            elif kind == "scaled" and not table:
                stored |= {f"{layer}.scale_weight": factor, "scaled_fp8": torch.zeros(0, dtype=dtype)}
            elif kind == "comfy_quant" and not table:
                entry = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
                stored |= {f"{layer}.weight_scale": factor, f"{layer}.comfy_quant": entry}
    shutil.copytree(DEMO.root / "text_encoder", folder := tmp_path / "text_encoder")
    save_file(stored, folder / "model.safetensors")
    part = replace(DEMO.part("text_encoder"), path=folder)
    shards = check_part(part)
    kinds = {"scaled": "comfy-scaled-fp8", "comfy_quant": "comfy-quant-fp8"}
    kinds |= {"rows e4m3": "scaled-part", "rows int8": "scaled-part"}
    assert shards is not None and shards.kinds == (kinds.get(kind, "fp8"),)
    state = load_library_part(part, shards, torch.float32).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.float()), name


def test_a_vae_in_plain_fp8(tmp_path: Path) -> None:
    tensors = load_file(DEMO.root / "vae" / owned.WEIGHTS)
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    shutil.copytree(DEMO.root / "vae", folder := tmp_path / "vae")
    save_file(stored, folder / owned.WEIGHTS)
    part = replace(DEMO.part("vae"), path=folder)
    shards = check_part(part)
    assert shards is not None and shards.kinds == ("fp8",)
    state = load_library_part(part, shards, torch.float32).state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in stored.items())


@pytest.mark.parametrize("role, label", [("SCB", "bitsandbytes"), ("weight_scale_inv", "fp8 in tiles")])
def test_a_quantized_text_encoder_is_refused_by_name(tmp_path: Path, role: str, label: str) -> None:
    tensors = load_file(DEMO.root / "text_encoder" / "model.safetensors")
    shutil.copytree(DEMO.root / "text_encoder", folder := tmp_path / "text_encoder")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    dtype = torch.int8 if role == "SCB" else torch.float8_e4m3fn
    tensors |= {name: tensors[name].to(dtype), name.replace("weight", role): torch.ones(32)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=label) as e:
        check_part(replace(DEMO.part("text_encoder"), path=folder))
    assert e.value.code == "E-CKP-04" and e.value.fix == "use the text_encoder of the BF16 model"


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_repack_quantize_and_load(tmp_path: Path, name: str) -> None:
    """Each verb gives the same as the oracle's values in a float folder."""
    file = INPUTS[name]()
    file.config = owned.CONFIG
    source = file.write(tmp_path / "in" / "wan.safetensors")
    repack(source, tmp_path / "r", check=True)
    written = values(read(tmp_path / "r"))
    assert written.keys() == file.values.keys()
    assert all(torch.equal(written[n], tensor.float()) for n, tensor in file.values.items())
    model = load_expert(read(source), None, bind("cpu"), dtype=torch.float32)
    for parameter, tensor in model.named_parameters():
        if parameter.removesuffix(".weight") not in file.schemes and parameter in file.values:
            assert torch.equal(tensor, file.values[parameter].float()), parameter
    if not file.schemes:
        floats = Owned(file.values, file.values, (), config=owned.CONFIG)
        floats.write(tmp_path / "floats" / owned.WEIGHTS)
        quantize(source, tmp_path / "a", scheme="int8")
        quantize(tmp_path / "floats", tmp_path / "b", scheme="int8")
        one, other = (load_file(tmp_path / x / "transformer" / owned.WEIGHTS) for x in "ab")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[n], other[n]) for n in one)
