"""The sink of a folder: a thread writes the pieces in order, and its errors are raised."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascendit.checkpoint.headers import read_header
from ascendit.checkpoint.writer import ShardWriter, TensorSpec
from ascendit.convert.expert_folder import WriteBehind
from ascendit.weights.tensor_steps import WAITING, moved

SPECS = [TensorSpec("a", "U8", (1000,)), TensorSpec("moved", "F32", (5, 7)), TensorSpec("b", "U8", (30,))]


class Slow(ShardWriter):
    """Writes slowly, so that pieces wait."""

    def append(self, name, data):
        time.sleep(0.002)
        super().append(name, data)


def test_bytes_come_in_order_from_a_ring_of_buffers(tmp_path: Path):
    tensor = torch.randn(5, 7)
    save_file({"moved": tensor}, tmp_path / "source.safetensors")
    info = read_header(tmp_path / "source.safetensors")["moved"]
    ring = [bytearray(50) for _ in range(WAITING + 1)]
    with Slow(tmp_path, SPECS, stem="out") as writer, WriteBehind(writer) as behind:
        for piece in range(20):
            buffer = ring[piece % len(ring)]
            buffer[:] = bytes([piece]) * 50
            behind.append("a", memoryview(buffer))
        behind.move(moved("moved", info))
        behind.append("b", bytes(range(30)))
        behind.flush()
        assert not behind.done("a")
    loaded = load_file(tmp_path / "out.safetensors")
    assert loaded["a"].tolist() == [i for i in range(20) for _ in range(50)]
    assert torch.equal(loaded["moved"], tensor) and loaded["b"].tolist() == list(range(30))


def test_an_error_of_the_thread_is_raised_in_the_caller(tmp_path: Path):
    class Broken(ShardWriter):
        def append(self, name, data):
            raise OSError(5, "the disk is gone")

    writer = Broken(tmp_path, SPECS)
    behind = WriteBehind(writer)
    with pytest.raises(OSError, match="the disk is gone"), behind:
        for _ in range(5):
            behind.append("a", bytes(10))
    with pytest.raises(OSError, match="the disk is gone"), WriteBehind(writer) as behind:
        behind.append("a", bytes(10))  # raised at the end at the latest


def test_an_error_of_the_caller_ends_the_thread(tmp_path: Path):
    writer = ShardWriter(tmp_path, SPECS)
    with pytest.raises(ValueError, match="mine"), WriteBehind(writer) as behind:
        behind.append("a", bytes(10))
        raise ValueError("mine")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ascendit-write")]
