"""int8_block against an oracle in NumPy that shares no code: quantization, product and bias, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from ascendit import mx
from ascendit.kernels.cpu import linear as cpu_linear
from ascendit.native.build import Built
from ascendit.ops.operators import bind

DEVICES = ["cpu", "cpu without a compiler", "twin:a2", "twin:a3", "twin:a5"]
SHAPES = [(1, 1, 1), (3, 20, 33), (130, 128, 128), (257, 200, 1040)]


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [R, C] -> integers [R, C] and the scale of each of them, both float64."""
    values, scales = np.zeros(x.shape), np.zeros(x.shape)
    for i in range(0, x.shape[0], 128):
        for j in range(0, x.shape[1], 128):
            at = slice(i, i + 128), slice(j, j + 128)
            scale = np.abs(x[at]).max() / np.float32(127)
            scales[at] = scale
            values[at] = np.rint(x[at] / scale) if scale else 0
    return values, scales


def oracle(x: np.ndarray, w: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """bfloat16 [M, N] of float32 x [M, K] and w [N, K]."""
    (a, a_scale), (b, b_scale), total = quantized(x), quantized(w), np.zeros((len(x), len(w)))
    for j in range(0, x.shape[1], 128):
        at = slice(j, j + 128)
        total += (a[:, at] @ b[:, at].T) * a_scale[:, j, None] * b_scale[:, j]
    return (total + bias).astype(np.float32).astype(ml_dtypes.bfloat16)


def bits(x: Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int16).numpy()


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_device_is_numpy(monkeypatch, device, m, n, k, smoothed):
    if device == "cpu without a compiler":
        monkeypatch.setattr(cpu_linear, "library", lambda: Built(None, "no C++ compiler"))
    draw = torch.Generator().manual_seed(m)
    x, w = (torch.randn(rows, k, generator=draw).bfloat16() for rows in (m, n))
    x[128:, 128:256] = 0
    bias, factors = torch.randn(n, generator=draw), torch.rand(k, generator=draw) + 0.5
    ops, encoded = bind(device.split()[0]).quantized, mx.encode(w, "int8_block")
    weight = ops.prepare_weight(encoded.qdata, encoded.scale, None, bias, "int8_block")
    a = ops.quantize_activation(x, "int8_block", factors if smoothed else None)
    values = x.float().numpy()
    if smoothed:
        values = (values * factors.numpy()).astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = oracle(values, w.float().numpy(), bias.numpy().astype(np.float64))
    np.testing.assert_array_equal(bits(ops.quantized_linear(a, weight)), expected.view(np.int16))
    assert torch.equal(ops.stored(weight).qdata, encoded.qdata)
    assert torch.equal(ops.stored(weight).scale, encoded.scale)


def test_rows_depend_on_the_rows_beside_them_and_not_on_other_tiles():
    ops = bind("cpu").quantized
    w = mx.encode(torch.randn(9, 200), "int8_block")
    weight = ops.prepare_weight(w.qdata, w.scale, None, None, "int8_block")
    x = torch.randn(300, 200).bfloat16()

    def run(rows: Tensor) -> Tensor:
        return ops.quantized_linear(ops.quantize_activation(rows, "int8_block"), weight)

    assert torch.equal(run(x), torch.cat([run(part) for part in x.split(128)]))
    assert not torch.equal(run(x), torch.cat([run(part) for part in x.split(100)]))
    assert torch.equal(run(x.view(3, 100, 200)).flatten(0, 1), run(x))
