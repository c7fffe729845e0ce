"""The comparison of decoded values: independent of packing and name style, and of nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert import exports
from torch import Tensor

from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import Expert, read_expert
from ascendit.convert.compare_numbers import combined, compare_numbers, digests
from ascendit.convert.repack import repack
from ascendit.errors import CheckpointError
from ascendit.weights import tensor_steps


def read(folder: Path) -> Expert:
    return read_expert(recognise(folder).experts[0])


@pytest.mark.parametrize("source", exports.ALL, ids=lambda folder: folder.name)
def test_digests_are_of_the_decoded_values(source: Path) -> None:
    computed = digests(read(source))
    named = {
        exports.diffusers_name(n): x
        for n, x in exports.tensors(exports.experts(source)["transformer"]).items()
    }
    layers = exports.by_layer(named)
    inside = {
        f"{name}.{role}" for name, roles in layers.items() for role in roles if role.startswith("weight_")
    }
    assert computed.keys() == named.keys() - inside
    for name, digest in computed.items():
        layer = layers.get(name.removesuffix(".weight"), {})
        values = exports.decoded(layer) if name.endswith(".weight") and layer else named[name]
        assert digest == hashlib.sha256(values.float().numpy().tobytes()).hexdigest(), name


def test_one_digest_for_a_model() -> None:
    assert combined({"b": "2", "a": "1"}) == hashlib.sha256(b"a 1\nb 2\n").hexdigest()


@pytest.mark.parametrize(
    ("export", "name"),
    [
        (exports.MXFP8, "blocks.0.ffn.0.weight"),
        (exports.MXFP4, "blocks.0.ffn.0.weight_scale"),
        (exports.DUAL, "blocks.1.ffn.0.weight_dual_scale"),
        (exports.INT8, "blocks.0.ffn.0.weight_scale"),
        (exports.LEGACY, "text_embedding.0.bias"),
        (exports.SMOOTH, "blocks.1.ffn.0.div.mul_scale"),
        (exports.MXFP8, "head.head.weight"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.parent.name,
)
def test_one_changed_byte_is_detected(export: Path, name: str, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        raw = tensors[name].flatten().view(torch.uint8)
        raw[-1] += 1 if raw[-1] < 120 else -1

    other = exports.changed(export, tmp_path / "other", change)
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors .* differ in the output: ") as e:
        compare_numbers(read(export), read(other))
    assert e.value.code == "E-CKP-10"
    assert exports.diffusers_name(name).rpartition(".")[0] in e.value.got
    assert compare_numbers(read(export), read(export)) == digests(read(export))


def test_a_wrong_rewrite_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With swapped nibbles, for example, the run fails and there is no output."""
    correct = tensor_steps.recode

    def swapped(*args: Any) -> bytes:
        qdata = np.frombuffer(correct(*args), np.uint8)
        return bytes((qdata >> 4 | qdata << 4).tobytes())

    def widen(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype == torch.uint8 and name.endswith("weight"):
                tensors[name] = exports.unpacked(tensor).to(torch.float8_e4m3fn)

    unpacked = exports.changed(exports.MXFP4, tmp_path / "wide", widen)
    monkeypatch.setattr(tensor_steps, "recode", swapped)
    with pytest.raises(CheckpointError, match="10 of .* differ in the output") as e:
        repack(unpacked, tmp_path / "out", check=True)
    assert e.value.code == "E-CKP-10" and not (tmp_path / "out").exists()
    monkeypatch.undo()
    repack(unpacked, tmp_path / "out", check=True)


@pytest.mark.parametrize(
    ("export", "name", "value"),
    [
        (exports.MXFP8, "blocks.0.ffn.0.weight", 0x7F),
        (exports.MXFP8, "blocks.0.ffn.0.weight", 0xFF),
        (exports.MXFP8, "head.head.weight", float("nan")),
        (exports.INT8, "blocks.0.ffn.0.bias", float("inf")),
        (exports.LEGACY, "text_embedding.0.bias", float("-inf")),
        (exports.MXFP8, "blocks.0.ffn.0.weight_scale", 254),
    ],
)
def test_nan_and_infinity_are_refused(export: Path, name: str, value: float, tmp_path: Path) -> None:
    """With the first position; 254 is a valid scale, 2^127, that makes values overflow."""

    def spoil(tensors: dict[str, Tensor], types: dict[str, Any]) -> None:
        tensor = tensors[name].view(torch.uint8) if isinstance(value, int) else tensors[name]
        tensor[-1] = value

    source = exports.changed(export, tmp_path / "source", spoil)
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors .* have NaN or infinite values: ") as e:
        repack(source, tmp_path / "out", check=True)
    assert e.value.code == "E-QNT-01" and not (tmp_path / "out").exists()
    row = len(exports.tensors(exports.experts(export)["transformer"])[name]) - 1
    assert f"the first at [{row}" in e.value.got
    repack(source, tmp_path / "out")
