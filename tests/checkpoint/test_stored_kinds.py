"""Files of other tools: their kinds, and their values against a float64 oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from owned import INPUTS, REFUSED, Owned
from stored import read, refused

from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.transformer import Expert
from ascendit.weights.decoded_rows import layer_rows, tensor_rows


def values(expert: Expert) -> dict[str, torch.Tensor]:
    """All weights as the checker of `repack` decodes them, float32."""
    weights = {f"{name}.weight": layer for name, layer in expert.layers.items()}
    scales = {
        info.name for x in expert.layers.values() for role, info in x.tensors.items() if "scale" in role
    }
    tensors = {}
    with RowReader() as reader:
        for name, info in expert.tensors.items():
            if info.name not in scales:
                rows = layer_rows(weights[name], reader) if name in weights else tensor_rows(info, reader)
                tensors[name] = torch.cat([block.clone() for block in rows]).reshape(
                    weights[name].shape if name in weights else info.shape
                )
    return tensors


@pytest.mark.parametrize("name", INPUTS)
def test_values(tmp_path: Path, name: str) -> None:
    file: Owned = INPUTS[name]()
    expert = read(file.write(tmp_path / "wan.safetensors"))
    assert expert.kinds == file.kinds
    assert {n: layer.scheme for n, layer in expert.layers.items()} == file.schemes
    decoded = values(expert)
    assert decoded.keys() == file.values.keys()
    for tensor, expected in file.values.items():
        assert torch.equal(decoded[tensor], expected.float()), tensor
        if tensor.removesuffix(".weight") not in file.schemes:
            assert expert.tensors[tensor].dtype == {
                torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"
            }[expected.dtype]  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    make, code, text = REFUSED[name]
    assert text in refused(make().write(tmp_path / "wan.safetensors"), code)
