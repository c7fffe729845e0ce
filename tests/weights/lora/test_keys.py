"""Prefixes, suffixes and paths of LoRA keys, for models of the published sizes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ascendit.names import Shapes, expected_tensors, to_wan
from ascendit.weights.lora.keys import (
    FLAT_PREFIXES,
    INNER_WRAPPERS,
    REFUSED,
    SUFFIXES,
    WRAPPERS,
    Targets,
    refusal,
    split_key,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "14B": {},
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "2.1 I2V": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514},
}


@pytest.fixture(scope="module", params=CONFIGS)
def shapes(request: pytest.FixtureRequest) -> Shapes:
    return expected_tensors(CONFIGS[request.param])


@pytest.fixture(scope="module")
def targets(shapes: Shapes) -> Targets:
    return Targets(shapes)


def role_of(name: str) -> str:
    return "diff_b" if name.endswith(".bias") else "diff"


def test_every_tensor_has_a_match_for_every_name_style(shapes: Shapes, targets: Targets) -> None:
    for name in shapes:
        wan = to_wan(name)
        assert wan is not None, name
        for alias in (name, wan):
            path = re.sub(r"\.(weight|bias)$", "", alias)
            for prefix in (
                "",
                *(
                    "diffusion_model.",
                    "model.",
                    "base_model.model.",
                    "pipe.dit.",
                    "transformer.",
                    "transformer_2.",
                ),
                "transformer.base_model.model.",
                "base_model.model.diffusion_model.",
            ):
                key = split_key(f"{prefix}{path}.{role_of(name)}")
                assert targets.find(key) == name, key
            for prefix in FLAT_PREFIXES:
                key = split_key(f"{prefix}{path.replace('.', '_')}.{role_of(name)}")
                assert targets.find(key) == name, key


def test_flat_names_are_unique(shapes: Shapes) -> None:
    flat: dict[tuple[str, str], str] = {}
    for name in shapes:
        for alias in {name, to_wan(name) or name}:
            path = re.sub(r"\.(weight|bias)$", "", alias).replace(".", "_")
            assert flat.setdefault((path, role_of(name)), name) == name


FLAT = {
    "lora_unet_blocks_0_cross_attn_k.lora_down.weight": "blocks.0.attn2.to_k.weight",
    "lora_unet_blocks_11_self_attn_o.alpha": "blocks.11.attn1.to_out.0.weight",
    "lora_unet__blocks_1_ffn_0.lora_up.weight": "blocks.1.ffn.net.0.proj.weight",
    "lora_unet_blocks_1_ffn_2.hada_w1_a": "blocks.1.ffn.net.2.weight",
    "lora_unet_head_head.lora_down.weight": "proj_out.weight",
    "lora_unet_text_embedding_2.lora_down.weight": "condition_embedder.text_embedder.linear_2.weight",
    "lora_unet_time_embedding_0.lora_down.weight": "condition_embedder.time_embedder.linear_1.weight",
    "lora_unet_time_projection_1.lora_down.weight": "condition_embedder.time_proj.weight",
    "lora_unet_patch_embedding.lokr_w1": "patch_embedding.weight",
    "lora_unet_blocks_3.diff_m": "blocks.3.scale_shift_table",
    "lycoris_blocks_3_attn1_to_out_0.lokr_w2_b": "blocks.3.attn1.to_out.0.weight",
    "lora_unet_head.diff_m": "scale_shift_table",
    "diffusion_model.head.diff_m": "scale_shift_table",
    "transformer.blocks.3.diff_m": "blocks.3.scale_shift_table",
}


@pytest.mark.parametrize("name", FLAT)
def test_supported_names(name: str) -> None:
    assert Targets(expected_tensors({})).find(split_key(name)) == FLAT[name]


WRAPPED = [
    "_orig_mod.blocks.3.attn1.to_q.lora_A.weight",
    "transformer._orig_mod.module.blocks.3.attn1.to_q.lora_A.weight",
    "module._orig_mod.blocks.3._checkpoint_wrapped_module.attn1.to_q.lora_A.default.weight",
    "_fsdp_wrapped_module.blocks.3._fsdp_wrapped_module._orig_mod.self_attn.q.lora_down.weight",
    "base_model.model._orig_mod.blocks.3.self_attn.q._fsdp_wrapped_module.lora_A.weight",
    "base_model.model.blocks.3.self_attn.q.base_layer.lora_A.my_adapter.weight",
    "blocks.3.self_attn._orig_mod.q.lora_A.my-adapter.weight",
    "blocks.3.attn1.to_q.lora_A.default._orig_mod.weight",
    "blocks.3.attn1.to_q.lora_down.style.weight",
    "model.diffusion_model.blocks.3.self_attn.q.lora_A.weight",
    "diffusion_model.model.blocks.3.self_attn.q.lora_A.weight",
    "unet.base_model.model.blocks.3.attn1.to_q.lora_A.weight",
    "pipe.dit.blocks.3.self_attn.q.lora_A.default.weight",
    "wan.model.net.blocks.3.self_attn.q.lora_A.weight",
    "denoiser.module.blocks.3.self_attn.q.lora_A.weight",
    "generator.model._fsdp_wrapped_module.blocks.3.self_attn.q.lora_A.weight",
    "lora_unet_blocks_3.self_attn.q.lora_down.weight",
    "lora_unet_blocks.3.self_attn.q.lora_down.weight",
    "lora_unet.blocks.3.self_attn.q.lora_down.weight",
    "lora_unet_diffusion_model_blocks_3_self_attn_q.lora_down.weight",
    "lora_unet__orig_mod_blocks_3_self_attn_q.lora_down.weight",
    "lora_unet_blocks_3__orig_mod_self_attn_q.lora_down.weight",
    "lora_unet_blocks_3__checkpoint_wrapped_module_attn1_to_q.lora_down.weight",
    "diffusion_model.lora_unet_blocks_3_self_attn_q.lora_down.weight",
    "module.lora_unet__blocks_3_self_attn_q.lora_down.weight",
    "transformer.blocks_3_attn1_to_q.lora_down.weight",
    "lycoris_model_blocks_3_self_attn_q.lora_down.weight",
    "_forward_module.student.blocks.3.self_attn.q.lora_A.weight",
    "model_state_dict.model_ema.blocks.3.self_attn.q.lora_A.weight",
    "net_ema.dit_ema.blocks.3.self_attn.q.lora_A.weight",
    "unet_ema.transformer_ema.blocks.3.self_attn.q.lora_A.weight",
    "lora_unet_model_ema_blocks_3_self_attn_q.lora_down.weight",
]
"""Keys of `blocks.3.attn1.to_q` in a part of a training loop."""


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers(name: str) -> None:
    key = split_key(name)
    target = Targets(expected_tensors({"num_layers": 4})).find(key)
    assert (target, key.role) == ("blocks.3.attn1.to_q.weight", "down")


def test_wrappers_in_any_order() -> None:
    targets = Targets(expected_tensors({"num_layers": 1}))
    names = (*WRAPPERS, *INNER_WRAPPERS)
    for first in names:
        for second in names:
            key = split_key(f"{first}{second}blocks.0.attn1.to_q.lora_A.weight")
            assert targets.find(key) == "blocks.0.attn1.to_q.weight"
            flat = f"lora_unet_{first}{second}blocks.0.attn1.to_q".replace(".", "_")
            assert targets.find(split_key(f"{flat}.alpha")) == "blocks.0.attn1.to_q.weight"


@pytest.mark.parametrize("name", ["controlnet", "text_encoder", "vace_blocks.0", "critic", "blocks.0.ema"])
def test_other_modules_are_not_wrappers(name: str) -> None:
    targets = Targets(expected_tensors({"num_layers": 1}))
    assert targets.find(split_key(f"{name}.blocks.0.attn1.to_q.lora_A.weight")) is None


GROUPS = {
    "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": "image",
    "blocks.0.cross_attn.norm_k_img.diff": "image",
    "lora_unet_blocks_0_cross_attn_v_img.alpha": "image",
    "transformer.blocks.0.attn2.add_v_proj.lora_A.weight": "image",
    "blocks.0.attn2.norm_added_k.w_norm": "image",
    "diffusion_model.img_emb.proj.1.diff_b": "image",
    "lora_unet_img_emb_proj_3.lora_up.weight": "image",
    "condition_embedder.image_embedder.ff.net.0.proj.lora_A.weight": "image",
    "blocks.0.cross_attn.k_img.dora_scale": "image",
    "lora_te1_encoder_q.lora_down.weight": "text",
    "text_encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": "text",
    "pipe.text_encoder.blocks.0.attn.q.lora_A.weight": "text",
    "diffusion_model.vace_blocks.0.self_attn.q.lora_A.weight": "control",
    "lora_unet_vace_blocks_0_self_attn_q.alpha": "control",
    "diffusion_model.ref_conv.diff": "control",
    "diffusion_model.audio_injector.injector.0.q.lora_A.weight": "audio",
    "blocks.0.audio_cross_attn.q_linear.lora_A.weight": "audio",
    "lora_unet_face_adapter_fuser_blocks_0_linear1_q.alpha": "face",
    "diffusion_model.patch_embedding.lora_A.weight": "patch",
    "diffusion_model.blocks.0.cross_attn.k.lora_A.weight": "",
    "diffusion_model.text_embedding.0.lora_A.weight": "",
    "condition_embedder.text_embedder.linear_1.lora_A.weight": "",
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups(name: str) -> None:
    assert split_key(name).group == GROUPS[name]


def test_image_layers_of_kohya() -> None:
    targets = Targets(expected_tensors(CONFIGS["2.1 I2V"]))
    assert (
        targets.find(split_key("lora_unet_blocks_9_cross_attn_k_img.alpha"))
        == "blocks.9.attn2.add_k_proj.weight"
    )
    key = split_key("lora_unet_img_emb_proj_3.lora_down.weight")
    assert targets.find(key) == "condition_embedder.image_embedder.ff.net.2.weight"


def test_prefixes_that_name_an_expert() -> None:
    named = {prefix: split_key(f"{prefix}blocks.0.diff_m").expert for prefix in WRAPPERS}
    assert named["transformer."] == "transformer"
    assert named["transformer_2."] == "transformer_2"
    assert split_key("transformer_2.base_model.model.blocks.0.diff_m").expert == "transformer_2"
    assert named["dit."] == named["high_noise_model."] == "transformer"
    assert named["dit2."] == named["low_noise_model."] == "transformer_2"
    assert named["model."] is named["diffusion_model."] is named["base_model."] is None
    flat = {
        p: split_key(f"{p}blocks_0_ffn_0.alpha").expert for p in ("lora_transformer_", "lora_transformer_2_")
    }
    assert list(flat.values()) == ["transformer", "transformer_2"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffixes(suffix: str) -> None:
    key = split_key(f"diffusion_model.blocks.0.self_attn.q{suffix}")
    assert (key.path, key.role, key.flat) == ("blocks.0.self_attn.q", SUFFIXES[suffix], False)
    flat = split_key(f"lora_unet_blocks_0_self_attn_q{suffix}")
    assert (flat.path, flat.role, flat.flat) == ("blocks_0_self_attn_q", SUFFIXES[suffix], True)


def test_adapter_names_are_removed() -> None:
    key = split_key("transformer.blocks.0.attn1.to_q.lora_A.my-style_2.weight")
    assert (key.path, key.role) == ("blocks.0.attn1.to_q", "down")
    assert split_key("transformer.proj_out.lora_B.default.bias").role == "up_bias"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.dora_scale", "DoRA"),
        ("x.lora_magnitude_vector.default.weight", "DoRA"),
        ("x.set_weight", "replaces"),
        ("x.lokr_t2", "Tucker"),
        ("x.b2.weight", "GLoRA"),
        ("x.oft_R.default.weight", "OFT"),
        ("x.on_input", "IA3"),
        ("x.fourierft_spectrum", "FourierFT"),
        ("vera_A", "VeRA"),
        ("x.weight", "complete tensor"),
    ],
)
def test_unsupported_kinds(name: str, message: str) -> None:
    assert message in str(refusal(name))
    assert split_key(name).role is None


def test_no_suffix_is_both_refused_and_used() -> None:
    assert [s for s in SUFFIXES for pattern, _ in REFUSED[:-1] if re.search(pattern, f"x{s}")] == []


def test_the_nearest_name_is_in_the_same_block() -> None:
    targets = Targets(expected_tensors({}))
    assert targets.reason_missing(split_key("blocks.7.attn1.to_w.lora_A.weight")).endswith(
        "similar: blocks.7.attn1.to_v"
    )
    assert (
        targets.reason_missing(split_key("blocks.40.attn1.to_q.lora_A.weight")) == "the model has 40 blocks"
    )
