"""The format of each engine against the loaders in `engines.py`, and checkpoints that engines cannot load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert import engines, exports
from torch import Tensor

from ascendit.convert.repack import repack
from ascendit.errors import UsageError
from ascendit.quant.engines import ENGINES
from ascendit.weights.engine_formats import check_engine, model_kind, target_format, traits_of, wan_config

REFUSED = {
    (exports.DUAL, "sglang"): "its loader of dual-scale layers fails",
    (exports.SMOOTH, "vllm-omni"): "it silently ignores mul_scale",
    (exports.SMOOTH, "sglang"): "its loader of dual-scale layers fails",
    (exports.LEGACY, "vllm-omni"): "embedders and proj_out as unquantized layers",
    (exports.LEGACY, "sglang"): "embedders as unquantized layers",
}


def problems(folder: Path, engine: str, blocks: int = 6) -> list[str]:
    """Problems that `engine` would have with a folder."""
    if engine == "mindie":
        return [
            p for expert in exports.experts(folder).values() for p in engines.mindie_problems(expert, blocks)
        ]
    load = engines.omni_problems if engine == "vllm-omni" else engines.sglang_problems
    return [p for expert in sorted(folder.glob("transformer*")) for p in load(expert)]


@pytest.mark.parametrize("canonical_first", [True, False], ids=["canonical", "export"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("source", exports.ALL, ids=lambda folder: folder.name)
def test_real_exports(source: Path, engine: str, canonical_first: bool, tmp_path: Path) -> None:
    if canonical_first:
        repack(source, tmp_path / "canonical")
    start = tmp_path / "canonical" if canonical_first else source
    if reason := REFUSED.get((source, engine)):
        with pytest.raises(UsageError, match=reason) as e:
            repack(start, tmp_path / "out", engine=engine)
        assert e.value.code == "E-ENG-01"
        assert f"{engine} {ENGINES[engine].version} cannot run transformer" in e.value.got
        assert "mindie can run it" in e.value.fix or "vllm-omni, mindie can run it" in e.value.fix
        assert not (tmp_path / "out").exists()
        return
    repack(start, tmp_path / "out", engine=engine, check=True)
    assert problems(tmp_path / "out", engine, 6 if exports.CASCADE in source.name else 1) == []


def test_the_loaders_detect_problems(tmp_path: Path) -> None:
    """Each loader rejects the canonical folder."""
    repack(exports.DUAL, tmp_path / "dual")
    repack(exports.INT8, tmp_path / "int8")
    repack(exports.MXFP4, tmp_path / "fp4")
    detected = problems(tmp_path / "dual", "vllm-omni")
    assert "blocks.1.attn1.to_qkv/q.weight is [64, 32], not [64, 64]" in detected
    assert "blocks.1.ffn.net_2.mul_scale is missing" in detected
    assert "blocks.0.ffn.net_2.weight_offset is not read" in problems(tmp_path / "int8", "vllm-omni")
    assert any("no scheme matches blocks.0" in p for p in problems(tmp_path / "dual", "sglang"))
    repack(exports.MXFP4, tmp_path / "mindie", engine="mindie")
    for file in (tmp_path / "mindie").glob("quant_*"):
        file.chmod(0o644)
    assert [p.rpartition(" has ")[2] for p in problems(tmp_path / "mindie", "mindie", 1)] == [
        "too many permissions"
    ] * 2


# ---- recipes without a real export --------------------------------------------------------------

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def excluding(*names: str) -> Change:
    """Convert layers to BF16, as if they had been excluded."""

    def change(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        for name in names:
            roles = {r: tensors.pop(f"{name}.{r}") for r in ("weight", "weight_scale")}
            tensors[f"{name}.weight"] = exports.decoded(roles).bfloat16()
            tensors[f"{name}.bias"] = tensors[f"{name}.bias"].bfloat16()
            types[f"{name}.weight"] = "FLOAT"
            del types[f"{name}.weight_scale"]

    return change


def smooth(*, alike: bool = True, only: str = "") -> Change:
    """Wrap every quantized layer like iter_smooth; `alike`: Q, K and V share their factors."""

    def change(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        layers = [
            n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale") and only in n
        ]
        for index, layer in enumerate(sorted(layers)):
            columns = 256 if layer.endswith("ffn.2") else 128
            torch.manual_seed(0 if alike and "self_attn" in layer else index)
            for name in [n for n in tensors if n.startswith(f"{layer}.")]:
                new = name.replace(layer, f"{layer}.linear")
                tensors[new], types[new] = tensors.pop(name), types.pop(name)
            tensors[f"{layer}.div.mul_scale"] = torch.rand(columns) + 0.5
            types[f"{layer}.div.mul_scale"] = "FLOAT"

    return change


def test_excluded_layers_for_vllm_omni(tmp_path: Path) -> None:
    excluded = [f"blocks.0.self_attn.{x}" for x in "qkvo"] + [
        "blocks.0.cross_attn.k",
        "blocks.0.ffn.0",
        "blocks.0.ffn.2",
    ]
    source = exports.changed(exports.MXFP8, tmp_path / "source", excluding(*excluded))
    repack(source, tmp_path / "out", engine="vllm-omni", check=True)
    assert problems(tmp_path / "out", "vllm-omni") == []
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_bytes())
    assert config["quantization_config"] == {
        "quant_method": "mxfp8",
        "is_checkpoint_mxfp8_serialized": True,
        "ignored_layers": [
            "blocks.0.attn1.to_qkv",
            "blocks.0.attn1.to_out",
            "blocks.0.attn2.to_k",
            "blocks.0.ffn.net_0.proj",
            "blocks.0.ffn.net_2",
        ],
    }


@pytest.mark.parametrize("engine", ["vllm-omni", "mindie"])
def test_smoothed_layers(engine: str, tmp_path: Path) -> None:
    source = exports.changed(exports.MXFP4, tmp_path / "source", smooth())
    repack(source, tmp_path / "out", engine=engine, check=True)
    assert problems(tmp_path / "out", engine, 1) == []
    if engine == "vllm-omni":
        config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_bytes())
        assert config["quantization_config"]["require_smooth_scale"] is True
    repack(tmp_path / "out", tmp_path / "again")
    repack(source, tmp_path / "first")
    assert (tmp_path / "again" / "transformer" / "quant_model_description.json").read_bytes() == (
        tmp_path / "first" / "transformer" / "quant_model_description.json"
    ).read_bytes()


def test_smoothed_layers_for_sglang(tmp_path: Path) -> None:
    """It reads `mul_scale` only if the manifest also has the name before SGLang's renaming."""
    source = exports.changed(exports.MXFP4, tmp_path / "source", smooth())
    repack(source, tmp_path / "out", engine="sglang")
    assert problems(tmp_path / "out", "sglang") == []
    types = exports.manifest(tmp_path / "out" / "transformer")
    assert types["blocks.0.ffn.net.2.mul_scale"] == types["blocks.0.ffn.net.2.div.mul_scale"] == "FLOAT"
    assert list(types)[-1] == "model_quant_type"
    repack(tmp_path / "out", tmp_path / "again", check=True)


