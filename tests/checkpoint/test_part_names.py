"""Names of text encoders, VAEs and image encoders in other tools: each maps to one tensor of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from checkpoint.test_part_tensors import CLIP_H, UMT5_XXL, WAN21_VAE, WAN22_VAE
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from wan_files import CLIP, umt5_name, vae_name

from ascendit.checkpoint.part_configs import AutoencoderConfig, ImageEncoderConfig, TextEncoderConfig
from ascendit.checkpoint.part_names import canonical_part, recognise_part
from ascendit.checkpoint.part_tensors import autoencoder_tensors, image_encoder_tensors, text_encoder_tensors
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.errors import CheckpointError
from ascendit.names import Shapes, expected_tensors, to_wan

UMT5 = text_encoder_tensors(TextEncoderConfig(**UMT5_XXL))
VAES = [autoencoder_tensors(AutoencoderConfig(**config)) for config in (WAN21_VAE, WAN22_VAE)]


def infos(names: Iterable[str], shapes: Shapes | None = None) -> dict[str, TensorInfo]:
    return {n: TensorInfo(n, "F32", (shapes or {}).get(n, (1,)), Path("x"), 0, 4) for n in names}


def renamed(part: str, names: Iterable[str]) -> dict[str, str]:
    """Stored name -> canonical name."""
    return {info.name: name for name, info in canonical_part(part, infos(names)).items()}


def test_names_of_the_vae_are_those_of_diffusers_converter() -> None:
    config = AutoencoderConfig(**WAN21_VAE).model_dump()
    stored = [vae_name(name, config) for name in VAES[0]]
    theirs = {old: new for new, old in convert_wan_vae_to_diffusers({n: n for n in stored}).items()}
    assert set(theirs.values()) == set(VAES[0])
    assert renamed("vae", stored) == theirs


@settings(max_examples=12)
@given(st.booleans(), st.integers(1, 4), st.lists(st.booleans(), max_size=4))
def test_names_of_every_vae_are_inverted(residual: bool, blocks: int, temporal: list[bool]) -> None:
    config = AutoencoderConfig.model_construct(
        is_residual=residual,
        num_res_blocks=blocks,
        dim_mult=[1] + [2] * len(temporal),
        temperal_downsample=temporal,
    )
    names = {vae_name(name, config.model_dump()): name for name in autoencoder_tensors(config)}
    assert len(names) == len(autoencoder_tensors(config))
    assert renamed("vae", names) == names


def test_names_of_umt5_are_those_of_the_library() -> None:
    names = {umt5_name(name): name for name in UMT5}
    assert len(names) == len(UMT5) and "blocks.23.ffn.gate.0.weight" in names
    assert renamed("text_encoder", names) == names
    scales = {name.replace(".weight", ".scale_weight"): name for name in names if "attn.q" in name}
    assert [n.rpartition(".")[2] for n in renamed("text_encoder", scales).values()] == ["scale_weight"] * 24


def wan_transformer() -> list[str]:
    return [to_wan(name) or name for name in expected_tensors({"num_layers": 1})]


def clip_names() -> list[str]:
    names = list(image_encoder_tensors(ImageEncoderConfig(**CLIP_H)))
    for old, new in CLIP.items():
        names = [name.replace(old, new) for name in names]
    return [f"visual.{name}" for name in names] + ["textual.head.0.weight", "log_scale"]


FILES: dict[str, tuple[str | None, Callable[[], list[str]]]] = {
    "umt5": ("text_encoder", lambda: list(UMT5)),
    "umt5 tied": ("text_encoder", lambda: [*list(UMT5)[1:], "encoder.embed_tokens.weight"]),
    "umt5 wan": ("text_encoder", lambda: [umt5_name(name) for name in UMT5]),
    "umt5 comfy": ("text_encoder", lambda: [*UMT5, "spiece_model", "scaled_fp8"]),
    "vae": ("vae", lambda: list(VAES[0])),
    "vae 2.2": ("vae", lambda: list(VAES[1])),
    "vae wan": ("vae", lambda: [vae_name(name, WAN21_VAE | {"is_residual": False}) for name in VAES[0]]),
    "vae wan 2.2": ("vae", lambda: [vae_name(name, WAN22_VAE) for name in VAES[1]]),
    "clip": ("image_encoder", lambda: list(image_encoder_tensors(ImageEncoderConfig(**CLIP_H)))),
    "clip wan": ("image_encoder", clip_names),
    "transformer": ("transformer", lambda: list(expected_tensors({"num_layers": 1}))),
    "transformer wan": ("transformer", wan_transformer),
    "transformer comfy": (
        "transformer",
        lambda: [f"model.diffusion_model.{name}" for name in wan_transformer()],
    ),
    "two components": (None, lambda: [*VAES[0], *UMT5]),
    "transformer and vae": (None, lambda: [*wan_transformer(), *VAES[0]]),
    "unknown": (None, lambda: ["a.weight", "b"]),
    "empty": (None, list),
}


@pytest.mark.parametrize("file", FILES)
def test_a_component_is_recognised_by_its_names(file: str) -> None:
    part, names = FILES[file]
    assert recognise_part(names()) == part


def test_unknown_names_stay_and_duplicates_are_refused() -> None:
    assert renamed("vae", ["encoder.conv1.weight", "other.conv9.weight"]) == {
        "encoder.conv1.weight": "encoder.conv_in.weight",
        "other.conv9.weight": "other.conv9.weight",
    }
    with pytest.raises(CheckpointError, match="both map to encoder.conv_in.weight") as e:
        canonical_part("vae", infos(["encoder.conv1.weight", "encoder.conv_in.weight"]))
    assert e.value.code == "E-CKP-09"
    names: dict[str, Any] = infos(["blocks.0.norm2.weight", "module.x"])
    assert canonical_part("transformer", names) == names
