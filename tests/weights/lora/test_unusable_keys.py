"""Every key is used, or E-LRA-01 names it with the reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.loras import IMAGE, IMAGE_LAYERS, LAYERS, block_layers, matrices, save, shapes, write
from torch import Tensor

from ascendit.errors import CheckpointError, UsageError
from ascendit.weights.lora.file import MERGE_FIX
from ascendit.weights.lora.fold import Folds, LoraSource, require_skipped
from ascendit.weights.lora.keys import SKIPPED

Q = "diffusion_model.blocks.0.self_attn.q"
DOWN, UP = torch.ones(2, 24), torch.ones(24, 2)
PAIR = {f"{Q}.lora_down.weight": DOWN, f"{Q}.lora_up.weight": UP}


def refused(tmp_path: Path, tensors: dict[str, Tensor], **extra: Any) -> CheckpointError:
    source = save(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError) as e:
        Folds.open([source], "transformer", shapes(**extra))
    assert e.value.code == "E-LRA-01"
    assert str(source.path) in e.value.got
    assert "every key" in e.value.needs
    return e.value


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "misspelt": (
        {f"{Q}x.diff": DOWN},
        f"1 of 1 keys cannot be used: {Q}x.diff: no such layer; similar: blocks.0.self_attn.q",
    ),
    "misspelt, kohya": (
        {"lora_unet_blocks_0_self_attn_qq.diff": DOWN},
        "lora_unet_blocks_0_self_attn_qq.diff: no such layer; similar: blocks_0_self_attn_q",
    ),
    "no similar name": ({"foo.diff": DOWN}, "foo.diff: no such layer"),
    "another model": ({"double_blocks.0.img_attn.qkv.lora_A.weight": DOWN}, "no such layer"),
    "block too high": ({"transformer.blocks.2.attn1.to_q.lora_A.weight": DOWN}, "the model has 2 blocks"),
    "text encoder": ({"lora_te1_encoder_q.lora_down.weight": DOWN}, "LoRAs of text encoders are not"),
    "text encoder of diffusers": ({"text_encoder.q.lora_A.weight": DOWN}, "LoRAs of text encoders"),
    "no suffix": ({"diffusion_model.blocks": DOWN}, "not a key of a supported kind of LoRA"),
    "complete tensor": ({f"{Q}.weight": DOWN}, "a complete tensor, not a change"),
    "dora of kohya": (PAIR | {f"{Q}.dora_scale": DOWN}, "q.dora_scale: DoRA is not supported"),
    "dora of peft": (PAIR | {f"{Q}.lora_magnitude_vector": DOWN}, "DoRA is not supported"),
    "dora of peft, newer": (PAIR | {f"{Q}.lora_magnitude_vector.weight": DOWN}, "DoRA is not supported"),
    "set": ({f"{Q}.set_weight": DOWN}, "it replaces the weight"),
    "reshape": (PAIR | {f"{Q}.reshape_weight": torch.tensor([24, 24])}, "changes the shape"),
    "tucker": (PAIR | {f"{Q}.lora_mid.weight": DOWN}, "Tucker"),
    "tucker loha": ({f"{Q}.hada_t1": DOWN}, "Tucker"),
    "glora": ({f"{Q}.a1.weight": DOWN}, "GLoRA is not supported"),
    "oft": ({f"{Q}.oft_blocks": DOWN}, "OFT is not supported"),
    "up missing": (
        {f"{Q}.lora_down.weight": DOWN},
        "q.lora_down.weight: incomplete: up of this layer is missing",
    ),
    "down missing": ({f"{Q}.lora_B.weight": UP}, "incomplete: down of this layer is missing"),
    "a quarter of loha": ({f"{Q}.hada_w1_a": UP, f"{Q}.hada_w1_b": DOWN}, "hada_w2_a and hada_w2_b of this"),
    "half of lokr": ({f"{Q}.lokr_w1": UP}, "lokr_w2 of this layer is missing"),
    "half of a lokr factor": (
        {f"{Q}.lokr_w1": UP, f"{Q}.lokr_w2_a": UP},
        "lokr_w2_b of this layer is missing",
    ),
    "redundant lokr": (
        {f"{Q}.lokr_w1": UP, f"{Q}.lokr_w1_a": UP, f"{Q}.lokr_w1_b": UP, f"{Q}.lokr_w2": UP},
        "either lokr_w1 or its halves",
    ),
    "alpha alone": ({f"{Q}.alpha": torch.tensor(1.0)}, "q.alpha: the factors that it scales are missing"),
    "alpha of a difference": (
        {f"{Q}.diff": torch.ones(24, 24), f"{Q}.alpha": torch.tensor(1.0)},
        "q.alpha: the factors that it scales are missing",
    ),
    "bias without up": ({f"{Q}.lora_B.bias": torch.ones(24)}, "the factors of this layer are missing"),
    "alpha of two": (PAIR | {f"{Q}.alpha": torch.ones(2)}, "q.alpha: F32 [2] is not a valid scale"),
    "alpha nan": (
        PAIR | {f"{Q}.alpha": torch.tensor(torch.nan)},
        "q.alpha: F32 [] with the value nan is not a valid scale",
    ),
    "alpha of the file nan": (PAIR | {"lora_alpha": torch.tensor(torch.nan)}, "lora_alpha: F32 [] with the"),
    "alpha is bool": (PAIR | {f"{Q}.alpha": torch.tensor(True)}, "BOOL [] is not a valid scale"),
    "whole numbers": (
        {f"{Q}.lora_A.weight": DOWN.to(torch.int8), f"{Q}.lora_B.weight": UP},
        "q.lora_A.weight: I8 [2, 24] is not a floating-point tensor with rows",
    ),
    "no axes": ({f"{Q}.diff": torch.tensor(1.0)}, "F32 [] is not a floating-point tensor with rows"),
    "ranks differ": (
        {f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": torch.ones(24, 3)},
        "ranks differ (up [24, 3], down [2, 24])",
    ),
    "rank nothing": ({f"{Q}.lora_A.weight": DOWN[:0], f"{Q}.lora_B.weight": UP[:, :0]}, "the rank is 0 (up"),
    "another width": (
        {f"{Q}.lora_A.weight": torch.ones(2, 5120), f"{Q}.lora_B.weight": torch.ones(5120, 2)},
        "its product [5120, 5120] does not match the [24, 24] of blocks.0.attn1.to_q.weight",
    ),
    "another width, difference": (
        {f"{Q}.diff_b": torch.ones(25)},
        "q.diff_b: [25] does not match the [24] of blocks.0.attn1.to_q.bias",
    ),
    "transposed difference": (
        {"diffusion_model.blocks.0.ffn.0.diff": torch.ones(24, 200)},
        "[24, 200] does not match the [200, 24]",
    ),
    "two widths of loha": (
        {
            f"{Q}.hada_w1_a": UP,
            f"{Q}.hada_w1_b": DOWN,
            f"{Q}.hada_w2_a": UP,
            f"{Q}.hada_w2_b": torch.ones(2, 25),
        },
        "does not match the [24, 24]",
    ),
    "another size of lokr": (
        {f"{Q}.lokr_w1": UP, f"{Q}.lokr_w2": DOWN},
        "its product [48, 48] does not match",
    ),
    "another kernel": (
        {
            "diffusion_model.patch_embedding.lora_down.weight": torch.ones(2, 8, 2, 2, 1),
            "diffusion_model.patch_embedding.lora_up.weight": torch.ones(24, 2, 1, 1, 1),
        },
        "down [2, 8, 2, 2, 1] has another kernel size than the [24, 8, 1, 2, 2]",
    ),
    "more channels in": (
        {"diffusion_model.patch_embedding.diff": torch.ones(24, 36, 1, 2, 2)},
        "[24, 36, 1, 2, 2] does not match the [24, 8, 1, 2, 2] of patch_embedding.weight",
    ),
    "bias of another width": (PAIR | {f"{Q}.lora_B.bias": torch.ones(2)}, "F32 [2] does not match"),
    "layer without bias": (
        {"diffusion_model.blocks.0.self_attn.norm_q.diff_b": torch.ones(24)},
        "this layer has no bias",
    ),
    "two names for one": (
        PAIR | {"transformer.blocks.0.attn1.to_q.lora_A.weight": DOWN},
        f"means the same as {Q}.lora_down.weight",
    ),
    "two adapters": (
        {f"{Q}.lora_A.one.weight": DOWN, f"{Q}.lora_A.two.weight": DOWN, f"{Q}.lora_B.one.weight": UP},
        "lora_A.two.weight: means the same as",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_key_that_cannot_be_used_is_named(tmp_path: Path, case: str) -> None:
    tensors, message = BAD[case]
    assert message in refused(tmp_path, tensors).got


@pytest.mark.parametrize("name", IMAGE_LAYERS.values())
def test_image_layers_on_a_model_without_image_input(tmp_path: Path, name: str) -> None:
    key = f"diffusion_model.blocks.1.{name}"
    tensors = {f"{key}.lora_down.weight": DOWN, f"{key}.lora_up.weight": UP}
    error = refused(tmp_path, tensors)
    assert "2 of 2 keys" in error.got
    assert "has no CLIP image input; this LoRA is for a Wan2.1 image-to-video model" in error.got
    assert error.fix == 'use a LoRA for this model, or add lora_skip=["image"]'
    source = LoraSource(tmp_path / "a.safetensors")
    assert len(Folds.open([source], "transformer", shapes(**IMAGE)).names) == 1


# ---- groups that are skipped on request -------------------------------------------------------------

IMAGE_KEYS = {
    f"diffusion_model.{layer}.{role}.weight": tensor
    for layer in ("blocks.0.cross_attn.k_img", "blocks.1.cross_attn.v_img", "img_emb.proj.1")
    for role, tensor in (("lora_down", DOWN), ("lora_up", UP))
}
TEXT_KEYS = {"lora_te1_encoder_q.lora_down.weight": DOWN, "lora_te1_encoder_q.lora_up.weight": UP}


def test_a_group_is_skipped_by_name(tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors", PAIR | IMAGE_KEYS)
    folds = Folds.open([source], "transformer", shapes(), skip=["image"])
    assert folds.names == {"blocks.0.attn1.to_q.weight"}
    assert folds.notes == (
        "a.safetensors: 2 keys, 6 keys of group image skipped, "
        "scale 1 (no alpha in the file, rank 2) x weight 1",
    )
    after = folds.fold("blocks.0.attn1.to_q.weight", torch.zeros(24, 24), 0)
    assert torch.equal(after, torch.full((24, 24), 2.0))
    require_skipped(["image"], [Folds.open([], "transformer_2", shapes()), folds])


def test_only_the_named_group_is_skipped(tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors", PAIR | IMAGE_KEYS | TEXT_KEYS)
    with pytest.raises(CheckpointError) as e:
        Folds.open([source], "transformer", shapes())
    assert e.value.fix.endswith('add lora_skip=["image", "text"]')
    with pytest.raises(CheckpointError) as e:
        Folds.open([source], "transformer", shapes(), skip=["image"])
    assert "2 of 10 keys cannot be used: lora_te1_encoder_q" in e.value.got
    assert e.value.fix.endswith('add lora_skip=["text"]')
    assert Folds.open([source], "transformer", shapes(), skip=["image", "text"]).names
    source = save(tmp_path / "b.safetensors", IMAGE_KEYS | {f"{Q}x.diff": DOWN})
    with pytest.raises(CheckpointError) as e:
        Folds.open([source], "transformer", shapes(), skip=["image"])
    assert "1 of 7 keys" in e.value.got and "lora_skip" not in e.value.fix


def test_the_pages_list_every_group() -> None:
    *names, last = SKIPPED
    page = Path(__file__).parents[3] / "docs" / "cli.md"
    assert page.read_text().count(f"LoRA keys to leave out: {', '.join(names)} or {last};") == 3


def test_groups_that_do_not_exist_or_have_no_key(tmp_path: Path) -> None:
    source = save(tmp_path / "a.safetensors", PAIR)
    with pytest.raises(UsageError, match=r'lora_skip=\["imgs"\]') as e:
        Folds.open([source], "transformer", shapes(), skip=["imgs"])
    assert (e.value.code, e.value.needs) == ("E-USE-01", f"a group of keys: {', '.join(SKIPPED)}")
    folds = Folds.open([source], "transformer", shapes(), skip=["image"])
    with pytest.raises(UsageError, match=r'lora_skip=\["image"\] matches no key') as e:
        require_skipped(["image"], [folds])
    assert e.value.code == "E-USE-05"


def test_the_first_layer_of_an_image_to_video_model(tmp_path: Path) -> None:
    """A text-to-video LoRA, whose first layer has fewer input channels, can be used without that layer."""
    first = {"diffusion_model.patch_embedding.diff": torch.ones(24, 4, 1, 2, 2)}
    assert refused(tmp_path, PAIR | first).fix == 'use a LoRA for this model, or add lora_skip=["patch"]'
    source = LoraSource(tmp_path / "a.safetensors")
    assert Folds.open([source], "transformer", shapes(), skip=["patch"]).names == {
        "blocks.0.attn1.to_q.weight"
    }
    other = {f"{Q}.lora_A.weight": torch.ones(2, 25), f"{Q}.lora_B.weight": UP}
    assert "lora_skip" not in refused(tmp_path, first | other).fix  # of another width


@pytest.mark.parametrize("role", ["dora_scale", "oft_blocks", "ia3_l", "vera_lambda_b", "bone_", "hra_u"])
def test_what_changes_the_weight_in_another_way_is_to_be_merged(tmp_path: Path, role: str) -> None:
    error = refused(tmp_path, PAIR | {f"{Q}.alpha": torch.ones(()), f"{Q}.{role}": torch.ones(24)})
    assert f"q.{role}: " in error.got and "is not supported" in error.got and error.fix == MERGE_FIX


def test_five_keys_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    tensors = {f"diffusion_model.blocks.{i}.self_attn.q.diff": torch.ones(24, 24) for i in range(2, 10)}
    error = refused(tmp_path, tensors | PAIR)
    assert "8 of 10 keys" in error.got
    assert error.got.endswith("blocks.6.self_attn.q.diff: the model has 2 blocks; and 3 more")


def test_a_lora_for_another_width(tmp_path: Path) -> None:
    wider = shapes(num_attention_heads=4)
    layers = block_layers(LAYERS)
    factors = matrices(wider, layers)
    tensors = write(factors, "transformer.{}".format, ".lora_A.weight", ".lora_B.weight")
    error = refused(tmp_path, tensors)
    assert "its product [48, 48] does not match the [24, 24]" in error.got
    assert error.fix == "use a LoRA for a model of this width and kind"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("role", ["down", "diff"])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, value: float, role: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in PAIR.items()}
    tensors[f"{Q}.diff"] = torch.ones(24, 24)
    tensors[f"{Q}.diff" if role == "diff" else f"{Q}.lora_down.weight"][1, 3] = value
    folds = Folds.open([save(tmp_path / "a.safetensors", tensors)], "transformer", shapes())
    with pytest.raises(CheckpointError, match="values that are not finite") as e:
        folds.fold("blocks.0.attn1.to_q.weight", torch.zeros(24, 24), 0)
    assert e.value.code == "E-LRA-01"
    assert role in e.value.got


# ---- experts ----------------------------------------------------------------------------------------

KEY = "blocks.0.attn1.to_q.diff"


def two_experts(tmp_path: Path) -> Path:
    tensors = {f"{name}.{KEY}": torch.ones(24, 24) for name in ("transformer", "transformer_2")}
    return save(tmp_path / "a.safetensors", tensors).path


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_keys_for_another_expert_than_the_option(tmp_path: Path, expert: str) -> None:
    other = {"transformer": "transformer_2", "transformer_2": "transformer"}[expert]
    with pytest.raises(CheckpointError) as e:
        Folds.open([LoraSource(two_experts(tmp_path), 1.0, expert)], expert, shapes())
    assert f"{other}.{KEY}: for {other}, but the file was passed for {expert}" in e.value.got
    assert e.value.fix == f"pass the file without {expert}="


def test_keys_for_an_expert_that_the_model_lacks(tmp_path: Path) -> None:
    path = two_experts(tmp_path)
    with pytest.raises(
        CheckpointError, match=re.escape(f"transformer_2.{KEY}: for transformer_2, which this")
    ):
        Folds.open([LoraSource(path)], "transformer", shapes(), experts=("transformer",))
    with pytest.raises(UsageError, match="is for transformer_2") as e:
        Folds.open(
            [LoraSource(path, 1.0, "transformer_2")], "transformer", shapes(), experts=("transformer",)
        )
    assert (e.value.code, e.value.exit_code) == ("E-USE-01", 2)
