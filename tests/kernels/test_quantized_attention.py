"""Quantized attention against NumPy's own quantization and float64 attention, and the twin's quantizers."""

from __future__ import annotations

from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from ascendit.device.device import parse_device
from ascendit.kernels import reference
from ascendit.kernels.kernel import Wish
from ascendit.kernels.quantized_attention import (
    dequantize,
    dequantized,
    emulated,
    operator_of,
    quantize,
    smooth_key,
)
from ascendit.mx.codec import sqnr
from ascendit.ops.select import select
from ascendit.quant.attention_schemes import ATTENTION_FORMATS

ELEMENTS: dict[str, tuple[Any, float, int]] = {
    "int8": (np.int8, 127, 0),
    "fp8": (ml_dtypes.float8_e4m3fn, 448, 8),
    "mxfp8": (ml_dtypes.float8_e4m3fn, 448, 8),
    "mxfp4": (ml_dtypes.float4_e2m1fn, 6, 2),
}
"""Format -> dtype in NumPy, its largest number and that number's exponent."""
LEAST_SQNR = {"int8": 36.0, "fp8": 21.0, "mxfp8": 20.0, "mxfp4": 9.5}
"""dB of one attention on normally distributed q, k and v."""
OPERANDS = [
    (f.format, tile)
    for f in ATTENTION_FORMATS.values()
    for tile in dict.fromkeys((f.query_tile, f.key_tile, f.value_tile))
]


def operands(s: int, length: int, d: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """q, k and v with two samples and three heads; k has a mean and v an outlier."""
    q, k, v = (torch.randn(2, n, 3, d) for n in (s, length, length))
    v[0, 0, 0, 0] = 20
    return q.to(dtype), (k + torch.randn(2, 1, 3, d) * 2).to(dtype), v.to(dtype)


def in_numpy(x: np.ndarray, format: str, tile: tuple[int | None, int | None]) -> np.ndarray:
    """x [B, S, H, d] quantized and back, one tile after another."""
    dtype, largest, exponent = ELEMENTS[format]
    out = np.empty_like(x)
    b, s, h, d = x.shape
    rows, columns = tile[0] or s, tile[1] or d
    for i, j, t, c in product(range(b), range(h), range(0, s, rows), range(0, d, columns)):
        at = i, slice(t, t + rows), j, slice(c, c + columns)
        top = np.abs(x[at]).max()
        scale = top / np.float32(largest)
        if format.startswith("mx"):
            scale = np.float32(2.0) ** np.float32(np.floor(np.log2(top or 1)) - exponent)
        steps = x[at] / (scale or np.float32(1))
        if dtype is np.int8:
            out[at] = np.rint(steps) * scale
        else:
            out[at] = steps.clip(-largest, largest).astype(dtype).astype(np.float32) * scale
    return out


def in_float64(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bshd,blhd->bhsl", q.double(), k.double()) * q.shape[-1] ** -0.5
    lse = torch.logsumexp(scores, -1)
    return torch.einsum("bhsl,blhd->bshd", (scores - lse[..., None]).exp(), v.double()), lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("s,d", [(1, 64), (33, 64), (300, 128)])
@pytest.mark.parametrize("format,tile", OPERANDS)
def test_operand_is_numpy(
    format: str, tile: tuple[int | None, int | None], s: int, d: int, dtype: torch.dtype
) -> None:
    x = (torch.randn(2, s, 3, d) * 5).to(dtype)
    x[0, :, 0] = 0
    operand = quantize(x, format, tile)
    assert operand.scale.shape == (2, -(-s // (tile[0] or s)), 3, -(-d // (tile[1] or d)))
    np.testing.assert_array_equal(dequantize(operand).numpy(), in_numpy(x.float().numpy(), format, tile))


@pytest.mark.parametrize("format,tile", OPERANDS)
def test_nan_stays_nan(format: str, tile: tuple[int | None, int | None]) -> None:
    x = torch.randn(1, 40, 2, 64)
    x[0, 3, 1, 5] = torch.nan
    values = dequantize(quantize(x, format, tile))
    assert values[0, 3, 1, 5].isnan() and values[0, :, 0].isfinite().all()


@pytest.mark.parametrize("s,length,d", [(1, 1, 64), (47, 47, 128), (130, 77, 64), (257, 513, 128)])
@pytest.mark.parametrize("scheme", ATTENTION_FORMATS)
def test_attention_is_that_of_the_dequantized_operands(scheme: str, s: int, length: int, d: int) -> None:
    """Within BF16 rounding of float64, on the CPU and in the reference, and the log-sum-exp too."""
    q, k, v = operands(s, length, d)
    f = ATTENTION_FORMATS[scheme]
    smooth, mean = smooth_key(k) if f.smooth_key else (k.float(), torch.zeros(1))
    values = [
        torch.from_numpy(in_numpy(t.float().numpy(), f.format, tile))
        for t, tile in ((q, f.query_tile), (smooth, f.key_tile), (v, f.value_tile))
    ]
    expected, lse = in_float64(*values)
    lse += (q.double() * mean.double()).sum(-1).transpose(1, 2) * d**-0.5
    cpu = select(operator_of(scheme), parse_device("cpu"), Wish())
    assert cpu.backend == "cpu" and cpu.reason.startswith("emulated: ")
    for out in (cpu.call(q, k, v), emulated(scheme, reference.attention)(q, k, v)):
        assert out.dtype == torch.bfloat16 and out.shape == q.shape
        torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)
    got = emulated(scheme, reference.attention)(q, k, v, return_lse=True)[1]
    torch.testing.assert_close(got.double(), lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheme", ATTENTION_FORMATS)
def test_attention_keeps_its_precision(scheme: str) -> None:
    q, k, v = operands(200, 300, 64)
    expected, lse = in_float64(q, k, v)
    out, got = emulated(scheme, reference.attention)(q, k, v, return_lse=True)
    assert sqnr(expected, out) > LEAST_SQNR[scheme]
    assert (got - lse).abs().max() < {"int8": 0.02, "mxfp4": 1.5}.get(scheme, 0.5)


def test_smoothing_saves_keys_with_a_large_mean() -> None:
    """int8 keys far from zero lose their precision, unless their mean is subtracted."""
    q, k, v = operands(64, 64, 64)
    k += 30
    expected, _ = in_float64(q, k, v)
    rough = reference.attention(*dequantized("int8", q, k, v))
    assert sqnr(expected, emulated("int8", reference.attention)(q, k, v)) > sqnr(expected, rough) + 10


@pytest.mark.parametrize("scheme", ATTENTION_FORMATS)
def test_reference_on_request(scheme: str) -> None:
    kernel = select(operator_of(scheme), parse_device("cpu"), Wish(reference=True))
    assert kernel.backend == "reference"
    q, k, v = operands(5, 7, 64)
    assert torch.equal(kernel.call(q, k, v), emulated(scheme, reference.attention)(q, k, v))


@pytest.mark.parametrize("scheme", ATTENTION_FORMATS)
def test_no_keys(scheme: str) -> None:
    q, k = torch.randn(1, 3, 2, 64), torch.randn(1, 0, 2, 64)
    out, lse = emulated(scheme, reference.attention)(q, k, k, return_lse=True)
    assert torch.equal(out, torch.zeros_like(q)) and torch.equal(lse, torch.full((1, 2, 3), -torch.inf))
