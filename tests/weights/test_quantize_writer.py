"""What reaches the file is what `mx.encode` makes of the whole weight, whatever the scheme and the rule."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from convert.models import CONFIG, read, same, tensors, write_transformer
from mx import encoders
from safetensors.torch import load_file, save_file

from ascendit import mx
from ascendit.checkpoint.reader import read_header
from ascendit.checkpoint.writer import ShardWriter, TensorSpec
from ascendit.convert.quantize import quantize
from ascendit.mx.formats import lookup
from ascendit.quant.schemes import SCHEMES
from ascendit.weights.quantize_writer import WAITING, WriteBehind

VALUES = {"max:": ("7.25",), "msms:ceil_x:": ("7.25", "search")}
RULES = [
    (scheme.name, rule + value)
    for scheme in SCHEMES.values()
    if scheme.weight
    for rule in lookup(scheme.weight).rules
    for value in VALUES.get(rule, ("",))
]


class Late(ShardWriter):
    """Takes its time, so that codes wait while the next rows are encoded."""

    def append(self, name, data):
        time.sleep(0.0005)
        super().append(name, data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("scheme", "rule"), RULES)
def test_every_rule(tmp_path, monkeypatch, scheme, rule, dtype):
    monkeypatch.setattr("ascendit.checkpoint.reader.BLOCK_BYTES", 10 * 4 * 64)
    monkeypatch.setattr("ascendit.convert.quantize.ShardWriter", Late)
    folder = write_transformer(tmp_path / "model", dtype=dtype, num_layers=1)
    quantize(folder, tmp_path / "out", scheme=scheme, scale_rule=rule)
    found, compared = read(tmp_path / "out" / "transformer"), 0
    for name, weight in tensors(CONFIG | {"num_layers": 1}, dtype=dtype).items():
        if f"{name}_scale" in found:
            encoded = mx.encode(weight, SCHEMES[scheme].weight, scale_rule=rule)
            assert same(found[name], encoded.codes) and same(found[f"{name}_scale"], encoded.scale)
            if encoded.dual_scale is not None:
                assert same(found[f"{name}_dual_scale"], encoded.dual_scale)
            compared += 1
    assert compared == 10


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4", "mxfp4_dualscale", "int8"])
def test_without_a_compiler_the_folder_is_the_same(tmp_path: Path, monkeypatch, scheme: str) -> None:
    folder = write_transformer(tmp_path / "model")
    quantize(folder, tmp_path / "a", scheme=scheme)
    encoders.take("pytorch", monkeypatch)
    quantize(folder, tmp_path / "b", scheme=scheme, report=True)
    encoders.forget()
    ours, theirs = read(tmp_path / "a" / "transformer"), read(tmp_path / "b" / "transformer")
    assert ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)


# ---- writing in a thread -------------------------------------------------------------------------

SPECS = [TensorSpec("a", "U8", (1000,)), TensorSpec("moved", "F32", (5, 7)), TensorSpec("b", "U8", (30,))]


class Slow(ShardWriter):
    """Takes its time, so that pieces do wait."""

    def append(self, name, data):
        time.sleep(0.002)
        super().append(name, data)


def test_bytes_come_in_order_from_a_ring_of_buffers(tmp_path: Path):
    moved = torch.randn(5, 7)
    save_file({"moved": moved}, tmp_path / "source.safetensors")
    info = read_header(tmp_path / "source.safetensors")["moved"]
    ring = [bytearray(50) for _ in range(WAITING + 1)]
    with Slow(tmp_path, SPECS, stem="out") as writer, WriteBehind(writer) as behind:
        for piece in range(20):
            buffer = ring[piece % len(ring)]
            buffer[:] = bytes([piece]) * 50
            behind.append("a", memoryview(buffer))
        behind.move(info, "moved")
        behind.append("b", bytes(range(30)))
        behind.flush()
        assert not behind.done("a")
    found = load_file(tmp_path / "out.safetensors")
    assert found["a"].tolist() == [i for i in range(20) for _ in range(50)]
    assert torch.equal(found["moved"], moved) and found["b"].tolist() == list(range(30))


def test_what_goes_wrong_there_is_raised_here(tmp_path: Path):
    class Broken(ShardWriter):
        def append(self, name, data):
            raise OSError(5, "the disk is gone")

    writer = Broken(tmp_path, SPECS)
    behind = WriteBehind(writer)
    with pytest.raises(OSError, match="the disk is gone"), behind:
        for _ in range(5):
            behind.append("a", bytes(10))
    with pytest.raises(OSError, match="the disk is gone"), WriteBehind(writer) as behind:
        behind.append("a", bytes(10))  # seen at the end at the latest


def test_an_error_of_the_caller_ends_the_thread(tmp_path: Path):
    writer = ShardWriter(tmp_path, SPECS)
    with pytest.raises(ValueError, match="mine"), WriteBehind(writer) as behind:
        behind.append("a", bytes(10))
        raise ValueError("mine")
    assert not behind._thread.is_alive()
