"""Starting an NPU, on a torch_npu that only remembers what it was told."""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any

import pytest
import torch

from ascendit.device import npu_settings
from ascendit.device.backends import Device, open_device
from ascendit.device.npu import CHIPS
from ascendit.errors import EnvironmentProblem


class FakeNpu(types.SimpleNamespace):
    """torch.npu of a machine with `count` cards of one SoC number."""

    def __init__(self, soc: int = 260, count: int = 2):
        off = types.SimpleNamespace
        super().__init__(
            config=off(allow_internal_format=None), matmul=off(allow_hf32=None), conv=off(allow_hf32=None)
        )
        self.soc, self.count = soc, count
        self.told: list[Any] = []

    def get_soc_version(self) -> int:
        return self.soc

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        self.told.append(f"set_device {index}")

    def set_compile_mode(self, **given: Any) -> None:
        self.told.append(given)


@pytest.fixture
def npu(monkeypatch):
    """A fake torch_npu; variables and modules are put back."""
    for v in npu_settings.VARIABLES:
        monkeypatch.setenv(v.name, "")
    fake = FakeNpu()
    module = types.ModuleType("torch_npu")
    vars(module)["npu"] = fake
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setitem(sys.modules, "mindiesd", None)
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    return fake


def test_every_setting_is_applied_and_told(npu, caplog):
    with caplog.at_level("INFO", logger="ascendit"):
        device = open_device("npu:1")
    assert device == Device("npu", 1, "a5")
    assert npu.told == [{"jit_compile": False}, "set_device 1"]
    assert npu.config.allow_internal_format is npu.matmul.allow_hf32 is npu.conv.allow_hf32 is False
    for v in npu_settings.VARIABLES:
        assert os.environ[v.name] == v.value and f"{v.name}={v.value}: {v.why}" in caplog.text
    for s in npu_settings.SETTINGS:
        assert f"torch.npu: {s.path}={s.value}: {s.why}" in caplog.text
    assert "npu:1: Atlas 350 (Ascend 950), chip a5" in caplog.text


def test_an_open_device_is_not_started_again(npu):
    device = open_device("npu")
    told = list(npu.told)
    assert open_device(device) == device and npu.told == told


def test_variables_of_the_user_stay(npu, monkeypatch, caplog):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "0")
    with caplog.at_level("INFO", logger="ascendit"):
        npu_settings.set_variables()
    assert os.environ["TASK_QUEUE_ENABLE"] == "0" and "TASK_QUEUE_ENABLE=0: kept as it was set" in caplog.text


def test_variables_are_set_before_torch_npu_is_imported(npu, monkeypatch):
    seen = {}

    def look() -> Any:
        seen.update({v.name: os.environ[v.name] for v in npu_settings.VARIABLES})
        return types.SimpleNamespace(npu=npu)

    monkeypatch.setattr(npu_settings, "import_torch_npu", look)
    npu_settings.start(Device("npu"))
    assert seen == {v.name: v.value for v in npu_settings.VARIABLES}


def test_a_torch_npu_without_a_setting_is_told(caplog):
    npu_settings.apply(types.SimpleNamespace())
    assert "torch.npu.conv.allow_hf32: this torch_npu does not have it" in caplog.text
    assert "torch.npu.set_compile_mode" in caplog.text


@pytest.mark.parametrize(("soc", "chip"), [(220, "a2"), (225, "a2"), (250, "a3"), (255, "a3"), (260, "a5")])
def test_chips_by_their_number(soc, chip):
    assert npu_settings.find_chip(FakeNpu(soc)) is CHIPS[chip]


def test_a_chip_that_wan_does_not_run_on():
    with pytest.raises(EnvironmentProblem) as e:
        npu_settings.find_chip(FakeNpu(204))
    assert e.value.got == "an NPU with SoC number 204" and "Ascend 950" in e.value.needs


def test_no_such_card(npu):
    with pytest.raises(EnvironmentProblem, match="npu:2: this machine has 2 of them"):
        open_device("npu:2")


def test_torch_npu_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    for v in npu_settings.VARIABLES:
        monkeypatch.setenv(v.name, "x")
    with pytest.raises(EnvironmentProblem, match="is not installed") as e:
        open_device("npu")
    assert e.value.code == "E-ENV-03" and "twin:a5" in e.value.fix


@pytest.mark.parametrize(
    "error",
    [ImportError("libhccl.so: cannot open shared object file"), OSError("libascendcl.so"), RuntimeError()],
)
def test_cann_is_absent(monkeypatch, error):
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(EnvironmentProblem, match="torch_npu cannot be imported") as e:
        npu_settings.import_torch_npu()
    assert "source /usr/local/Ascend/ascend-toolkit/set_env.sh" in e.value.fix


def test_mindiesd_is_optional(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mindiesd", None)
    with caplog.at_level("INFO", logger="ascendit"):
        npu_settings.load_mindiesd()
        monkeypatch.setitem(sys.modules, "mindiesd", types.SimpleNamespace(__version__="3.1.0"))
        npu_settings.load_mindiesd()
        monkeypatch.delitem(sys.modules, "mindiesd")
        monkeypatch.setattr(importlib, "import_module", _no_einops)
        npu_settings.load_mindiesd()
    assert "MindIE-SD is not installed" in caplog.text and "MindIE-SD 3.1.0" in caplog.text
    assert "No module named 'einops'" in caplog.text


def _no_einops(name: str) -> Any:
    raise ModuleNotFoundError("No module named 'einops'", name="einops")