@pytest.mark.parametrize(
    ("export", "change", "engine", "reason"),
    [
        (
            exports.MXFP8,
            excluding("blocks.0.ffn.0"),
            "sglang",
            "excluded layers of a block under other names",
        ),
        (exports.MXFP8, excluding("blocks.0.self_attn.q"), "vllm-omni", "only some of them are quantized"),
        (exports.MXFP8, smooth(), "vllm-omni", "it silently ignores mul_scale in layers that are not MXFP4"),
        (exports.MXFP8, smooth(), "sglang", "it reads mul_scale only in mxfp4 layers"),
        (
            exports.SHARDED,
            smooth(),
            "vllm-omni",
            "it silently ignores mul_scale in layers that are not MXFP4",
        ),
        (exports.SHARDED, smooth(only="ffn"), "sglang", "it reads mul_scale only in mxfp4 layers"),
        (
            exports.MXFP4,
            smooth(alike=False),
            "vllm-omni",
            "Q, K and V of self-attention, but their mul_scale differ",
        ),
        (
            exports.MXFP4,
            smooth(only="attn.q"),
            "vllm-omni",
            "Q, K and V of self-attention, but their mul_scale differ",
        ),
    ],
)
def test_recipes_that_an_engine_cannot_load(
    export: Path, change: Change, engine: str, reason: str, tmp_path: Path
) -> None:
    source = exports.changed(export, tmp_path / "source", change)
    with pytest.raises(UsageError, match=reason) as e:
        repack(source, tmp_path / "out", engine=engine)
    assert e.value.code == "E-ENG-01" and not (tmp_path / "out").exists()


