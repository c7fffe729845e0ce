import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ascendit.checkpoint.layout import read_json, recognise, stays_inside
from ascendit.errors import AscenditError, CheckpointError, UsageError

INDEX: dict[str, Any] = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.36.0",
    "boundary_ratio": 0.875,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "image_encoder": [None, None],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "scheduler/scheduler_config.json": {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0},
    "text_encoder/config.json": {"architectures": ["UMT5EncoderModel"]},
    "tokenizer/tokenizer_config.json": {"model_max_length": 512},
    "transformer/config.json": {"_class_name": "WanTransformer3DModel", "num_layers": 2},
    "transformer_2/config.json": {"_class_name": "WanTransformer3DModel", "num_layers": 2},
    "vae/config.json": {"_class_name": "AutoencoderKLWan", "z_dim": 16},
}


def write(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def folder(root: Path) -> Path:
    write(root / "model_index.json", INDEX)
    for name, config in CONFIGS.items():
        write(root / name, config)
    return root


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    return folder(tmp_path / "Wan2.2-T2V-A14B-Diffusers")


def edit_index(wan: Path, **changes: object) -> None:
    write(wan / "model_index.json", INDEX | changes)


def refused(path: Path | str, code: str, kind: type[AscenditError] = CheckpointError) -> AscenditError:
    with pytest.raises(kind) as e:
        recognise(path)
    assert e.value.code == code, str(e.value)
    return e.value


def test_a_diffusers_folder(wan: Path) -> None:
    layout = recognise(wan)
    assert (layout.kind, layout.name, layout.pipeline) == ("diffusers", wan.name, "WanPipeline")
    assert list(layout.parts) == [
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "transformer_2",
        "vae",
    ]
    assert [p.name for p in layout.experts] == ["transformer", "transformer_2"]
    assert layout.index["boundary_ratio"] == 0.875
    assert layout.source is None
    vae = layout.part("vae")
    assert (vae.path, vae.library, vae.class_name) == (wan / "vae", "diffusers", "AutoencoderKLWan")
    assert vae.config == CONFIGS["vae/config.json"]
    assert layout.part("scheduler").config["flow_shift"] == 3.0
    assert layout.part("tokenizer").config["model_max_length"] == 512
    assert [n for n, p in layout.parts.items() if not p.has_weights] == ["scheduler", "tokenizer"]
    assert (layout.part("text_encoder").stem, vae.stem) == ("model", "diffusion_pytorch_model")
    with pytest.raises(CheckpointError, match="has no image_encoder") as e:
        layout.part("image_encoder")
    assert e.value.code == "E-CKP-02"


def test_one_expert_and_a_tokenizer_without_config(wan: Path) -> None:
    edit_index(wan, transformer_2=[None, None], _class_name="WanImageToVideoPipeline")
    (wan / "tokenizer" / "tokenizer_config.json").unlink()
    layout = recognise(wan)
    assert [p.name for p in layout.experts] == ["transformer"]
    assert layout.part("tokenizer").config == {}


def test_name_and_source_of_a_hub_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    root = folder(tmp_path / "models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers" / "snapshots" / revision)
    layout = recognise(root)
    assert layout.name == "Wan2.1-T2V-1.3B-Diffusers"
    assert layout.source == f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers@{revision}"
    monkeypatch.chdir(root)
    assert recognise(".").name == layout.name


def test_nothing_there(tmp_path: Path) -> None:
    e = refused(tmp_path / "no", "E-USE-02", UsageError)
    assert "no file or folder" in e.got
    assert "hf:org/name" in e.fix


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "it has no model_index.json"),
        ({"config.json": CONFIGS["transformer/config.json"]}, "a bare WanTransformer3DModel folder"),
        ({"config.json": {"_class_name": "WanModel"}}, "original Wan format"),
        ({"config.json": {"model_type": "llama"}}, "class None"),
        ({"inner/model_index.json": INDEX}, "the folder below it has one: inner"),
    ],
)
def test_not_a_pipeline_folder(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    for name, data in files.items():
        write(tmp_path / name, data)
    e = refused(tmp_path, "E-CKP-01")
    assert words in e.got
    assert "model_index.json" in e.needs


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "this is a file" in refused(tmp_path / "model.safetensors", "E-CKP-01").got


@pytest.mark.parametrize("name", ["WanVACEPipeline", "FluxPipeline", None, 3])
def test_another_pipeline(wan: Path, name: object) -> None:
    edit_index(wan, _class_name=name)
    e = refused(wan, "E-CKP-05")
    assert (name if isinstance(name, str) else "of no named class") in e.got
    assert "WanPipeline or WanImageToVideoPipeline" in e.needs


@pytest.mark.parametrize("part", ["transformer", "transformer_2", "vae"])
def test_another_class_in_the_index(wan: Path, part: str) -> None:
    edit_index(wan, **{part: ["diffusers", "FluxTransformer2DModel"]})
    e = refused(wan, "E-CKP-05")
    assert "model_index.json" in e.got
    assert f"{part} is FluxTransformer2DModel" in e.got


@pytest.mark.parametrize("part", ["transformer", "transformer_2", "vae"])
def test_another_class_in_the_parts_config(wan: Path, part: str) -> None:
    write(wan / part / "config.json", {"_class_name": "FluxTransformer2DModel"})
    e = refused(wan, "E-CKP-05")
    assert f"{part}/config.json" in e.got
    assert "FluxTransformer2DModel" in e.got
    assert INDEX[part][1] in e.needs


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_part_without_its_folder(wan: Path, part: str) -> None:
    (wan / part).rename(wan / "elsewhere")
    e = refused(wan, "E-CKP-02")
    assert f"names {part}, and the folder" in e.got


def test_no_transformer(wan: Path) -> None:
    edit_index(wan, transformer=[None, None])
    assert "names no transformer" in refused(wan, "E-CKP-02").got


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "a/b", "C:\\x"])
def test_a_part_outside_the_folder(wan: Path, name: str) -> None:
    (wan.parent / "outside").mkdir()
    edit_index(wan, **{name: ["diffusers", "Anything"]})
    assert repr(name) in refused(wan, "E-CKP-03").got


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "a JSON list, not an object"),
    ],
)
def test_broken_json_is_named(wan: Path, file: str, content: bytes, words: str) -> None:
    (wan / file).write_bytes(content)
    e = refused(wan, "E-CKP-06")
    assert file in e.got
    assert words in e.got


