"""The oracle is Diffusers' own model, built without memory."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from ascendit.checkpoint.names import expected_tensors, transformer_dim
from ascendit.errors import CheckpointError

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


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_those_of_diffusers(variant: str) -> None:
    config = {**SMALL, **VARIANTS[variant]}
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert expected_tensors(config) == found
    assert expected_tensors(dict(model.config)) == found  # as written to config.json, with every default
    assert transformer_dim(config) == config["num_attention_heads"] * config["attention_head_dim"]


def test_defaults_are_those_of_diffusers() -> None:
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
def test_a_value_that_is_no_dimension_is_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"has {key} = ") as e:
        expected_tensors({**SMALL, key: value})
    assert e.value.code == "E-CKP-06"
