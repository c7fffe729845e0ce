"""Tensors read in blocks of rows, and what is done to the numbers on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ascendit import mx
from ascendit.checkpoint import reader as reader_module
from ascendit.checkpoint.reader import RowReader, TensorInfo, read_header
from ascendit.errors import CheckpointError
from ascendit.mx.codec import Encoded


@pytest.fixture
def stored(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, TensorInfo]]:
    values = {
        "matrix": torch.randn(37, 20).to(torch.bfloat16),
        "conv": torch.randn(6, 4, 1, 2, 2),
        "vector": torch.randn(11).to(torch.float16),
        "scalar": torch.tensor(3.5),
        "fp8": torch.randn(300, 70).to(torch.float8_e4m3fn),
    }
    save_file(values, tmp_path / "x.safetensors")
    return values, read_header(tmp_path / "x.safetensors")


def test_blocks_join_to_the_tensor(stored):
    values, infos = stored
    with RowReader() as reader:
        for name, tensor in values.items():
            parts: list[torch.Tensor] = []
            for start, view in reader.blocks(infos[name], block_bytes=128):
                assert start == sum(len(part) for part in parts)
                parts.append(reader_module.as_tensor(view, infos[name]).clone())
            whole = torch.cat(parts).view(tensor.shape)
            assert torch.equal(whole.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
            assert reader.whole(infos[name]) == bytes(reader_module.as_bytes(tensor))


def test_blocks_are_whole_multiples_and_grow_if_they_must(stored, monkeypatch):
    values, infos = stored
    monkeypatch.setattr(reader_module, "BLOCK_BYTES", 1000)
    with RowReader() as reader:
        starts = [start for start, _ in reader.blocks(infos["fp8"], multiple=128)]
        assert starts == [0, 128, 256]
        assert [start for start, _ in reader.blocks(infos["fp8"])] == list(range(0, 300, 14))


def test_a_file_that_shrinks_is_an_error(stored):
    _, infos = stored
    file = infos["matrix"].file
    with RowReader() as reader:
        blocks = reader.blocks(infos["matrix"], block_bytes=40)
        next(blocks)
        with open(file, "r+b") as f:
            f.truncate(infos["matrix"].start + 50)
        with pytest.raises(CheckpointError, match="truncated while it was read, in matrix") as e:
            list(blocks)
    assert e.value.code == "E-CKP-02"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_widening_is_exact(dtype):
    spelling = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    values = torch.tensor([0.0, -0.0, 1.0, 1e-7, -6e-8, 65504.0, torch.inf, -torch.inf], dtype=dtype)
    data = bytes(reader_module.as_bytes(values))
    for given in (data, bytearray(data), memoryview(data)):
        wide = torch.frombuffer(bytearray(reader_module.float_bytes(given, spelling)), dtype=torch.float32)
        assert torch.equal(wide, values.float()) and torch.equal(wide.signbit(), values.signbit())


@pytest.mark.parametrize("shape", [(300, 70), (128, 128), (256, 300), (5, 129)])
def test_tiles_are_what_mx_decodes(shape):
    codes = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128))
    whole = mx.decode(Encoded(codes, scale, None, "fp8_128x128", -1, shape), torch.float32)
    blocks = [reader_module.tile_values(codes[i : i + 256], scale, i) for i in range(0, shape[0], 256)]
    assert torch.equal(torch.cat(blocks), whole)
