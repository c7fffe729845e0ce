import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ascendit.checkpoint.component import read_json, stays_inside
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.weight_sets import weight_set
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


def refused(path: Path | str, code: str, error_class: type[AscenditError] = CheckpointError) -> AscenditError:
    with pytest.raises(error_class) as e:
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
    assert "hf:ORG/NAME" in e.fix


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it has no model_index.json"),
        ({"config.json": {"model_type": "llama"}}, "class None"),
        ({"config.json": CONFIGS["vae/config.json"]}, "class AutoencoderKLWan"),
        ({"inner/model_index.json": INDEX}, "model_index.json is in a subfolder: inner"),
        ({"a.safetensors": {}, "b.safetensors": {}}, "a.safetensors, b.safetensors; pass one of them"),
        ({"note.txt": {}}, "it has no model_index.json"),
        ({"diffusion_pytorch_model.safetensors.index.json": {"weight_map": {"a": "b"}}}, "it has no"),
    ],
)
def test_a_folder_of_no_supported_layout(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    for name, data in files.items():
        write(tmp_path / name, data)
    e = refused(tmp_path, "E-CKP-01")
    assert message in e.got
    for supported in ("model_index.json", "high_noise_model", "quant_model_description", ".safetensors"):
        assert supported in e.needs


def test_a_file_of_an_unknown_type(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "does not end in .safetensors" in refused(tmp_path / "model.onnx", "E-CKP-01").got


@pytest.mark.parametrize("name", ["WanVACEPipeline", "FluxPipeline", None, 3])
def test_another_pipeline(wan: Path, name: object) -> None:
    edit_index(wan, _class_name=name)
    e = refused(wan, "E-CKP-05")
    assert (name if isinstance(name, str) else "has no class name") in e.got
    assert "WanPipeline or WanImageToVideoPipeline" in e.needs


@pytest.mark.parametrize("component", ["transformer", "transformer_2", "vae"])
def test_another_class_in_the_index(wan: Path, component: str) -> None:
    edit_index(wan, **{component: ["diffusers", "FluxTransformer2DModel"]})
    e = refused(wan, "E-CKP-05")
    assert "model_index.json" in e.got
    assert f"{component} is FluxTransformer2DModel" in e.got


@pytest.mark.parametrize("component", ["transformer", "transformer_2", "vae"])
def test_another_class_in_the_component_config(wan: Path, component: str) -> None:
    write(wan / component / "config.json", {"_class_name": "FluxTransformer2DModel"})
    e = refused(wan, "E-CKP-05")
    assert f"{component}/config.json" in e.got
    assert "FluxTransformer2DModel" in e.got
    assert INDEX[component][1] in e.needs


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_component_without_its_folder(wan: Path, component: str) -> None:
    (wan / component).rename(wan / "elsewhere")
    e = refused(wan, "E-CKP-02")
    assert f"lists {component}, but the folder" in e.got


def test_no_transformer(wan: Path) -> None:
    edit_index(wan, transformer=[None, None])
    assert "lists no transformer" in refused(wan, "E-CKP-02").got


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "a/b", "C:\\x"])
def test_a_component_outside_the_folder(wan: Path, name: str) -> None:
    (wan.parent / "outside").mkdir()
    edit_index(wan, **{name: ["diffusers", "Anything"]})
    assert repr(name) in refused(wan, "E-CKP-03").got


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "a JSON list, not an object"),
    ],
)
def test_broken_json_is_named(wan: Path, file: str, content: bytes, message: str) -> None:
    (wan / file).write_bytes(content)
    e = refused(wan, "E-CKP-06")
    assert file in e.got
    assert message in e.got


def test_missing_config(wan: Path) -> None:
    (wan / "transformer" / "config.json").unlink()
    e = refused(wan, "E-CKP-06")
    assert "transformer/config.json is missing" in e.got


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_config(wan: Path) -> None:
    (wan / "vae" / "config.json").chmod(0)
    assert "unreadable" in refused(wan, "E-CKP-06").got


