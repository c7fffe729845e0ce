"""The public names. A commit that adds or removes one changes this file."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ascendit

REPO = Path(__file__).resolve().parents[1]

PUBLIC = [
    "AscenditError",
    "GenerateRequest",
    "Pipeline",
    "Video",
    "__version__",
    "contact_sheet",
    "inspect",
    "load",
    "quantize",
    "quantize_",
    "repack",
]


def test_public_names() -> None:
    assert ascendit.__all__ == PUBLIC == sorted(PUBLIC)
    assert sorted(dir(ascendit)) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves(name: str) -> None:
    value = getattr(ascendit, name)
    assert isinstance(value, str) or callable(value)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'ascendit' has no attribute 'nothing'"):
        _ = ascendit.nothing


def test_star_import_exports_the_public_names() -> None:
    code = "from ascendit import *\nprint(*sorted(n for n in dir() if n[:2] != '__' or n == '__version__'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == PUBLIC, done.stderr


def test_the_version_is_consistent() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ascendit.__version__ == project["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", ascendit.__version__)
    try:
        installed = importlib.metadata.version("ascendit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ascendit is on the path, not installed")
    assert installed == project["version"]


def test_the_package_has_py_typed() -> None:
    assert (Path(ascendit.__file__).parent / "py.typed").is_file()


def test_a_renamed_module_is_still_found() -> None:
    with pytest.warns(DeprecationWarning, match="ascendit.family"):
        from ascendit import spec
    assert spec is importlib.import_module("ascendit.family")
