"""Opening, activating and synchronizing devices; NPUs with a fake torch_npu."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import ascendit.twin
from ascendit.device import npu_runtime
from ascendit.device.device import Device, parse_device
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.native.build import processor_name
from ascendit.ops.open_device import (
    activate,
    check_index,
    hardware_name,
    hide_torch_npu,
    internal_format,
    memory_bytes,
    open_device,
    show_torch_npu,
    synchronize,
    to_dtype,
)
from ascendit.twin import STATE


def test_a_missing_cuda_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="reports no CUDA device") as e:
        open_device("cuda:1")
    assert e.value.code == "E-ENV-03"


def test_an_index_beyond_the_devices_is_refused():
    check_index(Device("cuda", 1), 2)
    with pytest.raises(EnvironmentProblem) as e:
        check_index(Device("npu", 2), 2)
    assert (
        e.value.got == "device npu:2: this machine has 2 such devices" and e.value.needs == "npu:0 to npu:1"
    )
    with pytest.raises(EnvironmentProblem, match="has 0 such devices"):
        check_index(Device("npu"), 0)


def test_the_hardware_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA H200 number {index}")
    assert hardware_name(Device("cuda", 1)) == "NVIDIA H200 number 1"
    assert hardware_name(Device("twin", chip="a5")) == hardware_name(Device("cpu")) == processor_name()
    monkeypatch.setattr(
        Path, "read_text", lambda file: "flags\t: a b\nmodel name\t: A (R) 9\nmodel name\t: B"
    )
    assert processor_name() == "A (R) 9"
    monkeypatch.setattr(Path, "read_text", lambda file: "")
    assert processor_name() == (platform.processor() or platform.machine())


def test_activating_a_twin_switches_the_chip():
    try:
        a5, a2 = open_device("twin:a5"), open_device("twin:a2")
        assert ascendit.twin.chip() == "a2"
        activate(a5)
        assert ascendit.twin.chip() == "a5" and hasattr(torch.ops.npu, "npu_rms_norm")
        activate(a2)
        assert ascendit.twin.chip() == "a2"
    finally:
        ascendit.twin.disable()


@pytest.mark.parametrize(
    ("name", "toolkit", "hidden"),
    [("cpu", "", True), ("cpu", "/cann", False), ("twin:a5", "", True), ("twin:a5", "/cann", True)],
)
def test_torch_npu_is_hidden_if_it_must_not_be_loaded(monkeypatch, tmp_path, name, toolkit, hidden):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ASCEND_HOME_PATH", toolkit)
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # so that pytest restores it
    show_torch_npu()
    assert importlib.util.find_spec("torch_npu") is not None
    hide_torch_npu(parse_device(name))
    assert (importlib.util.find_spec("torch_npu") is None) is hidden
    show_torch_npu()
    assert importlib.util.find_spec("torch_npu") is not None


def test_dtypes_of_the_denoiser():
    cpu, twin = parse_device("cpu"), parse_device("twin:a5")
    assert to_dtype(cpu, None) is None and to_dtype(twin, None) == torch.bfloat16
    assert to_dtype(parse_device("npu"), None) == to_dtype(parse_device("cuda"), None) == torch.bfloat16
    assert to_dtype(cpu, "float16") == to_dtype(twin, torch.float16) == torch.float16
    assert to_dtype(cpu, torch.float64) == torch.float64
    for device, dtype in ((twin, torch.float64), (parse_device("npu"), "complex64"), (cpu, "int8")):
        with pytest.raises(UsageError) as e:
            to_dtype(device, dtype)
        assert e.value.code == "E-USE-01" and "float32 or bfloat16 or float16" in e.value.needs


def test_memory_of_the_process_and_internal_format_of_a_cpu():
    device = parse_device("twin:a5")
    assert memory_bytes(device) > 50e6
    synchronize(device)
    with internal_format(parse_device("cpu"), True):
        pass


def test_the_twins_internal_format_is_restored():
    device = parse_device("twin:a2")
    with pytest.raises(KeyError), internal_format(device, True):
        assert STATE.internal_format
        raise KeyError
    assert not STATE.internal_format


class WriteOnly:
    """torch.npu.config: attributes can be set, not read."""

    _calls: list[tuple[str, object]]

    def __init__(self, calls):
        object.__setattr__(self, "_calls", calls)

    def __setattr__(self, name, value):
        self._calls.append((name, value))


class FakeApi:
    """The functions of torch.npu that a Device calls."""

    def __init__(self):
        self.calls: list[object] = []
        self.config = WriteOnly(self.calls)

    def set_device(self, index):
        self.calls.append(("set_device", index))

    def synchronize(self):
        self.calls.append("synchronize")

    def memory_allocated(self, index):
        return 7 + (index or 0)


def test_an_npu_uses_torch_npu(monkeypatch):
    api = FakeApi()
    monkeypatch.setattr(torch, "npu", api, raising=False)
    device = Device("npu", 2, chip="a5")
    assert open_device(device) == device and memory_bytes(device) == 9
    synchronize(device)
    with internal_format(device, True):  # which a5 ignores, with a warning
        pass
    assert api.calls == [("set_device", 2), "synchronize"]
    activate(Device("npu", chip="a5"))  # without an index: the current device
    assert len(api.calls) == 2


def test_the_internal_format_of_a_card_is_switched_off_again(monkeypatch):
    api = FakeApi()
    monkeypatch.setattr(torch, "npu", api, raising=False)
    with pytest.raises(KeyError), internal_format(Device("npu", 0, chip="a2"), True):
        api.calls.append("cast")
        raise KeyError
    assert api.calls == [("allow_internal_format", True), "cast", ("allow_internal_format", False)]


# ---- starting an NPU ----------------------------------------------------------------------------


class FakeNpu(types.SimpleNamespace):
    """torch.npu of a machine with `count` cards of one SoC number."""

    def __init__(self, soc: int = 260, count: int = 2):
        off = types.SimpleNamespace
        super().__init__(
            config=off(allow_internal_format=None), matmul=off(allow_hf32=None), conv=off(allow_hf32=None)
        )
        self.soc, self.count = soc, count
        self.calls: list[Any] = []

    def get_soc_version(self) -> int:
        return self.soc

    def device_count(self) -> int:
        return self.count

    def set_device(self, index: int) -> None:
        self.calls.append(f"set_device {index}")

    def set_compile_mode(self, **kwargs: Any) -> None:
        self.calls.append(kwargs)


@pytest.fixture
def npu(monkeypatch):
    """A fake torch_npu; pytest restores variables and modules."""
    for v in npu_runtime.VARIABLES:
        monkeypatch.setenv(v.name, "")
    fake = FakeNpu()
    module = types.ModuleType("torch_npu")
    vars(module)["npu"] = fake
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setitem(sys.modules, "mindiesd", None)
    monkeypatch.setattr(torch, "npu", fake, raising=False)
    return fake


def test_every_setting_is_applied_and_logged(npu, caplog):
    with caplog.at_level("INFO", logger="ascendit"):
        device = open_device("npu:1")
    assert device == Device("npu", 1, "a5")
    assert npu.calls == [{"jit_compile": False}, "set_device 1"]
    assert npu.config.allow_internal_format is npu.matmul.allow_hf32 is npu.conv.allow_hf32 is False
    for v in npu_runtime.VARIABLES:
        assert os.environ[v.name] == v.value and f"{v.name}={v.value}: {v.reason}" in caplog.text
    for s in npu_runtime.SETTINGS:
        assert f"torch.npu: {s.path}={s.value}: {s.reason}" in caplog.text
    assert "npu:1: Atlas 350 (Ascend 950), chip a5" in caplog.text


def test_a_setting_changed_by_importing_mindiesd_is_set_again(npu, monkeypatch):
    def switch_on() -> None:
        npu.config.allow_internal_format = True

    monkeypatch.setattr(npu_runtime, "load_mindiesd", switch_on)
    open_device("npu")
    assert npu.config.allow_internal_format is False


def test_an_open_device_is_not_started_again(npu):
    device = open_device("npu")
    calls = list(npu.calls)
    assert open_device(device) == device and npu.calls == calls


def test_variables_are_set_before_torch_npu_is_imported(npu, monkeypatch):
    values = {}

    def record_values() -> Any:
        values.update({v.name: os.environ[v.name] for v in npu_runtime.VARIABLES})
        return types.SimpleNamespace(npu=npu)

    monkeypatch.setattr(npu_runtime, "import_torch_npu", record_values)
    open_device("npu")
    assert values == {v.name: v.value for v in npu_runtime.VARIABLES}


def test_a_missing_card_is_refused(npu):
    with pytest.raises(EnvironmentProblem, match="npu:2: this machine has 2 such devices"):
        open_device("npu:2")


def test_a_missing_torch_npu_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    for v in npu_runtime.VARIABLES:
        monkeypatch.setenv(v.name, "x")
    with pytest.raises(EnvironmentProblem, match="is not installed") as e:
        open_device("npu")
    assert e.value.code == "E-ENV-03" and "twin:a5" in e.value.fix
