"""The file has the result of `mx.encode` of the complete weight, for every scheme and rule."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from convert.models import CONFIG, read, same, tensors, write_transformer
from mx import encoders

from ascendit import mx
from ascendit.checkpoint.writer import ShardWriter
from ascendit.convert.quantize import quantize
from ascendit.mx.formats import lookup
from ascendit.quant.schemes import SCHEMES

VALUES = {"max:": ("7.25",), "msms:ceil_x:": ("7.25", "search")}
RULES = [
    (scheme.name, rule + value)
    for scheme in SCHEMES.values()
    if scheme.weight
    for rule in lookup(scheme.weight).rules
    for value in VALUES.get(rule, ("",))
]


class Late(ShardWriter):
    """Writes slowly, so that qdata waits while the next rows are encoded."""

    def append(self, name, data):
        time.sleep(0.0005)
        super().append(name, data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("scheme", "rule"), RULES)
def test_every_rule(tmp_path, monkeypatch, scheme, rule, dtype):
    monkeypatch.setattr("ascendit.checkpoint.reader.BLOCK_BYTES", 10 * 4 * 64)
    monkeypatch.setattr("ascendit.convert.expert_folder.ShardWriter", Late)
    folder = write_transformer(tmp_path / "model", dtype=dtype, num_layers=1)
    quantize(folder, tmp_path / "out", scheme=scheme, scale_rule=rule)
    written, compared = read(tmp_path / "out" / "transformer"), 0
    for name, weight in tensors(CONFIG | {"num_layers": 1}, dtype=dtype).items():
        if f"{name}_scale" in written:
            encoded = mx.encode(weight, SCHEMES[scheme].weight, scale_rule=rule)
            assert same(written[name], encoded.qdata) and same(written[f"{name}_scale"], encoded.scale)
            if encoded.dual_scale is not None:
                assert same(written[f"{name}_dual_scale"], encoded.dual_scale)
            compared += 1
    assert compared == 10


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4", "mxfp4_dualscale", "int8"])
def test_without_a_compiler_the_folder_is_the_same(tmp_path: Path, monkeypatch, scheme: str) -> None:
    folder = write_transformer(tmp_path / "model")
    quantize(folder, tmp_path / "a", scheme=scheme)
    encoders.use("pytorch", monkeypatch)
    quantize(folder, tmp_path / "b", scheme=scheme, report=True)
    encoders.forget()
    ours, theirs = read(tmp_path / "a" / "transformer"), read(tmp_path / "b" / "transformer")
    assert ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)
