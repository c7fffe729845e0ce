"""The Wan family: published figures as literals, properties of helpers, and rows matched by shape."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from ascendit.family import SPECS, VaeConfig, WanConfig, match_spec, out_channels

P480 = {(832, 480), (480, 832)}
P720 = {(1280, 720), (720, 1280)}

# name: task, experts, steps, shift, boundary, guidance, guidance of the low-noise expert, frames, fps, sizes
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "Wan2.2-T2V-A14B": ("t2v", 2, 40, 12.0, 0.875, 4.0, 3.0, 81, 16, P720 | P480),
    "Wan2.2-I2V-A14B": ("i2v", 2, 40, 5.0, 0.900, 3.5, 3.5, 81, 16, P720 | P480),
    "Wan2.2-TI2V-5B": ("ti2v", 1, 50, 5.0, None, 5.0, None, 121, 24, {(1280, 704), (704, 1280)}),
    "Wan2.1-T2V-1.3B": ("t2v", 1, 50, 5.0, None, 5.0, None, 81, 16, P480),
    "Wan2.1-T2V-14B": ("t2v", 1, 50, 5.0, None, 5.0, None, 81, 16, P720 | P480),
    "Wan2.1-I2V-14B-480P": ("i2v", 1, 40, 3.0, None, 5.0, None, 81, 16, P480),
    "Wan2.1-I2V-14B-720P": ("i2v", 1, 40, 5.0, None, 5.0, None, 81, 16, P720 | P480),
    "Wan2.1-FLF2V-14B-720P": ("i2v", 1, 50, 16.0, None, 5.0, None, 81, 16, P720 | P480),
}
# Published folders: width (heads x head size), layers, channels in and out, experts, image K/V.
A14B: dict[str, Any] = {"dim": 40 * 128, "num_layers": 40, "out_channels": 16, "image_cross_attention": False}
SHAPES: dict[str, dict[str, Any]] = {
    "Wan2.2-T2V-A14B": {**A14B, "in_channels": 16, "num_experts": 2},
    "Wan2.2-I2V-A14B": {**A14B, "in_channels": 36, "num_experts": 2},
    "Wan2.2-TI2V-5B": {
        "dim": 24 * 128,
        "num_layers": 30,
        "in_channels": 48,
        "out_channels": 48,
        "num_experts": 1,
        "image_cross_attention": False,
    },
    "Wan2.1-T2V-1.3B": {**A14B, "dim": 12 * 128, "num_layers": 30, "in_channels": 16, "num_experts": 1},
    "Wan2.1-T2V-14B": {**A14B, "in_channels": 16, "num_experts": 1},
}
I2V_21 = {**A14B, "in_channels": 36, "num_experts": 1, "image_cross_attention": True}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    s = SPECS[name]
    assert s.name == name
    assert (
        s.task,
        s.num_experts,
        s.num_inference_steps,
        s.flow_shift,
        s.boundary_ratio,
        s.guidance_scale,
        s.guidance_scale_2,
        s.num_frames,
        s.fps,
        set(s.sizes),
    ) == PUBLISHED[name]
    assert s.size_multiple == (32 if name == "Wan2.2-TI2V-5B" else 16)


def test_no_row_without_published_figures() -> None:
    assert set(SPECS) == {*PUBLISHED, "ascendit-demo"}


def test_default_sizes() -> None:
    first = {name: s.sizes[0] for name, s in SPECS.items()}
    assert first["Wan2.2-TI2V-5B"] == (1280, 704)
    assert first["Wan2.1-T2V-1.3B"] == first["Wan2.1-I2V-14B-480P"] == (832, 480)
    for name in ("Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "Wan2.1-T2V-14B", "Wan2.1-I2V-14B-720P"):
        assert first[name] == (1280, 720), name


@pytest.mark.parametrize("name", SPECS)
def test_every_row_follows_its_own_rules(name: str) -> None:
    s = SPECS[name]
    assert s.num_frames % 4 == 1
    for width, height in s.sizes:
        assert width % s.size_multiple == height % s.size_multiple == 0


def test_the_demo_row_matches_the_demo_world() -> None:
    from ascendit.demo import world

    demo = SPECS["ascendit-demo"]
    assert demo.sizes == ((world.SIZE, world.SIZE),)
    assert (demo.num_frames, demo.fps, demo.num_experts) == (world.FRAMES, world.FPS, 2)


def test_shift_depends_on_the_size_as_published() -> None:
    i2v = SPECS["Wan2.1-I2V-14B-720P"]
    assert i2v.shift_for(1280, 720) == 5.0
    assert i2v.shift_for(832, 480) == i2v.shift_for(480, 832) == 3.0
    assert SPECS["Wan2.1-I2V-14B-480P"].shift_for(832, 480) == 3.0
    assert SPECS["Wan2.1-T2V-14B"].shift_for(832, 480) == 5.0
    assert SPECS["Wan2.2-T2V-A14B"].shift_for(832, 480) == 12.0


@pytest.mark.parametrize("folder", ["", "Wan2.1-FLF2V-14B-720P-diffusers", "Wan2.1-I2V-14B-480P"])
def test_position_embeddings_distinguish_flf2v_in_any_folder(folder: str) -> None:
    spec = match_spec(**I2V_21, first_last_frame=True, folder_name=folder)
    assert spec is not None and spec.name == "Wan2.1-FLF2V-14B-720P" and spec.last_frame == "required"
    assert match_spec(**A14B, in_channels=36, num_experts=1, first_last_frame=True) is None


@pytest.mark.parametrize("name", SHAPES)
def test_match_returns_the_row_of_a_published_folder(name: str) -> None:
    for folder in ("", f"{name}-Diffusers", "my-model"):
        spec = match_spec(**SHAPES[name], folder_name=folder)
        assert spec is not None and spec.name == name


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Wan2.1-I2V-14B-480P-Diffusers", "Wan2.1-I2V-14B-480P"),
        ("wan2.1-i2v-14b-480p", "Wan2.1-I2V-14B-480P"),
        ("Wan2.1-I2V-14B-720P-Diffusers", "Wan2.1-I2V-14B-720P"),
        ("", "Wan2.1-I2V-14B-720P"),
        ("anything", "Wan2.1-I2V-14B-720P"),
    ],
)
def test_match_distinguishes_480p_and_720p_by_the_folder(folder: str, name: str) -> None:
    spec = match_spec(**I2V_21, folder_name=folder)
    assert spec is not None and spec.name == name


@pytest.mark.parametrize("name", [*SHAPES, "Wan2.1-I2V-14B-480P"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("dim", 512), ("num_layers", 2), ("in_channels", 20), ("out_channels", 4), ("num_experts", 3)],
)
def test_match_is_none_if_one_figure_differs(name: str, field: str, value: int) -> None:
    shape = {**SHAPES.get(name, I2V_21), field: value}
    assert match_spec(**shape, folder_name=name) is None


def test_match_needs_equal_image_cross_attention() -> None:
    assert match_spec(**{**I2V_21, "image_cross_attention": False}, folder_name="Wan2.1-I2V-14B-480P") is None
    assert match_spec(**{**SHAPES["Wan2.1-T2V-14B"], "image_cross_attention": True}) is None


def test_the_table_needs_no_torch() -> None:
    code = "import sys, ascendit.family; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- config.json --------------------------------------------------------------------------------


def test_output_channels_that_are_absent_or_null() -> None:
    """As in Diffusers: absent means its default, null the channels of the input."""
    for config, count in (({"in_channels": 36}, 16), ({"in_channels": 36, "out_channels": None}, 36)):
        assert WanConfig.from_dict(config).out_channels == out_channels(config) == count


def test_defaults_equal_those_of_diffusers() -> None:
    assert WanConfig().to_dict() == {
        "patch_size": [1, 2, 2],
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }
    assert VaeConfig.from_dict({"z_dim": 16}) == VaeConfig(scale_factor_spatial=8, scale_factor_temporal=4)


def test_out_channels_default_to_in_channels() -> None:
    assert WanConfig.from_dict({"in_channels": 48, "out_channels": None}).out_channels == 48
    assert WanConfig.from_dict({"_class_name": "x", "patch_size": [1, 4, 4]}).patch_size == (1, 4, 4)
