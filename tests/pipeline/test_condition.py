"""Mask and image latents: equal to Diffusers' `prepare_latents`, with and without a last image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import copy

import ascendit
from ascendit.errors import CheckpointError
from ascendit.pipeline.condition import make_condition

SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9}


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8))


@pytest.mark.parametrize("frames", [5, 9])
@pytest.mark.parametrize("with_last", [False, True])
def test_channels_equal_prepare_latents(tiny_i2v_cascade: Path, with_last: bool, frames: int) -> None:
    first, last = picture(0), picture(1) if with_last else None
    size = SIZE | {"num_frames": frames}
    theirs = WanImageToVideoPipeline.from_pretrained(tiny_i2v_cascade)
    images = [
        None if image is None else theirs.video_processor.preprocess(image, height=64, width=96).float()
        for image in (first, last)
    ]
    _, expected = theirs.prepare_latents(
        images[0], 1, 16, **size, dtype=torch.float32, device="cpu", last_image=images[1]
    )
    pipe = ascendit.load(tiny_i2v_cascade)
    request = pipe.request("a", image="a", last_image="z" if with_last else None, **size)
    channels = make_condition("i2v", first, request, pipe.vae, None, last).channels
    assert channels is not None and channels.shape == (1, 20, (frames + 3) // 4, 8, 12)
    torch.testing.assert_close(channels, expected, rtol=0, atol=1e-5)
    assert int(channels[:, :4].sum()) == 8 * 12 * (5 if with_last else 4)


def test_clip_tokens_of_both_images(tiny_flf2v: Path) -> None:
    pipe = ascendit.load(tiny_flf2v)
    request = pipe.request("a", image="a", last_image="z", **SIZE)
    tokens = make_condition("i2v", picture(0), request, pipe.vae, pipe.clip, picture(1)).tokens
    assert tokens is not None and tokens.shape == (2, 17, 32) and not torch.equal(tokens[0], tokens[1])


def test_position_embeddings_of_another_image_encoder(tiny_flf2v: Path, tmp_path: Path) -> None:
    folder = copy(tiny_flf2v, tmp_path / "m")
    config = folder / "image_encoder/config.json"
    config.write_text(config.read_text().replace('"image_size": 32', '"image_size": 64'))
    weights = load_file(file := folder / "image_encoder/model.safetensors")
    weights["embeddings.position_embedding.weight"] = torch.zeros(65, 32)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="pos_embed_seq_len = 34") as error:
        ascendit.load(folder)
    assert error.value.code == "E-CKP-06" and "130" in error.value.needs
