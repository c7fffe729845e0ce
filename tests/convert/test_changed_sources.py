"""`quantize` and `repack` publish nothing if a source changes, or their unfinished output is removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from changes import replace, write_in_place
from convert.models import read, same, write_model
from safetensors.torch import save_file

from ascendit.convert.quantize import quantize
from ascendit.convert.repack import repack
from ascendit.errors import AscenditError, CheckpointError, EnvironmentProblem, UsageError
from ascendit.progress import Progress

WEIGHTS = "diffusion_pytorch_model.safetensors"
Change = Callable[[Path], Any]


def in_second_expert(change: Callable[[], Any]) -> Callable[[Progress], None]:
    """A callback that calls `change` once, in the middle of the second expert."""
    pending = [change]

    def on_progress(event: Progress) -> None:
        if event.stage == "transformer_2" and pending:
            pending.pop()()

    return on_progress


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return write_model(tmp_path / "model")


CHANGES: dict[str, Change] = {
    "second expert": lambda m: replace(m / "transformer_2" / WEIGHTS),
    "first expert": lambda m: write_in_place(m / "transformer" / WEIGHTS),
    "config": lambda m: replace(m / "transformer" / "config.json"),
    "index": lambda m: (m / "model_index.json").write_text("{}"),
    "licence": lambda m: (m / "LICENSE.txt").write_text("other"),
    "linked part": lambda m: replace(m / "text_encoder" / "model.safetensors"),
    "file added to a part": lambda m: (m / "vae" / "new.json").write_text("{}"),
    "removed": lambda m: (m / "transformer" / WEIGHTS).unlink(),
}


@pytest.mark.parametrize("run", [quantize, repack])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_source_that_changes(change: Change, run: Any, model: Path, tmp_path: Path) -> None:
    options = {"scheme": "int8"} if run is quantize else {}
    with pytest.raises(CheckpointError, match="changed") as e:
        run(model, tmp_path / "out", on_progress=in_second_expert(lambda: change(model)), **options)
    assert e.value.code == "E-CKP-02" and os.listdir(tmp_path) == ["model"]


def test_other_files_of_the_folder_may_change(model: Path, tmp_path: Path) -> None:
    on_progress = in_second_expert(lambda: (model / "run.log").write_text("a line"))
    quantize(model, tmp_path / "out", scheme="int8", on_progress=on_progress)
    assert (tmp_path / "out").is_dir() and not (tmp_path / "out" / "run.log").exists()


def test_a_recipe_a_lora_and_a_base(model: Path, tmp_path: Path) -> None:
    recipe, lora = tmp_path / "r.toml", tmp_path / "l.safetensors"
    recipe.write_text('name = "x"\nabout = "x"\n[[rules]]\nlayers = ["*"]\nscheme = "int8"\n')
    factors = {"A": torch.ones(2, 64), "B": torch.ones(64, 2)}
    save_file({f"blocks.0.attn1.to_q.lora_{k}.weight": x for k, x in factors.items()}, lora)
    for path in (recipe, lora):
        with pytest.raises(CheckpointError, match="changed"):
            on_progress = in_second_expert(lambda path=path: replace(path))  # type: ignore[misc]
            quantize(model, tmp_path / "o", recipe=str(recipe), loras=[str(lora)], on_progress=on_progress)
    (tmp_path / "base").mkdir()
    base = write_model(tmp_path / "base")
    with pytest.raises(CheckpointError, match="1 source file changed"):
        on_progress = in_second_expert(lambda: replace(base / "vae" / "config.json"))
        repack(model, tmp_path / "o", base=base, on_progress=on_progress)


# ---- resumed runs -------------------------------------------------------------------------------


def interrupted(model: Path, out: Path, **options: Any) -> Path:
    """The unfinished output of a run that was stopped in the second expert."""

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, scheme="int8", on_progress=in_second_expert(stop), **options)
    return out.with_name(f".{out.name}.partial") / out.name


def test_resume_reads_finished_files_with_a_hash_again(model: Path, tmp_path: Path) -> None:
    staged = interrupted(model, tmp_path / "out", hash=True)
    write_in_place(staged / "transformer" / WEIGHTS)
    quantize(model, tmp_path / "out", scheme="int8", hash=True, resume=True)
    quantize(model, tmp_path / "fresh", scheme="int8")
    new, fresh = (read(tmp_path / name / "transformer") for name in ("out", "fresh"))
    assert all(same(tensor, fresh[name]) for name, tensor in new.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: write_in_place(m / "transformer" / WEIGHTS),
        lambda m: replace(m / "transformer_2" / WEIGHTS),
        lambda m: write_in_place(m / "text_encoder" / "model.safetensors"),
        lambda m: write_in_place(m / "LICENSE.txt"),
    ],
    ids=["in place", "replaced", "copied part", "licence"],
)
def test_resume_refuses_another_source(change: Change, model: Path, tmp_path: Path) -> None:
    interrupted(model, tmp_path / "out", copy=True)
    change(model)
    with pytest.raises(UsageError, match="from a run with another source"):
        quantize(model, tmp_path / "out", scheme="int8", copy=True, resume=True)


# ---- the unfinished output ----------------------------------------------------------------------


def make_again(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder / "out" / "transformer_2").mkdir(parents=True)


@pytest.mark.parametrize("run", [quantize, repack])
@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda folder: shutil.rmtree(folder / "out"),
        make_again,
        lambda folder: (folder / "out" / "transformer" / WEIGHTS).unlink(),
    ],
    ids=["all", "inner folder", "made again", "one file"],
)
def test_output_that_is_removed_during_the_run(damage: Change, run: Any, model: Path, tmp_path: Path) -> None:
    options = {"scheme": "int8"} if run is quantize else {}
    on_progress = in_second_expert(lambda: damage(tmp_path / ".out.partial"))
    with pytest.raises(AscenditError, match="removed") as e:
        run(model, tmp_path / "out", on_progress=on_progress, **options)
    assert isinstance(e.value, EnvironmentProblem) and e.value.code == "E-ENV-02"
    assert not (tmp_path / "out").exists()
