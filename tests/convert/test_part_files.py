"""`repack FILE.. --base MODEL` and `load(model, parts=..)`: single files in place of a model's components.

The oracle is the folder whose weights the files have: the output has the same tensors, and the same frames.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WEIGHTS
from wan_files import clip_state

import ascendit
from ascendit.checkpoint.component import noise_of
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.part_files import read_part_files, split_name, with_part_files
from ascendit.checkpoint.transformer import read_expert
from ascendit.convert.quantize import quantize
from ascendit.convert.repack import repack
from ascendit.errors import AscenditError, UsageError
from ascendit.names import to_wan
from ascendit.progress import Progress

SHAPE: dict[str, Any] = {"width": 32, "height": 32, "num_frames": 1, "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def cascade(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("t2v_cascade")


@pytest.fixture(scope="module")
def files(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Other weights of both experts, in original names with a prefix, as single files."""
    folder = tmp_path_factory.mktemp("files")
    paths = {}
    for expert, noise in (("transformer", "high"), ("transformer_2", "low")):
        tensors = load_file(cascade / expert / WEIGHTS)
        renamed = {f"model.diffusion_model.{to_wan(name)}": x * 1.125 for name, x in tensors.items()}
        paths[expert] = folder / f"wan2.2_t2v_{noise}_noise_14B.safetensors"
        save_file(renamed, paths[expert])
    return paths


def written(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return {
        k: x for file in sorted((folder / part).glob("*.safetensors")) for k, x in load_file(file).items()
    }


def test_two_files_and_a_base_make_a_folder(cascade: Path, files: dict[str, Path], tmp_path: Path) -> None:
    report = repack(list(files.values()), tmp_path / "out", base=cascade, check=True)
    for expert in files:
        expected = {name: x * 1.125 for name, x in load_file(cascade / expert / WEIGHTS).items()}
        tensors = written(tmp_path / "out", expert)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], x) for name, x in expected.items())
    assert report.checked and {"text_encoder", "vae", "tokenizer", "scheduler"} <= set(report.linked)
    assert recognise(tmp_path / "out").kind == "diffusers"
    record = json.loads((tmp_path / "out" / "ascendit.json").read_text())
    assert record["command"].startswith("ascendit repack transformer=wan2.2_t2v_high_noise_14B.safetensors ")
    video = ascendit.load(tmp_path / "out").generate("a boat", **SHAPE)
    parts = [str(path) for path in files.values()]
    assert np.array_equal(
        video.frames, ascendit.load(cascade, parts=parts).generate("a boat", **SHAPE).frames
    )
    assert not np.array_equal(video.frames, ascendit.load(cascade).generate("a boat", **SHAPE).frames)


def test_one_expert_alone_keeps_the_other(cascade: Path, files: dict[str, Path], tmp_path: Path) -> None:
    report = repack(f"low={files['transformer_2']}", tmp_path / "out", base=cascade)
    assert [expert.name for expert in report.experts] == ["transformer_2"]
    assert "transformer" in report.linked
    original = load_file(cascade / "transformer" / WEIGHTS)
    tensors = written(tmp_path / "out", "transformer")
    assert all(torch.equal(tensors[name], x) for name, x in original.items())
    assert recognise(tmp_path / "out").experts[1].path == tmp_path / "out" / "transformer_2"
    repack(files["transformer_2"], tmp_path / "same", base=cascade)  # the name of the file says `low`
    assert written(tmp_path / "same", "transformer_2").keys() == original.keys()


@pytest.mark.parametrize(
    ("sources", "message", "code"),
    [
        (["{transformer}", "{transformer}"], "are both the transformer", "E-USE-01"),
        (["{unnamed}"], "does not say whether for high or low noise", "E-USE-01"),
        (["vae={transformer}"], "has the tensors of a transformer", "E-USE-01"),
        (["vae={tiny}"], "the tensors of a tiny autoencoder", "E-USE-01"),
        (["{transformer}", "{cascade}"], "is a Diffusers pipeline folder", "E-USE-01"),
        (["{transformer}", "none.gguf"], "no file at none.gguf", "E-USE-02"),
    ],
)
def test_files_that_do_not_fit(
    cascade: Path, files: dict[str, Path], tmp_path: Path, sources: list[str], message: str, code: str
) -> None:
    unnamed = tmp_path / "wan.safetensors"
    unnamed.symlink_to(files["transformer"])
    save_file({"decoder.1.weight": torch.ones(2)}, tmp_path / "taew2_1.safetensors")
    paths = {**files, "unnamed": unnamed, "cascade": cascade, "tiny": tmp_path / "taew2_1.safetensors"}
    names = [source.format(**paths) for source in sources]
    with pytest.raises(AscenditError, match=message) as e:
        repack(names, tmp_path / "out", base=cascade)
    assert e.value.code == code and not (tmp_path / "out").exists()
    with pytest.raises(AscenditError, match=message):
        ascendit.load(cascade, parts=names)


