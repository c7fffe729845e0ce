"""Names, their order and styles. The oracles are Diffusers' model on the meta device and its conversion of
Wan names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.errors import CheckpointError
from ascendit.family import SPECS, WanSpec
from ascendit.names import (
    all_linears,
    block_linears,
    canonical,
    expected_tensors,
    grouped,
    is_block_linear,
    is_linear,
    naming_of,
    on_disk,
    ranges,
    to_diffusers,
    to_wan,
    unwrapped,
)

SOURCES = Path(__file__).parent / "fixtures" / "msmodelslim" / "source_models"
SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "published A14B": {
        "num_layers": 2,
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "ffn_dim": 13824,
    },
    "i2v": {"in_channels": 36},
    "wan2.1 i2v": {"in_channels": 36, "image_dim": 14, "added_kv_proj_dim": 24, "pos_embed_seq_len": 10},
    "wan2.1 i2v without positions": {"in_channels": 36, "image_dim": 14, "added_kv_proj_dim": 24},
    "ti2v": {"in_channels": 48, "out_channels": 48},
    "as many out as in": {"in_channels": 20, "out_channels": None},
    "no cross norm": {"cross_attn_norm": False},
    "other patch": {"patch_size": [2, 4, 2]},
}
SUFFIXES = (
    *(
        "weight",
        "bias",
        "weight_scale",
        "weight_offset",
        "weight_dual_scale",
        "weight_scale_inv",
        "mul_scale",
    ),
    *("linear.weight", "linear.weight_scale", "linear.bias", "div.mul_scale", "lora_A.weight", "diff_b"),
)
LEAVES = ("q_rot", "k_rot", "quant_type", "fa3_q.scale", "fa3_k.offset", "fa3_v.scale")


def of_spec(spec: WanSpec) -> dict[str, Any]:
    image = {"image_dim": 1280, "added_kv_proj_dim": spec.dim, "pos_embed_seq_len": 514}
    heads = {"num_attention_heads": spec.dim // 32, "attention_head_dim": 32, "num_layers": spec.num_layers}
    channels = {"in_channels": spec.in_channels, "out_channels": spec.out_channels}
    return heads | channels | (image if spec.image_cross_attention else {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_equal_those_of_diffusers(variant: str) -> None:
    config = {**SMALL, **VARIANTS[variant]}
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert expected_tensors(config) == shapes
    assert expected_tensors(dict(model.config)) == shapes  # as written to config.json, with all defaults


@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_layers_equal_those_of_diffusers(variant: str) -> None:
    config = {**SMALL, **VARIANTS[variant]}
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(all_linears(config)) == sorted(linears)
    assert sorted(block_linears(config)) == sorted(name for name in linears if name.startswith("blocks."))
    modules = [name for name, _ in model.named_modules()]
    assert [name for name in modules if is_linear(name)] == linears
    assert [n for n in modules if is_block_linear(n)] == [n for n in linears if "blocks" in n]


def test_the_layers_of_a_block_have_the_order_of_the_model() -> None:
    assert block_linears({"num_layers": 1}) == (
        *(f"blocks.0.attn1.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"blocks.0.attn2.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")),
        *("blocks.0.ffn.net.0.proj", "blocks.0.ffn.net.2"),
    )
    assert len(block_linears({})) == 400
    assert all_linears({"num_layers": 2, "image_dim": 8, "added_kv_proj_dim": 8})[-13:] == (
        *(f"blocks.1.attn1.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"blocks.1.attn2.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")),
        *("blocks.1.ffn.net.0.proj", "blocks.1.ffn.net.2", "proj_out"),
    )


def test_defaults_equal_those_of_diffusers() -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=1)
    assert expected_tensors({"num_layers": 1}) == {n: tuple(t.shape) for n, t in model.state_dict().items()}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", "40"),
        ("num_layers", None),
        ("num_layers", 10**9),
        ("ffn_dim", -1),
        ("in_channels", 16.0),
        ("text_dim", True),
        ("patch_size", [1, 2]),
        ("patch_size", 2),
    ],
)
def test_an_invalid_dimension_is_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"has {key} = ") as e:
        expected_tensors({**SMALL, key: value})
    assert e.value.code == "E-CKP-06"


# ---- original Wan names -------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_tensor_name_converts_and_back(spec: WanSpec) -> None:
    names = list(expected_tensors(of_spec(spec)))
    original = [to_wan(name) for name in names]
    assert None not in original
    assert len(set(original)) == len(names)
    assert [to_diffusers(name) for name in original if name] == names


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_suffixes_are_preserved(spec: WanSpec) -> None:
    for layer in all_linears(of_spec(spec) | {"num_layers": 2}):
        wan = to_wan(layer)
        assert wan is not None and to_diffusers(wan) == layer
        for suffix in SUFFIXES:
            assert to_wan(f"{layer}.{suffix}") == f"{wan}.{suffix}"
            assert to_diffusers(f"{wan}.{suffix}") == f"{layer}.{suffix}"


@pytest.mark.parametrize("leaf", LEAVES)
def test_names_of_quantized_attention(leaf: str) -> None:
    for wan, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        assert to_diffusers(f"blocks.39.{wan}.{leaf}") == f"blocks.39.{diffusers}.{leaf}"
        assert to_wan(f"blocks.39.{diffusers}.{leaf}") == f"blocks.39.{wan}.{leaf}"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_names_equal_the_conversion_of_diffusers(spec: WanSpec) -> None:
    names = [n for n in expected_tensors(of_spec(spec)) if "pos_embed" not in n]  # no FLF2V in its loader
    stored = {to_wan(name): torch.tensor(i) for i, name in enumerate(names)}
    converted = convert_wan_transformer_to_diffusers(dict(stored))
    assert {name: int(value) for name, value in converted.items()} == {n: i for i, n in enumerate(names)}


def test_norm2_and_norm3_are_swapped() -> None:
    assert to_diffusers("blocks.0.norm3.weight") == "blocks.0.norm2.weight"
    assert to_diffusers("blocks.0.norm2.weight") == "blocks.0.norm3.weight"
    assert to_wan("blocks.0.norm2.bias") == "blocks.0.norm3.bias"


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "blocks", "blocks.0", "blocks.0.", "blocks.x.self_attn.q.weight", "head", "modulation"),
        *("blocks.00.ffn.0.weight", "blocks.-1.ffn.0.weight", "blocks.1000000.ffn.0.weight"),
        *("blocks.0.self_attn.qq.weight", "blocks.0.self_attn.weight", "vace_blocks.0.self_attn.q.weight"),
        *("blocks.0.attn1.to_q.weight", "time_embedding.1.weight", "xblocks.0.ffn.0.weight", "proj_out.bias"),
        *("blocks.\u0663.ffn.0.weight", "text_embedding.0weight"),
    ],
)
def test_unknown_names_have_no_conversion(name: str) -> None:
    assert to_diffusers(name) is None


@given(st.lists(st.sampled_from("blocks 0 17 self_attn attn1 q to_q ffn net 2 norm2 norm3 weight".split())))
def test_the_conversions_are_inverse(parts: list[str]) -> None:
    name = ".".join(parts)
    if (new := to_diffusers(name)) is not None:
        assert to_wan(new) == name
    if (old := to_wan(name)) is not None:
        assert to_diffusers(old) == name


@pytest.mark.parametrize("model", ["t2v_d64_l6/high_noise_model", "ti2v_d128_l1"])
def test_a_real_original_model_loads_into_diffusers(model: str) -> None:
    """Strict: WanTransformer3DModel with the derived config has every tensor of WanModel."""
    expert = read_expert(recognise(SOURCES / model).experts[0])
    config = {key: value for key, value in expert.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        network = WanTransformer3DModel(**config)
    stored = load_file(SOURCES / model / "diffusion_pytorch_model.safetensors")
    weights = {name: stored[info.name] for name, info in expert.tensors.items()}
    network.load_state_dict(weights, strict=True, assign=True)
    assert network.blocks[0].norm2.weight is not None
    assert torch.equal(network.blocks[0].norm2.weight, stored["blocks.0.norm3.weight"])


# ---- names of other tools ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "naming", "expected"),
    [
        ("blocks.0.self_attn.q.linear.weight", "wan", "blocks.0.attn1.to_q.weight"),
        ("blocks.0.self_attn.q.linear.weight_dual_scale", "wan", "blocks.0.attn1.to_q.weight_dual_scale"),
        ("blocks.0.ffn.2.div.mul_scale", "wan", "blocks.0.ffn.net.2.mul_scale"),
        ("blocks.0.attn1.to_q.linear.bias", "diffusers", "blocks.0.attn1.to_q.bias"),
        ("model.diffusion_model.head.modulation", "wan", "scale_shift_table"),
        ("diffusion_model.blocks.0.norm3.bias", "wan", "blocks.0.norm2.bias"),
        ("model.head.head.weight", "wan", "proj_out.weight"),
        ("module._orig_mod.transformer.proj_out.bias", "diffusers", "proj_out.bias"),
        ("net.blocks.1.self_attn.o.weight", "wan", "blocks.1.attn1.to_out.0.weight"),
        ("pipeline.network.inner_model.head.head.bias", "wan", "proj_out.bias"),
        ("wan_model.dit_model.transformer_model.proj_out.bias", "diffusers", "proj_out.bias"),
        ("transformer_1.dit2.proj_out.bias", "diffusers", "proj_out.bias"),
        ("ema.dit.patch_embedding.bias", "wan", "patch_embedding.bias"),
        ("_fsdp_wrapped_module.blocks.0.module.ffn.net.2.weight", "diffusers", "blocks.0.ffn.net.2.weight"),
        (
            "blocks.3._checkpoint_wrapped_module._orig_mod.attn2.norm_q.weight",
            "diffusers",
            "blocks.3.attn2.norm_q.weight",
        ),
        ("model.diffusion_model.blocks.0.ffn.2.div.mul_scale", "wan", "blocks.0.ffn.net.2.mul_scale"),
        ("blocks.0.model.weight", "diffusers", "blocks.0.model.weight"),
        ("modules.proj_out.bias", "diffusers", "modules.proj_out.bias"),
        ("blocks.0.norm3.bias", "diffusers", "blocks.0.norm3.bias"),
        ("blocks.0.norm2.bias", "diffusers", "blocks.0.norm2.bias"),
        ("blocks.0.attn1.to_k_rot", "diffusers", "blocks.0.attn1.k_rot"),
        ("blocks.0.self_attn.quant_type", "diffusers", "blocks.0.attn1.quant_type"),
        ("condition_embedder.time_proj.weight", "wan", "condition_embedder.time_proj.weight"),
        ("condition_embedder.time_proj.weight", "diffusers", "condition_embedder.time_proj.weight"),
        ("who.knows", "wan", "who.knows"),
        ("blocks.0.linear.weighty", "wan", "blocks.0.linear.weighty"),
        ("", "wan", ""),
    ],
)
def test_the_diffusers_name(name: str, naming: object, expected: str) -> None:
    assert canonical(name, naming) == expected  # type: ignore[arg-type]


def test_only_complete_wrappers_are_removed() -> None:
    assert unwrapped("x.linear.weight") == "x.weight"
    assert unwrapped("x.div.mul_scale") == "x.mul_scale"
    for name in ("x.linear.y.weight", "x.div.weight", "x.linear_1.weight", "linear", "x.linear"):
        assert unwrapped(name) == name


@pytest.mark.parametrize(
    ("names", "naming"),
    [
        (["patch_embedding.weight", "head.head.weight"], "wan"),
        (["patch_embedding.weight", "proj_out.weight"], "diffusers"),
        (["patch_embedding.weight"], "diffusers"),
        (["proj_out.weight", "blocks.0.attn1.to_k.weight", "blocks.0.self_attn.fa3_q.scale"], "diffusers"),
        (["model.diffusion_model.blocks.0.ffn.0.linear.weight"], "wan"),
        (["encoder.conv_in.weight", "decoder.x"], None),
        ([], None),
    ],
)
def test_the_naming_of_tensors(names: list[str], naming: str | None) -> None:
    assert naming_of(names) == naming


def test_on_disk() -> None:
    assert on_disk("proj_out.bias", "wan") == "head.head.bias"
    assert on_disk("proj_out.bias", "diffusers") == "proj_out.bias"
    assert on_disk("strange", "wan") == "strange"


# ---- names as patterns ---------------------------------------------------------------------------

LAYERS = all_linears({"num_layers": 8})
BLOCK = [name.removeprefix("blocks.0.") for name in LAYERS if name.startswith("blocks.0.")]


def of_block(*numbers: int) -> list[str]:
    return [f"blocks.{n}.{layer}" for n in numbers for layer in BLOCK]


@pytest.mark.parametrize(
    ("chosen", "patterns"),
    [
        ([], ()),
        (LAYERS, ("condition_embedder.*", "blocks.*", "proj_out")),
        (of_block(0, 1, 2, 3, 4), ("blocks.0-4",)),
        (of_block(0, 2, 3, 7), ("blocks.0,2-3,7",)),
        (["blocks.3.attn2.to_out.0"], ("blocks.3.attn2.to_out.0",)),
        ([f"blocks.{n}.ffn.net.2" for n in range(8)], ("blocks.0-7.ffn.net.2",)),
        (of_block(0) + ["blocks.3.attn2.to_out.0"], ("blocks.0", "blocks.3.attn2.to_out.0")),
        ([n for n in LAYERS if ".attn1." in n], ("blocks.0-7.attn1.*",)),
        (["condition_embedder.time_proj"], ("condition_embedder.time_proj",)),
        (
            ["condition_embedder.text_embedder.linear_1", "condition_embedder.text_embedder.linear_2"],
            ("condition_embedder.text_embedder.*",),
        ),
    ],
)
def test_groups(chosen: list[str], patterns: tuple[str, ...]) -> None:
    assert grouped(chosen, LAYERS) == patterns


def test_ranges() -> None:
    assert ranges([7, 0, 1, 2, 4]) == "0-2,4,7"


def matches(pattern: str, name: str) -> bool:
    """Whether a reader would apply the pattern to the name."""
    match = re.fullmatch(r"blocks\.([\d,-]+)(.*)", pattern)
    if match is None:
        return name == pattern or (pattern.endswith(".*") and name.startswith(pattern[:-1]))
    numbers = set()
    for span in match[1].split(","):
        first, _, last = span.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    suffix = match[2] or ".*"
    return any(
        name == f"blocks.{n}{suffix}"
        or (suffix.endswith(".*") and name.startswith(f"blocks.{n}{suffix[:-1]}"))
        for n in numbers
    )


@given(st.sets(st.sampled_from(LAYERS)))
def test_the_patterns_match_exactly_the_chosen_names(chosen: set[str]) -> None:
    patterns = grouped(chosen, LAYERS)
    assert {name for name in LAYERS if any(matches(p, name) for p in patterns)} == chosen
    assert len(patterns) == len(set(patterns))
