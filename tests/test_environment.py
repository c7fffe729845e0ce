"""Environment variables of other Ascend tools."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

import ascendit
from ascendit import environment
from ascendit.errors import UsageError
from ascendit.pipeline.options import VARIABLES


def read(environ):
    """(options that the variables set, notes)."""
    return environment.read_environment(VARIABLES, environ)


def test_nothing_set():
    assert read({}) == ({}, ())


@pytest.mark.parametrize(
    ("value", "text_on"), [("1", "cpu"), ("true", "cpu"), ("0", None), ("", None), ("False", None)]
)
def test_t5_load_cpu(value, text_on):
    options, notes = read({"T5_LOAD_CPU": value})
    assert options == ({} if text_on is None else {"text_on": text_on})
    assert ("--text-on device overrides it" in "".join(notes)) is (text_on is not None)


def test_a_bad_value():
    with pytest.raises(UsageError) as e:
        read({"T5_LOAD_CPU": "maybe"})
    assert e.value.code == "E-USE-01" and "T5_LOAD_CPU='maybe'" in e.value.got and "0 or 1" in e.value.needs


def test_precision_has_no_effect():
    options, (note,) = read({"PRECISION": "1"})
    assert note == "PRECISION=1: no effect, noise is always drawn on the CPU" and options == {}


def test_unsupported_variables_are_reported():
    options, (note,) = read({"OVERLAP": "1"})
    assert note.startswith("OVERLAP=1: not used by this version") and options == {}


def test_heads_in_one_call():
    options, (note,) = read({"USE_SUB_HEAD": "4"})
    assert options == {"sub_head": 4}
    assert note == "USE_SUB_HEAD=4: heads of self-attention in one call: 4 (--sub-head overrides it)"
    assert read({"USE_SUB_HEAD": "0"}) == read({"USE_SUB_HEAD": ""}) == ({}, ())
    with pytest.raises(UsageError, match="USE_SUB_HEAD='all'") as e:
        read({"USE_SUB_HEAD": "all"})
    assert e.value.code == "E-USE-01" and "unset USE_SUB_HEAD" in e.value.fix


def test_fast_layernorm():
    options, notes = read({"FAST_LAYERNORM": "1"})
    assert options == {"fast_layernorm": True} and "--set fast_layernorm=false" in "".join(notes)
    assert read({"FAST_LAYERNORM": "0"}) == ({}, ())


def test_variables_that_are_set_are_unchanged(monkeypatch):
    monkeypatch.setenv("ONE_OF_THEM", "mine")
    monkeypatch.setenv("ANOTHER", "")
    assert environment.set_missing({"ONE_OF_THEM": "ours", "ANOTHER": "ours"}) == {"ONE_OF_THEM": "mine"}
    assert os.environ["ONE_OF_THEM"] == "mine" and os.environ["ANOTHER"] == "ours"


def test_device_plugins_are_switched_off(monkeypatch):
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    environment.disable_device_plugins()
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"


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
        if path == root / "environment.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
                raise AssertionError(f"{path}:{node.lineno} reads the environment")


def test_algo_selects_an_npu_kernel():
    options = [read({"ALGO": n})[0] for n in ("0", "1", "3", "2", "")]
    assert options == [{}, {"attention": "self=laser"}, {"attention": "self=fused_infer"}, {}, {}]
    assert "attention self=fused_infer on an NPU" in read({"ALGO": "3"})[1][0]
    assert "ALGO=0: the default attention kernels" in read({"ALGO": "0"})[1][0]
    assert "ALGO=2: not used by this version, which supports 0, 1, 3" in read({"ALGO": "2"})[1][0]
