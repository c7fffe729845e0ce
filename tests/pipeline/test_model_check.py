"""Damaged folders and wrong options: inspect, a dry run, load and generate refuse with one error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from pipeline.headers import write_json
from safetensors.torch import load_file, save_file

import ascendit
from ascendit import twin
from ascendit.cli.main import main
from ascendit.errors import AscenditError
from ascendit.inspect.checkpoint import inspect
from ascendit.pipeline.estimate import estimate_run
from ascendit.pipeline.job import prepare, prepare_model
from ascendit.pipeline.options import LoadOptions

Damage = Callable[[Path], Any]
TEXT_WEIGHTS = "model.safetensors"


def edit(file: str, **changes: Any) -> Damage:
    return lambda root: write_json(root / file, json.loads((root / file).read_text()) | changes)


def drop(file: str, *keys: str) -> Damage:
    def damage(root: Path) -> None:
        data = json.loads((root / file).read_text())
        write_json(root / file, {k: v for k, v in data.items() if k not in keys})

    return damage


def remove(name: str) -> Damage:
    def damage(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def truncate(name: str) -> Damage:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-5])


def write(name: str, text: str) -> Damage:
    return lambda root: (root / name).write_text(text)


def narrow(expert: str, channels: int = 8) -> Damage:
    """An expert of another model: its own config and weights agree."""

    def damage(root: Path) -> None:
        shutil.rmtree(root / expert)
        tiny.transformer(5, channels, channels).save_pretrained(root / expert)

    return damage


def without(tensor: str, file: str) -> Damage:
    def damage(root: Path) -> None:
        weights = load_file(root / file)
        del weights[tensor]
        save_file(weights, root / file, metadata={"format": "pt"})

    return damage


INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
HIGH, LOW = "transformer/config.json", "transformer_2/config.json"
WEIGHTS = {
    "vae": f"vae/{tiny.WEIGHTS}",
    "text": f"text_encoder/{TEXT_WEIGHTS}",
    "high": f"transformer/{tiny.WEIGHTS}",
    "low": f"transformer_2/{tiny.WEIGHTS}",
}

DAMAGES: dict[str, tuple[str, Damage]] = {
    "no tokenizer in the index": ("E-CKP-02", edit(INDEX, tokenizer=[None, None])),
    "no text encoder in the index": ("E-CKP-02", edit(INDEX, text_encoder=[None, None])),
    "no vae in the index": ("E-CKP-02", edit(INDEX, vae=[None, None])),
    "no scheduler in the index": ("E-CKP-02", edit(INDEX, scheduler=[None, None])),
    "no transformer in the index": ("E-CKP-02", edit(INDEX, transformer=[None, None])),
    "another pipeline": ("E-CKP-05", edit(INDEX, _class_name="FluxPipeline")),
    "the index is not JSON": ("E-CKP-06", write(INDEX, "{")),
    "no index": ("E-CKP-01", remove(INDEX)),
    "no tokenizer folder": ("E-CKP-02", remove("tokenizer")),
    "no text encoder folder": ("E-CKP-02", remove("text_encoder")),
    "no vae weights": ("E-CKP-02", remove(WEIGHTS["vae"])),
    "no text encoder weights": ("E-CKP-02", remove(WEIGHTS["text"])),
    "no weights of the second expert": ("E-CKP-02", remove(WEIGHTS["low"])),
    "vae truncated": ("E-CKP-02", truncate(WEIGHTS["vae"])),
    "text encoder truncated": ("E-CKP-02", truncate(WEIGHTS["text"])),
    "second expert truncated": ("E-CKP-02", truncate(WEIGHTS["low"])),
    "vae not safetensors": ("E-CKP-02", write(WEIGHTS["vae"], "<html>")),
    "text encoder not safetensors": ("E-CKP-02", write(WEIGHTS["text"], "version https://git-lfs")),
    "a tensor of the second expert missing": ("E-CKP-04", without(tiny.DAMAGED, WEIGHTS["low"])),
    "more layers than tensors": ("E-CKP-04", edit(LOW, num_layers=3)),
    "no vae config": ("E-CKP-06", remove("vae/config.json")),
    "vae config is a list": ("E-CKP-06", write("vae/config.json", "[]")),
    "an unknown key of a transformer": ("E-CKP-06", edit(LOW, vace_layers=[0])),
    "another norm": ("E-CKP-06", edit(HIGH, qk_norm="rms_norm")),
    "no number of heads": ("E-CKP-06", edit(LOW, num_attention_heads=None)),
    "another scheduler": ("E-CKP-05", edit(SCHEDULER, _class_name="DDPMScheduler")),
    "a scheduler setting": ("E-CKP-06", edit(SCHEDULER, solver_order=3)),
    "a shift that no request may have": ("E-CKP-06", edit(SCHEDULER, flow_shift=1e5)),
    "a shift below those of requests": ("E-CKP-06", edit(SCHEDULER, flow_shift=1e-9)),
    "no scheduler config": ("E-CKP-06", remove(SCHEDULER)),
    "experts with other channels": ("E-CKP-07", narrow("transformer_2")),
    "both experts with other channels than the vae": (
        "E-CKP-07",
        lambda root: [narrow(name)(root) for name in ("transformer", "transformer_2")],
    ),
    "more input channels than the vae has": (
        "E-CKP-07",
        lambda root: [narrow(name, 36)(root) for name in ("transformer", "transformer_2")],
    ),
    "ascendit.json is not JSON": ("E-CKP-06", write("ascendit.json", "{")),
    "a schedule in ascendit.json for weights that are not there": (
        "E-USE-01",
        write("ascendit.json", '{"recipe": {"step_policy": "0:w4a8"}}'),
    ),
    "an unreadable schedule in ascendit.json": (
        "E-USE-01",
        write("ascendit.json", '{"recipe": {"step_policy": "first:fast"}}'),
    ),
}


def refusal(call: Callable[[], Any]) -> tuple[str, str] | None:
    try:
        call()
    except AscenditError as e:
        return e.code, e.got
    return None


def inspected(folder: Path) -> tuple[str, str] | None:
    try:
        problems = inspect(folder).problems
    except AscenditError as e:
        return e.code, e.got
    return (problems[0].code, problems[0].got) if problems else None


@pytest.fixture(scope="module")
def sound(tiny_t2v_cascade: Path) -> Path:
    assert inspected(tiny_t2v_cascade) is None
    assert refusal(lambda: prepare_model(LoadOptions(model=str(tiny_t2v_cascade)))) is None
    return tiny_t2v_cascade


def no_weights(*args: Any, **more: Any) -> None:
    raise AssertionError("weights were read")


@pytest.mark.parametrize("name", DAMAGES)
def test_all_entry_points_refuse_a_damaged_folder_alike(
    name: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    code, damage = DAMAGES[name]
    folder = shutil.copytree(sound, tmp_path / "model")
    damage(folder)
    monkeypatch.setattr("ascendit.pipeline.load.build", no_weights)
    loaded = refusal(lambda: ascendit.load(folder))
    assert loaded is not None and loaded[0] == code, loaded
    assert refusal(lambda: prepare(LoadOptions(model=str(folder)), "a")) == loaded
    if name != "no index":  # `inspect` also takes transformers alone
        assert inspected(folder) == loaded
    for flags in (["--dry-run"], ["-o", str(tmp_path / "a.png")]):
        assert main(["generate", str(folder), "a", *flags]) in (1, 2)
        assert f"error[{code}]: {loaded[1]}" in capsys.readouterr().err


IMAGE = "image_encoder/config.json"


@pytest.mark.parametrize("vision", ["x", {"image_size": "a"}, None, [1], 5])
@pytest.mark.parametrize("model", ["i2v_21", "flf2v"])
def test_a_vision_config_that_the_library_ignores(
    model: str, vision: Any, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The config of a CLIPVisionModel has its values at the top."""
    folder = shutil.copytree(tiny_folder(model), tmp_path / "model")
    edit(IMAGE, vision_config=vision)(folder)
    assert inspected(folder) is None
    picture, names = Image.new("RGB", (64, 64)), ["image", "last_image"][: 2 if model == "flf2v" else 1]
    size: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 5}
    prepared = prepare(
        LoadOptions(model=str(folder)), "a", **(size | dict.fromkeys(names, "p")), pixels={"p": picture}
    )
    assert estimate_run(prepared).work.flops > 0


