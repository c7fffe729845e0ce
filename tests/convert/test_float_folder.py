"""`quantize --scheme bf16 --lora`: a float folder with LoRA files added, and nothing quantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert import loras
from convert.models import CONFIG, read, same, tensors, write_model, write_transformer
from convert.test_quantize import tiled
from safetensors.torch import load_file, save_file
from torch import Tensor

from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.sources import sha256_of
from ascendit.checkpoint.transformer import read_expert
from ascendit.convert.quantize import quantize
from ascendit.convert.repack import repack
from ascendit.errors import UsageError
from ascendit.inspect.checkpoint import inspect
from ascendit.names import expected_tensors
from ascendit.progress import Progress

Q = "blocks.0.attn1.to_q"
DOWN, UP = torch.randn(4, 64), torch.randn(64, 4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA of one layer, with a change of its bias."""
    changes = {f"transformer.{Q}.lora_A.weight": DOWN, f"transformer.{Q}.lora_B.weight": UP}
    file = tmp_path / "style.safetensors"
    save_file(changes | {f"transformer.{Q}.diff_b": torch.ones(64)}, file)
    return file


def expected(values: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """The tensors with the LoRA, in NumPy's float64, rounded once."""
    bias = (values[f"{Q}.bias"].double() + weight).to(values[f"{Q}.bias"].dtype)
    return values | {
        f"{Q}.weight": loras.merged(values[f"{Q}.weight"], (weight, DOWN, UP)),
        f"{Q}.bias": bias,
    }


def assert_tensors(folder: Path, values: dict[str, Tensor]) -> None:
    written = read(folder)
    assert written.keys() == values.keys()
    assert [name for name, tensor in values.items() if not same(written[name], tensor)] == []


def test_only_the_changed_tensors_differ_from_the_source(model: Path, lora: Path, tmp_path: Path) -> None:
    report = quantize(
        model, tmp_path / "out", scheme="bf16", loras=[f"{lora}:0.5", f"low={lora}:-2"], hash=True
    )
    assert_tensors(tmp_path / "out" / "transformer", expected(tensors(CONFIG), 0.5))
    second = tensors(CONFIG, 1)
    second[f"{Q}.weight"] = loras.merged(second[f"{Q}.weight"], (0.5, DOWN, UP), (-2, DOWN, UP))
    second[f"{Q}.bias"] = (second[f"{Q}.bias"].double() + 0.5 - 2).to(torch.bfloat16)
    assert_tensors(tmp_path / "out" / "transformer_2", second)
    assert report.schemes == {"bf16": 2 * 26} and report.bytes_before == report.bytes_after
    assert not any("excluded" in line for line in report.lines())


def test_the_folder_is_complete_and_says_what_it_has(model: Path, lora: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    quantize(model, folder, scheme="bf16", loras=[f"{lora}:0.123456789"], hash=True)
    source, written = recognise(model), recognise(folder)
    assert written.kind == "diffusers" and written.parts.keys() == source.parts.keys()
    for name in ("transformer", "transformer_2"):
        assert json.loads((folder / name / "config.json").read_text()) == CONFIG
        files = {path.name for path in (folder / name).iterdir()}
        assert files == {"config.json", "diffusion_pytorch_model.safetensors"}
    record = json.loads((folder / "ascendit.json").read_text())
    [entry] = record["loras"]
    assert (entry["file"], entry["weight"], entry["expert"]) == ("style.safetensors", 0.123456789, "all")
    command = "ascendit quantize model -o out --scheme bf16 --lora style.safetensors:0.123456789 --hash"
    assert record["command"] == command and "recipe" not in record and record["layers"] == {"bf16": 52}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert record["files"][weights] == sha256_of(folder / weights)
    card = (folder / "README.md").read_text()
    assert "base_model_relation: merge\n" in card and "license: apache-2.0" in card and command in card
    assert "quant_model_description" not in card and "| LoRA | style.safetensors with weight" in card
    assert "LoRA style.safetensors at 0.123456789, all" in "\n".join(inspect(folder).lines())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_the_dtype_of_the_source(dtype: torch.dtype, lora: Path, tmp_path: Path) -> None:
    quantize(
        write_transformer(tmp_path / "model", dtype=dtype), tmp_path / "out", scheme="bf16", loras=[lora]
    )
    assert_tensors(tmp_path / "out" / "transformer", expected(tensors(CONFIG, dtype=dtype), 1))


def test_fp8_in_tiles_becomes_bf16(lora: Path, tmp_path: Path) -> None:
    folder = write_transformer(tmp_path / "model")
    decoded = tiled(folder)
    source = {name: x for name, x in read(folder).items() if not name.endswith("_inv")} | decoded
    quantize(folder, tmp_path / "out", scheme="bf16", loras=[lora])
    assert_tensors(tmp_path / "out" / "transformer", expected(source, 1))
    assert read_expert(recognise(tmp_path / "out").experts[0]).layers == {}


def test_a_resumed_run_gives_the_same_folder(model: Path, lora: Path, tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.stage == "transformer_2":
            raise KeyboardInterrupt

    options: dict[str, Any] = {"scheme": "bf16", "loras": [lora], "hash": True}
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "a" / "out", **options, on_progress=stop)
    partial = tmp_path / "a" / ".out.partial" / "out" / "transformer"
    first = next(partial.glob("*.safetensors")).stat().st_ino
    with pytest.raises(UsageError, match="other options"):
        quantize(model, tmp_path / "a" / "out", **options | {"loras": [f"{lora}:2"]}, resume=True)
    quantize(model, tmp_path / "a" / "out", **options, resume=True)
    quantize(model, tmp_path / "b" / "out", **options)
    ours, fresh = (
        {x.relative_to(tmp_path / name): x.read_bytes() for x in (tmp_path / name).rglob("*") if x.is_file()}
        for name in ("a", "b")
    )
    assert (
        ours == fresh and next((tmp_path / "a/out/transformer").glob("*.safetensors")).stat().st_ino == first
    )


@pytest.mark.parametrize("engine", ["vllm-omni", "sglang"])
def test_an_engine_that_reads_float_folders_gets_the_same_files(
    engine: str, model: Path, lora: Path, tmp_path: Path
) -> None:
    quantize(model, tmp_path / "own", scheme="bf16", loras=[lora])
    quantize(model, tmp_path / "for", scheme="bf16", loras=[lora], engine=engine)
    for name in ("transformer", "transformer_2"):
        ours, theirs = (load_file(next((tmp_path / x / name).glob("*.safetensors"))) for x in ("own", "for"))
        assert ours.keys() == theirs.keys() and all(same(ours[n], theirs[n]) for n in ours)
    repack(tmp_path / "own", tmp_path / "again", check=True)


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"loras": []}, "E-QNT-01", "quantizes no layer"),
        ({"lora_skip": "image"}, "E-USE-05", "matches no key"),
        ({"lora_skip": "image", "loras": []}, "E-USE-01", 'lora_skip=["image"] without a LoRA'),
        ({"lora_skip": "nope", "loras": []}, "E-USE-01", "a group of keys: image, text, control"),
        ({"engine": "mindie"}, "E-ENG-01", "only quantized models"),
        ({"keep": ["blocks.0.*"]}, "E-USE-01", "keep with scheme bf16"),
        ({"report": True}, "E-USE-01", "report with scheme bf16"),
        ({"smoothing": {"transformer": {Q: torch.ones(64)}}}, "E-USE-01", "smoothing with scheme bf16"),
        ({"scale_rule": "amax"}, "E-USE-01", "scale rule 'amax' for bf16"),
        ({"scheme": "int8", "keep": ["*"]}, "E-QNT-01", "quantizes no layer"),
    ],
)
def test_options_that_need_quantized_layers_are_refused(
    options: dict[str, Any], code: str, text: str, model: Path, lora: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        quantize(model, tmp_path / "out", **{"scheme": "bf16", "loras": [lora], **options})
    assert error.value.code == code and text in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_and_a_single_file_in_original_names(lora: Path, tmp_path: Path) -> None:
    from ascendit.names import to_wan

    values = tensors(CONFIG)
    file = tmp_path / "wan.safetensors"
    save_file({to_wan(name) or name: x for name, x in values.items()}, file)
    report = quantize(file, tmp_path / "out", scheme="bf16", loras=[lora], dry_run=True)
    assert report.loras and "float weights" in report.recipe and not (tmp_path / "out").exists()
    quantize(file, tmp_path / "out", scheme="bf16", loras=[lora])
    assert_tensors(tmp_path / "out" / "transformer", expected(values, 1))
    assert values.keys() == expected_tensors(CONFIG).keys()


def test_a_resumed_run_reads_the_same_alphas(model: Path, tmp_path: Path) -> None:
    """The alphas of PEFT are in a file beside the weights. Exchanged, they change no count in the report."""

    def stop(event: Progress) -> None:
        if event.stage == "transformer_2":
            raise KeyboardInterrupt

    def save_alphas(first: int, second: int) -> None:
        pattern = {Q: first, Q.replace("to_q", "to_k"): second}
        fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": pattern}
        (folder / "adapter_config.json").write_text(json.dumps(fields))

    folder = tmp_path / "adapter"
    folder.mkdir()
    layers = (Q, Q.replace("to_q", "to_k"))
    factors = {f"{layer}.lora_A.weight": DOWN for layer in layers}
    factors |= {f"{layer}.lora_B.weight": UP for layer in layers}
    save_file({f"transformer.{name}": x.clone() for name, x in factors.items()}, folder / "a.safetensors")
    save_alphas(2, 8)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", scheme="bf16", loras=[folder], on_progress=stop)
    save_alphas(8, 2)
    with pytest.raises(UsageError, match="other options"):
        quantize(model, tmp_path / "out", scheme="bf16", loras=[folder], resume=True)
