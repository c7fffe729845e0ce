"""Device names: their fields, and the error for an invalid name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ascendit.device.device import BACKENDS, Device, parse_device
from ascendit.errors import UsageError


@pytest.mark.parametrize(
    ("name", "kind", "index", "chip", "tensors", "operators"),
    [
        ("cpu", "cpu", None, None, "cpu", "cpu"),
        ("cuda", "cuda", None, None, "cuda", "cuda"),
        ("cuda:1", "cuda", 1, None, "cuda:1", "cuda"),
        ("npu", "npu", None, None, "npu", "npu"),
        ("npu:3", "npu", 3, None, "npu:3", "npu"),
        ("twin:a2", "twin", None, "a2", "cpu", "npu"),
        ("twin:a5", "twin", None, "a5", "cpu", "npu"),
    ],
)
def test_device_names(name, kind, index, chip, tensors, operators):
    device = parse_device(name)
    assert (device.kind, device.index, device.chip) == (kind, index, chip)
    assert (device.torch_name, device.operators) == (tensors, operators)
    assert str(device) == name and parse_device(str(device)) == device
    assert parse_device(torch.device("cuda", 1)) == Device("cuda", 1)


@pytest.mark.parametrize(
    "name", ["", "tpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "npu:a5", "twin", "twin:", "twin:a4"]
)
def test_an_invalid_name_is_refused(name):
    with pytest.raises(UsageError) as e:
        parse_device(name)
    assert e.value.code == "E-USE-01" and e.value.got == f"device {name!r}"
    assert "cuda:N" in e.value.needs and "twin:a5" in e.value.needs


@pytest.mark.parametrize(
    ("name", "device"),
    [("gpu", "cuda"), ("gpu:1", "cuda"), ("Ascend", "npu"), ("mps", "cpu"), ("twin", "twin:a5")],
)
def test_the_fix_for_a_name_of_another_tool(name, device):
    with pytest.raises(UsageError) as e:
        parse_device(name)
    assert e.value.fix == f'device="{device}"'


def test_names_are_parsed_without_torch():
    code = "import sys, ascendit.device.device as b; b.parse_device('twin:a5'); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_names_of_dtypes():
    cpu, twin = parse_device("cpu"), parse_device("twin:a5")
    assert cpu.dtype_name(None) is None and twin.dtype_name(None) == "bfloat16"
    assert cpu.dtype_name("float16") == twin.dtype_name(torch.float16) == "float16"
    assert [k for k, b in BACKENDS.items() if not b.has_float64] == ["npu", "twin"]
    with pytest.raises(UsageError):
        cpu.dtype_name("int8")