def test_an_image_encoder(tiny_folder: Any, tmp_path: Path) -> None:
    """In the names of Wan's own code, in which q, k and v are one tensor."""
    base = tiny_folder("i2v_21")
    state = load_file(base / "image_encoder" / "model.safetensors")
    other = {name.removeprefix("vision_model."): x * 1.25 for name, x in state.items()}
    save_file(clip_state(other), tmp_path / "clip.safetensors")
    report = repack(tmp_path / "clip.safetensors", tmp_path / "out", base=base)
    assert [part["name"] for part in report.parts] == ["image_encoder"] and not report.experts
    unused = "2 tensors not used, which Wan does not need: log_scale, textual.norm.weight"
    assert f"image_encoder: {unused}" in report.warnings
    tensors = written(tmp_path / "out", "image_encoder")
    assert {n.removeprefix("vision_model."): x.tolist() for n, x in tensors.items()} == {
        n: x.tolist() for n, x in other.items()
    }
    assert split_name("image_encoder=a.pth") == ("image_encoder", "a.pth")


def test_the_other_expert_of_a_base_from_a_hub(
    cascade: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is downloaded, unless all transformers are among the files."""
    downloads: list[bool] = []

    def fetch(name: str, *, experts: bool = True) -> Path:
        downloads.append(experts)
        if experts:
            shutil.copy(cascade / "transformer" / WEIGHTS, folder / "transformer" / WEIGHTS)
        return folder

    folder = Path(shutil.copytree(cascade, tmp_path / "hub"))
    (folder / "transformer" / WEIGHTS).unlink()
    monkeypatch.setattr("ascendit.checkpoint.hub.fetch", fetch)
    repack(list(files.values()), tmp_path / "both", base="hf:org/name", dry_run=True)
    assert downloads == [False]
    repack(f"low={files['transformer_2']}", tmp_path / "one", base="hf:org/name", dry_run=True)
    assert downloads == [False, False, True]
    (folder / "transformer" / WEIGHTS).unlink()
    with pytest.raises(AscenditError, match="no diffusion_pytorch_model.safetensors") as e:
        repack(f"low={files['transformer_2']}", tmp_path / "one", base=folder)
    assert e.value.code == "E-CKP-02" and not (tmp_path / "one").exists()


def test_a_stopped_run_resumes_with_its_parts(cascade: Path, tmp_path: Path) -> None:
    def stop(event: Progress) -> None:
        if event.stage == "vae":
            raise KeyboardInterrupt

    encoder = cascade / "text_encoder" / "model.safetensors"
    sources = [f"vae={cascade / 'vae' / WEIGHTS}", f"text_encoder={encoder}"]
    with pytest.raises(KeyboardInterrupt):
        repack(sources, tmp_path / "out", base=cascade, on_progress=stop)
    partial = tmp_path / ".out.partial" / "out" / "text_encoder" / "model.safetensors"
    first = partial.stat().st_ino
    with pytest.raises(UsageError, match="another source"):
        repack(sources[1:], tmp_path / "out", base=cascade, resume=True)
    repack(sources, tmp_path / "out", base=cascade, resume=True)
    assert (tmp_path / "out" / "text_encoder" / "model.safetensors").stat().st_ino == first
    for name, file in (("vae", cascade / "vae" / WEIGHTS), ("text_encoder", encoder)):
        tensors, expected = written(tmp_path / "out", name), load_file(file)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[n], x) for n, x in expected.items())


def test_the_record_of_parts_alone(cascade: Path, tmp_path: Path) -> None:
    """It has the bytes of the parts, nothing about layers, and no local path."""
    report = repack(f"vae={cascade / 'vae' / WEIGHTS}", tmp_path / "out", base=cascade, copy=True)
    nbytes = sum(x.nbytes for x in load_file(cascade / "vae" / WEIGHTS).values())
    assert report.as_dict()["bytes"] == nbytes
    (size,) = (line for line in report.lines() if line.startswith("Size"))
    assert "bits/weight" not in size and " 0 B" not in size
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Linear layers" not in card and "Bits per weight" not in card
    command = json.loads((tmp_path / "out" / "ascendit.json").read_text())["command"]
    assert command == f"ascendit repack vae={WEIGHTS} -o out --base {cascade.name} --copy"


def test_the_record_of_one_expert_names_it(cascade: Path, files: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "epoch-7.safetensors"
    file.symlink_to(files["transformer_2"])
    repack(f"low={file}", tmp_path / "out", base=cascade, copy=True)
    command = json.loads((tmp_path / "out" / "ascendit.json").read_text())["command"]
    assert command == f"ascendit repack transformer_2={file.name} -o out --base {cascade.name} --copy"


def test_a_name_chooses_the_part_of_an_all_in_one_file(
    cascade: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    encoder = load_file(cascade / "text_encoder" / "model.safetensors")
    tensors = load_file(files["transformer"])
    tensors |= {f"text_encoders.umt5xxl.transformer.{name}": x * 1.5 for name, x in encoder.items()}
    save_file(tensors, tmp_path / "all.safetensors")
    one, other = f"high={tmp_path / 'all.safetensors'}", f"text_encoder={tmp_path / 'all.safetensors'}"
    report = repack([one, other], tmp_path / "out", base=cascade)
    assert [x.name for x in report.experts] == ["transformer"]
    result = written(tmp_path / "out", "text_encoder")
    assert {n: x.tolist() for n, x in result.items()} == {n: (x * 1.5).tolist() for n, x in encoder.items()}
    with pytest.raises(UsageError, match="has the tensors of a transformer"):
        read_part_files([f"vae={tmp_path / 'all.safetensors'}"])


def test_a_file_in_place_of_quantized_weights(cascade: Path, tmp_path: Path) -> None:
    """The config of the replaced expert describes its layers, not those of the file."""
    folder = tmp_path / "int8"
    quantize(cascade, folder, scheme="int8")
    assert "quantization_config" in recognise(folder).experts[0].config

    def schemes(*parts: str) -> list[set[str]]:
        files = read_part_files(parts, 2)
        experts = [read_expert(part) for part in with_part_files(recognise(folder), files).experts]
        return [{layer.scheme for layer in expert.layers.values()} for expert in experts]

    assert schemes(f"high={cascade / 'transformer' / WEIGHTS}") == [set(), {"int8"}]
    assert schemes(f"low={folder / 'transformer' / WEIGHTS}") == [{"int8"}] * 2


def test_a_file_of_another_model(files: dict[str, Path], tiny_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(AscenditError) as e:
        repack(f"transformer_2={files['transformer']}", tmp_path / "out", base=tiny_folder("t2v_single"))
    assert "transformer_2, which" in e.value.got


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.gguf", (None, "a.gguf")),
        ("high=a.gguf", ("transformer", "a.gguf")),
        ("low=a=b.gguf", ("transformer_2", "a=b.gguf")),
        ("HIGH=a.gguf", ("transformer", "a.gguf")),
        ("vae=/x/y.pth", ("vae", "/x/y.pth")),
        ("x=y.gguf", (None, "x=y.gguf")),
    ],
)
def test_the_name_before_a_file(text: str, expected: tuple[str | None, str]) -> None:
    assert split_name(text) == expected


@pytest.mark.parametrize(
    ("stem", "noise"),
    [
        *(("wan_low_noise", "low"), ("t2v-high-noise-Q4", "high"), ("Wan22_HighNoise", "high")),
        *(("style_high", "high"), ("Low.v2", "low"), ("wan22LOWNOISE_x", "low")),
        *(("slow_motion", None), ("highlight", None), ("high_and_low", None), ("", None)),
    ],
)
def test_the_noise_level_in_a_name(stem: str, noise: str | None) -> None:
    assert noise_of(stem) == noise


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.safetensors", "Wan2.2-T2V-A14B-LowNoise-Q4_K_M.safetensors"),
        (
            "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
            "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        ),
        ("high.safetensors", "low.safetensors"),
        ("flow_high.safetensors", "flow-low.safetensors"),
    ],
)
def test_the_experts_in_names_of_files(files: dict[str, Path], tmp_path: Path, high: str, low: str) -> None:
    for name in (low, high):
        (tmp_path / name).symlink_to(files["transformer"])
    layout = read_part_files([tmp_path / low, tmp_path / high])
    assert [part.path.name for part in layout.experts] == [high, low]
