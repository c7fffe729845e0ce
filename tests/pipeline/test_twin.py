"""The whole way on the twin of an NPU: the demo's video is that of the reference on the CPU."""

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
    """PSNR of each prompt's frames."""
    videos = [[demo(d).generate(p, seed=7, **fields).frames for p in prompts] for d in ("cpu", device)]
    return [psnr(*pair) for pair in zip(*videos, strict=True)]


def test_two_short_videos() -> None:
    prompts = [scene.prompt() for scene in pick(2)]
    found = against_the_reference("twin:a5", prompts, num_inference_steps=6, num_frames=5)
    assert min(found) >= MEDIAN_DB, found
    assert ascendit.twin.launches()["npu_fusion_attention"] > 0


@pytest.mark.slow
def test_twelve_prompts() -> None:
    prompts = [scene.prompt() for scene in pick(12)]
    found = against_the_reference("twin:a5", prompts)
    print("PSNR", [round(x, 1) for x in found])
    assert median(found) >= MEDIAN_DB and min(found) >= LEAST_DB, found


SMALL: dict[str, Any] = {"height": 48, "width": 32, "num_frames": 5, "num_inference_steps": 2}


def test_every_kind_of_model_runs(tiny_folder: Any) -> None:
    image = np.zeros((48, 32, 3), np.uint8) + np.arange(32, dtype=np.uint8)[:, None] * 8
    for name in ("t2v_cascade", "i2v_cascade", "i2v_21", "ti2v_image"):
        size = {"height": 64, "width": 64} if name == "ti2v_image" else {}
        given = {**SMALL, **size} | ({} if name.startswith("t2v") else {"image": image})
        videos = [
            ascendit.load(tiny_folder(name), device=d, dtype="bfloat16", ops=ops).generate(
                "a", seed=1, **given
            )
            for d, ops in (("cpu", "reference"), ("twin:a2" if name == "i2v_21" else "twin:a5", None))
        ]
        assert psnr(*(video.frames for video in videos)) > MEDIAN_DB, name


def test_the_image_encoders_gelu_is_exact_on_every_chip(tiny_i2v_21: Path, tmp_path: Path) -> None:
    """F.gelu is the tanh form on a2 and a3, whatever it is told; Wan2.1's CLIP has the exact one."""
    folder = tiny.copy(tiny_i2v_21, tmp_path / "m")
    config = folder / "image_encoder/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu"}))
    image = Image.fromarray(np.arange(48 * 32 * 3, dtype=np.uint8).reshape(48, 32, 3))
    tokens = {}
    for device in ("cpu", "twin:a2", "twin:a5"):
        pipe = ascendit.load(folder, device=device, dtype="bfloat16")
        assert pipe.clip is not None
        ascendit.twin.reset()
        tokens[device] = pipe.clip.encode(image)
        layers = pipe.clip.model.config.num_hidden_layers
        assert ascendit.twin.launches().get("npu_gelu", 0) == (layers if device == "twin:a2" else 0)
    assert torch.equal(tokens["cpu"], tokens["twin:a5"])
    torch.testing.assert_close(tokens["twin:a2"], tokens["cpu"], rtol=1e-5, atol=1e-5)


def test_pipelines_on_two_chips_take_turns(tiny_t2v_single: Path) -> None:
    a2, a5 = (ascendit.load(tiny_t2v_single, device=f"twin:{chip}") for chip in ("a2", "a5"))
    assert a5.transformer.dtype == torch.bfloat16 and str(a5.device) == "twin:a5"
    for pipe, adaln in ((a2, "mindiesd::adaln"), (a5, "mindiesd::adaln_v2"), (a2, "mindiesd::adaln")):
        ascendit.twin.reset()
        pipe.generate("a", seed=1, **SMALL)
        assert {n for n in ascendit.twin.launches() if "adaln" in n} == {adaln}


def test_dtypes_an_npu_has_not(tiny_t2v_single: Path) -> None:
    with pytest.raises(UsageError, match="dtype=float64 on twin:a5"):
        ascendit.load(tiny_t2v_single, device="twin:a5", dtype=torch.float64)


def test_fast_layernorm_reaches_the_operators(tiny_t2v_single: Path) -> None:
    pipe = ascendit.load(tiny_t2v_single, device="twin:a5", fast_layernorm=True)
    ascendit.twin.reset()
    pipe.generate("a", seed=1, **SMALL)
    assert ascendit.twin.launches()["mindiesd::layernorm"] > 0
