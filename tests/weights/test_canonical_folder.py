"""The on-disk format, compared with literal tables."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendit.checkpoint.quant_metadata import manifest_for, model_quant_type
from ascendit.names import ROLES, block_linears, expected_tensors, is_block_linear, sort_names
from ascendit.quant.vllm_omni_config import quantization_config_for
from ascendit.weights.engine_formats import layer_specs

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_dim": 1040,
    "num_layers": 12,
    "image_dim": 20,
}
CONFIG |= {"added_kv_proj_dim": 64, "in_channels": 16, "out_channels": 16, "pos_embed_seq_len": 5}

TABLE = {
    "bf16": [("weight", "BF16", (6, 1040)), ("bias", "BF16", (6,))],
    "int8": [
        ("weight", "I8", (6, 1040)),
        ("weight_scale", "F32", (6, 1)),
        ("weight_offset", "F32", (6, 1)),
        ("bias", "F32", (6,)),
    ],
    "fp8": [("weight", "F8_E4M3", (6, 1040)), ("weight_scale", "F32", (6, 1)), ("bias", "F32", (6,))],
    "mxfp8": [("weight", "F8_E4M3", (6, 1040)), ("weight_scale", "U8", (6, 33)), ("bias", "F32", (6,))],
    "mxfp4": [("weight", "U8", (6, 520)), ("weight_scale", "U8", (6, 33)), ("bias", "F32", (6,))],
    "mxfp4_dualscale": [
        ("weight", "U8", (6, 520)),
        ("weight_scale", "U8", (6, 33)),
        ("weight_dual_scale", "F32", (6, 3, 1)),
        ("bias", "F32", (6,)),
    ],
}


@pytest.mark.parametrize("scheme", TABLE)
def test_tensors_of_a_layer(scheme: str) -> None:
    def specs_of(bias: bool = True, mul_scale: bool = False) -> list[tuple[str, str, tuple[int, ...]]]:
        specs = layer_specs("a.b", scheme, (6, 1040), bias=bias, mul_scale=mul_scale)
        return [(spec.name, spec.dtype, spec.shape) for spec in specs]

    expected = [(f"a.b.{role}", dtype, shape) for role, dtype, shape in TABLE[scheme]]
    assert specs_of() == expected
    assert specs_of(bias=False) == expected[:-1]
    assert specs_of(mul_scale=True) == [*expected[:-1], ("a.b.mul_scale", "F32", (1040,)), expected[-1]]


def test_an_excluded_layer_has_the_dtype_of_its_source() -> None:
    weight, bias = layer_specs("x", "bf16", (4, 8), bias=True, float_dtype="F16")
    assert (weight.dtype, bias.dtype) == ("F16", "F16")


def test_names_have_the_order_of_the_model() -> None:
    names = list(expected_tensors(CONFIG))
    sorted_names = sort_names(reversed(names))
    assert sorted(sorted_names) == sorted(names)
    inside = [name for name in sorted_names if name.startswith("blocks.")]
    assert inside == [name for name in names if name.startswith("blocks.")], "blocks 2 to 11 follow 1"
    assert sorted_names[0] == "scale_shift_table" and sorted_names[-2:] == [
        "proj_out.weight",
        "proj_out.bias",
    ]
    assert sorted_names.index("patch_embedding.bias") < sorted_names.index("blocks.0.scale_shift_table")


@given(st.randoms(use_true_random=False))
def test_the_order_depends_only_on_the_names(draw: random.Random) -> None:
    layer = "blocks.3.attn1.to_out.0"
    roles = [f"{layer}.{role}" for role in ROLES]
    of_attention = [*roles, "blocks.3.attn1.norm_q.weight", "blocks.3.attn1.q_rot", "blocks.3.attn1.k_rot"]
    expected = [
        *of_attention,
        "blocks.3.attn2.to_q.weight",
        "blocks.3.attn1.fa3_q.scale",
        "blocks.10.norm2.bias",
        "zzz",
    ]
    mixed = list(expected)
    draw.shuffle(mixed)
    assert sort_names(mixed) == expected


def test_manifest() -> None:
    layers = {
        "blocks.0.attn1.to_q": "int8",
        "blocks.0.attn1.to_k": "bf16",
        "blocks.0.ffn.net.2": "mxfp4_dualscale",
    }
    names = [
        "patch_embedding.weight",
        *(f"blocks.0.attn1.to_q.{r}" for r in ("weight", "weight_scale", "weight_offset", "bias")),
        *(f"blocks.0.attn1.to_k.{r}" for r in ("weight", "mul_scale", "bias")),
        "blocks.0.attn1.q_rot",
        "blocks.0.attn1.fa3_q.scale",
        *(f"blocks.0.ffn.net.2.{r}" for r in ("weight", "weight_scale", "weight_dual_scale", "mul_scale")),
    ]
    stored_types = {
        "blocks.0.attn1.fa3_q.scale": "FAQuant",
        "blocks.0.attn1.to_q.bias": "W8A8_DYNAMIC",
        "model_quant_type": "W4A4_MXFP4",
        "version": "1.0.0",
    }
    manifest = manifest_for(layers, names, {"blocks.0.attn1.quant_type": "FP8_DYNAMIC"}, stored_types)
    assert list(manifest) == [*names, "blocks.0.attn1.quant_type", "version", "model_quant_type"]
    assert list(manifest.values()) == [
        "FLOAT",
        *["W8A8_DYNAMIC"] * 3,
        *["FLOAT"] * 5,
        "FAQuant",
        *["W4A4_MXFP4_DUALSCALE"] * 3,
        "FLOAT",
        "FP8_DYNAMIC",
        "1.0.0",
        "W4A4_MXFP4_DUALSCALE",
    ]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"blocks.10.ffn.net.2": "mxfp4", "blocks.9.ffn.net.2": "mxfp8"}, "W4A4_MXFP4"),
        ({"blocks.0.ffn.net.2": "mxfp8", "proj_out": "int8"}, "W8A8_MXFP8"),
        ({"proj_out": "fp8", "blocks.0.ffn.net.2": "bf16"}, "WFP8AFP8_DYNAMIC"),
        ({"blocks.0.ffn.net.2": "bf16"}, "FLOAT"),
    ],
)
def test_quant_type_of_the_model(layers: dict[str, str], expected: str) -> None:
    assert model_quant_type(layers) == expected


# ---- quantization_config ------------------------------------------------------------------------


def all_in(scheme: str, *excluded: str) -> dict[str, str]:
    return {name: "bf16" if name in excluded else scheme for name in block_linears(CONFIG)}


@pytest.mark.parametrize(
    ("scheme", "key"),
    [
        ("int8", "is_checkpoint_int8_serialized"),
        ("mxfp8", "is_checkpoint_mxfp8_serialized"),
        ("mxfp4", "is_checkpoint_mxfp4_serialized"),
        ("mxfp4_dualscale", "is_checkpoint_serialized"),
    ],
)
def test_config_of_one_scheme(scheme: str, key: str) -> None:
    assert quantization_config_for(all_in(scheme)) == {
        "quant_method": scheme,
        key: True,
        "ignored_layers": [],
    }
    layer = "blocks.11.attn2.to_out.0"
    assert (quantization_config_for(all_in(scheme, layer)) or {})["ignored_layers"] == [
        "blocks.11.attn2.to_out"
    ]


def test_config_of_smoothed_layers() -> None:
    layers = all_in("mxfp4", "blocks.0.ffn.net.2")
    smoothed = [name for name, scheme in layers.items() if scheme == "mxfp4"]
    assert (quantization_config_for(layers, smoothed) or {})["require_smooth_scale"] is True
    assert "require_smooth_scale" not in (quantization_config_for(layers, smoothed[:-1]) or {})
    assert "require_smooth_scale" not in (quantization_config_for(all_in("mxfp4_dualscale"), smoothed) or {})


@pytest.mark.parametrize(
    ("layers", "smoothed"),
    [
        (all_in("fp8"), ()),
        (all_in("mxfp8") | {"blocks.0.ffn.net.2": "mxfp4"}, ()),
        (all_in("int8") | {"condition_embedder.time_proj": "int8"}, ()),
        (all_in("mxfp8", "blocks.1.attn1.to_k"), ()),
        (all_in("mxfp8"), ("blocks.0.ffn.net.2",)),
        (all_in("mxfp4", "blocks.0.ffn.net.2"), ("blocks.0.ffn.net.2",)),
    ],
    ids=["fp8", "mixed", "embedder", "half of qkv", "smoothed mxfp8", "smoothed and excluded"],
)
def test_models_that_vllm_omni_cannot_describe(layers: dict[str, str], smoothed: tuple[str, ...]) -> None:
    assert quantization_config_for(layers, smoothed) == {"quant_method": "ascendit"}


def test_float_models_have_no_config() -> None:
    assert quantization_config_for(all_in("bf16")) is None


def test_block_linears_are_recognised_by_name() -> None:
    layers = {name.removesuffix(".weight") for name in expected_tensors(CONFIG) if name.endswith(".weight")}
    assert {name for name in layers if is_block_linear(name)} == set(block_linears(CONFIG))
