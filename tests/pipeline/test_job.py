"""From options and a request to a video: early checks, headers read once, out of memory."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ascendit
from ascendit.checkpoint import headers
from ascendit.cli.main import main
from ascendit.errors import CheckpointError, OutOfMemory, RequestError, UsageError
from ascendit.pipeline import load
from ascendit.pipeline.images import name_image
from ascendit.pipeline.job import prepare, run
from ascendit.pipeline.options import LoadOptions
from ascendit.progress import Progress

PROMPT = "a red circle moves right on a black background"
SMALL: dict[str, Any] = {"num_frames": 5, "num_inference_steps": 2, "seed": 3}

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
    "3.25 GiB is free. Process 1 has 75.00 GiB memory in use."
)


# ---- prepare and run ----------------------------------------------------------------------------


def test_run_makes_the_same_video_as_load_and_generate(tiny_t2v_cascade: Path) -> None:
    options: dict[str, Any] = {"scheme": "mxfp4", "step_policy": "0:w4a8"}
    shape = {"width": 32, "height": 32, **SMALL}
    prepared = prepare(LoadOptions(model=str(tiny_t2v_cascade), **options), PROMPT, **shape)
    events: list[Progress] = []
    video = run(prepared, events.append)
    again = ascendit.load(tiny_t2v_cascade, **options).generate(PROMPT, **shape)
    assert np.array_equal(video.frames, again.frames)
    assert video.describe() | {"seconds": 0} == again.describe() | {"seconds": 0}
    assert video.describe()["replay"] == prepared.replay
    assert [e.stage for e in events if e.step == e.total] == ["load", "encode", "denoise", "decode"]


def test_prepare_returns_layers_dtype_and_device() -> None:
    prepared = prepare(LoadOptions(model="demo", scheme="int8"), PROMPT)
    assert [name for name, applied in prepared.model.experts if applied is None] == []
    assert prepared.model.dtype is None and prepared.model.part_dtypes["vae"] == "float32"
    on_a5 = prepare(LoadOptions(model="demo", device="twin:a5"), PROMPT)
    assert on_a5.model.dtype == "bfloat16" and on_a5.model.device.chip == "a5"


def test_seconds_set_the_number_of_frames() -> None:
    assert prepare(LoadOptions(model="demo"), PROMPT, seconds=1.0).request.num_frames == 9
    assert prepare(LoadOptions(model="demo"), PROMPT, seconds=1.0, fps=16).request.num_frames == 17


def test_damaged_headers_and_invalid_steps_are_refused_without_weights(
    tiny_folder: Any, tmp_path: Path
) -> None:
    import tiny

    folder = tiny.copy(tiny_folder("t2v_single"), tmp_path / "m")
    file = folder / "transformer" / tiny.WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated|bytes"):
        prepare(LoadOptions(model=str(folder)), PROMPT)
    with pytest.raises(RequestError, match="names step 9"):
        prepare(
            LoadOptions(model="demo", scheme="mxfp4", step_policy="9:w4a8"), PROMPT, num_inference_steps=4
        )
    with pytest.raises(UsageError, match="unknown argument: steps"):
        prepare(LoadOptions(model="demo"), PROMPT, steps=4)


def test_pixels_are_passed_beside_the_request(tiny_folder: Any) -> None:
    options = LoadOptions(model=str(tiny_folder("i2v_cascade")))
    name, pixels = name_image(torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(RequestError, match="no pixels for image"):
        prepare(options, PROMPT, image=name)
    shape = {"width": 64, "height": 64, **SMALL}
    prepared = prepare(options, PROMPT, image=name, pixels=pixels, **shape)
    video = run(prepared)
    assert video.request and video.request.image == name
    again = ascendit.load(options.model).generate(PROMPT, image=pixels[str(name)], **shape)
    assert np.array_equal(video.frames, again.frames) and again.request == video.request


@pytest.mark.parametrize("flags", [[], ["--scheme", "mxfp8", "--set", "keep=blocks.0.*"]])
def test_no_header_is_read_twice(flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the transformers, whose files ascendit reads, in one `generate`."""
    read: Counter[str] = Counter()
    real = headers._read_json_header

    def counted(path: Path, *args: Any) -> Any:
        read[str(path)] += 1
        return real(path, *args)

    monkeypatch.setattr(headers, "_read_json_header", counted)
    args = ["--frames", "5", "--steps", "1", "-q", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "--demo", PROMPT, *args, *flags]) == 0
    assert len(read) >= 2 and set(read.values()) == {1}


def test_preparing_imports_no_torch(tmp_path: Path) -> None:
    save_file({"diffusion_model.blocks.0.self_attn.q.diff": torch.ones(192, 192)}, tmp_path / "a.safetensors")
    code = (
        "import sys\n"
        "from ascendit.pipeline.job import LoadOptions, prepare\n"
        "options = {'scheme': 'mxfp8', 'device': 'twin:a5', 'loras': sys.argv[1]}\n"
        "prepared = prepare(LoadOptions(model='demo', **options), 'a', seconds=1.0)\n"
        "print(len(prepared.loras), 'torch' in sys.modules)"
    )
    args = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    done = subprocess.run(args, capture_output=True, text=True, timeout=120)
    assert done.stdout == "1 False\n", done.stderr


def test_out_of_memory_names_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(model: Any, on_progress: Any) -> Any:
        on_progress(Progress(stage="load", step=1, total=4))
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(load, "build", build)
    with pytest.raises(OutOfMemory) as error:
        run(prepare(LoadOptions(model="demo"), PROMPT))
    assert error.value.got == "out of memory on cpu in stage load"
