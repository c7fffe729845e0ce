"""The environment variables that Ascend users know."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ascendit
from ascendit.device import environment
from ascendit.errors import UsageError


def test_nothing_set():
    assert environment.read_environment({}) == environment.EnvironmentOptions(text_on=None, notes=())


@pytest.mark.parametrize(
    ("value", "text_on"), [("1", "cpu"), ("true", "cpu"), ("0", None), ("", None), ("False", None)]
)
def test_t5_load_cpu(value, text_on):
    found = environment.read_environment({"T5_LOAD_CPU": value})
    assert found.text_on == text_on
    assert ("--text-on device overrides it" in "".join(found.notes)) is (text_on is not None)


def test_a_bad_value():
    with pytest.raises(UsageError) as e:
        environment.read_environment({"T5_LOAD_CPU": "maybe"})
    assert e.value.code == "E-USE-01" and "T5_LOAD_CPU='maybe'" in e.value.got and "0 or 1" in e.value.needs


def test_precision_needs_nothing():
    (note,) = environment.read_environment({"PRECISION": "1"}).notes
    assert note == "PRECISION=1: nothing left to do, noise is always drawn on the CPU"


@pytest.mark.parametrize("name", ["ALGO", "FAST_LAYERNORM", "USE_SUB_HEAD", "OVERLAP"])
def test_the_others_say_that_they_do_nothing(name):
    (note,) = environment.read_environment({name: "1"}).notes
    assert note.startswith(f"{name}=1: not used by this version")


def test_toolkit_and_libraries():
    assert environment.toolkit_folder({}) is None
    assert environment.toolkit_folder({"ASCEND_TOOLKIT_HOME": "/a"}) == Path("/a")
    assert environment.toolkit_folder({"ASCEND_TOOLKIT_HOME": "/a", "ASCEND_HOME_PATH": "/b"}) == Path("/b")
    assert environment.library_folders({"LD_LIBRARY_PATH": "/a::/b"}) == (Path("/a"), Path("/b"))


def test_a_child_without_device_plugins(monkeypatch):
    monkeypatch.setenv("SOMETHING", "x")
    env = environment.without_device_plugins()
    assert env["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0" and env["SOMETHING"] == "x"


def test_no_other_module_reads_the_environment():
    root = Path(ascendit.__file__).parent
    for path in root.rglob("*.py"):
        if path.name == "environment.py" and path.parent.name == "device":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
                raise AssertionError(f"{path}:{node.lineno} reads the environment")
