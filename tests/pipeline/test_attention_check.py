"""Attention kernels of a request: those of the check are those of the run, and the video reports them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ascendit
from ascendit.device.attention_kernels import PROBABILITIES
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.model.state import DenoiseState
from ascendit.native import build
from ascendit.pipeline.job import prepare
from ascendit.pipeline.options import LoadOptions

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "seed": 1}


def test_the_rows_of_the_check_are_those_of_the_video(tiny_t2v_cascade: Path) -> None:
    options: dict[str, Any] = {"attention": "self=int8,cross=sdpa", "step_policy": "1:attention=bf16"}
    options["dtype"] = "bfloat16"
    model = str(tiny_t2v_cascade)
    prepared = prepare(LoadOptions.model_validate({"model": model, **options}), "a cat", **SMALL)
    video = ascendit.load(model, **options).generate("a cat", **SMALL, allow_flat=True)
    rows = [dict(row) for row in video.attention]
    assert rows == video.describe()["attention"]
    keys = ("expert", "kind", "kernel", "backend", "blocks", "steps", "sub_head")
    checked = [row.as_dict() for row in prepared.attention]
    assert [[row[k] for k in keys] for row in rows] == [[row[k] for k in keys] for row in checked]
    kernels = {(row["expert"], row["steps"]): row["kernel"] for row in rows if row["kind"] == "self"}
    assert set(kernels.values()) >= {"int8"} and len({row["expert"] for row in rows}) == 2
    assert {row["kernel"] for row in rows if row["kind"] == "text"} == {"sdpa"}
    (exception,) = [row for row in rows if row["kind"] == "self" and "step policy" in row["reason"]]
    assert exception["steps"] == "1" and exception["kernel"] != "int8"


def test_a_plan_changes_no_frame(tiny_t2v_cascade: Path) -> None:
    class Default(DenoiseState):
        def attend(self, kind: Any, block: int, q: Any, k: Any, v: Any) -> Any:
            return self.ops.attention(q, k, v)

    pipe = ascendit.load(tiny_t2v_cascade, dtype="bfloat16")
    video = pipe.generate("a cat", **SMALL, allow_flat=True)
    pipe.make_state = Default
    assert np.array_equal(video.frames, pipe.generate("a cat", **SMALL, allow_flat=True).frames)


@pytest.mark.parametrize(
    "options", [{"attention": "self=mxfp8"}, {"attention": "reference"}, {"sub_head": 1}]
)
def test_requests_change_the_latents_by_rounding(tiny_t2v_single: Path, options: dict[str, Any]) -> None:
    videos = [
        ascendit.load(tiny_t2v_single, dtype="bfloat16", **x).generate("a cat", **SMALL, allow_flat=True)
        for x in ({}, options)
    ]
    plain, requested = (video.latents for video in videos)
    assert np.linalg.norm(plain - requested) < 0.05 * np.linalg.norm(plain)
    assert videos[1].loaded.items() >= options.items()
    if "attention" in options:
        assert not np.array_equal(plain, requested)


def test_probabilities_are_set_for_the_run(tiny_t2v_single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ascendit.load(tiny_t2v_single, dtype="bfloat16", attention_probabilities="two")
    numbers = []

    class Recorded(DenoiseState):
        def attend(self, kind: Any, block: int, q: Any, k: Any, v: Any) -> Any:
            numbers.append(PROBABILITIES.get())
            return super().attend(kind, block, q, k, v)

    pipe.make_state = Recorded
    pipe.generate("a cat", **SMALL, allow_flat=True)
    assert set(numbers) == {"two"} and PROBABILITIES.get() == "one"
    with pytest.raises(UsageError, match="attention_probabilities=two with ops=reference"):
        ascendit.load(tiny_t2v_single, attention_probabilities="two", ops="reference")


@pytest.mark.parametrize(
    ("request_", "fix"),
    [
        ("image=sdpa", 'attention="bf16"'),
        ("self=sdpa,image=sdpa", 'attention="self=sdpa"'),
        ("text=sdpa,image=reference", 'attention="text=sdpa"'),
    ],
)
def test_a_model_without_an_image_refuses_a_kernel_for_it(
    tiny_t2v_single: Path, request_: str, fix: str
) -> None:
    loaded = LoadOptions(model=str(tiny_t2v_single), attention=request_)
    with pytest.raises(UsageError, match="this model has no cross-attention to the image") as e:
        prepare(loaded, "a cat")
    assert e.value.fix == fix
    for accepted in ("sdpa", "cross=sdpa"):
        prepare(LoadOptions(model=str(tiny_t2v_single), attention=accepted), "a cat")


def test_load_refuses_a_kernel_that_no_size_fits(tiny_t2v_single: Path) -> None:
    with pytest.raises(UsageError, match="it computes self-attention only") as e:
        ascendit.load(tiny_t2v_single, device="twin:a2", attention="laser")
    assert e.value.fix == 'attention="self=laser,cross=fusion"'
    with pytest.raises(UsageError, match="with . heads"):
        ascendit.load(tiny_t2v_single, sub_head=7)
    options = LoadOptions(model=str(tiny_t2v_single), device="twin:a2", attention="self=laser")
    with pytest.raises(UsageError, match="at least 2048 tokens, not"):
        prepare(options, "a cat", **SMALL)


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({"attention": "sdpa"}, "the kernel cpu or qk_int8"),
        ({"dtype": "float32"}, "the kernel cpu or qk_int8"),
        ({"attention": "reference", "device": "twin:a2"}, "the kernel fusion or fused_infer"),
    ],
)
def test_probabilities_without_effect_are_refused(
    tiny_t2v_single: Path, options: dict[str, Any], needs: str
) -> None:
    given = {"dtype": "bfloat16", **options, "attention_probabilities": "two"}
    with pytest.raises(UsageError, match="attention_probabilities=two with attention by") as e:
        prepare(LoadOptions.model_validate({"model": str(tiny_t2v_single), **given}), "a cat", **SMALL)
    assert e.value.needs == needs
    with pytest.raises(UsageError, match="attention_probabilities=two with attention by"):
        ascendit.load(tiny_t2v_single, **given)


def test_attributes_of_diffusers_transformers_have_a_fix(tiny_t2v_single: Path) -> None:
    transformer: Any = ascendit.load(tiny_t2v_single).transformer
    with pytest.raises(UsageError) as e:
        transformer.set_attention_backend("flash")
    assert e.value.fix == 'ascendit.load(model, attention="sdpa")' and "add_module" not in e.value.needs
    assert not hasattr(transformer, "_hf_hook") and transformer.blocks[0].attn1 is not None


def test_a_processor_without_the_instructions(tiny_t2v_single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run shows the kernel of the run, and a request is refused before weights are loaded."""
    monkeypatch.setattr(build, "processor_flags", lambda: frozenset({"avx512f"}))
    model = str(tiny_t2v_single)
    for row in prepare(LoadOptions(model=model, dtype="bfloat16"), "a cat", **SMALL).attention:
        assert row.kernel == "sdpa" and "cpu: this processor has no avx512_bf16" in row.reason
    with pytest.raises(EnvironmentProblem, match="this processor has no avx512_bf16") as e:
        ascendit.load(model, dtype="bfloat16", attention="self=cpu")
    assert e.value.fix == 'attention="self=sdpa"' and e.value.code == "E-CAP-01"


def test_every_choice_is_logged_once(tiny_t2v_cascade: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = ascendit.load(tiny_t2v_cascade, dtype="bfloat16")
    with caplog.at_level("INFO", logger="ascendit"):
        for _ in range(2):
            pipe.generate("a cat", **SMALL, allow_flat=True)
    lines = [m for m in caplog.messages if "-attention" in m and "->" in m]
    assert len(lines) == 2, lines
    assert lines[0].startswith("self-attention -> ") and "; --attention self=NAME for another" in lines[0]
    assert lines[1].startswith("cross-attention to the text -> ")
