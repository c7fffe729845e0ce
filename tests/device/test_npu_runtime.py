"""What an NPU is started with, on a torch.npu that only remembers what it was told."""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any

import pytest

from ascendit.device import npu_runtime
from ascendit.device.chip import CHIPS
from ascendit.errors import EnvironmentProblem


@pytest.fixture
def variables(monkeypatch):
    """None of them is set, and what is set is put back."""
    for v in npu_runtime.VARIABLES:
        monkeypatch.setenv(v.name, "")


def test_variables_of_the_user_stay(variables, monkeypatch, caplog):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "0")
    with caplog.at_level("INFO", logger="ascendit"):
        npu_runtime.set_variables()
    assert os.environ["TASK_QUEUE_ENABLE"] == "0" and "TASK_QUEUE_ENABLE=0: set by the user" in caplog.text


def test_a_torch_npu_without_a_setting_is_told(caplog):
    npu_runtime.apply(types.SimpleNamespace())
    assert "torch.npu.conv.allow_hf32: this torch_npu does not have it" in caplog.text
    assert "torch.npu.set_compile_mode" in caplog.text


def soc_number(soc: int) -> Any:
    """torch.npu as far as `find_chip` needs it."""
    return types.SimpleNamespace(get_soc_version=lambda: soc)


@pytest.mark.parametrize(("soc", "chip"), [(220, "a2"), (225, "a2"), (250, "a3"), (255, "a3"), (260, "a5")])
def test_chips_by_their_number(soc, chip):
    assert npu_runtime.find_chip(soc_number(soc)) is CHIPS[chip]


def test_a_chip_that_wan_does_not_run_on():
    with pytest.raises(EnvironmentProblem) as e:
        npu_runtime.find_chip(soc_number(204))
    assert e.value.got == "an NPU with SoC number 204" and "Ascend 950" in e.value.needs


@pytest.mark.parametrize(
    "error",
    [ImportError("libhccl.so: cannot open shared object file"), OSError("libascendcl.so"), RuntimeError()],
)
def test_cann_is_absent(monkeypatch, error):
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(EnvironmentProblem, match="torch_npu cannot be imported") as e:
        npu_runtime.import_torch_npu()
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in e.value.fix


def test_mindiesd_is_optional(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mindiesd", None)
    with caplog.at_level("INFO", logger="ascendit"):
        npu_runtime.load_mindiesd()
        monkeypatch.setitem(sys.modules, "mindiesd", types.SimpleNamespace(__version__="3.1.0"))
        npu_runtime.load_mindiesd()
        monkeypatch.delitem(sys.modules, "mindiesd")
        monkeypatch.setattr(importlib, "import_module", _no_einops)
        npu_runtime.load_mindiesd()
    assert "MindIE-SD is not installed" in caplog.text and "MindIE-SD 3.1.0" in caplog.text
    assert "No module named 'einops'" in caplog.text


def _no_einops(name: str) -> Any:
    raise ModuleNotFoundError("No module named 'einops'", name="einops")
