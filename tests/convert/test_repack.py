"""Repacking real exports: names, tensors, numbers, and back again. Hand-written readers are the oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert import exports
from kill import SRC, contents, kill_often, moments, python
from torch import Tensor

from ascendit import mx
from ascendit.convert.repack import repack
from ascendit.errors import CheckpointError, UsageError
from ascendit.progress import Progress

MADE = {"ascendit.json", "README.md"}
"""These tell from what and by which command a folder was made."""


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_bytes()))


def weights_and_json(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name not in MADE}


@pytest.mark.parametrize("source", exports.ALL, ids=lambda folder: folder.name)
def test_real_exports_become_canonical(source: Path, tmp_path: Path) -> None:
    report = repack(source, tmp_path / "out", check=True)
    assert report.checked and report.to == "diffusers" and report.path == tmp_path / "out"
    assert {e.name for e in report.experts} == set(exports.experts(source))
    for name, folder in exports.experts(source).items():
        wanted = {exports.diffusers_name(key): x for key, x in exports.tensors(folder).items()}
        found = exports.tensors(tmp_path / "out" / name)
        assert found.keys() == wanted.keys()
        expected, layers = exports.by_layer(wanted), exports.by_layer(found)
        for layer, roles in layers.items():
            assert torch.equal(exports.decoded(roles), exports.decoded(expected[layer])), layer
            assert torch.equal(decode(roles), exports.decoded(expected[layer])), layer
        for key, tensor in found.items():
            coded = key.rpartition(".")[0] in layers and "weight_scale" in layers[key.rpartition(".")[0]]
            dtype = torch.float32 if coded and key.endswith((".bias", "_offset")) else wanted[key].dtype
            assert tensor.dtype == dtype or key.endswith("weight_scale"), key
            assert torch.equal(tensor.float(), wanted[key].float()), key


def decode(roles: dict[str, Tensor]) -> Tensor:
    """By `mx.decode`, from the dtypes of the canonical table."""
    weight, scale = roles["weight"], roles.get("weight_scale")
    if scale is None:
        return weight.float()
    dual = roles.get("weight_dual_scale")
    kind = {torch.int8: "int8", torch.float8_e4m3fn: "mxfp8", torch.uint8: "mxfp4"}[weight.dtype]
    kind += "_dualscale" if dual is not None else ""
    n, k = weight.shape
    shape = (n, 2 * k if weight.dtype == torch.uint8 else k)
    return mx.decode(mx.Encoded(weight, scale, dual, kind, -1, shape), torch.float32)


@pytest.mark.parametrize("source", exports.ALL, ids=lambda folder: folder.name)
def test_manifest_and_config_say_the_same_as_the_export(source: Path, tmp_path: Path) -> None:
    repack(source, tmp_path / "out")
    for name, folder in exports.experts(source).items():
        wanted = {exports.diffusers_name(key): value for key, value in exports.manifest(folder).items()}
        found = exports.manifest(tmp_path / "out" / name)
        assert found == wanted
        assert list(found)[-1] == "model_quant_type"
        stored = list(json_header(tmp_path / "out" / name / "diffusion_pytorch_model.safetensors"))
        assert list(found)[: len(stored)] == stored, "the manifest is in write order"
        config = config_of(tmp_path / "out" / name)
        assert config["_class_name"] == "WanTransformer3DModel"
        assert config["num_layers"] == (6 if exports.CASCADE in source.name else 1)


def json_header(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    header = dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))
    header.pop("__metadata__")
    return header


@pytest.mark.parametrize("to", ["wan", "mindie"])
@pytest.mark.parametrize("source", exports.ALL, ids=lambda folder: folder.name)
def test_there_and_back_gives_the_same_bytes(source: Path, to: str, tmp_path: Path) -> None:
    repack(source, tmp_path / "first")
    options: dict[str, Any] = {"to": "wan"} if to == "wan" else {"engine": "mindie"}
    report = repack(tmp_path / "first", tmp_path / "other", **options)
    assert all(e.rewritten_bytes == 0 and e.num_renamed >= e.num_tensors - 2 for e in report.experts)
    repack(tmp_path / "other", tmp_path / "again")
    assert weights_and_json(tmp_path / "first") == weights_and_json(tmp_path / "again")


def test_wan_names_and_folders(tmp_path: Path) -> None:
    repack(exports.SMOOTH, tmp_path / "cascade", to="wan")
    repack(exports.MXFP8, tmp_path / "single", to="wan")
    assert {p.name for p in (tmp_path / "cascade").iterdir()} == {*exports.FOLDERS.values(), *MADE}
    for folder, source in (
        ("cascade/high_noise_model", exports.SMOOTH / "high_noise_model"),
        ("single", exports.MXFP8),
    ):
        found = exports.tensors(tmp_path / folder)
        wanted = exports.tensors(source)
        assert found.keys() == {name.replace(".linear.", ".").replace(".div.", ".") for name in wanted}
        config = config_of(tmp_path / folder)
        assert config["_class_name"] == "WanModel" and config["model_type"] in ("t2v", "ti2v")
    single = config_of(tmp_path / "single")
    original = config_of(exports.MXFP8)
    for key in (
        "dim",
        "ffn_dim",
        "freq_dim",
        "in_dim",
        "out_dim",
        "num_heads",
        "num_layers",
        "eps",
        "model_type",
    ):
        assert single[key] == original[key], key


def test_a_smoothed_layer_that_is_kept_stays_as_it_is(tmp_path: Path) -> None:
    """Its weight is W * s, which only makes sense together with `mul_scale`."""
    repack(exports.SMOOTH, tmp_path / "out")
    for name, folder in exports.experts(exports.SMOOTH).items():
        wanted, found = exports.tensors(folder), exports.tensors(tmp_path / "out" / name)
        told = exports.manifest(tmp_path / "out" / name)
        for role, old in (
            ("weight", "linear.weight"),
            ("bias", "linear.bias"),
            ("mul_scale", "div.mul_scale"),
        ):
            key = f"blocks.0.attn1.to_q.{role}"
            assert torch.equal(found[key], wanted[f"blocks.0.self_attn.q.{old}"])
            assert found[key].dtype == wanted[f"blocks.0.self_attn.q.{old}"].dtype
            assert told[key] == "FLOAT"
        assert config_of(tmp_path / "out" / name)["quantization_config"] == {"quant_method": "ascendit"}


def test_old_int8_exports_are_widened_without_a_change(tmp_path: Path) -> None:
    report = repack(exports.LEGACY, tmp_path / "out")
    assert all(e.rewritten == {"to float32": 195} for e in report.experts)  # scale, offset, bias of 65 layers
    found = exports.tensors(tmp_path / "out" / "transformer")
    scale = found["blocks.0.attn1.to_q.weight_scale"]
    wanted = exports.tensors(exports.LEGACY / "high_noise_model")["blocks.0.self_attn.q.weight_scale"]
    assert scale.dtype == torch.float32 and scale.shape == (64, 1) and wanted.dtype == torch.bfloat16
    assert torch.equal(scale, wanted.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_scale_for_all_rows(dtype: torch.dtype, tmp_path: Path) -> None:
    """`mm_tensor` of the old calibrator: scale and offset of shape [1]."""

    def one(found: dict[str, Tensor], told: dict[str, Any]) -> None:
        name = "blocks.0.self_attn.q"
        found[f"{name}.weight_scale"] = torch.tensor([0.375], dtype=dtype)
        found[f"{name}.weight_offset"] = torch.zeros(1, dtype=dtype)

    source = exports.changed(exports.LEGACY, tmp_path / "source", one)
    repack(source, tmp_path / "out", check=True)
    found = exports.tensors(tmp_path / "out" / "transformer_2")
    assert torch.equal(found["blocks.0.attn1.to_q.weight_scale"], torch.full((64, 1), 0.375))
    assert torch.equal(found["blocks.0.attn1.to_q.weight_offset"], torch.zeros(64, 1))


# ---- other layouts ------------------------------------------------------------------------------


def canonical(source: Path, target: Path) -> dict[str, bytes]:
    """What repacking makes of it. Blanks after a header depend on where the bytes lay before."""
    repack(source, target)
    return exports.without_padding(weights_and_json(target))


@pytest.mark.parametrize("container", ["e4m3", "bf16"])
@pytest.mark.parametrize("source", [exports.MXFP4, exports.DUAL, exports.SMOOTH], ids=lambda f: f.name)
def test_fp4_in_a_wider_container_is_packed(source: Path, container: str, tmp_path: Path) -> None:
    def widen(found: dict[str, Tensor], told: dict[str, Any]) -> None:
        for name, tensor in found.items():
            if tensor.dtype == torch.uint8 and name.endswith("weight"):
                wide = exports.unpacked(tensor)
                found[name] = wide.to(torch.float8_e4m3fn if container == "e4m3" else torch.bfloat16)

    wide = exports.changed(source, tmp_path / "wide", widen)
    report = repack(wide, tmp_path / "out", check=True)
    assert all("FP4 in another container" in e.rewritten for e in report.experts)
    found = exports.without_padding(weights_and_json(tmp_path / "out"))
    assert found == canonical(source, tmp_path / "packed")


def test_a_number_that_is_no_fp4_is_refused(tmp_path: Path) -> None:
    def spoil(found: dict[str, Tensor], told: dict[str, Any]) -> None:
        name = "blocks.0.ffn.2.weight"
        wide = exports.unpacked(found[name])
        wide[0, 3] = 5.0
        found[name] = wide.to(torch.float8_e4m3fn)

    source = exports.changed(exports.MXFP4, tmp_path / "source", spoil)
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.ffn\.2\.weight has 1 values that FP4 cannot represent"
    ) as e:
        repack(source, tmp_path / "out")
    assert e.value.code == "E-CKP-04"
    assert list(tmp_path.iterdir()) == [source], "nothing is left behind"


@pytest.mark.parametrize(
    "source", [exports.MXFP4, exports.MXFP8, exports.DUAL, exports.INT8], ids=lambda f: f.name
)
def test_folders_merged_for_sglang(source: Path, tmp_path: Path) -> None:
    first = canonical(source, tmp_path / "first")
    config = config_of(tmp_path / "first" / "transformer")
    config.pop("quantization_config", None)
    merged = exports.merged(source, tmp_path / "merged", config, None)
    assert canonical(merged, tmp_path / "out") == first


MARKERS = {
    exports.MXFP8: {"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": True},
    exports.MXFP4: {"quant_method": "mxfp4", "is_checkpoint_mxfp4_serialized": True, "ignored_layers": []},
    exports.DUAL: {
        "quant_method": "mxfp4_dualscale",
        "is_checkpoint_serialized": True,
        "ignored_layers": [
            *(f"blocks.0.{name}" for name in ("attn1.to_qkv", "attn1.to_out", "ffn.net_0.proj", "ffn.net_2")),
            *(f"blocks.0.attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out")),
            "blocks.3.attn2.to_out",
            "proj_out",
        ],
    },
}


@pytest.mark.parametrize("described", [True, False], ids=["manifest", "marker-alone"])
@pytest.mark.parametrize("source", MARKERS, ids=lambda f: f.name)
def test_folders_merged_for_vllm_omni(source: Path, described: bool, tmp_path: Path) -> None:
    first = canonical(source, tmp_path / "first")
    config = config_of(tmp_path / "first" / "transformer")
    config.pop("quantization_config", None)
    merged = exports.merged(source, tmp_path / "merged", config, MARKERS[source])
    if not described:
        for file in merged.glob("*/quant_model_description.json"):
            file.unlink()
    found = canonical(merged, tmp_path / "out")
    differ = {name for name in first if first[name] != found[name]}
    # Without a manifest nothing tells that an attention was to be quantized.
    assert differ <= (set() if described else {"transformer/quant_model_description.json"})


def test_ascend_v1_names_and_shards(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tmp_path / "source"
    source.mkdir()
    found = exports.tensors(exports.DUAL / "high_noise_model")
    told = exports.manifest(exports.DUAL / "high_noise_model")
    told = {
        k: "W4A4_MXFP4_DUALSCALE" if k.endswith(".bias") and found[k].dtype == torch.float32 else v
        for k, v in told.items()
    }
    names = list(found)
    files = [f"quant_model_weights-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    save_file({n: found[n] for n in names[::2]}, source / files[0])
    save_file({n: found[n] for n in names[1::2]}, source / files[1])
    where = {n: files[i % 2] for i, n in enumerate(names)}
    (source / "quant_model_weights.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    (source / "quant_model_description.json").write_text(
        json.dumps({"version": "1.0.0", "group_size": 32, **told})
    )
    repack(source, tmp_path / "out", check=True)
    again = exports.tensors(tmp_path / "out" / "transformer")
    assert {exports.diffusers_name(n) for n in names} == set(again)
    manifest = exports.manifest(tmp_path / "out" / "transformer")
    assert manifest["blocks.1.attn1.to_q.bias"] == "FLOAT" and manifest["version"] == "1.0.0"
    assert manifest["model_quant_type"] == "W4A4_MXFP4_DUALSCALE"


def test_what_is_unknown_and_harmless_is_kept(tmp_path: Path) -> None:
    def static(found: dict[str, Tensor], told: dict[str, Any]) -> None:
        for x in "qkv":
            found[f"blocks.0.self_attn.fa3_{x}.scale"] = torch.rand(4, 1)
            told[f"blocks.0.self_attn.fa3_{x}.scale"] = "FAQuant"
        told |= {"blocks.0.self_attn.quant_type": "FP8", "fa_quant_type": "FAKQuant"}

    source = exports.changed(exports.MXFP8, tmp_path / "source", static)
    repack(source, tmp_path / "out")
    repack(tmp_path / "out", tmp_path / "mindie", engine="mindie")
    told = exports.manifest(tmp_path / "out" / "transformer")
    assert told["blocks.0.attn1.fa3_q.scale"] == "FAQuant" and told["fa_quant_type"] == "FAKQuant"
    assert told["blocks.0.attn1.quant_type"] == "FP8"
    wanted, found = exports.tensors(source), exports.tensors(tmp_path / "mindie")
    assert torch.equal(found["blocks.0.self_attn.fa3_v.scale"], wanted["blocks.0.self_attn.fa3_v.scale"])
    assert exports.manifest(tmp_path / "mindie") == exports.manifest(source)


# ---- FP8 in tiles -------------------------------------------------------------------------------


def tiled(folder: Path, inverse: torch.dtype = torch.float32) -> Path:
    """FP8 with `weight_scale_inv`, as FP8 checkpoints have it, made from the smallest real model."""
    from safetensors.torch import save_file

    source = exports.EXPORTS.parent / "source_models" / exports.SINGLE
    found = exports.tensors(source)
    torch.manual_seed(3)
    for name in [n for n in found if n.startswith("blocks.") and n.endswith("weight") and found[n].ndim == 2]:
        n, k = found[name].shape
        scale = torch.rand(-(-n // 128), -(-k // 128)).mul(0.01).add(1e-4).to(inverse)
        found[name] = (torch.randn(n, k) * 60).to(torch.float8_e4m3fn)
        found[name.replace("weight", "weight_scale_inv")] = scale
    folder.mkdir()
    save_file(found, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def by_hand(qdata: Tensor, scale: Tensor) -> np.ndarray[Any, Any]:
    """float32 code x scale of its tile, rounded to the nearest even bfloat16; as bits."""
    raw = qdata.view(torch.uint8).numpy().astype(np.int32)
    exponent, fraction = raw >> 3 & 15, raw & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    values = (np.where(raw & 128, -size, size)).astype(np.float32)
    wide = np.kron(scale.float().numpy(), np.ones((128, 128), np.float32))[: raw.shape[0], : raw.shape[1]]
    bits = (values * wide).astype(np.float32).view(np.uint32)
    return np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, np.uint16)


@pytest.mark.parametrize("inverse", [torch.float32, torch.bfloat16])
def test_fp8_in_tiles_becomes_bf16(inverse: torch.dtype, tmp_path: Path) -> None:
    source = tiled(tmp_path / "source", inverse)
    report = repack(source, tmp_path / "out", check=True)
    assert report.experts[0].rewritten == {"FP8 tiles to BF16": 10} and report.schemes == {"bf16": 10}
    before, after = exports.tensors(source), exports.tensors(tmp_path / "out" / "transformer")
    assert {exports.diffusers_name(n) for n in before if not n.endswith("_inv")} == set(after)
    for name, scale in before.items():
        if name.endswith("_inv"):
            found = after[exports.diffusers_name(name).replace("_scale_inv", "")]
            assert found.dtype == torch.bfloat16
            wanted = by_hand(before[name.replace("_scale_inv", "")], scale)
            assert np.array_equal(found.view(torch.uint16).numpy(), wanted), name
    assert not (tmp_path / "out" / "transformer" / "quant_model_description.json").exists()
    assert "quantization_config" not in config_of(tmp_path / "out" / "transformer")


@pytest.mark.parametrize("lost", ["weight", "weight_scale_inv"])
def test_fp8_in_tiles_is_paired_strictly(lost: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tiled(tmp_path / "source")
    found = exports.tensors(source)
    del found[f"blocks.0.ffn.0.{lost}"]
    save_file(found, source / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn\.(0|net\.0\.proj)\.weight") as e:
        repack(source, tmp_path / "out")
    assert e.value.code == "E-CKP-08" and not (tmp_path / "out").exists()


# ---- what is refused ----------------------------------------------------------------------------


def poison(export: Path, name: str, value: float, tmp_path: Path) -> Path:
    def spoil(found: dict[str, Tensor], told: dict[str, Any]) -> None:
        assert name in found, sorted(found)
        found[name].view(-1)[-1] = value

    return exports.changed(export, tmp_path / "source", spoil)


@pytest.mark.parametrize(
    ("export", "name", "value", "engine"),
    [
        (exports.MXFP8, "blocks.0.ffn.2.weight_scale", 255, None),
        (exports.DUAL, "blocks.1.ffn.2.weight_scale", 255, "mindie"),
        (exports.INT8, "blocks.0.ffn.2.weight_offset", 1.0, None),
        (exports.INT8, "blocks.0.ffn.2.weight_offset", 1.0, "vllm-omni"),  # which has none
        (exports.LEGACY, "blocks.0.ffn.2.weight_offset", -2.0, None),
        (exports.SMOOTH, "blocks.1.ffn.2.div.mul_scale", 0.0, None),
        (exports.SMOOTH, "blocks.1.ffn.2.div.mul_scale", -1.0, None),
        (exports.SMOOTH, "blocks.0.ffn.2.div.mul_scale", float("inf"), None),
    ],
    ids=lambda x: x.name if isinstance(x, Path) else str(x),
)
def test_scales_that_cannot_be(
    export: Path, name: str, value: float, engine: str | None, tmp_path: Path
) -> None:
    source = poison(export, name, value, tmp_path)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as e:
        repack(source, tmp_path / "out", engine=engine)
    assert e.value.code == "E-CKP-08"
    assert list(tmp_path.iterdir()) == [source], "nothing is left behind"


def test_the_output_may_not_exist_nor_lie_inside(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="already exists") as e:
        repack(exports.MXFP8, tmp_path / "out")
    assert e.value.code == "E-USE-03"
    source = exports.changed(exports.MXFP8, tmp_path / "source", lambda found, told: None)
    with pytest.raises(UsageError, match="is inside the source") as e:
        repack(source, source / "out")
    assert e.value.code == "E-USE-06"


# ---- base ---------------------------------------------------------------------------------------


def base_for(source: Path, tmp_path: Path, **changes: Any) -> Path:
    """A pipeline folder that fits `source`, with heads; `changes` go into the configs."""
    repack(source, tmp_path / "plain")
    configs = {}
    for name in exports.experts(source):
        config = config_of(tmp_path / "plain" / name)
        heads = {"num_attention_heads": 2, "attention_head_dim": 32} if exports.CASCADE in source.name else {}
        configs[name] = {**config, **heads, "image_dim": None, **changes}
    return exports.pipeline(tmp_path / "base", configs)


@pytest.mark.parametrize("copy", [False, True])
def test_a_base_gives_the_other_parts_and_the_configs(copy: bool, tmp_path: Path) -> None:
    base = base_for(exports.INT8, tmp_path, rope_max_seq_len=77)
    report = repack(exports.INT8, tmp_path / "out", base=base, copy=copy)
    assert report.warnings == () and set(report.linked) >= {"text_encoder", "vae", "model_index.json"}
    for part in ("scheduler", "text_encoder", "tokenizer", "vae"):
        assert contents(tmp_path / "out" / part) == contents(base / part)
        assert (tmp_path / "out" / part).is_symlink() is not copy
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "Apache-2.0"
    for name in ("transformer", "transformer_2"):
        config = config_of(tmp_path / "out" / name)
        assert (config["num_attention_heads"], config["rope_max_seq_len"]) == (2, 77)
        assert config["quantization_config"]["quant_method"] == "int8"
    again = repack(tmp_path / "out", tmp_path / "again")
    assert again.linked == report.linked, "a pipeline folder is its own base"
    assert config_of(tmp_path / "again" / "transformer") == config_of(tmp_path / "out" / "transformer")


def test_without_heads_the_config_has_null_and_a_warning(tmp_path: Path) -> None:
    report = repack(exports.INT8, tmp_path / "out")
    assert config_of(tmp_path / "out" / "transformer")["num_attention_heads"] is None
    assert any("number of attention heads is unknown" in w for w in report.warnings)
    assert any("--base" in w for w in report.warnings)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_layers": 7}, r"missing: blocks\.6"),
        ({"num_layers": 5}, r"not in the base: blocks\.5"),
        ({"ffn_dim": 256}, r"ffn\.net\.0\.proj\.\w+ \[128.*, not \[256"),
        ({"num_attention_heads": 4}, r"with another shape"),
    ],
)
def test_a_base_of_another_shape(changes: dict[str, int], told: str, tmp_path: Path) -> None:
    base = base_for(exports.INT8, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=told) as e:
        repack(exports.INT8, tmp_path / "out", base=base)
    assert e.value.code == "E-CKP-04"
    assert str(exports.INT8) in e.value.got and str(base) in e.value.got, "names both"
    assert not (tmp_path / "out").exists()


def test_a_base_with_another_number_of_experts(tmp_path: Path) -> None:
    base = base_for(exports.MXFP8, tmp_path)
    with pytest.raises(CheckpointError, match=r"has two experts, but --base .* has one transformer") as e:
        repack(exports.INT8, tmp_path / "out", base=base)
    assert e.value.code == "E-CKP-04"


def test_a_base_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--base .* is an msModelSlim export") as e:
        repack(exports.MXFP8, tmp_path / "out", base=exports.MXFP4)
    assert e.value.code == "E-USE-01"


# ---- the run itself -----------------------------------------------------------------------------


def test_dry_run_tells_everything_and_writes_nothing(tmp_path: Path) -> None:
    report = repack(exports.DUAL, tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == [] and report.dry_run
    wet = repack(exports.DUAL, tmp_path / "out")
    assert [e.as_dict() for e in report.experts] == [e.as_dict() for e in wet.experts]
    assert "nothing written" in report.lines()[-1]
    assert wet.schemes == {"mxfp4_dualscale": 98, "bf16": 22}


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    told: list[Progress] = []
    report = repack(exports.MXFP8, tmp_path / "out", on_progress=told.append)
    assert told[-1].step == told[-1].total == report.bytes_after
    assert [p.step for p in told] == sorted(p.step for p in told)


def test_renaming_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(SRC)!r})
from ascendit.convert.repack import repack
for source in sys.argv[2:]:
    repack(source, sys.argv[1] + source.rpartition("/")[2])
print(*(name for name in ("torch", "numpy") if name in sys.modules))
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
    sources = [str(exports.MXFP8), str(exports.SMOOTH), str(exports.INT8), str(exports.SHARDED)]
    argv = [sys.executable, "-c", code, f"{tmp_path}/", *sources]
    out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == "" and int(out[1]) < 60 * 1024


def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    work, wanted = tmp_path / "out", canonical(exports.DUAL, tmp_path / "whole")
    code = "from ascendit.convert.repack import repack; print('ready', flush=True); repack(*sys.argv[1:])"

    def check(found: Path) -> None:
        assert exports.without_padding(weights_and_json(found)) == wanted

    argv = python(code, exports.DUAL, work)
    assert kill_often(argv, work, moments(5, 10, 0.15), check, ready="ready")
    repack(exports.DUAL, work)
    check(work)
    assert not list(tmp_path.glob(".*")), "the rest of killed runs is gone"


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.stage == "transformer_2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack(exports.DUAL, tmp_path / "out", on_progress=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="another source") as e:
        repack(exports.DUAL, tmp_path / "out", resume=True, engine="mindie")
    assert e.value.code == "E-USE-01"
    told: list[Progress] = []
    repack(exports.DUAL, tmp_path / "out", resume=True, on_progress=told.append)
    assert told[-1].skipped > 0, "the first expert was complete"
    found = exports.without_padding(weights_and_json(tmp_path / "out"))
    assert found == canonical(exports.DUAL, tmp_path / "fresh")


def test_the_record_and_the_card(tmp_path: Path) -> None:
    report = repack(exports.DUAL, tmp_path / "out", check=True)
    record = json.loads((tmp_path / "out" / "ascendit.json").read_bytes())
    assert record["command"] == f"ascendit repack {exports.DUAL.name} -o out --check"
    assert record["decoded_sha256"] == {e.name: e.decoded_sha256 for e in report.experts}
    assert record["layers"] == report.schemes
    assert set(record["files"]) == {
        f"{n}/diffusion_pytorch_model.safetensors" for n in record["decoded_sha256"]
    }
    assert record["command"] in (tmp_path / "out" / "README.md").read_text()