def test_a_folder_instead_of_a_config(wan: Path) -> None:
    (wan / "vae" / "config.json").unlink()
    (wan / "vae" / "config.json").mkdir()
    assert "unreadable" in refused(wan, "E-CKP-06").got


def test_read_json(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"a": [1, "ü"]})
    assert read_json(tmp_path / "a.json") == {"a": [1, "ü"]}


@pytest.mark.parametrize("name", ["a", "a/b.json", "a..b", "...", "model-00001-of-00002.safetensors"])
def test_names_inside_the_folder(name: str) -> None:
    assert stays_inside(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/../b", "/a", "\\a", "..\\a", "a\\..\\b", "C:a", "C:/a", "a\0b"]
)
def test_names_outside_the_folder(name: str) -> None:
    assert not stays_inside(name)


@pytest.mark.parametrize("build", ["t2v_cascade", "i2v_21", "ti2v"])
def test_folders_written_by_diffusers(tiny_folder: Callable[[str], Path], build: str) -> None:
    layout = recognise(tiny_folder(build))
    assert len(layout.experts) == (2 if build == "t2v_cascade" else 1)
    assert all(part.config for part in layout.parts.values())
    assert ("image_encoder" in layout.parts) == (build == "i2v_21")


# ---- standalone transformers --------------------------------------------------------------------

