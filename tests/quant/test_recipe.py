"""Recipes: the scheme of each layer, from data files and patterns."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from ascendit.errors import UsageError
from ascendit.quant.layer_rules import LayerRule
from ascendit.quant.recipe import Recipe, load_recipe, recipe_names
from ascendit.weights.engine_formats import model_kind

T2V = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 7, "ffn_dim": 128}
I2V = T2V | {"in_channels": 36, "out_channels": 16}
TI2V = T2V | {"in_channels": 48, "out_channels": 48}


def schemes(recipe: Recipe, config=T2V, kind="t2v", keep=()) -> dict[str, tuple[str, str | None]]:
    return {
        p.name: (p.scheme, p.scale_rule) for p in recipe.layer_schemes(config, model_kind=kind, keep=keep)
    }


def write(folder: Path, text: str) -> str:
    path = folder / "own.toml"
    path.write_text(text)
    return str(path)


# ---- packaged recipes ---------------------------------------------------------------------------


def test_packaged_recipes():
    names = [
        "default",
        "ascend-w4a4",
        "ascend-w4a4f4",
        "ascend-w8a8f8",
        "dualscale-bf16-5",
        "recommended-fp4",
    ]
    assert recipe_names() == names
    for name in names:
        recipe = load_recipe(name, "mxfp8" if name == "default" else None)
        assert recipe.name == name and recipe.about
        assert recipe.layer_schemes(T2V, model_kind="t2v")


@pytest.mark.parametrize(
    ("scheme", "rule"),
    [
        ("mxfp8", "ceil"),
        ("mxfp4", "max:7"),
        ("mxfp4_dualscale", "floor"),
        ("int8", "amax"),
        ("fp8", "amax"),
    ],
)
def test_default_quantizes_the_linears_of_the_blocks_only(scheme, rule):
    layers = schemes(load_recipe("default", scheme))
    inside = {n: p for n, p in layers.items() if n.startswith("blocks.")}
    assert len(inside) == 70 and set(inside.values()) == {(scheme, rule)}
    outside = {n: p for n, p in layers.items() if not n.startswith("blocks.")}
    assert "proj_out" in outside and "condition_embedder.time_proj" in outside
    assert set(outside.values()) == {("bf16", None)}


def test_default_in_a_model_with_image_tokens():
    config = I2V | {"added_kv_proj_dim": 64, "image_dim": 32}
    layers = schemes(load_recipe("default", "int8"), config, "i2v")
    assert layers["blocks.3.attn2.add_k_proj"] == ("int8", "amax")
    assert layers["condition_embedder.image_embedder.ff.net.2"] == ("bf16", None)


def test_w8a8f8_has_a_scale_rule_for_each_kind_of_model():
    recipe = load_recipe("ascend-w8a8f8")
    for config, kind, rule in ((T2V, "t2v", "mse_round"), (I2V, "i2v", "minmax"), (TI2V, "ti2v", "minmax")):
        inside = {p for n, p in schemes(recipe, config, kind).items() if n.startswith("blocks.")}
        assert inside == {("mxfp8", f"msms:{rule}")}


def test_w8a8f8_attention():
    recipe = load_recipe("ascend-w8a8f8")
    attention = recipe.attention_schemes(T2V, model_kind="t2v")
    assert [p.name for p in attention] == [f"blocks.{i}.attn1" for i in range(1, 7)]
    assert {(p.quant_type, p.rotate) for p in attention} == {("FP8_DYNAMIC", True)}
    for kind in ("i2v", "ti2v"):
        assert len(recipe.attention_schemes(T2V, model_kind=kind)) == 7


@pytest.mark.parametrize(
    ("name", "first", "others"),
    [("ascend-w4a4", "", "FP8_DYNAMIC"), ("ascend-w4a4f4", "FP8_DYNAMIC", "MXFP4_DYNAMIC")],
)
def test_w4a4_is_mxfp8_in_five_blocks_and_rotates_all(name, first, others):
    recipe = load_recipe(name)
    layers = schemes(recipe)
    assert layers["blocks.4.ffn.net.2"] == ("mxfp8", "msms:mse_round")
    assert layers["blocks.5.ffn.net.2"] == ("mxfp4", "msms:ceil_x:search")
    attention = recipe.attention_schemes(T2V, model_kind="t2v")
    assert [p.quant_type for p in attention] == [first] + [others] * 6
    assert all(p.rotate for p in attention) and recipe.kinds == ("t2v",)


def test_blocks_of_two_digits_are_not_first_blocks():
    layers = schemes(load_recipe("ascend-w4a4"), T2V | {"num_layers": 42})
    assert Counter(layers[f"blocks.{i}.ffn.net.2"][0] for i in range(42)) == {"mxfp8": 5, "mxfp4": 37}


def test_recommended_fp4_has_self_attention_in_mxfp8():
    layers = schemes(load_recipe("recommended-fp4"))
    assert layers["blocks.0.attn1.to_v"][0] == layers["blocks.6.attn1.to_out.0"][0] == "mxfp8"
    assert layers["blocks.0.attn2.to_v"] == layers["blocks.6.ffn.net.2"] == ("mxfp4", "max:7")


def test_dualscale_excludes_five_blocks():
    layers = schemes(load_recipe("dualscale-bf16-5"))
    assert layers["blocks.4.attn2.to_out.0"] == ("bf16", None)
    assert layers["blocks.5.attn2.to_out.0"] == ("mxfp4_dualscale", "floor")


# ---- patterns -----------------------------------------------------------------------------------


def test_keep_overrides_every_rule_and_is_the_reason():
    recipe = load_recipe("default", "mxfp8")
    layers = {
        p.name: p for p in recipe.layer_schemes(T2V, model_kind="t2v", keep=["blocks.0.*", "*.ffn.net.2"])
    }
    assert layers["blocks.0.attn1.to_q"].reason == "--keep blocks.0.*"
    assert layers["blocks.6.ffn.net.2"].scheme == "bf16"
    assert layers["blocks.1.attn1.to_q"].reason == "default: *"
    assert layers["proj_out"].reason == "not a linear of the blocks"


def test_keep_accepts_wan_names_and_layers_that_are_excluded_already():
    recipe = load_recipe("default", "mxfp8")
    layers = schemes(recipe, keep=["blocks.3.cross_attn.o", "proj_out"])
    assert [n for n, p in layers.items() if p[0] == "bf16" and n.startswith("blocks")] == [
        "blocks.3.attn2.to_out.0"
    ]


def test_the_error_for_a_pattern_without_match_names_the_nearest_layer():
    recipe = load_recipe("default", "mxfp8")
    with pytest.raises(UsageError) as e:
        recipe.layer_schemes(T2V, model_kind="t2v", keep=["blocks.0.attn1.to_qq"])
    assert e.value.code == "E-USE-05" and "blocks.0.attn1.to_qq" in e.value.got and "of keep" in e.value.got
    assert "blocks.0.attn1.to_q," in e.value.needs
    with pytest.raises(UsageError, match="E-USE-05"):
        recipe.layer_schemes(T2V, model_kind="t2v", keep=["blocks.7.*"])


def test_an_attention_pattern_that_matches_nothing(tmp_path):
    text = '[[rules]]\nlayers="*"\nscheme="int8"\n[[attention]]\nlayers="*.attn3"\nrotate=true\n'
    recipe = load_recipe(write(tmp_path, text))
    with pytest.raises(UsageError) as e:
        recipe.attention_schemes(T2V, model_kind="t2v")
    assert e.value.code == "E-USE-05" and "attn3" in e.value.got and "attn1" in e.value.needs


def test_the_last_rule_wins_and_a_star_means_the_blocks(tmp_path):
    text = """
