"""Files in other formats than their names say, and files that are no weights."""

from __future__ import annotations

from pathlib import Path

import gguf_files
import owned
import pytest
import torch

from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.errors import CheckpointError


@pytest.mark.parametrize("ending", ["safetensors", "gguf", "pth"])
def test_what_a_failed_download_leaves_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "a b" / f"x.{ending}"
    path.parent.mkdir()
    for content, kind, fix in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "a pointer of Git LFS",
            f"git -C '{path.parent}' lfs pull",
        ),
        (b"<!DOCTYPE html>\n<html>", "a web page", "hf download"),
        (b"\n <html lang='en'>", "a web page", "hf download"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as e:
            read_header(path)
        assert e.value.code == "E-CKP-02" and e.value.got == f"{path} is {kind}, not weights"
        assert fix in e.value.fix


@pytest.mark.parametrize("ending", ["", ".GGUF", ".0", ".SAFETENSORS", ".PTH"])
@pytest.mark.parametrize("kind", ["safetensors", "gguf", "pickle"])
def test_the_first_bytes_of_a_file_tell_its_format(tmp_path: Path, kind: str, ending: str) -> None:
    if ending == ".GGUF" and kind != "gguf":
        return
    file, path = owned.floats(owned.wan), tmp_path / f"wan{ending}"
    if kind == "gguf":
        gguf_files.write_model(path, file.tensors, "F32")
    elif kind == "pickle":
        torch.save(file.tensors, path)
    else:
        file.write(path)
    layout = recognise(path)
    assert layout.kind == "file"
    assert read_expert(layout.part("transformer")).tensors.keys() == file.values.keys()
