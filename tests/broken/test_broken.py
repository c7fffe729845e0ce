"""Each broken model and verb: an ascendit error with its code, the input untouched, no output left."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from broken import make
from broken.cases_header import RAWS
from broken.models import MODELS
from broken.registry import CASES

from ascendit.convert.quantize import quantize
from ascendit.convert.repack import repack
from ascendit.errors import AscenditError, UsageError
from ascendit.inspect.checkpoint import inspect

Build = Callable[[str], tuple[Path, dict[str, str]]]


def look(path: Path, out: Path) -> None:
    """`inspect` lists the faults of a recognised model in its report; raise the first."""
    for problem in inspect(path).problems:
        raise problem


VERBS: dict[str, Callable[[Path, Path], object]] = {
    "inspect": look,
    "repack": repack,
    "quantize": lambda source, out: quantize(source, out, scheme="mxfp8"),
}


def snapshot(folder: Path) -> dict[str, str]:
    """Content of every file, folder and link."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            contents[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            contents[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            contents[name] = "folder"
    return contents


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each complete model, written once."""
    root = tmp_path_factory.mktemp("models")
    for name, write in MODELS.items():
        (root / name).mkdir()
        write(root / name)
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Build:
    """`build(case)`: the verbs' input path and a snapshot of its folder; built once for all verbs."""
    root = tmp_path_factory.mktemp("broken")
    built: dict[str, tuple[Path, dict[str, str]]] = {}

    def build_once(name: str) -> tuple[Path, dict[str, str]]:
        if name not in built:
            case = CASES[name]
            source = case.build(root / name, models.get(case.base))
            built[name] = (source, snapshot(root / name))
        return built[name]

    return build_once


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", CASES)
def test_broken(build: Build, tmp_path: Path, name: str, verb: str) -> None:
    source, before = build(name)
    code = CASES[name].expected(verb)
    root = next(path for path in (source, *source.parents) if path.name == name)
    if code:
        with pytest.raises(AscenditError) as e:
            VERBS[verb](source, tmp_path / "out")
        assert e.value.code == code, e.value
        assert e.value.got and e.value.needs and e.value.fix
        assert list(tmp_path.iterdir()) == []
    else:
        VERBS[verb](source, tmp_path / "out")
    assert snapshot(root) == before


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", MODELS)
def test_the_models_are_valid_before_they_are_broken(
    models: dict[str, Path], tmp_path: Path, name: str, verb: str
) -> None:
    """Otherwise the errors above would prove little."""
    if verb == "quantize" and name in ("mxfp8", "int8", "dualscale", "export"):
        with pytest.raises(UsageError, match="is already quantized"):
            VERBS[verb](models[name], tmp_path / "out")
        return
    before = snapshot(models[name])
    VERBS[verb](models[name], tmp_path / "out")
    assert snapshot(models[name]) == before
    if verb != "inspect":
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        look(tmp_path / "out", tmp_path)


def test_the_committed_files_match_the_registry() -> None:
    """`python -m broken.make --committed` writes them."""
    assert make.README.read_text(encoding="utf-8") == make.table()
    committed = {path.name: path.read_bytes() for path in make.RAW.iterdir()}
    assert committed == {f"{name}.safetensors": data for name, (_, data) in RAWS.items()}
