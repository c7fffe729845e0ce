"""Compiling on first use: cached, shared by processes, and a failure is never an error."""

from __future__ import annotations

import ctypes
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import pytest

from ascendit.native import build

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, build.COMPILERS)), reason="no C++ compiler on this machine"
)


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty caches on disk and in memory."""
    monkeypatch.setattr(build, "CACHE", tmp_path / "cache")
    build.native.cache_clear()
    yield
    build.native.cache_clear()


@pytest.fixture
def unoptimized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the encoder takes seconds, mostly for optimization, which these tests do not need."""
    assert "-O3" in build.FLAGS
    monkeypatch.setattr(build, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS))


@needs_compiler
def test_compiled_once_and_then_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build.native("elementwise")
    assert isinstance(built.library, ctypes.CDLL) and built.reason == "compiled from native/elementwise.cpp"
    files = list((tmp_path / "cache").glob("*.so"))
    assert len(files) == 1 and files[0].name.startswith("elementwise-")
    build.native.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *a: pytest.fail("compiled again"))
    assert build.native("elementwise").library is not None


@needs_compiler
@pytest.mark.usefixtures("unoptimized")
def test_the_reason_names_the_instruction_set() -> None:
    labels = ("AVX-512", "AVX2", "NEON", "plain C++")
    assert build.native("encode").reason in [f"compiled from native/encode.cpp, {label}" for label in labels]


@needs_compiler
@pytest.mark.usefixtures("unoptimized")
def test_a_changed_header_gives_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.native("encode")
    shutil.copytree(build.SOURCES, tmp_path / "src", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    header = tmp_path / "src" / "floats.h"
    header.write_text(header.read_text() + "// changed\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "src")
    build.native.cache_clear()
    assert build.native("encode").library is not None
    assert len(list((tmp_path / "cache").glob("*.so"))) == 2


@needs_compiler
@pytest.mark.usefixtures("unoptimized")
def test_flags_unsupported_by_the_compiler_are_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as OpenMP. The results are the same, see `tests/mx/test_encoder.py`."""
    monkeypatch.setattr(build, "OPTIONAL_FLAGS", (("-fno-such-flag", "-fopenmp"), ("-march=native",)))
    built = build.native("encode")
    assert built.library is not None and not hasattr(built.library, "omp_get_max_threads")


def test_sources_and_headers_are_in_the_package() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["ascendit"]
    for path in build.SOURCES.iterdir():
        if path.suffix not in (".py", "") and path.name != "__pycache__":
            assert any(PurePath(f"native/{path.name}").match(pattern) for pattern in patterns), path.name


@needs_compiler
def test_a_changed_source_gives_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.native("elementwise")
    (tmp_path / "src").mkdir()
    text = (build.SOURCES / "elementwise.cpp").read_text()
    (tmp_path / "src/elementwise.cpp").write_text(text + "// changed\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "src")
    build.native.cache_clear()
    assert build.native("elementwise").library is not None
    assert len(list((tmp_path / "cache").glob("*.so"))) == 2


def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr("shutil.which", lambda name: None)
    return "no C++ compiler"


def old_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr(build, "processor_flags", lambda: frozenset({"sse2"}))
    return "this processor has no avx512_bf16"


def broken_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    (tmp_path / "attention.cpp").write_text("this is not C++")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "processor_flags", lambda: build.REQUIRED_FEATURES["attention"])
    return "failed"


def closed_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build, "CACHE", tmp_path / "file" / "cache")
    monkeypatch.setattr(build, "temporary_folder", lambda: tmp_path / "file" / "temporary")
    monkeypatch.setattr(build, "processor_flags", lambda: build.REQUIRED_FEATURES["attention"])
    return "File exists"


@pytest.mark.parametrize("problem", [no_compiler, old_processor, broken_source, closed_folders])
def test_a_problem_is_a_reason_and_not_an_error(
    problem: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if problem in (broken_source, closed_folders) and not any(map(shutil.which, build.COMPILERS)):
        pytest.skip("no C++ compiler on this machine")
    text = problem(monkeypatch, tmp_path)
    if problem is no_compiler:
        monkeypatch.setattr(build, "processor_flags", lambda: build.REQUIRED_FEATURES["attention"])
    with caplog.at_level("INFO", logger="ascendit"):
        built, again = build.native("attention"), build.native("attention")
    assert built.library is None and text in built.reason and again is built
    messages = [r.getMessage() for r in caplog.records if "is not used" in r.getMessage()]
    assert len(messages) == 1 and "PyTorch path runs instead" in messages[0]


def test_without_a_library_the_pytorch_kernels_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascendit.kernels.cpu import attention, linear, qk_int8
    from ascendit.ops.operators import bind

    for module in (linear, qk_int8):  # theirs are cached: what other tests get must not change
        monkeypatch.setattr(module, "library", module.library.__wrapped__)
    monkeypatch.setattr("shutil.which", lambda name: None)
    ops = bind("cpu")
    assert ops.attention is attention.attention and ops.choices["attention"] == "cpu: fused PyTorch kernel"
