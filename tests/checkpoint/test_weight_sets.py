"""Which files of a folder are read as the weights of a component."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ascendit.checkpoint.weight_files import Shards
from ascendit.checkpoint.weight_sets import weight_set, weights_in
from ascendit.errors import CheckpointError

STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("names", "index", "files"),
    [
        ([], None, []),
        (["notes.txt"], None, []),
        (["a.safetensors"], None, ["a.safetensors"]),
        (["a.gguf"], None, ["a.gguf"]),
        (["a.GGUF", "b.PTH"], None, ["a.GGUF"]),
        (["a.SafeTensors", "b.gguf"], None, ["a.SafeTensors"]),
        (["Wan2.1_VAE.pth"], None, ["Wan2.1_VAE.pth"]),
        (["a.gguf", "a.pth", "a.safetensors"], None, ["a.safetensors"]),
        (["a.gguf", "a.pth"], None, ["a.gguf"]),
        ([f"{STEM}.safetensors", "b.safetensors"], None, [f"{STEM}.safetensors"]),
        ([f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"], None, [f"{STEM}.safetensors"]),
        ([f"{STEM}.fp16.safetensors"], None, [f"{STEM}.fp16.safetensors"]),
        ([f"{STEM}.fp16.safetensors", "b.gguf"], None, [f"{STEM}.fp16.safetensors"]),
        ([f"{STEM}.bin"], None, [f"{STEM}.bin"]),
        (["pytorch_model.bin"], None, ["pytorch_model.bin"]),
        (["pytorch_model.bin.index.json"], "pytorch_model.bin.index.json", []),
        ([f"{STEM}.safetensors", f"{STEM}.bin"], None, [f"{STEM}.safetensors"]),
        (
            ["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"],
            None,
            ["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"],
        ),
        (
            [f"{STEM}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)],
            None,
            [f"{STEM}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)],
        ),
        (
            [f"{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)],
            None,
            [f"{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)],
        ),
        (
            [f"{STEM}.safetensors.index.fp16.json"]
            + [f"{STEM}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)],
            f"{STEM}.safetensors.index.fp16.json",
            [],
        ),
    ],
)
def test_the_weights_of_a_folder(
    tmp_path: Path, names: list[str], index: str | None, files: list[str]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert weight_set(tmp_path, STEM) == (
        None if index is None else tmp_path / index,
        tuple(tmp_path / name for name in files),
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.safetensors", "b.safetensors"], "2 weight files without an index: a.safetensors, b.safetensors"),
        ([f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"], "several variants: bf16, fp16"),
        (["x-00001-of-00003.safetensors", "x-00003-of-00003.safetensors"], "number 2 of 3 is missing"),
        (["x-00001-of-00002.safetensors", "y-00002-of-00002.safetensors"], "2 weight files without an index"),
        (["x-00001-of-00001.gguf", "y.gguf"], "2 weight files without an index"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=message) as e:
        weight_set(tmp_path, STEM)
    assert e.value.code == "E-CKP-03"
    assert weights_in(tmp_path) == sorted(names)


def test_shards_without_an_index_are_one_component(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((2, 3), float(i)) for i in range(4)}
    for number in (1, 2):
        part = {name: x for name, x in tensors.items() if int(name[1]) % 2 == number - 1}
        save_file(part, tmp_path / f"{STEM}-0000{number}-of-00002.safetensors")
    shards = Shards.open(tmp_path)
    assert shards.tensors.keys() == tensors.keys() and len(shards.files) == 2
