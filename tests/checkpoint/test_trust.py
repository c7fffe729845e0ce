"""Limits for the files of a checkpoint: classes, config keys, devices, pickles, links."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ascendit.checkpoint.component import EXPERTS, Part
from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.pickle_file import convert_command
from ascendit.checkpoint.scheduler import SOLVERS
from ascendit.checkpoint.trust import OTHER_CODE, PART_CLASSES, Home
from ascendit.checkpoint.weight_files import Shards
from ascendit.checkpoint.weight_sets import PICKLED
from ascendit.errors import CheckpointError

INDEX: dict[str, Any] = {
    "_class_name": "WanImageToVideoPipeline",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "image_encoder": ["transformers", "CLIPVisionModel"],
    "image_processor": ["transformers", "CLIPImageProcessor"],
}
CONFIGS = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "image_processor": "preprocessor_config.json",
}


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    for name in INDEX.keys() - {"_class_name", "transformer_2"}:
        (tmp_path / "wan" / name).mkdir(parents=True)
        (tmp_path / "wan" / name / CONFIGS.get(name, "config.json")).write_text("{}")
    (tmp_path / "wan" / "model_index.json").write_text(json.dumps(INDEX))
    return tmp_path / "wan"


def refused(wan: Path, *texts: str, code: str = "E-CKP-05") -> None:
    with pytest.raises(CheckpointError) as e:
        recognise(wan)
    assert e.value.code == code and all(text in str(e.value) for text in texts), str(e.value)


def edit_index(wan: Path, **entries: object) -> None:
    (wan / "model_index.json").write_text(json.dumps(INDEX | entries))


# ---- classes ------------------------------------------------------------------------------------


def test_the_folder_is_accepted_with_every_class_of_the_table(wan: Path) -> None:
    for name, row in PART_CLASSES.items():
        for class_name in row.classes or SOLVERS:
            edit_index(wan, **{name: [row.library, class_name]})
            (wan / name).mkdir(exist_ok=True)
            (wan / name / "config.json").write_text("{}")
            assert recognise(wan).parts[name].class_name == class_name


@pytest.mark.parametrize("name", sorted(INDEX.keys() - {"_class_name"}))
@pytest.mark.parametrize(
    ("library", "class_name"),
    [
        ("wan_evil", "T"),
        ("os", "system"),
        (".wan_evil", "T"),
        ("../wan_evil", "T"),
        ("transformers.models.auto", "AutoModel"),
        ("transformers", "Trainer.x"),
        ("transformers", ""),
        ("", "AutoencoderKLWan"),
    ],
)
def test_other_libraries_and_odd_names_are_refused(
    wan: Path, name: str, library: str, class_name: str
) -> None:
    edit_index(wan, **{name: [library, class_name]})
    refused(wan, "model_index.json", name, f"{library}.{class_name}", PART_CLASSES[name].library)


@pytest.mark.parametrize("name", sorted(set(PART_CLASSES) - {"scheduler"}))
def test_other_classes_of_the_library_are_refused(wan: Path, name: str) -> None:
    library = PART_CLASSES[name].library
    for class_name in ("AutoModel", "AutoencoderKL", "BertTokenizer", "pipeline", "__import__"):
        edit_index(wan, **{name: [library, class_name]})
        refused(wan, f"{name} is {class_name}", PART_CLASSES[name].classes[0])


def test_the_index_cannot_hide_an_entry(wan: Path) -> None:
    for entry in (["wan_evil", "T", 1], ["T"], {"library": "wan_evil"}, "T", [None, "T"], 1, True):
        edit_index(wan, tokenizer=entry)
        refused(wan, "tokenizer", code="E-CKP-06")


def test_components_of_other_names_are_files_of_a_known_library(wan: Path) -> None:
    (wan / "safety_checker").mkdir()
    (wan / "safety_checker" / "config.json").write_text("{}")
    edit_index(wan, safety_checker=["transformers", "AnyName"])
    assert recognise(wan).parts["safety_checker"].class_name == "AnyName"
    edit_index(wan, safety_checker=["wan_evil", "AnyName"])
    refused(wan, "safety_checker")


def test_an_auto_tokenizer_is_the_class_in_its_config(wan: Path) -> None:
    edit_index(wan, tokenizer=["transformers", "AutoTokenizer"])
    refused(wan, "AutoTokenizer")
    (wan / "tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    assert recognise(wan).parts["tokenizer"].class_name == "T5Tokenizer"
    (wan / "tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "Evil"}')
    refused(wan, "tokenizer_class Evil")


# ---- keys of configs ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*OTHER_CODE, "attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("name", ["text_encoder", "vae", "tokenizer", "image_processor", "transformer"])
@pytest.mark.parametrize("nested", [False, True])
def test_keys_for_other_code_are_refused_in_every_component(
    wan: Path, key: str, name: str, nested: bool
) -> None:
    value = {"AutoModel": "evil/repo--evil.T"} if key == "auto_map" else "evil/repo"
    config = {"a": [{"b": {key: value}}]} if nested else {key: value}
    file = wan / name / CONFIGS.get(name, "config.json")
    file.write_text(json.dumps(config))
    if name in EXPERTS and key == "quantization_config":
        recognise(wan)  # ascendit's own key; its value is checked when the expert is read
        return
    refused(wan, str(file), key)
    file.write_text(json.dumps({key: None}))
    recognise(wan)


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("text_encoder/config.json", {"model_type": "bert"}),
        ("image_encoder/config.json", {"model_type": "siglip"}),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}),
        ("transformer/config.json", {"_class_name": ["evil", "T"]}),
        ("image_processor/preprocessor_config.json", {"image_processor_type": "ViTImageProcessor"}),
        ("text_encoder/adapter_config.json", {"base_model_name_or_path": "evil/repo"}),
        ("tokenizer/special_tokens_map.json", {"auto_map": "evil.T"}),
        ("text_encoder/generation_config.json", {"custom_generate": "evil"}),
    ],
)
def test_other_architectures_and_adapters_are_refused(wan: Path, file: str, config: object) -> None:
    (wan / file).write_text(json.dumps(config))
    refused(wan, file.split("/")[0])


# ---- devices, procfs and pickles ----------------------------------------------------------------

IRREGULAR: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("no such file"),
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "procfs": lambda path: path.symlink_to("/proc/self/environ"),
    "procfs memory": lambda path: path.symlink_to("/proc/self/mem"),
    "sysfs": lambda path: path.symlink_to("/sys/kernel/notes"),
}


@pytest.mark.parametrize("how", IRREGULAR)
@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "vae/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/spiece.model",
        "tokenizer/tokenizer_config.json",
        "tokenizer/special_tokens_map.json",
        "tokenizer/added_tokens.json",
    ],
)
def test_files_that_are_not_regular_are_refused_without_being_opened(wan: Path, file: str, how: str) -> None:
    (wan / file).unlink(missing_ok=True)
    IRREGULAR[how](wan / file)
    refused(wan, str(wan / file), code="E-CKP-06")


@pytest.mark.parametrize("how", ["pipe", "zero", "procfs", "sysfs", "loop"])
def test_weights_that_are_not_regular_are_refused(tmp_path: Path, how: str) -> None:
    file = tmp_path / "model.safetensors"
    IRREGULAR[how](file)
    with pytest.raises(CheckpointError) as e:
        read_header(file)
    assert e.value.code == "E-CKP-02"


@pytest.mark.parametrize("value", [None, {}, {"a": "b"}, [], {"a": 1}, {"a": {}}, {"a": None}, "x", 0, False])
def test_metadata_is_accepted_as_by_the_library(tmp_path: Path, value: object) -> None:
    file = tmp_path / "x.safetensors"
    header = json.dumps({"__metadata__": value, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0")
    try:
        safe_open(file, "np").metadata()
    except SafetensorError:
        with pytest.raises(CheckpointError, match="__metadata__"):
            read_header(file)
    else:
        assert list(read_header(file)) == ["a"]


@pytest.mark.parametrize("ending", PICKLED)
def test_a_pickle_of_another_kind_is_refused(tmp_path: Path, ending: str) -> None:
    pickled = tmp_path / f"pytorch_model{ending}"
    pickled.write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(CheckpointError, match="PyTorch pickle"):
        Shards.open(tmp_path, "model")
    pickled.rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="PyTorch pickle"):
        Shards.open(tmp_path, "model")


def test_the_command_converts_tensors_and_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    good, evil = tmp_path / "it's a.bin", tmp_path / "evil.bin"
    torch.save({"state_dict": {"a": torch.ones(2), "b": torch.zeros(1)}}, good)
    torch.save({"a": Evil()}, evil)

    def run(pickled: Path) -> None:
        python, flag, code, *arguments = shlex.split(convert_command(pickled, tmp_path / "x.safetensors"))
        assert (python, flag) == ("python", "-c")
        monkeypatch.setattr(sys, "argv", ["-c", *arguments])
        exec(code, {})

    run(good)
    assert set(read_header(tmp_path / "x.safetensors")) == {"a", "b"}
    with pytest.raises(pickle.UnpicklingError):
        run(evil)
    assert not (tmp_path / "ran").exists()


# ---- links --------------------------------------------------------------------------------------


def test_a_home_contains_the_checkpoint_and_hub_blobs(tmp_path: Path) -> None:
    root = tmp_path / "models--a--b" / "snapshots" / "0"
    root.mkdir(parents=True)
    home = Home.of(root)
    targets = {
        "inside": (root / "own.txt", True),
        "blob": (tmp_path / "models--a--b/blobs" / ("0a" * 32), True),
        "other blob": (tmp_path / "models--c--d/blobs" / ("0a" * 20), False),
        "named like a blob": (tmp_path / "blobs" / ("0a" * 32), False),
        "beside": (tmp_path / "models--a--b/blobs/config.json", False),
        "above": (tmp_path / "models--a--b", False),
        "similar": (tmp_path / "models--a--b/snapshots/00", False),
        "system": (Path("/etc/passwd"), False),
    }
    for name, (target, inside) in targets.items():
        (root / name).symlink_to(target)
        (root / f"chain {name}").symlink_to(name)
        (root / f"relative {name}").symlink_to(os.path.relpath(target, root))
        assert [home.contains(root / f"{p}{name}") for p in ("", "chain ", "relative ")] == [inside] * 3


def test_a_linked_part_of_a_snapshot_has_its_blobs(tmp_path: Path, wan: Path) -> None:
    """`quantize` and `repack` link the other parts of a model in a hub cache."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    shutil.copytree(wan, snapshot)
    blob = tmp_path / "models--a--b" / "blobs" / ("0a" * 20)
    blob.parent.mkdir()
    for name in ("vae", "transformer"):
        shutil.rmtree(wan / name)
        (wan / name).symlink_to(snapshot / name)
        file = snapshot / name / "config.json"
        file.replace(blob)
        file.symlink_to(blob)
        part = Part(name, wan / name)
        assert Home.of(wan, part).contains(wan / name / "config.json")
        assert not Home.of(wan).contains(wan / name / "config.json")


def test_a_link_to_another_disk_may_lead_to_weights_only(tmp_path: Path) -> None:
    root = tmp_path / "wan"
    root.mkdir()
    (tmp_path / "key").write_text("secret")
    (tmp_path / "weights").write_bytes(save({"a": np.zeros(2, np.float32)}))
    for name, target in (("w.safetensors", "weights"), ("k.safetensors", "key"), ("w.json", "weights")):
        (root / name).symlink_to(tmp_path / target)
        assert Home.of(root).copies(root / name) is (name == "w.safetensors")
    with pytest.raises(CheckpointError) as e:
        Home.of(root).require(root / "k.safetensors")
    assert e.value.code == "E-CKP-03" and str(tmp_path / "key") in e.value.got
    subprocess.run(["bash", "-c", e.value.fix.partition(": ")[2]], check=True)
    Home.of(root).require(root / "k.safetensors")