def test_missing_config(wan: Path) -> None:
    (wan / "transformer" / "config.json").unlink()
    e = refused(wan, "E-CKP-06")
    assert "transformer/config.json is missing" in e.got


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_config(wan: Path) -> None:
    (wan / "vae" / "config.json").chmod(0)
    assert "unreadable" in refused(wan, "E-CKP-06").got


def test_a_folder_in_place_of_a_config(wan: Path) -> None:
    (wan / "vae" / "config.json").unlink()
    (wan / "vae" / "config.json").mkdir()
    assert "unreadable" in refused(wan, "E-CKP-06").got


def test_read_json(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"a": [1, "ü"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, "ü"]}


@pytest.mark.parametrize("name", ["a", "a/b.json", "a..b", "...", "model-00001-of-00002.safetensors"])
def test_names_that_stay_inside(name: str) -> None:
    assert stays_inside(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/../b", "/a", "\\a", "..\\a", "a\\..\\b", "C:a", "C:/a", "a\0b"]
)
def test_names_that_do_not(name: str) -> None:
    assert not stays_inside(name)


@pytest.mark.parametrize("build", ["t2v_cascade", "i2v_21", "ti2v"])
def test_what_diffusers_itself_writes(tiny_folder: Callable[[str], Path], build: str) -> None:
    layout = recognise(tiny_folder(build))
    assert len(layout.experts) == (2 if build == "t2v_cascade" else 1)
    assert all(part.config for part in layout.parts.values())
    assert ("image_encoder" in layout.parts) == (build == "i2v_21")
