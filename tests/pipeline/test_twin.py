"""Complete runs on the twin of an NPU: the demo's video is close to the reference on the CPU."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import ascendit
import ascendit.twin
from ascendit.demo.adherence import pick
from ascendit.errors import UsageError
from ascendit.kernels.cpu import attention
from ascendit.pipeline.generate import Pipeline
from ascendit.verify.metrics import psnr

pytestmark = pytest.mark.usefixtures("twin")
MEDIAN_DB, LEAST_DB = 45.0, 35.0


@pytest.fixture(autouse=True)
def _one_thread(_repeatable: None) -> None:
    """The models are so small that a second thread only waits for the first."""
    torch.set_num_threads(1)


@cache
def demo(device: str) -> Pipeline:
    return ascendit.load(
        "demo", device=device, dtype="bfloat16", ops="reference" if device == "cpu" else None
    )


def against_the_reference(device: str, prompts: list[str], **fields: Any) -> list[float]:
    """PSNR in dB of each prompt's frames."""
    videos = [[demo(d).generate(p, seed=7, **fields).frames for p in prompts] for d in ("cpu", device)]
    return [psnr(*pair) for pair in zip(*videos, strict=True)]


def test_two_short_videos() -> None:
    prompts = [scene.prompt() for scene in pick(2)]
    decibels = against_the_reference("twin:a5", prompts, num_inference_steps=6, num_frames=5)
    assert min(decibels) >= MEDIAN_DB, decibels
    assert ascendit.twin.launches()["npu_fusion_attention"] > 0


@pytest.mark.slow
def test_twelve_prompts() -> None:
    prompts = [scene.prompt() for scene in pick(12)]
    decibels = against_the_reference("twin:a5", prompts)
    print("PSNR", [round(x, 1) for x in decibels])
    assert median(decibels) >= MEDIAN_DB and min(decibels) >= LEAST_DB, decibels


@pytest.mark.skipif(attention.library().library is None, reason="there is no native attention")
def test_numbers_per_probability_on_the_cpu_and_the_twin(tiny_t2v_single: Path) -> None:
    latents = {
        numbers: [
            ascendit.load(tiny_t2v_single, device=device, dtype="bfloat16", attention_probabilities=numbers)
            .generate("a cat", seed=7, **SMALL, allow_flat=True)
            .latents
            for device in ("cpu", "twin:a5")
        ]
        for numbers in ("one", "two")
    }
    for pair in latents.values():
        assert np.array_equal(*pair)
    assert not np.array_equal(latents["one"], latents["two"])


SMALL: dict[str, Any] = {"height": 48, "width": 32, "num_frames": 5, "num_inference_steps": 2}


def test_every_kind_of_model_runs(tiny_folder: Any) -> None:
    image = np.zeros((48, 32, 3), np.uint8) + np.arange(32, dtype=np.uint8)[:, None] * 8
    for name in ("t2v_cascade", "i2v_cascade", "i2v_21", "ti2v_image"):
        size = {"height": 64, "width": 64} if name == "ti2v_image" else {}
        fields = {**SMALL, **size} | ({} if name.startswith("t2v") else {"image": image})
        videos = [
            ascendit.load(tiny_folder(name), device=d, dtype="bfloat16", ops=ops).generate(
                "a", seed=1, **fields
            )
            for d, ops in (("cpu", "reference"), ("twin:a2" if name == "i2v_21" else "twin:a5", None))
        ]
        assert psnr(*(video.frames for video in videos)) > MEDIAN_DB, name


def test_the_image_encoders_gelu_is_exact_on_every_chip(tiny_i2v_21: Path, tmp_path: Path) -> None:
    """F.gelu always uses the tanh approximation on a2 and a3; Wan2.1's CLIP needs the exact function."""
    folder = tiny.copy(tiny_i2v_21, tmp_path / "m")
    config = folder / "image_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu"}))
    image = Image.fromarray(np.arange(48 * 32 * 3, dtype=np.uint8).reshape(48, 32, 3))
    hidden = {}
    for device in ("cpu", "twin:a2", "twin:a5"):
        pipe = ascendit.load(folder, device=device, dtype="bfloat16")
        assert pipe.clip is not None
        ascendit.twin.reset()
        hidden[device] = pipe.clip.encode(image)
        layers = pipe.clip.model.config.num_hidden_layers
        assert ascendit.twin.launches().get("npu_gelu", 0) == (layers if device == "twin:a2" else 0)
    assert torch.equal(hidden["cpu"], hidden["twin:a5"])
    torch.testing.assert_close(hidden["twin:a2"], hidden["cpu"], rtol=1e-5, atol=1e-5)


def test_pipelines_on_two_chips_take_turns(tiny_t2v_single: Path) -> None:
    a2, a5 = (ascendit.load(tiny_t2v_single, device=f"twin:{chip}") for chip in ("a2", "a5"))
    assert a5.transformer.dtype == torch.bfloat16 and str(a5.device) == "twin:a5"
    for pipe, adaln in ((a2, "mindiesd::adaln"), (a5, "mindiesd::adaln_v2"), (a2, "mindiesd::adaln")):
        ascendit.twin.reset()
        pipe.generate("a", seed=1, **SMALL)
        assert {n for n in ascendit.twin.launches() if "adaln" in n} == {adaln}


def test_dtypes_that_an_npu_lacks(tiny_t2v_single: Path) -> None:
    with pytest.raises(UsageError, match="dtype=float64 on twin:a5"):
        ascendit.load(tiny_t2v_single, device="twin:a5", dtype=torch.float64)


def test_fast_layernorm_selects_its_operator(tiny_t2v_single: Path) -> None:
    pipe = ascendit.load(tiny_t2v_single, device="twin:a5", fast_layernorm=True)
    ascendit.twin.reset()
    pipe.generate("a", seed=1, **SMALL)
    assert ascendit.twin.launches()["mindiesd::layernorm"] > 0
