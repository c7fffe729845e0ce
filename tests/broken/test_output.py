"""Outputs that cannot be written: existing files are unchanged and nothing new is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from broken.models import MODELS, WEIGHTS, quantized, save
from broken.test_broken import VERBS, snapshot

from ascendit.errors import AscenditError, EnvironmentProblem

WRITERS = ("repack", "quantize")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A pipeline of two experts, alone in its folder."""
    folder = tmp_path / "home" / "model"
    folder.mkdir(parents=True)
    MODELS["pipeline"](folder)
    return folder


def refused(verb: str, source: Path, dst: Path, code: str) -> AscenditError:
    """Return the error; nothing below the common parent folder may have changed."""
    root = Path(os.path.commonpath([source.parent, os.path.abspath(dst)]))
    before = snapshot(root)
    with pytest.raises(AscenditError) as e:
        VERBS[verb](source, dst)
    assert e.value.code == code, e.value
    assert snapshot(root) == before
    return e.value


def folder(path: Path) -> None:
    path.mkdir()


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("keep")


def file(path: Path) -> None:
    path.write_text("keep")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("create", [folder, full_folder, file, dangling])
def test_the_output_exists(source: Path, verb: str, create: Callable[[Path], None]) -> None:
    dst = source.parent / "out"
    create(dst)
    assert "already exists" in refused(verb, source, dst, "E-USE-03").got


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize(
    "output", ["out", "transformer/out", "new/deep/out", "../model/out", "../link/out", "transformer/../out"]
)
def test_the_output_is_inside_the_input(source: Path, verb: str, output: str) -> None:
    (source.parent / "link").symlink_to("model")
    assert "is inside the source" in refused(verb, source, source / output, "E-USE-06").got


@pytest.mark.parametrize("verb", WRITERS)
def test_the_output_is_the_input(source: Path, verb: str) -> None:
    refused(verb, source, source, "E-USE-06")
    refused(verb, source, source / "." / "..", "E-USE-06")


@pytest.mark.parametrize("verb", WRITERS)
def test_the_input_is_inside_the_output(source: Path, verb: str) -> None:
    refused(verb, source, source.parent, "E-USE-06")
    refused(verb, source, source.parent.parent, "E-USE-06")


@pytest.mark.parametrize("verb", WRITERS)
def test_the_input_is_a_link_into_the_output(source: Path, verb: str) -> None:
    other = source.parent.parent / "other"
    other.symlink_to(source)
    refused(verb, other, source / "out", "E-USE-06")


@pytest.mark.parametrize("verb", WRITERS)
def test_a_shard_in_the_output(source: Path, tmp_path: Path, verb: str) -> None:
    """In a hub cache the weights are links to files elsewhere. The output must not replace these."""
    blobs = tmp_path / "home" / "blobs"
    blobs.mkdir()
    weights = source / "transformer" / WEIGHTS
    weights.rename(blobs / "b10b")
    weights.symlink_to(blobs / "b10b")
    refused(verb, source, blobs, "E-USE-03")
    VERBS[verb](source, tmp_path / "home" / "out")
    assert (blobs / "b10b").is_file()


@pytest.mark.parametrize("verb", WRITERS)
def test_a_parent_of_the_output_is_a_file(source: Path, verb: str) -> None:
    (source.parent / "file").write_text("keep")
    refused(verb, source, source.parent / "file" / "out", "E-ENV-02")


@pytest.mark.parametrize("verb", WRITERS)
def test_the_folder_for_the_unfinished_output_exists(source: Path, verb: str) -> None:
    partial = source.parent / ".out.partial"
    full_folder(partial)
    refused(verb, source, source.parent / "out", "E-USE-03")
    assert (partial / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_no_name(source: Path, monkeypatch: pytest.MonkeyPatch, verb: str, name: str) -> None:
    monkeypatch.chdir(source.parent)
    with pytest.raises(AscenditError) as e:
        VERBS[verb](source, Path(name))
    assert e.value.code in ("E-USE-01", "E-USE-03", "E-USE-06")
    assert [path.name for path in source.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("target", ["vae", "tokenizer"])
def test_a_component_with_a_dangling_link(source: Path, verb: str, target: str) -> None:
    """Linked folders are not inspected; copied ones are."""
    from ascendit.convert.quantize import quantize
    from ascendit.convert.repack import repack

    (source / target / "extra").symlink_to("nowhere")
    (source / target / "again").symlink_to(".")
    before = snapshot(source.parent)
    with pytest.raises(AscenditError) as e:
        if verb == "repack":
            repack(source, source.parent / "out", copy=True)
        else:
            quantize(source, source.parent / "out", scheme="mxfp8", copy=True)
    assert e.value.code == "E-CKP-03"
    assert snapshot(source.parent) == before


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"[red]x", b"-rf", b" "])
def test_unusual_names_are_accepted(source: Path, verb: str, name: bytes) -> None:
    """Not UTF-8, or special to a shell or a console."""
    renamed = source.parent / os.fsdecode(name)
    source.rename(renamed)
    VERBS[verb](renamed, source.parent / "out")
    VERBS["inspect"](source.parent / "out", source)
    (source.parent / "out").rename(source.parent / "out2")
    VERBS[verb](renamed, Path(f"{renamed}-out"))