def test_inspect_lists_a_bad_scheduler_beside_other_problems(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    edit("vae/config.json", dropout="a")(folder)
    edit(SCHEDULER, _class_name="DDIMScheduler")(folder)
    assert [problem.code for problem in inspect(folder).problems] == ["E-CKP-05", "E-CKP-06"]


def test_damaged_weights_and_a_damaged_config_of_one_expert(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "model")
    edit(HIGH, num_attention_heads=None)(folder)
    truncate(WEIGHTS["high"])(folder)
    assert (inspected(folder) or ("", ""))[0] == "E-CKP-02"


# ---- options ------------------------------------------------------------------------------------

OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("E-ENV-03", {"device": "cuda"}, "device cuda: "),
    ("E-ENV-03", {"device": "cuda:7"}, "device cuda:7: "),
    ("E-ENV-03", {"device": "npu"}, "device npu: torch_npu is not installed"),
    ("E-CAP-01", {"device": "twin:a2", "scheme": "mxfp8"}, "scheme mxfp8 on twin:a2"),
    ("E-CAP-01", {"device": "twin:a3", "scheme": "mxfp4", "step_policy": "0:w4a8"}, "scheme mxfp4"),
    ("E-USE-01", {"attention": "fusion"}, "attention self=fusion on cpu: it needs an NPU or its twin"),
    (
        "E-USE-01",
        {"device": "twin:a5", "attention": "fusion", "ops": "reference"},
        "attention self=fusion on twin:a5: ops=reference computes in plain PyTorch",
    ),
    ("E-USE-01", {"activation_rule": "mxfp8=floor"}, "activation_rule for mxfp8, which no layer uses"),
    ("E-USE-01", {"activation_rule": "mxfp9=floor"}, "scheme 'mxfp9'"),
    ("E-USE-01", {"scheme": "mxfp8", "activation_rule": "mxfp8=up"}, "scale rule 'up' for mxfp8"),
    (
        "E-USE-01",
        {"device": "twin:a5", "scheme": "mxfp8", "activation_rule": "mxfp8=max:7"},
        "scale rule 'max:7'",
    ),
    (
        "E-USE-01",
        {"device": "twin:a5", "scheme": "mxfp8", "dtype": "float32"},
        "an activation in float32 for mxfp8",
    ),
    (
        "E-USE-01",
        {"device": "twin:a2", "scheme": "int8_block", "dtype": "float16"},
        "an activation in float16 for int8_block",
    ),
    ("E-USE-01", {"dtype": "float8"}, "dtype=float8"),
    ("E-USE-01", {"vae_dtype": "int8"}, "dtype=int8"),
    ("E-USE-01", {"step_policy": "0:w4a8"}, "no layer is quantized"),
    ("E-USE-05", {"scheme": "mxfp8", "keep": "nothing.*"}, "nothing.*"),
]


