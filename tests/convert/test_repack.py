"""Repacking real exports, and back: names, tensors, values. Hand-written readers are the oracle."""

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

RECORDS = {"ascendit.json", "README.md"}
"""The files that record the source and the command of a folder."""


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_bytes()))


def weights_and_json(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name not in RECORDS}


@pytest.mark.parametrize("source", exports.ALL, ids=lambda folder: folder.name)
def test_real_exports_become_canonical(source: Path, tmp_path: Path) -> None:
    report = repack(source, tmp_path / "out", check=True)
    assert report.checked and report.to == "diffusers" and report.path == tmp_path / "out"
    assert {e.name for e in report.experts} == set(exports.experts(source))
    for name, folder in exports.experts(source).items():
        original = {exports.diffusers_name(key): x for key, x in exports.tensors(folder).items()}
        output = exports.tensors(tmp_path / "out" / name)
        assert output.keys() == original.keys()
        expected, layers = exports.by_layer(original), exports.by_layer(output)
        for layer, roles in layers.items():
            assert torch.equal(exports.decoded(roles), exports.decoded(expected[layer])), layer
            assert torch.equal(decode(roles), exports.decoded(expected[layer])), layer
        for key, tensor in output.items():
            quantized = key.rpartition(".")[0] in layers and "weight_scale" in layers[key.rpartition(".")[0]]
            dtype = torch.float32 if quantized and key.endswith((".bias", "_offset")) else original[key].dtype
            assert tensor.dtype == dtype or key.endswith("weight_scale"), key
            assert torch.equal(tensor.float(), original[key].float()), key


