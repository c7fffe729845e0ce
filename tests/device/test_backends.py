"""Devices by name: what they are, what a wrong one is told, and what runs where."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

import ascendit.twin
from ascendit.device.backends import (
    BACKENDS,
    Device,
    check_index,
    hide_torch_npu,
    open_device,
    parse_device,
    show_torch_npu,
)
from ascendit.errors import EnvironmentProblem, UsageError


@pytest.mark.parametrize(
    ("name", "kind", "index", "chip", "tensors", "operators", "collectives"),
    [
        ("cpu", "cpu", None, None, "cpu", "cpu", "gloo"),
        ("cuda", "cuda", None, None, "cuda", "cuda", "cpu:gloo,cuda:nccl"),
        ("cuda:1", "cuda", 1, None, "cuda:1", "cuda", "cpu:gloo,cuda:nccl"),
        ("npu", "npu", None, None, "npu", "npu", "cpu:gloo,npu:hccl"),
        ("npu:3", "npu", 3, None, "npu:3", "npu", "cpu:gloo,npu:hccl"),
        ("twin:a2", "twin", None, "a2", "cpu", "npu", "gloo"),
        ("twin:a5", "twin", None, "a5", "cpu", "npu", "gloo"),
    ],
)
def test_names(name, kind, index, chip, tensors, operators, collectives):
    device = parse_device(name)
    assert (device.kind, device.index, device.chip) == (kind, index, chip)
    assert (device.torch_name, device.operators, device.collectives) == (tensors, operators, collectives)
    assert str(device) == name and parse_device(str(device)) == device
    assert parse_device(torch.device("cuda", 1)) == Device("cuda", 1)


@pytest.mark.parametrize(
    "name", ["", "tpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "npu:a5", "twin", "twin:", "twin:a4"]
)
def test_a_name_that_is_none(name):
    with pytest.raises(UsageError) as e:
        parse_device(name)
    assert e.value.code == "E-USE-01" and e.value.got == f"device {name!r}"
    assert "cuda:N" in e.value.needs and "twin:a5" in e.value.needs


def test_names_are_read_without_torch():
    code = (
        "import sys, ascendit.device.backends as b; b.parse_device('twin:a5'); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_no_cuda_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match="sees no CUDA device") as e:
        open_device("cuda:1")
    assert e.value.code == "E-ENV-03"


def test_a_card_too_few():
    check_index(Device("cuda", 1), 2)
    with pytest.raises(EnvironmentProblem) as e:
        check_index(Device("npu", 2), 2)
    assert e.value.got == "device npu:2: this machine has 2 of them" and e.value.needs == "npu:0 to npu:1"
    with pytest.raises(EnvironmentProblem, match="has 0 of them"):
        check_index(Device("npu"), 0)


def test_the_twin_is_switched_on_and_again_after_another():
    try:
        a5, a2 = open_device("twin:a5"), open_device("twin:a2")
        assert ascendit.twin.chip() == "a2"
        a5.activate()
        assert ascendit.twin.chip() == "a5" and hasattr(torch.ops.npu, "npu_rms_norm")
        a2.activate()
        assert ascendit.twin.chip() == "a2"
    finally:
        ascendit.twin.disable()


@pytest.mark.parametrize(
    ("name", "toolkit", "hidden"),
    [("cpu", "", True), ("cpu", "/cann", False), ("twin:a5", "", True), ("twin:a5", "/cann", True)],
)
def test_libraries_see_no_torch_npu_that_may_not_be_loaded(monkeypatch, tmp_path, name, toolkit, hidden):
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ASCEND_HOME_PATH", toolkit)
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # so that it is put back
    show_torch_npu()
    assert importlib.util.find_spec("torch_npu") is not None
    hide_torch_npu(parse_device(name))
    assert (importlib.util.find_spec("torch_npu") is None) is hidden
    show_torch_npu()
    assert importlib.util.find_spec("torch_npu") is not None


def test_dtypes_of_the_denoiser():
    cpu, twin = parse_device("cpu"), parse_device("twin:a5")
    assert cpu.to_dtype(None) is None and twin.to_dtype(None) == torch.bfloat16
    assert parse_device("npu").to_dtype(None) == parse_device("cuda").to_dtype(None) == torch.bfloat16
    assert cpu.to_dtype("float16") == twin.to_dtype(torch.float16) == torch.float16
    assert cpu.to_dtype(torch.float64) == torch.float64
    for device, dtype in ((twin, torch.float64), (parse_device("npu"), "complex64"), (cpu, "int8")):
        with pytest.raises(UsageError) as e:
            device.to_dtype(dtype)
        assert e.value.code == "E-USE-01" and "float32 or bfloat16 or float16" in e.value.needs
    assert [k for k, b in BACKENDS.items() if not b.wide] == ["npu", "twin"]


def test_memory_of_this_process_and_streams_of_a_host():
    device = parse_device("twin:a5")
    assert device.memory_bytes() > 50e6
    device.synchronize()
    with device.side_stream(), parse_device("cpu").internal_format(True):
        pass


def test_the_twins_internal_format_is_set_back():
    from ascendit.twin.registry import STATE

    device = parse_device("twin:a2")
    with pytest.raises(KeyError), device.internal_format(True):
        assert STATE.internal_format
        raise KeyError
    assert not STATE.internal_format


class WriteOnly:
    """torch.npu.config: what is set is passed on, and cannot be read."""

    _seen: list[tuple[str, object]]

    def __init__(self, seen):
        object.__setattr__(self, "_seen", seen)

    def __setattr__(self, name, value):
        self._seen.append((name, value))


class FakeApi:
    """torch.npu as far as a Device needs it."""

    def __init__(self):
        self.seen: list[object] = []
        self.config = WriteOnly(self.seen)

    def set_device(self, index):
        self.seen.append(("set_device", index))

    def synchronize(self):
        self.seen.append("synchronize")

    def memory_allocated(self, index):
        return 7 + (index or 0)

    def Stream(self):
        return "a stream"

    def stream(self, stream):
        import contextlib

        self.seen.append(stream)
        return contextlib.nullcontext()


def test_an_npu_goes_through_torch_npu(monkeypatch):
    api = FakeApi()
    monkeypatch.setattr(torch, "npu", api, raising=False)
    device = Device("npu", 2, chip="a5")
    assert open_device(device) == device and device.memory_bytes() == 9
    device.synchronize()
    with device.side_stream(), device.internal_format(True):  # which a5 ignores, with a warning
        pass
    assert api.seen == [("set_device", 2), "synchronize", "a stream"]
    Device("npu", chip="a5").activate()  # without a number: the one that is current
    assert len(api.seen) == 3


def test_the_internal_format_of_a_card_is_switched_off_again(monkeypatch):
    api = FakeApi()
    monkeypatch.setattr(torch, "npu", api, raising=False)
    with pytest.raises(KeyError), Device("npu", 0, chip="a2").internal_format(True):
        api.seen.append("cast")
        raise KeyError
    assert api.seen == [("allow_internal_format", True), "cast", ("allow_internal_format", False)]
