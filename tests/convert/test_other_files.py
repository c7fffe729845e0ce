"""Components and small files in an output: nothing that a link leads to outside of the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from convert.models import OTHERS, write_model

from ascendit.convert.quantize import quantize
from ascendit.convert.repack import repack
from ascendit.errors import CheckpointError

SECRET = "secret-5d1f"
VERBS: dict[str, Callable[..., Any]] = {
    "quantize": lambda src, dst, **options: quantize(src, dst, scheme="int8", **options),
    "repack": repack,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "models" / "wan")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id_rsa").write_text(SECRET)
    (tmp_path / "private" / "auth.json").write_text(json.dumps({"recipe": {"name": SECRET}}))
    (tmp_path / "private" / "card").write_text(f"---\nlicense: {SECRET}\n---\n")
    return folder


def leaked(folder: Path) -> bool:
    files = (Path(base) / name for base, _, names in os.walk(folder, followlinks=True) for name in names)
    return any(SECRET.encode() in file.read_bytes() for file in files if file.is_file())


@pytest.mark.parametrize("verb", VERBS)
def test_links_out_of_the_checkpoint_are_named_and_omitted(verb: str, model: Path, tmp_path: Path) -> None:
    private = tmp_path / "private"
    (model / "text_encoder/deep/er").mkdir(parents=True)
    targets: dict[str, Path | str] = {
        "LICENSE.md": private / "id_rsa",
        "notes.txt": "../../private/id_rsa",
        "more": private,
        "text_encoder/extra": private,
        "text_encoder/deep/er/key": private / "id_rsa",
        "vae/auth.json": private / "auth.json",
    }
    for name, target in targets.items():
        (model / name).symlink_to(target)
    (model / "README.md").unlink()
    (model / "README.md").symlink_to(private / "card")
    (model / "ascendit.json").symlink_to(private / "auth.json")
    (model / "inside.txt").symlink_to("LICENSE.txt")
    report = VERBS[verb](model, tmp_path / "out", copy=True)
    assert not leaked(tmp_path / "out")
    omitted = {link.partition(" -> ")[0] for link in report.omitted}
    assert omitted == targets.keys()
    assert any("Not copied" in line and "notes.txt" in line for line in report.lines())
    assert report.as_dict()["omitted"] == list(report.omitted)
    assert (tmp_path / "out/LICENSE.txt").read_text() == OTHERS["LICENSE.txt"]
    assert (tmp_path / "out/inside.txt").exists() == (verb == "quantize")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("model_index.json", False),
        ("transformer/config.json", False),
        ("text_encoder/config.json", True),
        ("text_encoder/model.safetensors", True),
        ("text_encoder", False),
        ("vae", True),
    ],
)
def test_required_files_out_of_the_checkpoint_are_refused(
    verb: str, name: str, copy: bool, model: Path, tmp_path: Path
) -> None:
    (model / name).rename(tmp_path / "moved")
    (model / name).symlink_to(tmp_path / "moved")
    with pytest.raises(CheckpointError) as e:
        VERBS[verb](model, tmp_path / "out", copy=copy, dry_run=True)
    assert e.value.code == "E-CKP-03" and str(model / name) in e.value.got


def test_the_output_of_a_run_is_a_source_of_the_next(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "q", scheme="int8")
    assert (tmp_path / "q/text_encoder").is_symlink()
    report = repack(tmp_path / "q", tmp_path / "r", copy=True)
    assert report.omitted == () and not (tmp_path / "r/text_encoder").is_symlink()
    assert (tmp_path / "r/text_encoder/config.json").read_text() == OTHERS["text_encoder/config.json"]
