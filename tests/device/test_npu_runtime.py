"""Environment variables, settings and chip of an NPU, with a fake torch.npu."""

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
    """Every variable is empty; pytest restores them."""
    for v in npu_runtime.VARIABLES:
        monkeypatch.setenv(v.name, "")


def test_variables_set_by_the_user_are_not_changed(variables, monkeypatch, caplog):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "0")
    with caplog.at_level("INFO", logger="ascendit"):
        npu_runtime.set_variables()
    assert os.environ["TASK_QUEUE_ENABLE"] == "0" and "TASK_QUEUE_ENABLE=0: set by the user" in caplog.text


def test_a_setting_that_torch_npu_lacks_is_logged(caplog):
    npu_runtime.apply(types.SimpleNamespace())
    assert "torch.npu.conv.allow_hf32: this torch_npu does not have it" in caplog.text
    assert "torch.npu.set_compile_mode" in caplog.text


def fake_npu(soc: int) -> Any:
    """A fake torch.npu with a SoC number."""
    return types.SimpleNamespace(get_soc_version=lambda: soc)


@pytest.mark.parametrize(("soc", "chip"), [(220, "a2"), (225, "a2"), (250, "a3"), (255, "a3"), (260, "a5")])
def test_chips_by_soc_number(soc, chip):
    assert npu_runtime.find_chip(fake_npu(soc)) is CHIPS[chip]


def test_an_unsupported_chip_is_refused():
    with pytest.raises(EnvironmentProblem) as e:
        npu_runtime.find_chip(fake_npu(204))
    assert e.value.got == "an NPU with SoC number 204" and "Ascend 950" in e.value.needs


@pytest.mark.parametrize(
    "error",
    [ImportError("libhccl.so: cannot open shared object file"), OSError("libascendcl.so"), RuntimeError()],
)
def test_missing_cann_is_reported(monkeypatch, error):
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