def test_the_space_for_copied_components_is_checked(
    tiny_t2v_single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = []

    class Stop(Exception):
        pass

    def staging(*args: Any, needs_bytes: int, **more: Any) -> None:
        needed.append(needs_bytes)
        raise Stop

    monkeypatch.setattr("ascendit.convert.repack.Staging", staging)
    for copy in (False, True):
        with pytest.raises(Stop):
            repack(tiny_t2v_single, tmp_path / "out", copy=copy)
    others = ("text_encoder", "vae", "tokenizer")
    files = (file for name in others for file in (tiny_t2v_single / name).rglob("*") if file.is_file())
    assert needed[1] - needed[0] >= sum(file.stat().st_size for file in files)


def decode(roles: dict[str, Tensor]) -> Tensor:
    """Decode with `mx.decode`; the dtypes give the scheme."""
    weight, scale = roles["weight"], roles.get("weight_scale")
    if scale is None:
        return weight.float()
    dual = roles.get("weight_dual_scale")
    scheme = {torch.int8: "int8", torch.float8_e4m3fn: "mxfp8", torch.uint8: "mxfp4"}[weight.dtype]
    scheme += "_dualscale" if dual is not None else ""
    n, k = weight.shape
    shape = (n, 2 * k if weight.dtype == torch.uint8 else k)
    return mx.decode(mx.Encoded(weight, scale, dual, scheme, -1, shape), torch.float32)


@pytest.mark.parametrize("source", exports.ALL, ids=lambda folder: folder.name)
def test_manifest_and_config_match_the_export(source: Path, tmp_path: Path) -> None:
    repack(source, tmp_path / "out")
    for name, folder in exports.experts(source).items():
        original = {exports.diffusers_name(key): value for key, value in exports.manifest(folder).items()}
        output = exports.manifest(tmp_path / "out" / name)
        assert output == original
        assert list(output)[-1] == "model_quant_type"
        stored = list(json_header(tmp_path / "out" / name / "diffusion_pytorch_model.safetensors"))
        assert list(output)[: len(stored)] == stored, "the manifest is in write order"
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
    assert {p.name for p in (tmp_path / "cascade").iterdir()} == {*exports.FOLDERS.values(), *RECORDS}
    for folder, source in (
        ("cascade/high_noise_model", exports.SMOOTH / "high_noise_model"),
        ("single", exports.MXFP8),
    ):
        output = exports.tensors(tmp_path / folder)
        original = exports.tensors(source)
        assert output.keys() == {name.replace(".linear.", ".").replace(".div.", ".") for name in original}
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


def test_a_smoothed_layer_in_bf16_is_unchanged(tmp_path: Path) -> None:
    """Its weight is W * s, which is only valid together with `mul_scale`."""
    repack(exports.SMOOTH, tmp_path / "out")
    for name, folder in exports.experts(exports.SMOOTH).items():
        original, output = exports.tensors(folder), exports.tensors(tmp_path / "out" / name)
        types = exports.manifest(tmp_path / "out" / name)
        for role, old in (
            ("weight", "linear.weight"),
            ("bias", "linear.bias"),
            ("mul_scale", "div.mul_scale"),
        ):
            key = f"blocks.0.attn1.to_q.{role}"
            assert torch.equal(output[key], original[f"blocks.0.self_attn.q.{old}"])
            assert output[key].dtype == original[f"blocks.0.self_attn.q.{old}"].dtype
            assert types[key] == "FLOAT"
        assert config_of(tmp_path / "out" / name)["quantization_config"] == {"quant_method": "ascendit"}


def test_old_int8_exports_are_converted_to_float32_exactly(tmp_path: Path) -> None:
    report = repack(exports.LEGACY, tmp_path / "out")
    assert all(e.rewritten == {"to float32": 195} for e in report.experts)  # scale, offset, bias of 65 layers
    output = exports.tensors(tmp_path / "out" / "transformer")
    scale = output["blocks.0.attn1.to_q.weight_scale"]
    original = exports.tensors(exports.LEGACY / "high_noise_model")["blocks.0.self_attn.q.weight_scale"]
    assert scale.dtype == torch.float32 and scale.shape == (64, 1) and original.dtype == torch.bfloat16
    assert torch.equal(scale, original.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_scale_for_all_rows(dtype: torch.dtype, tmp_path: Path) -> None:
    """`mm_tensor` of the old calibrator: scale and offset of shape [1]."""

    def per_tensor(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        name = "blocks.0.self_attn.q"
        tensors[f"{name}.weight_scale"] = torch.tensor([0.375], dtype=dtype)
        tensors[f"{name}.weight_offset"] = torch.zeros(1, dtype=dtype)

    source = exports.changed(exports.LEGACY, tmp_path / "source", per_tensor)
    repack(source, tmp_path / "out", check=True)
    output = exports.tensors(tmp_path / "out" / "transformer_2")
    assert torch.equal(output["blocks.0.attn1.to_q.weight_scale"], torch.full((64, 1), 0.375))
    assert torch.equal(output["blocks.0.attn1.to_q.weight_offset"], torch.zeros(64, 1))


# ---- other layouts ------------------------------------------------------------------------------


def canonical(source: Path, target: Path) -> dict[str, bytes]:
    """Contents after repacking, without header padding, which depends on the source."""
    repack(source, target)
    return exports.without_padding(weights_and_json(target))


@pytest.mark.parametrize("dtype", ["e4m3", "bf16"])
@pytest.mark.parametrize("source", [exports.MXFP4, exports.DUAL, exports.SMOOTH], ids=lambda f: f.name)
def test_fp4_in_a_wider_dtype_is_packed(source: Path, dtype: str, tmp_path: Path) -> None:
    def widen(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype == torch.uint8 and name.endswith("weight"):
                unpacked = exports.unpacked(tensor)
                tensors[name] = unpacked.to(torch.float8_e4m3fn if dtype == "e4m3" else torch.bfloat16)

    unpacked = exports.changed(source, tmp_path / "wide", widen)
    report = repack(unpacked, tmp_path / "out", check=True)
    assert all("FP4 in another container" in e.rewritten for e in report.experts)
    output = exports.without_padding(weights_and_json(tmp_path / "out"))
    assert output == canonical(source, tmp_path / "packed")


def test_a_value_that_is_not_in_fp4_is_refused(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        name = "blocks.0.ffn.2.weight"
        values = exports.unpacked(tensors[name])
        values[0, 3] = 5.0
        tensors[name] = values.to(torch.float8_e4m3fn)

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


CONFIGS = {
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


@pytest.mark.parametrize("with_manifest", [True, False], ids=["manifest", "config-alone"])
@pytest.mark.parametrize("source", CONFIGS, ids=lambda f: f.name)
def test_folders_merged_for_vllm_omni(source: Path, with_manifest: bool, tmp_path: Path) -> None:
    first = canonical(source, tmp_path / "first")
    config = config_of(tmp_path / "first" / "transformer")
    config.pop("quantization_config", None)
    merged = exports.merged(source, tmp_path / "merged", config, CONFIGS[source])
    if not with_manifest:
        for file in merged.glob("*/quant_model_description.json"):
            file.unlink()
    output = canonical(merged, tmp_path / "out")
    differ = {name for name in first if first[name] != output[name]}
    # Without a manifest, the quantization of an attention is unknown.
    assert differ <= (set() if with_manifest else {"transformer/quant_model_description.json"})


def test_ascend_v1_names_and_shards(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tmp_path / "source"
    source.mkdir()
    tensors = exports.tensors(exports.DUAL / "high_noise_model")
    types = exports.manifest(exports.DUAL / "high_noise_model")
    types = {
        k: "W4A4_MXFP4_DUALSCALE" if k.endswith(".bias") and tensors[k].dtype == torch.float32 else v
        for k, v in types.items()
    }
    names = list(tensors)
    files = [f"quant_model_weights-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    save_file({n: tensors[n] for n in names[::2]}, source / files[0])
    save_file({n: tensors[n] for n in names[1::2]}, source / files[1])
    weight_map = {n: files[i % 2] for i, n in enumerate(names)}
    (source / "quant_model_weights.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (source / "quant_model_description.json").write_text(
        json.dumps({"version": "1.0.0", "group_size": 32, **types})
    )
    repack(source, tmp_path / "out", check=True)
    again = exports.tensors(tmp_path / "out" / "transformer")
    assert {exports.diffusers_name(n) for n in names} == set(again)
    manifest = exports.manifest(tmp_path / "out" / "transformer")
    assert manifest["blocks.1.attn1.to_q.bias"] == "FLOAT" and manifest["version"] == "1.0.0"
    assert manifest["model_quant_type"] == "W4A4_MXFP4_DUALSCALE"


def test_unknown_but_harmless_tensors_are_preserved(tmp_path: Path) -> None:
    def static(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        for x in "qkv":
            tensors[f"blocks.0.self_attn.fa3_{x}.scale"] = torch.rand(4, 1)
            types[f"blocks.0.self_attn.fa3_{x}.scale"] = "FAQuant"
        types |= {"blocks.0.self_attn.quant_type": "FP8", "fa_quant_type": "FAKQuant"}

    source = exports.changed(exports.MXFP8, tmp_path / "source", static)
    repack(source, tmp_path / "out")
    repack(tmp_path / "out", tmp_path / "mindie", engine="mindie")
    types = exports.manifest(tmp_path / "out" / "transformer")
    assert types["blocks.0.attn1.fa3_q.scale"] == "FAQuant" and types["fa_quant_type"] == "FAKQuant"
    assert types["blocks.0.attn1.quant_type"] == "FP8"
    original, output = exports.tensors(source), exports.tensors(tmp_path / "mindie")
    assert torch.equal(output["blocks.0.self_attn.fa3_v.scale"], original["blocks.0.self_attn.fa3_v.scale"])
    assert exports.manifest(tmp_path / "mindie") == exports.manifest(source)


# ---- FP8 in tiles -------------------------------------------------------------------------------


def tiled(folder: Path, inverse: torch.dtype = torch.float32) -> Path:
    """FP8 with `weight_scale_inv`, as in FP8 checkpoints, made from the smallest real model."""
    from safetensors.torch import save_file

    source = exports.EXPORTS.parent / "source_models" / exports.SINGLE
    tensors = exports.tensors(source)
    torch.manual_seed(3)
    for name in [
        n for n in tensors if n.startswith("blocks.") and n.endswith("weight") and tensors[n].ndim == 2
    ]:
        n, k = tensors[name].shape
        scale = torch.rand(-(-n // 128), -(-k // 128)).mul(0.01).add(1e-4).to(inverse)
        tensors[name] = (torch.randn(n, k) * 60).to(torch.float8_e4m3fn)
        tensors[name.replace("weight", "weight_scale_inv")] = scale
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def by_hand(qdata: Tensor, scale: Tensor) -> np.ndarray[Any, Any]:
    """float32 element x scale of its tile, rounded to nearest even bfloat16; as bits."""
    raw = qdata.view(torch.uint8).numpy().astype(np.int32)
    exponent, fraction = raw >> 3 & 15, raw & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    values = (np.where(raw & 128, -size, size)).astype(np.float32)
    scales = np.kron(scale.float().numpy(), np.ones((128, 128), np.float32))[: raw.shape[0], : raw.shape[1]]
    bits = (values * scales).astype(np.float32).view(np.uint32)
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
            tensor = after[exports.diffusers_name(name).replace("_scale_inv", "")]
            assert tensor.dtype == torch.bfloat16
            original = by_hand(before[name.replace("_scale_inv", "")], scale)
            assert np.array_equal(tensor.view(torch.uint16).numpy(), original), name
    assert not (tmp_path / "out" / "transformer" / "quant_model_description.json").exists()
    assert "quantization_config" not in config_of(tmp_path / "out" / "transformer")


@pytest.mark.parametrize("lost", ["weight", "weight_scale_inv"])
def test_fp8_in_tiles_is_paired_strictly(lost: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tiled(tmp_path / "source")
    tensors = exports.tensors(source)
    del tensors[f"blocks.0.ffn.0.{lost}"]
    save_file(tensors, source / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.ffn\.(0|net\.0\.proj)\.weight") as e:
        repack(source, tmp_path / "out")
    assert e.value.code == "E-CKP-08" and not (tmp_path / "out").exists()


# ---- errors -------------------------------------------------------------------------------------


def poison(export: Path, name: str, value: float, tmp_path: Path) -> Path:
    def spoil(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        assert name in tensors, sorted(tensors)
        tensors[name].view(-1)[-1] = value

    return exports.changed(export, tmp_path / "source", spoil)


@pytest.mark.parametrize(
    ("export", "name", "value", "engine"),
    [
        (exports.MXFP8, "blocks.0.ffn.2.weight_scale", 255, None),
        (exports.DUAL, "blocks.1.ffn.2.weight_scale", 255, "mindie"),
        (exports.INT8, "blocks.0.ffn.2.weight_offset", 1.0, None),
        (exports.INT8, "blocks.0.ffn.2.weight_offset", 1.0, "vllm-omni"),  # whose int8 has no offset
        (exports.LEGACY, "blocks.0.ffn.2.weight_offset", -2.0, None),
        (exports.SMOOTH, "blocks.1.ffn.2.div.mul_scale", 0.0, None),
        (exports.SMOOTH, "blocks.1.ffn.2.div.mul_scale", -1.0, None),
        (exports.SMOOTH, "blocks.0.ffn.2.div.mul_scale", float("inf"), None),
    ],
    ids=lambda x: x.name if isinstance(x, Path) else str(x),
)
def test_invalid_scales_are_refused(
    export: Path, name: str, value: float, engine: str | None, tmp_path: Path
) -> None:
    source = poison(export, name, value, tmp_path)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as e:
        repack(source, tmp_path / "out", engine=engine)
    assert e.value.code == "E-CKP-08"
    assert list(tmp_path.iterdir()) == [source], "nothing is left behind"


def test_an_output_that_exists_or_is_inside_the_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="already exists") as e:
        repack(exports.MXFP8, tmp_path / "out")
    assert e.value.code == "E-USE-03"
    source = exports.changed(exports.MXFP8, tmp_path / "source", lambda tensors, types: None)
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
def test_a_base_gives_the_other_components_and_the_configs(copy: bool, tmp_path: Path) -> None:
    base = base_for(exports.INT8, tmp_path, rope_max_seq_len=77)
    report = repack(exports.INT8, tmp_path / "out", base=base, copy=copy)
    assert report.warnings == () and set(report.linked) >= {"text_encoder", "vae", "model_index.json"}
    for component in ("scheduler", "text_encoder", "tokenizer", "vae"):
        assert contents(tmp_path / "out" / component) == contents(base / component)
        assert (tmp_path / "out" / component).is_symlink() is not copy
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "Apache-2.0"
    for name in ("transformer", "transformer_2"):
        config = config_of(tmp_path / "out" / name)
        assert (config["num_attention_heads"], config["rope_max_seq_len"]) == (2, 77)
        assert config["quantization_config"]["quant_method"] == "int8"
    again = repack(tmp_path / "out", tmp_path / "again")
    assert again.linked == report.linked, "a pipeline folder needs no base"
    assert config_of(tmp_path / "again" / "transformer") == config_of(tmp_path / "out" / "transformer")


def test_without_heads_the_config_has_null_and_a_warning(tmp_path: Path) -> None:
    report = repack(exports.INT8, tmp_path / "out")
    assert config_of(tmp_path / "out" / "transformer")["num_attention_heads"] is None
    assert any("number of attention heads is unknown" in w for w in report.warnings)
    assert any("--base" in w for w in report.warnings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 7}, r"missing: blocks\.6"),
        ({"num_layers": 5}, r"not in the base: blocks\.5"),
        ({"ffn_dim": 256}, r"ffn\.net\.0\.proj\.\w+ \[128.*, not \[256"),
        ({"num_attention_heads": 4}, r"with another shape"),
    ],
)
def test_a_base_of_another_shape(changes: dict[str, int], message: str, tmp_path: Path) -> None:
    base = base_for(exports.INT8, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as e:
        repack(exports.INT8, tmp_path / "out", base=base)
    assert e.value.code == "E-CKP-04"
    assert str(exports.INT8) in e.value.got and str(base) in e.value.got, "names both"
    assert not (tmp_path / "out").exists()


def test_a_base_with_another_number_of_experts(tmp_path: Path) -> None:
    base = base_for(exports.MXFP8, tmp_path)
    with pytest.raises(CheckpointError, match=r"has two experts, but base=.* has one transformer") as e:
        repack(exports.INT8, tmp_path / "out", base=base)
    assert e.value.code == "E-CKP-04"


def test_a_base_that_is_not_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="base=.* is an msModelSlim export") as e:
        repack(exports.MXFP8, tmp_path / "out", base=exports.MXFP4)
    assert e.value.code == "E-USE-01"


# ---- the run ------------------------------------------------------------------------------------


def test_a_dry_run_reports_everything_and_writes_nothing(tmp_path: Path) -> None:
    report = repack(exports.DUAL, tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == [] and report.dry_run
    real = repack(exports.DUAL, tmp_path / "out")
    assert [e.as_dict() for e in report.experts] == [e.as_dict() for e in real.experts]
    assert "nothing written" in report.lines()[-1]
    assert real.schemes == {"mxfp4_dualscale": 98, "bf16": 22}


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    events: list[Progress] = []
    report = repack(exports.MXFP8, tmp_path / "out", on_progress=events.append)
    assert events[-1].step == events[-1].total == report.bytes_after
    assert [p.step for p in events] == sorted(p.step for p in events)


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


def test_a_killed_run_leaves_no_folder_that_looks_complete(tmp_path: Path) -> None:
    work, original = tmp_path / "out", canonical(exports.DUAL, tmp_path / "complete")
    code = "from ascendit.convert.repack import repack; print('ready', flush=True); repack(*sys.argv[1:])"

    def check(folder: Path) -> None:
        assert exports.without_padding(weights_and_json(folder)) == original

    argv = python(code, exports.DUAL, work)
    assert kill_often(argv, work, moments(5, 10, 0.15), check, ready="ready")
    repack(exports.DUAL, work)
    check(work)
    assert not list(tmp_path.glob(".*")), "files of killed runs are removed"


def test_a_stopped_run_can_be_resumed(tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.stage == "transformer_2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repack(exports.DUAL, tmp_path / "out", on_progress=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="another source") as e:
        repack(exports.DUAL, tmp_path / "out", resume=True, engine="mindie")
    assert e.value.code == "E-USE-01"
    events: list[Progress] = []
    repack(exports.DUAL, tmp_path / "out", resume=True, on_progress=events.append)
    assert events[-1].skipped > 0, "the first expert was complete"
    output = exports.without_padding(weights_and_json(tmp_path / "out"))
    assert output == canonical(exports.DUAL, tmp_path / "fresh")


def test_the_record_and_the_card(tmp_path: Path) -> None:
    report = repack(exports.DUAL, tmp_path / "out", check=True)
    record = json.loads((tmp_path / "out" / "ascendit.json").read_bytes())
    assert record["command"] == f"ascendit repack {exports.DUAL.name} -o out --check"
    assert record["decoded_sha256"] == {e.name: e.decoded_sha256 for e in report.experts}
    assert record["layers"] == report.schemes
    names = ("diffusion_pytorch_model.safetensors", "config.json", "quant_model_description.json")
    assert set(record["files"]) == {f"{n}/{name}" for n in record["decoded_sha256"] for name in names}
    assert record["files"].keys() == record["sizes"].keys()
    assert record["command"] in (tmp_path / "out" / "README.md").read_text()