WAN_CONFIG = {"_class_name": "WanModel", "dim": 64, "model_type": "t2v"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
DESCRIPTION = "quant_model_description_w8a8_mxfp8.json"
EXPORTED = "quant_model_weight_w8a8_mxfp8.safetensors"


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def layout_of(path: Path) -> tuple[str, list[tuple[str, str]]]:
    layout = recognise(path)
    assert (layout.index, layout.pipeline) == ({}, "")
    return layout.kind, [(expert.name, expert.path.name) for expert in layout.experts]


def test_a_pipeline_without_its_index(wan: Path) -> None:
    (wan / "model_index.json").unlink()
    assert layout_of(wan) == (
        "transformers-only",
        [("transformer", "transformer"), ("transformer_2", "transformer_2")],
    )
    assert list(recognise(wan).parts) == ["transformer", "transformer_2"]
    write(wan / "transformer_2" / "config.json", {"_class_name": "FluxTransformer2DModel"})
    assert "FluxTransformer2DModel" in refused(wan, "E-CKP-05").got


def test_a_standalone_transformer(wan: Path) -> None:
    assert layout_of(wan / "transformer_2") == ("transformer", [("transformer", "transformer_2")])
    touch(wan / "transformer_2" / WEIGHTS)
    layout = recognise(wan / "transformer_2" / WEIGHTS)  # its only file; the config in the folder is used
    assert (layout.kind, layout.experts[0].config["num_layers"]) == ("transformer", 2)


def test_a_wan_folder(tmp_path: Path) -> None:
    write(tmp_path / "config.json", WAN_CONFIG)
    touch(tmp_path / WEIGHTS)
    assert layout_of(tmp_path) == ("wan", [("transformer", tmp_path.name)])
    assert recognise(tmp_path).experts[0].config == WAN_CONFIG


@pytest.mark.parametrize("prefix", ["", "t2v_", "i2v_"])
def test_a_wan_cascade(tmp_path: Path, prefix: str) -> None:
    for noise in ("low", "high"):
        write(tmp_path / f"{prefix}{noise}_noise_model" / "config.json", WAN_CONFIG)
    experts = [
        ("transformer", f"{prefix}high_noise_model"),
        ("transformer_2", f"{prefix}low_noise_model"),
    ]
    assert layout_of(tmp_path) == ("wan", experts)
    alone = tmp_path / f"{prefix}low_noise_model"
    assert layout_of(alone) == ("wan", [("transformer", alone.name)])


@pytest.mark.parametrize(("high", "low"), [("HighNoise", "LowNoise"), ("high_noise", "low_noise")])
def test_folders_with_one_gguf_file_each(tmp_path: Path, high: str, low: str) -> None:
    for folder in (low, high):
        touch(tmp_path / folder / f"Wan2.2-T2V-A14B-{folder}-Q4_K_M.gguf")
    layout = recognise(tmp_path)
    assert layout.kind == "wan" and [part.path.parent.name for part in layout.experts] == [high, low]


def test_one_expert_of_a_cascade(tmp_path: Path) -> None:
    write(tmp_path / "high_noise_model" / "config.json", WAN_CONFIG)
    e = refused(tmp_path, "E-CKP-02")
    assert "has high_noise_model" in e.got
    assert "use it alone" in e.fix
    (tmp_path / "low_noise_model").mkdir()
    assert "low_noise_model has no transformer weights" in refused(tmp_path, "E-CKP-02").got
    write(tmp_path / "t2v_low_noise_model" / "config.json", WAN_CONFIG)
    assert "low_noise_model, t2v_low_noise_model" in refused(tmp_path, "E-CKP-02").got


def test_experts_of_two_kinds(tmp_path: Path) -> None:
    write(tmp_path / "high_noise_model" / "config.json", WAN_CONFIG)
    touch(tmp_path / "low_noise_model" / EXPORTED)
    assert "different formats: msmodelslim, wan" in refused(tmp_path, "E-CKP-07").got


@pytest.mark.parametrize(
    "files",
    [
        [EXPORTED],
        ["quant_model_weight-00001-of-00001.safetensors"],
        ["quant_model_weights-00001-of-00002.safetensors", "quant_model_weights-00002-of-00002.safetensors"],
        ["quant_model_weights.safetensors"],
    ],
)
def test_an_export(tmp_path: Path, files: list[str]) -> None:
    for file in files:
        touch(tmp_path / file)
    write(tmp_path / DESCRIPTION, {})
    assert layout_of(tmp_path) == ("msmodelslim", [("transformer", tmp_path.name)])
    expert = recognise(tmp_path).experts[0]
    assert [file.name for file in expert.files] == files
    index = write_index(tmp_path, files)
    expert = recognise(tmp_path).experts[0]
    assert (expert.index, expert.files) == (index, ())


def write_index(folder: Path, files: list[str]) -> Path:
    path = folder / "quant_model_weight.safetensors.index.json"
    write(path, {"weight_map": {str(i): file for i, file in enumerate(files)}})
    return path


@pytest.mark.parametrize(
    ("files", "index"),
    [
        ([EXPORTED, "quant_model_weight_w4a4_mxfp4.safetensors"], None),
        ([EXPORTED, "quant_model_weight-00001-of-00001.safetensors"], None),
        (
            [
                "quant_model_weights-00001-of-00003.safetensors",
                "quant_model_weights-00003-of-00003.safetensors",
            ],
            None,
        ),
        (["quant_model_weights-00001-of-00001.safetensors", EXPORTED], [EXPORTED]),
    ],
)
def test_weights_of_two_exports_or_an_incomplete_one(
    tmp_path: Path, files: list[str], index: list[str] | None
) -> None:
    for file in files:
        touch(tmp_path / file)
    if index is not None:
        write_index(tmp_path, index)
    e = refused(tmp_path, "E-CKP-03")
    assert all(file in e.got for file in files)


def test_a_description_without_weights(tmp_path: Path) -> None:
    write(tmp_path / DESCRIPTION, {})
    assert DESCRIPTION in refused(tmp_path, "E-CKP-02").got
    touch(tmp_path / WEIGHTS)  # a file with Diffusers' name is not an export
    assert recognise(tmp_path).kind == "file"


def test_one_file(tmp_path: Path) -> None:
    file = touch(tmp_path / "wan2.2_t2v_high_noise.safetensors")
    for path in (file, tmp_path):
        layout = recognise(path)
        assert (layout.kind, layout.name) == ("file", path.name.removesuffix(".safetensors"))
        expert = layout.experts[0]
        assert (expert.name, expert.path, expert.files, expert.config) == ("transformer", file, (file,), {})
        assert expert.folder == tmp_path
    touch(tmp_path / "other.safetensors")
    assert recognise(file).experts[0].path == file
    assert "pass one of them" in refused(tmp_path, "E-CKP-01").got


def test_a_file_of_any_name_with_a_config(tmp_path: Path) -> None:
    write(tmp_path / "config.json", WAN_CONFIG)
    file = touch(tmp_path / "model.safetensors")
    assert recognise(tmp_path).kind == "wan"
    assert weight_set(tmp_path, recognise(tmp_path).experts[0].stem) == (None, (file,))


def test_one_of_many_shards(tmp_path: Path) -> None:
    file = touch(tmp_path / "diffusion_pytorch_model-00001-of-00006.safetensors")
    e = refused(file, "E-CKP-01")
    assert "one of 6 files" in e.got
    assert str(tmp_path) in e.fix


@pytest.mark.parametrize(
    ("name", "kind"),
    [("patch_embedding.weight", None), ("time_embedding.0.bias", "wan"), ("proj_out.bias", "transformer")],
)
def test_an_index_without_a_config(tmp_path: Path, name: str, kind: str | None) -> None:
    write(tmp_path / f"{WEIGHTS}.index.json", {"weight_map": {name: WEIGHTS}})
    assert recognise(tmp_path).kind == (kind or "transformer")


@pytest.mark.parametrize(
    "name", ["VaceWanModel", "WanModel_S2V", "WanAnimateModel", "WanVACETransformer3DModel"]
)
def test_models_derived_from_wan_are_another_class(tmp_path: Path, name: str) -> None:
    write(tmp_path / "config.json", {"_class_name": name})
    e = refused(tmp_path, "E-CKP-05")
    assert name in e.got
    assert "WanModel" in e.needs


def test_only_a_pipeline_can_generate_videos(wan: Path, tmp_path: Path) -> None:
    recognise(wan).require_pipeline()
    file = touch(tmp_path / "a" / "wan.safetensors")
    for path, message in ((wan / "transformer", "standalone Diffusers transformer"), (file, "single file")):
        with pytest.raises(CheckpointError, match=message) as e:
            recognise(path).require_pipeline()
        assert e.value.code == "E-CKP-01"
        assert f"ascendit repack {path} --base MODEL -o DST" in e.value.fix


def test_symlink_loops_end(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "E-USE-02", UsageError)
    (tmp_path / "model_index.json").symlink_to("model_index.json")
    (tmp_path / "config.json").symlink_to("config.json")
    (tmp_path / "high_noise_model").symlink_to(tmp_path)
    refused(tmp_path, "E-CKP-06")
    (tmp_path / "model_index.json").unlink()
    refused(tmp_path, "E-CKP-02")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    assert "not a regular file" in refused(tmp_path, "E-CKP-06").got


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "cannot be read: Permission denied" in refused(tmp_path, "E-CKP-01").got


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("__0_0.distcp", "torch.distributed"),
        ("step_1/__1_0.distcp", "dcp_to_torch"),
        ("zero_to_fp32.py", "DeepSpeed"),
    ],
)
def test_a_folder_of_a_trainer(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path / name, {})
    error = refused(tmp_path, "E-CKP-04")
    assert message in f"{error.got} {error.fix}" and str((tmp_path / name).parent) in error.fix


def test_a_part_of_a_split_file_needs_the_others(tmp_path: Path) -> None:
    write(tmp_path / "wan-Q8_0-00001-of-00002.gguf", {})
    error = refused(tmp_path, "E-CKP-03")
    assert "number 2 of 2 is missing" in error.got and error.fix == "download the missing files"