# ---- a full disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", WRITERS)
def test_too_little_disk_space(source: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setattr("ascendit.checkpoint.file_copy.available_bytes", lambda path: 1000)
    error = refused(verb, source, source.parent / "out", "E-ENV-04")
    assert isinstance(error, EnvironmentProblem)
    assert "1,000" in error.got


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_disk_that_fills_up(source: Path, monkeypatch: pytest.MonkeyPatch, verb: str, after: int) -> None:
    """Writes fail after `after` calls; the run ends in the same way whichever call fails."""
    calls = 0

    def filling(real: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: object, **options: object) -> int:
            nonlocal calls
            calls += 1
            if calls > after:
                raise OSError(28, os.strerror(28))
            return real(*arguments, **options)

        return call

    monkeypatch.setattr("ascendit.checkpoint.writer.reserve", lambda fd, count: None)
    for name in ("pwrite", "pwritev", "copy_file_range", "sendfile"):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, filling(getattr(os, name)))
    refused(verb, source, source.parent / "out", "E-ENV-04")
    assert calls > after


# ---- permissions -------------------------------------------------------------------------------------------

not_root = pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")


@not_root
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", f"transformer/{WEIGHTS}"])
def test_a_file_without_read_permission(source: Path, tmp_path: Path, verb: str, name: str) -> None:
    (source / name).chmod(0)
    try:
        with pytest.raises(AscenditError) as e:
            VERBS[verb](source, tmp_path / "out")
        assert e.value.code in ("E-CKP-02", "E-CKP-06")
    finally:
        (source / name).chmod(0o644)


@not_root
@pytest.mark.parametrize("verb", WRITERS)
def test_a_folder_without_write_permission(source: Path, verb: str) -> None:
    source.parent.chmod(0o500)
    try:
        refused(verb, source, source.parent / "out", "E-ENV-02")
    finally:
        source.parent.chmod(0o700)


# ---- changes during the run ---------------------------------------------------------------------------


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("change", ["truncated", "gone"])
def test_a_source_that_changes_while_it_is_read(
    source: Path, monkeypatch: pytest.MonkeyPatch, verb: str, change: str
) -> None:
    """After its header was read. There is no output, and the error is an ascendit error."""
    from ascendit.checkpoint import output_folder

    weights = source / "transformer_2" / WEIGHTS
    real = output_folder.Staging.__enter__

    def enter(self: output_folder.Staging) -> output_folder.Staging:
        if change == "gone":
            weights.unlink()
        else:
            os.truncate(weights, weights.stat().st_size // 2)
        return real(self)

    monkeypatch.setattr(output_folder.Staging, "__enter__", enter)
    with pytest.raises(AscenditError) as e:
        VERBS[verb](source, source.parent / "out")
    assert e.value.code == "E-CKP-02"
    assert [path.name for path in source.parent.iterdir()] == ["model"]


def test_a_broken_lora_leaves_no_output(source: Path, tmp_path: Path) -> None:
    from ascendit.convert.quantize import quantize

    lora = tmp_path / "lora.safetensors"
    save(lora, {"diffusion_model.blocks.0.self_attn.q.diff": ("F32", (64, 64), b"\xff" * 4 * 64 * 64)})
    before = snapshot(tmp_path)
    for extra in ((lora,), (lora, tmp_path / "none.safetensors")):
        with pytest.raises(AscenditError) as e:
            quantize(source, source.parent / "out", scheme="mxfp8", loras=[str(path) for path in extra])
        assert e.value.code == ("E-LRA-01" if len(extra) == 1 else "E-USE-02")
        assert snapshot(tmp_path) == before


def test_a_base_of_another_model_leaves_no_output(source: Path, tmp_path: Path) -> None:
    from ascendit.convert.repack import repack

    other = tmp_path / "other"
    other.mkdir()
    quantized("mxfp8")(other)
    before = snapshot(tmp_path)
    for base, code in ((other, "E-USE-01"), (source, "E-CKP-04"), (tmp_path / "none", "E-USE-02")):
        with pytest.raises(AscenditError) as e:
            repack(other, tmp_path / "out", base=base)
        assert e.value.code == code
        assert snapshot(tmp_path) == before
