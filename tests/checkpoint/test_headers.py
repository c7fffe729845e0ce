"""Files in other formats than their names say, and files that are no weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from ascendit.checkpoint.headers import read_header
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
