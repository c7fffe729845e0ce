"""One tensor, many spellings."""

import pytest

from ascendit.names import canonical, naming_of, on_disk, unwrapped


@pytest.mark.parametrize(
    ("name", "naming", "expected"),
    [
        ("blocks.0.self_attn.q.linear.weight", "wan", "blocks.0.attn1.to_q.weight"),
        ("blocks.0.self_attn.q.linear.weight_dual_scale", "wan", "blocks.0.attn1.to_q.weight_dual_scale"),
        ("blocks.0.ffn.2.div.mul_scale", "wan", "blocks.0.ffn.net.2.mul_scale"),
        ("blocks.0.attn1.to_q.linear.bias", "diffusers", "blocks.0.attn1.to_q.bias"),
        ("model.diffusion_model.head.modulation", "wan", "scale_shift_table"),
        ("diffusion_model.blocks.0.norm3.bias", "wan", "blocks.0.norm2.bias"),
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


def test_only_whole_wrappers_come_off() -> None:
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
def test_whose_names_they_are(names: list[str], naming: str | None) -> None:
    assert naming_of(names) == naming


def test_on_disk() -> None:
    assert on_disk("proj_out.bias", "wan") == "head.head.bias"
    assert on_disk("proj_out.bias", "diffusers") == "proj_out.bias"
    assert on_disk("strange", "wan") == "strange"
