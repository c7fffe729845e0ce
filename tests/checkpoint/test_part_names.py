"""Names of text encoders, VAEs and image encoders in other tools: each maps to one tensor of the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import tiny
import torch
from checkpoint.test_part_tensors import CLIP_H, UMT5_XXL, WAN21_VAE, WAN22_VAE
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st
from wan_files import CLIP, umt5_name, vae_name

from ascendit.checkpoint.component import Part, read_json
from ascendit.checkpoint.part_check import check_part
from ascendit.checkpoint.part_configs import AutoencoderConfig, ImageEncoderConfig, TextEncoderConfig
from ascendit.checkpoint.part_names import canonical_part, llama_cpp_names, recognise_part
from ascendit.checkpoint.part_tensors import autoencoder_tensors, image_encoder_tensors, text_encoder_tensors
from ascendit.checkpoint.tensor_info import Encoding, TensorInfo
from ascendit.errors import CheckpointError
from ascendit.model.library_component import load_library_part
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
    "umt5 quantized": (
        "text_encoder",
        lambda: [x.replace(".weight", ".qweight") if "q" in x else x for x in UMT5],
    ),
    "umt5 prefix": ("text_encoder", lambda: [f"model.{umt5_name(name)}" for name in UMT5]),
    "vae prefix": ("vae", lambda: [f"first_stage_model.{name}" for name in VAES[0]]),
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


UNUSED = {
    "text_encoder": ["decoder.block.0.layer.0.SelfAttention.q.weight", "model.lm_head.weight", "logit_scale"],
    "vae": ["mean", "model.std"],
    "image_encoder": [
        "text_model.embeddings.token_embedding.weight",
        "logit_scale",
        "text_projection.weight",
    ],
}


@pytest.mark.parametrize("part", UNUSED)
def test_tensors_that_wan_does_not_use_are_left_out(part: str) -> None:
    names: dict[str, Any] = infos([*UNUSED[part], "other.weight"])
    assert list(canonical_part(part, names)) == ["other.weight"]
    assert canonical_part("transformer", names) == names
    llama: dict[str, Any] = infos(["dec.blk.0.attn_q.weight", "output.weight", "enc.blk.0.attn_q.weight"])
    assert len(canonical_part("text_encoder", llama)) == 1


@pytest.mark.parametrize("scale", [(), (1,), (6,), (6, 1)])
def test_query_key_and_value_in_one_encoded_tensor(scale: tuple[int, ...]) -> None:
    path, size = Path("f"), math.prod(scale)
    factor = TensorInfo("s", "F32", scale, path, 100, 100 + 4 * size)
    info = TensorInfo("w", "BF16", (6, 4), path, 0, 24, encoding=Encoding("F8_E4M3", factor))
    stored = {"visual.transformer.0.attn.to_qkv.weight": info}
    pieces = list(canonical_part("image_encoder", stored).values())
    assert [(x.shape, x.start, x.end) for x in pieces] == [((2, 4), 8 * i, 8 * i + 8) for i in range(3)]
    rows = [(100 + 8 * i, 108 + 8 * i) if size == 6 else (100, 104) for i in range(3)]
    assert [(x.encoding.scale.start, x.encoding.scale.end) for x in pieces] == rows  # type: ignore[union-attr]


# ---- text encoders in llama.cpp, against the table of the package `gguf` ---------------------------

BLOCKS = 13


@pytest.mark.parametrize("gated", [True, False])
def test_all_names_of_an_encoder(gated: bool) -> None:
    config = TextEncoderConfig(num_layers=BLOCKS, feed_forward_proj="gated-gelu" if gated else "relu")
    ours = text_encoder_tensors(config)
    theirs = {gguf_files.llama_cpp_name(name): name for name in ours}
    assert len(theirs) == len(ours) and llama_cpp_names(theirs) == theirs
    assert recognise_part(theirs) == "text_encoder"


def test_other_names_are_not_translated() -> None:
    others = [
        "dec.blk.0.attn_q.weight",
        "enc.blk.x.attn_q.weight",
        "enc.blk.0.attn_q.bias",
        "blk.0.attn_q.weight",
    ]
    assert llama_cpp_names([*others, "shared.weight", "token_embd", "enc.blk.0.attn_z.weight"]) == {}
    assert recognise_part(["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight"]) is None


@pytest.fixture
def encoder(tmp_path: Path) -> tuple[Part, dict[str, torch.Tensor], torch.nn.Module]:
    """A text encoder with one GGUF file: its part, the stored values, and the model with these values."""
    model = tiny.text_encoder(0, 100)
    model.config.save_pretrained(tmp_path)
    weights = {n: w for n, w in model.state_dict().items() if n != "encoder.embed_tokens.weight"}
    values = gguf_files.write_model(
        tmp_path / "umt5-Q8_0.gguf",
        {gguf_files.llama_cpp_name(name): weight for name, weight in weights.items()},
        "Q8_0",
        arch="t5encoder",
    )
    stored = {name: values[gguf_files.llama_cpp_name(name)] for name in weights}
    assert {str(value.dtype) for value in stored.values()} == {"torch.bfloat16", "torch.float32"}
    tied = {"encoder.embed_tokens.weight": stored["shared.weight"]}
    model.load_state_dict({name: value.float() for name, value in (stored | tied).items()})
    part = Part(
        "text_encoder", tmp_path, "transformers", "UMT5EncoderModel", read_json(tmp_path / "config.json")
    )
    return part, stored, model.eval()


def test_a_text_encoder_has_the_embeddings_of_the_decoded_weights(encoder) -> None:
    part, stored, model = encoder
    shards = check_part(part)
    assert shards is not None and shards.tensors.keys() == stored.keys()
    loaded = load_library_part(part, shards, torch.float32)
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).last_hidden_state, model(tokens).last_hidden_state)


def test_a_missing_tensor_is_named(encoder) -> None:
    part, stored, _ = encoder
    left = {
        gguf_files.llama_cpp_name(name): value
        for name, value in stored.items()
        if "layer.0.SelfAttention.q" not in name
    }
    gguf_files.write_model(part.path / "umt5-Q8_0.gguf", left, "Q8_0", arch="t5encoder")
    with pytest.raises(CheckpointError) as e:
        check_part(part)
    assert e.value.code == "E-CKP-04" and "encoder.block.0.layer.0.SelfAttention.q.weight" in e.value.got