[[rules]]
layers = ["*"]
scheme = "mxfp8"
[[rules]]
layers = ["blocks.*.ffn.*", "blocks.1.attn1.to_[qkv]"]
scheme = "int8"
scale_rule = "msms:int8"
[[rules]]
layers = "condition_embedder.t*"
scheme = "int8"
[[rules]]
layers = "blocks.2.*"
scheme = "bf16"
kinds = ["i2v"]
"""
    layers = schemes(load_recipe(write(tmp_path, text)))
    assert layers["blocks.0.ffn.net.0.proj"] == ("int8", "msms:int8")
    assert layers["blocks.1.attn1.to_k"] == ("int8", "msms:int8")
    assert layers["blocks.2.attn1.to_k"] == ("mxfp8", "ceil")
    assert layers["condition_embedder.time_embedder.linear_1"] == ("int8", "amax")
    assert layers["proj_out"] == ("bf16", None)


def test_layers_without_a_rule_are_excluded(tmp_path):
    recipe = load_recipe(write(tmp_path, '[[rules]]\nlayers = "*.ffn.*"\nscheme = "fp8"\n'))
    layers = {p.name: p for p in recipe.layer_schemes(T2V, model_kind="t2v")}
    assert layers["blocks.0.attn1.to_q"].scheme == "bf16"
    assert layers["blocks.0.attn1.to_q"].reason == "no rule names it"


# ---- reading ------------------------------------------------------------------------------------


def test_scheme_and_scale_rule_complete_rules_without_them(tmp_path):
    assert schemes(load_recipe("default", "mxfp4", "msms:minmax"))["blocks.0.attn1.to_q"] == (
        "mxfp4",
        "msms:minmax",
    )
    path = write(tmp_path, '[[rules]]\nlayers="*"\n[[rules]]\nlayers="blocks.0.*"\nscheme="int8"\n')
    layers = schemes(load_recipe(path, "mxfp8", "floor"))
    assert layers["blocks.0.attn1.to_q"] == ("int8", "amax")
    assert layers["blocks.1.attn1.to_q"] == ("mxfp8", "floor")


def refused(code: str, *args) -> str:
    with pytest.raises(UsageError) as e:
        load_recipe(*args)
    assert e.value.code == code, e.value
    return str(e.value)


def test_a_missing_scheme_or_file_is_an_error():
    text = refused("E-USE-01", "default")
    assert "without a scheme" in text and "mxfp4_dualscale" in text and "ascend-w8a8f8" in text
    text = refused("E-USE-02", "asend-w8a8f8")
    assert "asend-w8a8f8" in text and "dualscale-bf16-5" in text
    assert "TOML file" in refused("E-USE-02", "folder/none.toml")


def test_a_contradicting_scheme_or_scale_rule_is_an_error():
    assert "mxfp4 for the recipe ascend-w8a8f8" in refused("E-USE-01", "ascend-w8a8f8", "mxfp4")
    assert "scheme 'w8a8'" in refused("E-USE-01", "default", "w8a8")
    assert "max:" in refused("E-USE-01", "default", "mxfp4", "max:99")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[rules]\n", "it is not TOML"),
        ("about = 'x'\n", "it has no [[rules]] and no [[attention]]"),
        ("about = 1\n[[rules]]\nlayers='*'\nscheme='int8'\n", "about and source are not texts"),
        ("rule = 1\n[[rules]]\nlayers='*'\nscheme='int8'\n", "the file has rule; allowed are about"),
        ("rules = 'x'\n", "rules is not a list of tables"),
        ("[[rules]]\nlayer='*'\nscheme='int8'\n", "a rule has layer; allowed are"),
        ("[[rules]]\nlayers=3\nscheme='int8'\n", "layers = 3, not a pattern"),
        ("[[rules]]\nlayers=[]\nscheme='int8'\n", "layers = [], not a pattern"),
        ("[[rules]]\nlayers='*'\nscheme='int9'\n", "scheme 'int9' in "),
        ("[[rules]]\nlayers='*'\nscheme=['int8']\n", "rules.0.scheme: Input should be a valid string"),
        ("[[rules]]\nscheme='int8'\n", "rules.0.layers: Field required"),
        ("step_policy = 1\n[[rules]]\nlayers='*'\nscheme='int8'\n", "step_policy 1 is not a text"),
        ("[[rules]]\nlayers='*'\nscheme='bf16'\nscale_rule='ceil'\n", "bf16, which has no scales"),
        ("[[rules]]\nlayers='*'\nscheme='int8'\nscale_rule=7\n", "scale_rule 7 is not a text"),
        ("[[rules]]\nlayers='*'\nscheme='int8'\nkinds=['v2v']\n", "kinds = ['v2v']"),
        ("[[rules]]\nlayers='*'\nscheme='int8'\n[[attention]]\nlayers='*'\nrotate=1\n", "rotate 1 is"),
        ("[[rules]]\nlayers='*'\nscheme='int8'\n[[attention]]\nlayers='*'\nquant_type='X'\n", "'X' is not"),
    ],
)
def test_a_file_that_is_not_a_recipe(tmp_path, text, problem):
    path = write(tmp_path, text)
    assert problem in refused("E-USE-01", path)


def test_a_recipe_can_be_read_from_its_record(tmp_path):
    recipe = load_recipe("ascend-w8a8f8")
    data = recipe.as_dict()
    assert data["rules"][0] == {
        "layers": ["*"],
        "scheme": "mxfp8",
        "scale_rule": "msms:mse_round",
        "kinds": ["t2v"],
    }
    assert data["attention"][1] == {
        "layers": ["blocks.0.attn1"],
        "quant_type": "",
        "rotate": False,
        "kinds": ["t2v"],
    }
    assert data["source"].startswith("msModelSlim 26.1.0")
    assert Recipe.model_validate(data) == recipe == Recipe.model_validate_json(recipe.model_dump_json())


def test_a_file_may_set_the_name_of_its_recipe(tmp_path):
    text = 'name = "mine"\nstep_policy = "0:w4a8"\n[[rules]]\nlayers = "*"\nscheme = "mxfp4"\n'
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.name == "mine" and str(recipe.step_policy) == "0:w4a8"
    assert recipe.layer_schemes(T2V, model_kind="t2v")[5].reason.startswith("mine: ")


def test_a_recipe_is_immutable():
    recipe = load_recipe("default", "mxfp8")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.rules = ()
    with pytest.raises(ValidationError, match="a rule has layer; allowed are"):
        LayerRule.model_validate({"layer": "*", "scheme": "int8"})


@pytest.mark.parametrize(
    ("channels", "kind"), [((16, 16), "t2v"), ((36, 16), "i2v"), ((48, 48), "ti2v"), ((8, 8), "t2v")]
)
def test_model_kind(channels, kind):
    """The value that is compared with the `kinds` of a rule."""
    assert model_kind({"in_channels": channels[0], "out_channels": channels[1]}) == kind