def test_two_schemes_in_one_model(tmp_path: Path) -> None:
    """As in the vendor's W4A4 recipes: vLLM-Omni has one method per file, the others one per layer."""

    def mix(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        other, others = exports.tensors(exports.MXFP8), exports.manifest(exports.MXFP8)
        for role in ("weight", "weight_scale", "bias"):
            name = f"blocks.0.ffn.0.{role}"
            tensors[name], types[name] = other[name], others[name]

    source = exports.changed(exports.MXFP4, tmp_path / "source", mix)
    repack(source, tmp_path / "canonical", check=True)
    config = json.loads((tmp_path / "canonical" / "transformer" / "config.json").read_bytes())
    assert config["quantization_config"] == {"quant_method": "ascendit"}
    for engine in ("sglang", "mindie"):
        repack(source, tmp_path / engine, engine=engine, check=True)
        assert problems(tmp_path / engine, engine, 1) == []
    with pytest.raises(UsageError, match="names one scheme for all quantized layers") as e:
        repack(source, tmp_path / "out", engine="vllm-omni")
    assert "(mxfp4, mxfp8)" in e.value.got


def test_mindie_refuses_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    source = exports.EXPORTS.parent / "source_models" / exports.SINGLE
    with pytest.raises(UsageError, match=r"\(no quantized layer\): it reads only quantized models"):
        repack(source, tmp_path / "out", engine="mindie")
    repack(source, tmp_path / "out", engine="vllm-omni")
    assert problems(tmp_path / "out", "vllm-omni") == []


@pytest.mark.parametrize(
    ("layers", "trait"),
    [
        ({"blocks.0.attn1.to_q": "mxfp8", "blocks.0.attn1.to_k": "bf16"}, "split_qkv"),
        ({"blocks.0.attn2.add_k_proj": "mxfp8"}, "added_kv"),
        ({"proj_out": "mxfp8"}, "outside_blocks"),
        ({"blocks.0.ffn.net.2": "mxfp4"}, "odd_blocks:mxfp4"),
    ],
)
def test_traits(layers: dict[str, str], trait: str) -> None:
    traits = traits_of(layers, dict.fromkeys(layers, (64, 96 if "odd" in trait else 128)), {})
    assert traits - {*layers.values(), "float_block_linears"} == {trait}
    plain = traits_of({"blocks.0.ffn.net.2": "mxfp8"}, {"blocks.0.ffn.net.2": (64, 128)}, {})
    assert plain == {"mxfp8"}
    check_engine("sglang", plain, "transformer")


def test_target_formats() -> None:
    assert target_format(None) == target_format(None, "diffusers")
    assert target_format(None).naming == "diffusers"
    assert target_format(None, "wan").naming == target_format("mindie").naming == "wan"
    with pytest.raises(UsageError, match='engine="tensorrt"') as e:
        target_format("tensorrt")
    assert e.value.code == "E-USE-01" and "vllm-omni, sglang, mindie" in e.value.needs
    with pytest.raises(UsageError, match='to="wan" with engine="sglang"') as e:
        target_format("sglang", "wan")
    assert "sglang 0.5.23 reads these names" in e.value.needs
    with pytest.raises(UsageError, match='to="comfy"') as e:
        target_format(None, "comfy")
    assert e.value.fix == 'to="wan", or omit to'
    with pytest.raises(UsageError) as e:
        target_format("vllm")
    assert e.value.fix == 'engine="vllm-omni"'


def test_model_kind_and_wan_config() -> None:
    common = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
    config = {**common, "in_channels": 36, "out_channels": 16, "freq_dim": 256, "image_dim": None}
    assert model_kind(config) == "i2v"
    assert model_kind(config | {"in_channels": 16}) == "t2v"
    assert model_kind(config | {"in_channels": 48, "out_channels": 48}) == "ti2v"
    assert model_kind(config | {"in_channels": 16, "image_dim": 1280}) == "i2v"
    wan = wan_config(config)
    assert (wan["dim"], wan["num_heads"], wan["in_dim"], wan["out_dim"]) == (5120, 40, 36, 16)
    assert (wan["_class_name"], wan["model_type"], wan["text_len"]) == ("WanModel", "i2v", 512)
    assert "dim" not in wan_config(config | {"num_attention_heads": None})
