"""vLLM-Omni's JSON as a recipe."""

from __future__ import annotations

import json

import pytest

from ascendit.errors import UsageError
from ascendit.quant.fusion import patterns_of_module
from ascendit.quant.recipe import load_recipe

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 8, "text_dim": 64}


def schemes(config, **keys):
    recipe = load_recipe(json.dumps(config))
    return {p.name: p.scheme for p in recipe.layer_schemes(CONFIG, model_kind="t2v")}, recipe


def test_dual_scale_excludes_the_first_five_blocks_by_default():
    layers, _ = schemes({"method": "mxfp4_dualscale"})
    assert {layers[f"blocks.{n}.attn1.to_q"] for n in range(5)} == {"bf16"}
    assert {layers[f"blocks.{n}.ffn.net.2"] for n in range(5, 8)} == {"mxfp4_dualscale"}
    layers, _ = schemes({"quant_method": "mxfp4_dualscale", "num_bf16_fallback_layers": 0})
    assert layers["blocks.0.attn1.to_q"] == "mxfp4_dualscale" and layers["proj_out"] == "bf16"


def test_ignored_layers_are_names_of_modules():
    assert patterns_of_module("*.to_out") == ("*.to_out.0",)
    assert patterns_of_module("blocks.*.ffn.net_2") == ("blocks.*.ffn.net.2",)
    assert patterns_of_module("blocks.0.attn1.to_qkv") == tuple(f"blocks.0.attn1.to_{x}" for x in "qkv")
    assert patterns_of_module("blocks.0.attn2.to_out") == ("blocks.0.attn2.to_out.0",)
    assert patterns_of_module("blocks.3.ffn.net_0.proj") == ("blocks.3.ffn.net.0.proj",)
    assert patterns_of_module("blocks.3.ffn.net_2") == ("blocks.3.ffn.net.2",)
    ignored = ["blocks.7.attn1.to_qkv", "blocks.6.ffn.net_2", "blocks.5.attn2.to_q"]
    layers, _ = schemes({"method": "mxfp8", "ignored_layers": ignored})
    excluded = {name for name, scheme in layers.items() if scheme == "bf16" and name.startswith("blocks")}
    assert excluded == {
        *(f"blocks.7.attn1.to_{x}" for x in "qkv"),
        "blocks.6.ffn.net.2",
        "blocks.5.attn2.to_q",
    }


def test_steps_and_scale_rule():
    _, recipe = schemes({"method": "mxfp4", "w4a8_fallback_steps": [1, 0], "mxfp4_scale_alg": 2})
    assert str(recipe.step_policy) == "0-1:w4a8" and recipe.rules[0].scale_rule == "max:7"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"method": "mxfp8", "ignored_layer": []}, "it has ignored_layer"),
        ({"method": "awq"}, "method 'awq' is not one of"),
        ({"method": "mxfp8", "num_bf16_fallback_layers": 5}, "belongs to mxfp4_dualscale"),
        ({"method": "mxfp4_dualscale", "num_bf16_fallback_layers": -1}, "not a number of blocks"),
        ({"method": "mxfp4_dualscale", "w4a8_fallback_steps": [0]}, "belongs to mxfp4"),
        ({"method": "mxfp4", "w4a8_fallback_steps": "0-1"}, "not a list of steps"),
        ({"method": "mxfp4", "mxfp4_scale_alg": 1}, "mxfp4_scale_alg 1"),
        ({"method": "mxfp4", "ignored_layers": "x"}, "not a list of names"),
        ({"method": "mxfp8", "mxfp4_scale_alg": 0}, "mxfp4_scale_alg belongs to mxfp4, not to mxfp8"),
        ({"method": "mxfp4", "mxfp4_scale_alg": True}, "mxfp4_scale_alg True"),
        ({"ignored_layers": []}, "method: Field required"),
    ],
)
def test_an_invalid_config_is_an_error(config, problem):
    with pytest.raises(UsageError) as e:
        load_recipe(json.dumps(config))
    assert problem in e.value.got and e.value.code == "E-USE-01"


def test_alternative_names_and_null():
    layers, _ = schemes({"quant_method": "mxfp8", "modules_to_not_convert": ["blocks.1.ffn.net_2"]})
    assert layers["blocks.1.ffn.net.2"] == "bf16" and layers["blocks.0.ffn.net.2"] == "mxfp8"
    layers, recipe = schemes({"method": "mxfp4", "ignored_layers": None, "w4a8_fallback_steps": None})
    assert set(layers.values()) == {"mxfp4", "bf16"} and str(recipe.step_policy) == ""


def test_a_name_without_layer_is_an_error_though_vllm_omni_ignores_it():
    for name in ("blocks.9.attn1.to_qkv", "blocks.0.attn1.to_qvk"):
        with pytest.raises(UsageError) as e:
            schemes({"method": "mxfp8", "ignored_layers": [name]})
        assert e.value.code == "E-USE-05"
    with pytest.raises(UsageError, match="not JSON"):
        load_recipe("{method: mxfp8}")
    with pytest.raises(UsageError, match="every rule of this one names its scheme"):
        load_recipe('{"method": "mxfp8"}', "int8")
