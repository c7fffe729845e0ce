"""`quantize`: its output, sources and errors."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.models import CONFIG, I2V, TI2V, read, same, tensors, write_model, write_transformer
from safetensors.torch import save_file

from ascendit import mx
from ascendit.checkpoint import reader
from ascendit.checkpoint.file_copy import write_at
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.convert.quantize import quantize
from ascendit.errors import AscenditError, CheckpointError, EnvironmentProblem, UsageError
from ascendit.mx import smoothing
from ascendit.progress import Progress
from ascendit.quant.schemes import QUANTIZED, SCHEMES
from ascendit.weights.recipe_steps import RecipeSteps

LAYERS = 10  # in a block
Q = "blocks.0.attn1.to_q"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    return tmp_path / "out"


def json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def refused(code: str, error_class: type[AscenditError], *args: Any, **options: Any) -> AscenditError:
    with pytest.raises(error_class) as e:
        quantize(*args, **options)
    assert e.value.code == code, e.value
    assert not Path(args[1]).exists() and not list(Path(args[1]).parent.glob(".*partial"))
    return e.value


def test_each_expert_is_planned_once_for_the_check_and_once_for_writing(model, dst, monkeypatch):
    plans, real = [], RecipeSteps.plan

    def counted(self):
        plans.append(self)
        return real(self)

    monkeypatch.setattr(RecipeSteps, "plan", counted)
    expected = quantize(model, dst, scheme="mxfp8", dry_run=True)
    assert len(plans) == 2
    assert quantize(model, dst, scheme="mxfp8").bytes_after == expected.bytes_after
    assert len(plans) == 2 + 4


# ---- the folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_every_layer_equals_mx_encode_of_the_weight(tmp_path, dst, scheme):
    model = write_model(tmp_path / "model", num_layers=1)
    quantize(model, dst, scheme=scheme)
    for seed, name in enumerate(("transformer", "transformer_2")):
        source, written = tensors(CONFIG | {"num_layers": 1}, seed), read(dst / name)
        for layer in (n.removesuffix(".weight") for n in source if n.endswith("weight")):
            weight = source[f"{layer}.weight"]
            if not layer.startswith("blocks") or "norm" in layer:
                assert same(written[f"{layer}.weight"], weight)
                continue
            encoded = mx.encode(weight, SCHEMES[scheme].weight)
            expected = {"weight": encoded.qdata, "weight_scale": encoded.scale}
            expected |= {"weight_dual_scale": encoded.dual_scale} if encoded.dual_scale is not None else {}
            expected |= {"weight_offset": torch.zeros(len(weight), 1)} if scheme == "int8" else {}
            expected |= {"bias": source[f"{layer}.bias"].float()}
            roles = {n.rpartition(".")[2] for n in written if n.rpartition(".")[0] == layer}
            assert roles == expected.keys()
            assert all(same(written[f"{layer}.{role}"], tensor) for role, tensor in expected.items()), layer
        assert same(written["scale_shift_table"], source["scale_shift_table"])


def test_the_folder_is_complete_and_readable(model, dst):
    report = quantize(model, dst, scheme="mxfp8", keep=["blocks.1.ffn.*"])
    layout = recognise(dst)
    assert layout.kind == "diffusers" and set(layout.parts) == {
        *("transformer", "transformer_2", "scheduler", "text_encoder", "vae")
    }
    expert = read_expert(layout.experts[0])
    assert {layer.scheme for layer in expert.layers.values()} == {"mxfp8"} and len(expert.layers) == 18
    assert expert.config == CONFIG
    quantization_config = json_of(dst / "transformer_2" / "config.json")["quantization_config"]
    assert quantization_config == {
        "quant_method": "mxfp8",
        "is_checkpoint_mxfp8_serialized": True,
        "ignored_layers": ["blocks.1.ffn.net_0.proj", "blocks.1.ffn.net_2"],
    }
    manifest = json_of(dst / "transformer" / "quant_model_description.json")
    assert manifest[f"{Q}.weight"] == manifest[f"{Q}.weight_scale"] == "W8A8_MXFP8"
    assert manifest[f"{Q}.bias"] == manifest["blocks.1.ffn.net.2.weight"] == "FLOAT"
    assert list(manifest)[-1] == "model_quant_type" and manifest["model_quant_type"] == "W8A8_MXFP8"
    assert report.schemes == {"mxfp8": 36, "bf16": 16}


def test_other_components_are_linked_and_small_files_copied(model, dst):
    report = quantize(model, dst, scheme="int8")
    assert {p.name for p in dst.iterdir()} == {
        *("transformer", "transformer_2", "text_encoder", "vae", "scheduler", "model_index.json"),
        *("LICENSE.txt", "README.md", "ascendit.json"),
    }
    assert (dst / "text_encoder").is_symlink() and (dst / "vae").resolve() == (model / "vae").resolve()
    assert not (dst / "model_index.json").is_symlink()
    assert json_of(dst / "model_index.json") == json_of(model / "model_index.json")
    assert "text_encoder" in report.linked


def test_copies_do_not_need_the_source(model, dst):
    quantize(model, dst, scheme="int8", copy=True)
    assert not any(p.is_symlink() for p in dst.rglob("*"))
    assert (dst / "vae" / "diffusion_pytorch_model.safetensors").read_text() == "weights of the VAE"


def test_the_record(model, dst):
    quantize(model, dst, scheme="mxfp4", keep=["blocks.0.*"])
    record = json_of(dst / "ascendit.json")
    assert record["recipe"]["rules"] == [{"layers": ["*"], "scheme": "mxfp4", "scale_rule": "max:7"}]
    assert record["command"] == "ascendit quantize model -o out --scheme mxfp4 --keep 'blocks.0.*'"
    assert record["keep"] == ["blocks.0.*"] and record["layers"] == {"mxfp4": 20, "bf16": 32}
    assert "files" not in record and "sha256" not in (dst / "README.md").read_text()


def test_hashes_of_every_file(model, dst):
    quantize(model, dst, scheme="mxfp8", hash=True, max_shard_bytes=60_000)
    files = json_of(dst / "ascendit.json")["files"]
    written = {
        p for p in dst.rglob("*") if p.is_file() and not (dst / p.relative_to(dst).parts[0]).is_symlink()
    }
    written -= {dst / "ascendit.json", dst / "README.md"}
    assert {dst / name for name in files} == written and dst / "model_index.json" in written
    assert json_of(dst / "ascendit.json")["sizes"] == {name: (dst / name).stat().st_size for name in files}
    for name, digest in files.items():
        assert hashlib.sha256((dst / name).read_bytes()).hexdigest() == digest
    assert "sha256" in (dst / "README.md").read_text()


def test_shards_and_their_index(model, dst):
    quantize(model, dst, scheme="mxfp8", max_shard_bytes=40_000)
    folder = dst / "transformer"
    index = json_of(folder / "diffusion_pytorch_model.safetensors.index.json")
    files = sorted({p.name for p in folder.glob("*.safetensors")})
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    quantize(model, dst.parent / "one", scheme="mxfp8", max_shard_bytes=None)
    one_file = read(dst.parent / "one" / "transformer")
    assert all(same(tensor, one_file[name]) for name, tensor in read(folder).items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one_file.values())


@pytest.mark.parametrize("rule", ["msms:ceil_x:search", "max:7"])
def test_blocks_of_rows_give_the_same_bytes(tmp_path, dst, monkeypatch, rule):
    folder = write_transformer(tmp_path / "model", num_layers=1)
    quantize(folder, dst, scheme="mxfp4", scale_rule=rule)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 20 * 2 * 64)
    quantize(folder, tmp_path / "other", scheme="mxfp4", scale_rule=rule)
    first, second = read(dst / "transformer"), read(tmp_path / "other" / "transformer")
    assert first.keys() == second.keys()
    assert all(same(tensor, second[name]) for name, tensor in first.items())


def test_two_runs_give_the_same_folder(model, tmp_path):
    for name in ("a", "b"):
        quantize(model, tmp_path / name / "out", scheme="mxfp8", report=True)
    files = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert files == {p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file()}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


# ---- sources ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_are_encoded_from_their_own_dtype(tmp_path, dst, dtype):
    folder = write_transformer(tmp_path / "model", dtype=dtype)
    quantize(folder, dst, scheme="mxfp8")
    source, written = tensors(CONFIG, dtype=dtype), read(dst / "transformer")
    encoded = mx.encode(source[f"{Q}.weight"], "mxfp8")
    assert same(written[f"{Q}.weight"], encoded.qdata) and same(written[f"{Q}.weight_scale"], encoded.scale)
    assert same(written["proj_out.weight"], source["proj_out.weight"])
    assert same(written[f"{Q}.bias"], source[f"{Q}.bias"].float())


def test_a_recipe_with_round_to_gives_the_result_of_bf16_weights(tmp_path, dst):
    quantize(write_transformer(tmp_path / "wide", dtype=torch.float32), dst, recipe="ascend-w8a8f8")
    other = write_transformer(tmp_path / "narrow")
    quantize(other, tmp_path / "out2", recipe="ascend-w8a8f8")
    from_float32, from_bf16 = read(dst / "transformer"), read(tmp_path / "out2" / "transformer")
    assert from_float32.keys() == from_bf16.keys() and all(
        same(from_float32[name], from_bf16[name]) for name in from_float32
    )
    assert (
        from_float32["proj_out.weight"].dtype == torch.bfloat16
        and from_float32[f"{Q}.bias"].dtype == torch.float32
    )


def test_a_single_file_in_original_names(tmp_path, dst):
    names = {"self_attn.q": "attn1.to_q", "ffn.0": "ffn.net.0.proj"}
    source = Path(__file__).parents[1] / "fixtures/msmodelslim/source_models/ti2v_d128_l1"
    file = source / "diffusion_pytorch_model.safetensors"
    quantize(file, dst, scheme="fp8")
    assert [p.name for p in dst.iterdir() if p.is_dir()] == ["transformer"]
    written, before = read(dst / "transformer"), read(source)
    for old, new in names.items():
        encoded = mx.encode(before[f"blocks.0.{old}.weight"], "fp8")
        assert same(written[f"blocks.0.{new}.weight"], encoded.qdata)


def tiled(folder: Path) -> dict[str, torch.Tensor]:
    """Rewrite a transformer as FP8 in tiles of 128 x 128. Return its decoded weights in BF16."""
    values, decoded = read(folder), {}
    for name in [n for n in values if n.startswith("blocks") and n.endswith(".weight") and "norm" not in n]:
        weight = values[name].float()
        rows, columns = (-(-n // 128) for n in weight.shape)
        scale = 0.001 + 0.01 * torch.rand(rows, columns)
        scales = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[
            : weight.shape[0], : weight.shape[1]
        ]
        qdata = (weight / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
        values |= {name: qdata, f"{name}_scale_inv": scale}
        decoded[name] = (qdata.float() * scales).to(torch.bfloat16)
    save_file(values, folder / "diffusion_pytorch_model.safetensors")
    return decoded


def test_fp8_in_tiles_is_decoded_to_bf16_first(tmp_path, dst, monkeypatch):
    folder = write_transformer(tmp_path / "model", num_attention_heads=6, num_layers=1, ffn_dim=320)
    decoded = tiled(folder)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 150 * 192)  # blocks of 128 rows
    quantize(folder, dst, scheme="mxfp8", keep=["*.ffn.net.2"])
    written = read(dst / "transformer")
    for name, weight in decoded.items():
        if "ffn.net.2" in name:
            assert same(written[name], weight)
        else:
            encoded = mx.encode(weight, "mxfp8")
            assert same(written[name], encoded.qdata) and same(written[f"{name}_scale"], encoded.scale)
    assert not any(name.endswith("_inv") for name in written)


def test_a_weight_without_its_scale_or_the_reverse_is_refused(tmp_path, dst):
    folder = write_transformer(tmp_path / "model", num_layers=1)
    tiled(folder)
    values = read(folder)
    del values[f"{Q}.weight_scale_inv"]
    save_file(values, folder / "diffusion_pytorch_model.safetensors")
    error = refused("E-CKP-08", CheckpointError, folder, dst, scheme="mxfp8")
    assert Q in str(error)


def test_a_quantized_source_is_refused_with_its_scheme(model, dst):
    quantize(model, dst, scheme="int8")
    error = refused("E-QNT-01", UsageError, dst, dst.parent / "again", scheme="mxfp8")
    assert "int8" in error.got and "repack" in error.fix and "BF16" in error.needs


# ---- rotations, LoRA, engines -------------------------------------------------------------------


def test_rotated_attention(tmp_path, dst):
    report = quantize(write_transformer(tmp_path / "model"), dst, recipe="ascend-w8a8f8")
    assert "  attention  fp8: blocks.1.attn1" in report.lines()
    assert report.experts[0].as_dict()["attention"] == {"fp8": ["blocks.1.attn1"]}
    written = read(dst / "transformer")
    manifest = json_of(dst / "transformer" / "quant_model_description.json")
    assert same(written["blocks.1.attn1.q_rot"], smoothing.rotation(32))
    assert same(written["blocks.1.attn1.k_rot"], smoothing.rotation(32))
    assert {n for n in manifest if n.endswith("quant_type")} == {
        "blocks.1.attn1.quant_type",
        "model_quant_type",
    }
    assert "blocks.0.attn1.q_rot" not in written and manifest["blocks.1.attn1.q_rot"] == "FLOAT"
    assert read_expert(recognise(dst).experts[0]).attention == {"blocks.1.attn1.quant_type": "FP8_DYNAMIC"}


def test_rotation_needs_heads_of_a_power_of_two(tmp_path, dst):
    folder = write_transformer(tmp_path / "model", attention_head_dim=48)
    error = refused("E-QNT-01", UsageError, folder, dst, recipe="ascend-w8a8f8")
    assert "heads of 48 values" in error.got


def test_loras_are_folded_before_encoding(model, dst):
    down, up = torch.randn(4, 64), torch.randn(64, 4)
    lora = {f"transformer.{Q}.lora_A.weight": down, f"transformer.{Q}.lora_B.weight": up}
    lora |= {"transformer.proj_out.diff": 0.01 * torch.randn(64, 64)}
    lora |= {f"transformer.{Q}.diff_b": torch.randn(64), "transformer.patch_embedding.diff_b": torch.ones(64)}
    save_file(lora, model.parent / "style.safetensors")
    report = quantize(model, dst, scheme="mxfp8", loras=[f"transformer={model.parent}/style.safetensors:0.5"])
    source, written = tensors(CONFIG), read(dst / "transformer")
    weight = (source[f"{Q}.weight"].double() + 0.5 * up.double() @ down.double()).to(torch.bfloat16)
    assert same(written[f"{Q}.weight"], mx.encode(weight, "mxfp8").qdata)
    bias = (source[f"{Q}.bias"].double() + 0.5 * lora[f"transformer.{Q}.diff_b"].double()).to(torch.bfloat16)
    assert same(written[f"{Q}.bias"], bias.float())
    proj_out = source["proj_out.weight"].double() + 0.5 * lora["transformer.proj_out.diff"].double()
    assert same(written["proj_out.weight"], proj_out.to(torch.bfloat16))
    other = read(dst / "transformer_2")
    assert same(other["proj_out.weight"], tensors(CONFIG, 1)["proj_out.weight"])
    applied = {"keys": 5, "skipped": {}, "scale": [1.0, 1.0], "rank": [4, 4], "origins": []}
    note = "style.safetensors: 5 keys, scale 1 (no alpha in the file, rank 4) x weight 0.5"
    expected = {"file": "style.safetensors", "weight": 0.5, "expert": "transformer"}
    assert report.loras == (expected | {"applied": {"transformer": applied | {"note": note}}},)
    assert any(line.endswith(f"transformer: {note}") for line in report.lines())
    record = json_of(dst / "ascendit.json")
    assert record["loras"] == list(report.loras)
    assert record["command"].endswith("--scheme mxfp8 --lora transformer=style.safetensors:0.5")


def test_a_lora_of_another_model_is_refused_before_writing(model, dst):
    save_file({"transformer.blocks.9.attn1.to_q.diff": torch.ones(64, 64)}, model.parent / "x.safetensors")
    error = refused(
        "E-LRA-01", CheckpointError, model, dst, scheme="mxfp8", loras=[str(model.parent / "x.safetensors")]
    )
    assert "blocks.9" in str(error)


@pytest.mark.parametrize(
    ("engine", "scheme"),
    [("vllm-omni", "mxfp4"), ("vllm-omni", "int8"), ("sglang", "mxfp4"), ("mindie", "mxfp8")],
)
def test_engine_format_equals_a_repacked_folder(tmp_path, engine, scheme):
    from ascendit.convert.repack import repack

    model = write_model(tmp_path / "model", ffn_dim=192)
    quantize(model, tmp_path / "canonical", scheme=scheme)
    quantize(model, tmp_path / "direct", scheme=scheme, engine=engine)
    repack(tmp_path / "canonical", tmp_path / "repacked", engine=engine)
    ours, theirs = (
        {p.relative_to(tmp_path / name): p for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("direct", "repacked")
    )
    assert ours.keys() == theirs.keys()
    for path, file in ours.items():
        if path.suffix == ".safetensors":
            a, b = read(file.parent), read(theirs[path].parent)
            assert a.keys() == b.keys() and all(same(a[n], b[n]) for n in a)
        elif path.suffix == ".json" and path.name != "ascendit.json":
            assert json_of(file) == json_of(theirs[path]), path
        assert file.stat().st_mode == theirs[path].stat().st_mode, path


def test_a_scheme_that_the_engine_cannot_load_is_refused_first(model, dst):
    error = refused("E-ENG-01", UsageError, model, dst, scheme="mxfp4_dualscale", engine="sglang")
    assert "sglang" in error.got


# ---- errors -------------------------------------------------------------------------------------


def test_nan_names_the_layer_and_the_row(tmp_path, dst, monkeypatch):
    def spoil(values):
        values[f"{Q}.weight"][37, 3] = torch.inf

    folder = write_transformer(tmp_path / "model", edit=spoil)
    monkeypatch.setattr(reader, "BLOCK_BYTES", 10 * 128)
    for scheme in ("mxfp8", "int8", "mxfp4_dualscale"):
        error = refused("E-QNT-01", CheckpointError, folder, dst, scheme=scheme)
        assert f"{Q}.weight has NaN or infinity in row 37" in error.got and f'keep=["{Q}"]' in error.fix
    quantize(folder, dst, scheme="mxfp8", keep=[Q])
    assert read(dst / "transformer")[f"{Q}.weight"][37, 3] == torch.inf


def test_ti2v_in_four_bits_needs_force(tmp_path, dst):
    folder = write_transformer(tmp_path / "model", **TI2V)
    for scheme in ("mxfp4", "mxfp4_dualscale"):
        error = refused("E-QNT-02", UsageError, folder, dst, scheme=scheme)
        assert "TI2V-5B" in error.got and "force=True" in error.needs and "mxfp8" in error.fix
    quantize(folder, dst.parent / "8", scheme="mxfp8")
    assert quantize(folder, dst, scheme="mxfp4", force=True).schemes["mxfp4"] == 20


def test_bad_calls(model, dst):
    assert "mxfp8" in refused("E-USE-01", UsageError, model, dst).needs
    refused("E-USE-02", UsageError, model.parent / "none", dst, scheme="mxfp8")
    refused("E-USE-05", UsageError, model, dst, scheme="mxfp8", keep=["blocks.2.*"])
    refused("E-USE-01", UsageError, model, dst, scheme="mxfp8", engine="tgi")
    refused("E-USE-06", UsageError, model, model / "out", scheme="mxfp8")
    error = refused("E-QNT-01", UsageError, model, dst, scheme="mxfp8", keep=["*"])
    assert "quantizes no layer" in error.got
    dst.mkdir()
    with pytest.raises(UsageError, match="E-USE-03"):
        quantize(model, dst, scheme="mxfp8")
    assert not any(dst.iterdir())


def test_a_full_disk_leaves_no_output(model, dst, monkeypatch):
    def full(fd: int, data: memoryview, offset: int) -> None:
        if len(data) == 64 * 64 and offset > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_at(fd, data, offset)

    monkeypatch.setattr("ascendit.checkpoint.writer.write_at", full)
    error = refused("E-ENV-04", EnvironmentProblem, model, dst, scheme="mxfp8")
    assert "No space left" in error.got


def test_smoothing_of_another_shape_or_expert_is_refused(model, dst):
    wrong = {"transformer": {Q: torch.ones(63)}}
    error = refused("E-USE-05", UsageError, model, dst, scheme="mxfp4", smoothing=wrong)
    assert "shape (63,)" in error.got
    wrong = {"high": {Q: torch.ones(64)}}
    error = refused("E-USE-05", UsageError, model, dst, scheme="mxfp4", smoothing=wrong)
    assert "transformer, transformer_2" in error.needs


def test_float64_is_rounded_or_refused(tmp_path, dst):
    folder = write_transformer(tmp_path / "model", dtype=torch.float64)
    assert "float64" in refused("E-QNT-01", UsageError, folder, dst, scheme="mxfp8").got
    quantize(folder, dst, recipe="ascend-w8a8f8")
    quantize(write_transformer(tmp_path / "narrow"), tmp_path / "out2", recipe="ascend-w8a8f8")
    from_float64, from_bf16 = read(dst / "transformer"), read(tmp_path / "out2" / "transformer")
    assert all(same(from_float64[name], from_bf16[name]) for name in from_bf16)


def test_float16_has_no_msmodelslim_arithmetic(tmp_path, dst):
    folder = write_transformer(tmp_path / "model", dtype=torch.float16)
    error = refused("E-QNT-01", UsageError, folder, dst, scheme="mxfp8", scale_rule="msms:minmax")
    assert "float16" in error.got and "round_to" in error.fix


# ---- reports ------------------------------------------------------------------------------------


def test_the_report_has_counts_and_reasons(model, dst):
    report = quantize(model, dst, scheme="mxfp8", keep=["blocks.0.attn1.*"])
    expert = report.experts[0]
    before = sum(t.nbytes for t in tensors(CONFIG).values())
    assert expert.bytes_before == before and report.bytes_before == 2 * before
    assert expert.bytes_after == sum(t.nbytes for t in read(dst / "transformer").values())
    weights = sum(t.numel() for t in tensors(CONFIG).values())
    assert expert.bits_per_weight == pytest.approx(8 * expert.bytes_after / weights)
    assert expert.kept == {
        "not a linear of the blocks": ("condition_embedder.*", "proj_out"),
        "--keep blocks.0.attn1.*": ("blocks.0.attn1.*",),
    }
    assert not expert.sqnr
    text = "\n".join(report.lines())
    assert "blocks.0.attn1.*  (--keep blocks.0.attn1.*)" in text and "bits/weight" in text


def test_sqnr_of_every_layer_and_the_ten_worst(model, dst):
    def spoil(values):
        values["blocks.1.ffn.net.2.weight"][:, ::32] *= 3000  # outliers leave few levels for their blocks

    folder = write_transformer(model.parent / "bare", edit=spoil)
    report = quantize(folder, dst, scheme="mxfp4", report=True)
    expert, source = report.experts[0], read(folder)
    assert len(expert.sqnr) == 20 and len(expert.worst) == 10
    for layer, value in expert.sqnr.items():
        weight = source[f"{layer}.weight"]
        exact = mx.sqnr(weight.float(), mx.decode(mx.encode(weight, "mxfp4"), torch.float32))
        assert value == pytest.approx(exact, abs=0.01), layer
    assert [v for _, v in expert.worst] == sorted(expert.sqnr.values())[:10]
    card = (dst / "README.md").read_text()
    assert "Signal to quantization noise ratio" in card and f"`{expert.worst[0][0]}`" in card
    assert len(report.as_dict()["experts"][0]["sqnr_db"]) == 20


def test_a_dry_run_writes_nothing(model, dst):
    before = {p for p in model.parent.rglob("*")}
    report = quantize(model, dst, scheme="mxfp8", dry_run=True)
    assert report.dry_run and {p for p in model.parent.rglob("*")} == before
    done = quantize(model, dst, scheme="mxfp8")
    assert (report.bytes_after, report.schemes) == (done.bytes_after, done.schemes)
    assert "nothing written" in "\n".join(report.lines()) and report.warnings == ()
    again = quantize(model, dst, scheme="mxfp8", dry_run=True)
    assert again.warnings == (f"{dst} already exists: without --dry-run this is an error",)


def test_progress_counts_every_byte_of_the_source(model, dst):
    events: list[Progress] = []
    report = quantize(model, dst, scheme="mxfp8", on_progress=events.append)
    done = [event.step for event in events]
    assert done == sorted(done) and done[-1] == events[-1].total == report.bytes_before
    assert {event.stage for event in events} == {"transformer", "transformer_2"}


def test_warnings(tmp_path, dst):
    folder = write_transformer(tmp_path / "i2v", **I2V, ffn_dim=97)
    report = quantize(folder, dst, recipe="ascend-w4a4")
    assert report.warnings[0].startswith("recipe ascend-w4a4 is published for t2v")
    report = quantize(folder, tmp_path / "b", scheme="mxfp4_dualscale", dry_run=True)
    assert any("K is odd" in w and "ffn.net.2" in w for w in report.warnings)
    assert any("not a multiple of 512" in w and "attn1" in w for w in report.warnings)
    report = quantize(folder, tmp_path / "c", scheme="mxfp8", dry_run=True)
    assert [w for w in report.warnings if "multiple of 32" in w] and len(report.warnings) == 1


def test_the_rules_depend_on_the_kind_of_model(tmp_path, dst):
    folder = write_transformer(tmp_path / "i2v", **I2V)
    quantize(folder, dst, recipe="ascend-w8a8f8")
    encoded = mx.encode(read(folder)[f"{Q}.weight"], "mxfp8", scale_rule="msms:minmax")
    assert same(read(dst / "transformer")[f"{Q}.weight_scale"], encoded.scale)
    assert "pipeline_tag: image-to-video" in (dst / "README.md").read_text()
