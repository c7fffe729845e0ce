"""Fused groups and engine modules against the names of a Wan transformer."""

from __future__ import annotations

import pytest

from ascendit.names import block_linears, is_block_linear
from ascendit.quant.fusion import (
    GROUPS,
    VLLM_OMNI,
    first_in_group,
    fused_with,
    layers_of_module,
    patterns_of_module,
    vllm_omni_module,
    vllm_omni_modules,
)

CONFIG = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 3, "added_kv_proj_dim": 64}


def test_the_tables_have_names_of_layers() -> None:
    layers = [layer for group in (*GROUPS, *VLLM_OMNI.values()) for layer in group]
    assert all(is_block_linear(f"blocks.0.{layer}") for layer in layers)
    grouped = [layer for group in GROUPS for layer in group]
    assert len(grouped) == len(set(grouped))


@pytest.mark.parametrize(
    ("layer", "first"),
    [
        ("blocks.2.attn1.to_v", "blocks.2.attn1.to_q"),
        ("blocks.2.attn1.to_q", "blocks.2.attn1.to_q"),
        ("blocks.12.attn2.to_q", "blocks.12.attn2.to_q"),
        ("blocks.12.attn2.to_v", "blocks.12.attn2.to_k"),
        ("blocks.1.attn2.add_v_proj", "blocks.1.attn2.add_k_proj"),
        ("blocks.1.ffn.net.2", "blocks.1.ffn.net.2"),
        ("proj_out", "proj_out"),
    ],
)
def test_first_in_group(layer: str, first: str) -> None:
    assert first_in_group(layer) == first


def test_modules_of_vllm_omni() -> None:
    names = [name for name in block_linears(CONFIG) if name.startswith("blocks.2.")]
    assert vllm_omni_modules(names, ()) == [
        *("blocks.2.attn1.to_qkv", "blocks.2.attn1.to_out"),
        *(f"blocks.2.attn2.{x}" for x in ("to_q", "to_k", "to_v", "to_out", "add_k_proj", "add_v_proj")),
        *("blocks.2.ffn.net_0.proj", "blocks.2.ffn.net_2"),
    ]
    assert vllm_omni_modules(["blocks.2.attn1.to_q"], ["blocks.2.attn1.to_v"]) is None


def test_a_module_and_its_layers_are_inverse() -> None:
    for name in (*block_linears(CONFIG), "condition_embedder.time_proj"):
        module = vllm_omni_module(name)
        assert name in layers_of_module(module) == fused_with(name) == patterns_of_module(module)


@pytest.mark.parametrize("name", ["blocks.0.attn2.to_qkv", "*.to_out", "blocks.0.ffn.net_2.x", "to_qkv"])
def test_a_name_that_is_not_a_module_is_unchanged(name: str) -> None:
    assert layers_of_module(name) == (name,)
