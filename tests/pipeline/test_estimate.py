"""FLOPs against PyTorch's counter, bytes against loaded pipelines, free memory, warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from ascendit.cli.main import main
from ascendit.model.linear import QuantLinear
from ascendit.pipeline.condition import make_condition
from ascendit.pipeline.estimate import Work, estimate_run, human_flops, size_warning, work_of
from ascendit.pipeline.generate import denoise
from ascendit.pipeline.job import prepare, prepare_model
from ascendit.pipeline.load import build
from ascendit.pipeline.memory import memory_of
from ascendit.pipeline.options import LoadOptions

SMALL: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 1}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("t2v_cascade", {"num_inference_steps": 3, "guidance_scale": 3.0, "guidance_scale_2": 1.0}),
        pytest.param("t2v_single", {"guidance_scale": 1.0}, marks=pytest.mark.slow),
        pytest.param("ti2v", {"image": "red.png"}, marks=pytest.mark.slow),
        pytest.param("i2v_21", {"image": "red.png"}, marks=pytest.mark.slow),
    ],
)
def test_flops_are_those_of_plain_pytorch(
    name: str, fields: dict[str, Any], tiny_folder: Any, tmp_path: Path
) -> None:
    picture = Image.new("RGB", (32, 32), "red") if "image" in fields else None
    if picture is not None:
        picture.save(tmp_path / "red.png")
        fields = fields | {"image": str(tmp_path / "red.png")}
    fields = SMALL | {"max_sequence_length": 64} | fields
    prepared = prepare(LoadOptions(model=str(tiny_folder(name)), ops="reference"), "a", **fields)
    model, request = prepared.model, prepared.request
    pipe = build(model)
    pipe.text.encode([request.prompt, request.negative_prompt], request.max_sequence_length)

    def counted(call: Any) -> int:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            call()
        return int(counter.get_total_flops())

    total = counted(lambda: denoise(pipe, request, picture, lambda event: None, None))
    total -= counted(lambda: make_condition(model.defaults.task, picture, request, pipe.vae, pipe.clip))
    assert work_of(prepared).flops == total


def real_bytes(module: Any) -> int:
    """Bytes of all parameters, each storage once, and of weights prepared for kernels."""
    tensors = {(p.data_ptr(), p.nbytes): p.nbytes for p in module.parameters()}
    extra = sum(m.extra_nbytes for m in module.modules() if isinstance(m, QuantLinear))
    return sum(tensors.values()) + extra


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float16", "vae_dtype": "bfloat16"},
        *({"scheme": s} for s in ("int8", "int8_block", "fp8", "mxfp4_dualscale")),
        {"scheme": "mxfp4", "step_policy": "0:bf16"},
        {"device": "twin:a5", "scheme": "mxfp4"},
        {"device": "twin:a2", "scheme": "int8_block"},
        {"device": "twin:a2", "scheme": "mxfp8", "emulate": "decode-once"},
    ],
)
def test_bytes_are_those_of_the_loaded_parts(options: dict[str, Any], tiny_i2v_21: Path) -> None:
    model = prepare_model(LoadOptions(model=str(tiny_i2v_21), **options))
    memory = memory_of(model)
    pipe = build(model)
    assert pipe.clip is not None
    modules: dict[str, Any] = {
        "text_encoder": pipe.text.model,
        "vae": pipe.vae.model,
        "image_encoder": pipe.clip.model,
    }
    modules |= pipe.experts
    assert {name: part.bytes for name, part in memory.parts.items()} == {
        name: real_bytes(module) for name, module in modules.items()
    }
    assert {part.dtype for name, part in memory.parts.items() if "encoder" in name} == {"float32"}


def test_a_float16_text_encoder_keeps_layers_in_float32(tmp_path: Path) -> None:
    import tiny

    folder = tiny.build_t2v_single(tmp_path / "m", dtype=torch.float16)
    model = prepare_model(LoadOptions(model=str(folder)))
    part = memory_of(model).parts["text_encoder"]
    encoder: Any = build(model).text.model
    assert part.dtype == "float16" and part.bytes == real_bytes(encoder)


def test_where_the_text_encoder_is() -> None:
    host = memory_of(prepare_model(LoadOptions(model="demo", text_on="cpu"))).parts["text_encoder"]
    dropped = memory_of(prepare_model(LoadOptions(model="demo", text_on="drop"))).parts["text_encoder"]
    assert (host.device, host.until) == ("cpu", "")
    assert (dropped.device, dropped.until) == ("cpu", "the prompt is encoded")


# ---- warnings ----------------------------------------------------------------------------------


def dry_run(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["generate", "--demo", "a", "--dry-run", *args]) == 0
    return capsys.readouterr().out


def test_a_dry_run_shows_work_memory_and_warnings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = dry_run(capsys, "--scheme", "mxfp8", "--device", "twin:a5")
    assert "device     twin:a5; denoiser in bfloat16, mxfp8" in text
    assert "GFLOP per step" in text and "of weights" in text and "warning" not in text
    monkeypatch.setattr("ascendit.pipeline.memory.host_memory", lambda: 1 << 20)
    text = dry_run(capsys, "--size", "2048x2048", "--frames", "81")
    assert "20.6 MiB of weights do not fit into the 1.0 MiB of memory that cpu has free" in text
    assert "2048x2048 with 81 frames has 4,879 times the pixels of the largest published size" in text
    data = json.loads(dry_run(capsys, "--size", "2048x2048", "--frames", "81", "--json"))
    assert len(data["warnings"]) == 2 and data["memory"]["fits"] is False
    assert data["memory"]["weights_bytes"] == sum(x["bytes"] for x in data["memory"]["parts"].values())
    assert data["work"]["tokens"] == data["video_tokens"] and data["work"]["passes"] == 32
    assert (data["dtype"], data["schemes"]) == ("bfloat16", ["bf16"])


def test_frames_that_do_not_fit_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascendit.pipeline.memory.host_memory", lambda: 1 << 30)
    prepared = prepare(LoadOptions(model="demo"), "a", width=2048, height=2048, num_frames=401)
    texts = estimate_run(prepared).warnings
    assert "20.6 MiB of weights and 18.8 GiB of decoded frames do not fit into the 1.0 GiB" in texts[0]


def test_a_run_above_the_published_sizes_says_so_once(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr("ascendit.pipeline.load.build", lambda *a: pytest.fail("stop here"))
    for flags, said in (([], 0), (["--size", "128x128"], 1)):
        with pytest.raises(BaseException, match="stop here"):
            main(["generate", "--demo", "a", "-o", str(tmp_path / "a.png"), *flags])
        assert capsys.readouterr().err.count("times the pixels") == said


def test_sizes_near_the_published_ones_are_quiet() -> None:
    work = Work(tokens=1, passes=1, flops_per_step=1, flops=1, attention_flops=3 * 10**15)
    for frames, said in ((17, False), (21, False), (41, True)):
        prepared = prepare(LoadOptions(model="demo"), "a", num_frames=frames)
        assert bool(size_warning(prepared, work)) == said
    assert "attention alone is 3.00 PFLOP" in size_warning(prepared, work)
    assert [human_flops(x) for x in (5 * 10**8, 12 * 10**12, 10**21)] == [
        "500 MFLOP",
        "12.0 TFLOP",
        "1,000 EFLOP",
    ]