@pytest.mark.parametrize(("code", "options", "text"), OPTIONS)
def test_options_are_refused_before_weights_are_read(
    code: str, options: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: options.get("device") == "cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    twin.disable()
    monkeypatch.setattr("ascendit.pipeline.load.build", no_weights)
    loaded = refusal(lambda: ascendit.load("demo", **options))
    assert loaded is not None and loaded[0] == code and text in loaded[1], loaded
    assert refusal(lambda: prepare(LoadOptions(model="demo", **options), "a")) == loaded


def test_what_an_npu_refuses_is_allowed_elsewhere() -> None:
    for options in (
        {"scheme": "mxfp8", "dtype": "float32"},
        {"device": "twin:a5", "dtype": "float32"},
        {"device": "twin:a5", "scheme": "mxfp8", "dtype": "float32", "ops": "reference"},
        {"device": "twin:a2", "scheme": "mxfp8", "dtype": "float32", "emulate": True},
        {"device": "twin:a5", "scheme": "mxfp4", "activation_rule": "mxfp4=max:7", "attention": "fusion"},
        {"device": "twin:a5", "scheme": "int8", "dtype": "float16"},
    ):
        prepare_model(LoadOptions.model_validate({"model": "demo", **options}))


@pytest.mark.parametrize(
    ("options", "shape"),
    [({"scheme": "mxfp4"}, (64, 33)), ({"scheme": "mxfp4", "step_policy": "0:w4a8"}, (64, 36))],
)
def test_shapes_that_an_npu_refuses(
    options: dict[str, Any], shape: tuple[int, int], tmp_path: Path, tiny_t2v_single: Path
) -> None:
    """`ffn_dim` is the K of one layer in each block."""
    import torch
    from diffusers import WanTransformer3DModel

    folder = shutil.copytree(tiny_t2v_single, tmp_path / "m")
    config = json.loads((folder / HIGH).read_text()) | {"ffn_dim": shape[1]}
    shutil.rmtree(folder / "transformer")
    WanTransformer3DModel.from_config(config).to(torch.float32).save_pretrained(folder / "transformer")
    prepare_model(LoadOptions(model=str(folder), **options))
    with pytest.raises(AscenditError, match=f"blocks.0.ffn.net.2: .*K = {shape[1]}") as e:
        prepare_model(LoadOptions(model=str(folder), device="twin:a5", **options))
    assert e.value.code == "E-QNT-01"
