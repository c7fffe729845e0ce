"""Rotation of Q and K before a quantized kernel, and the same bits on a CPU and its twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ascendit.attention.quantized import QuantizedAttention, quantized_attention
from ascendit.kernels import reference
from ascendit.kernels.quantized_attention import emulated
from ascendit.mx.codec import sqnr
from ascendit.mx.smoothing import rotation
from ascendit.ops.operators import bind
from ascendit.quant.attention_schemes import ATTENTION_FORMATS

ROTATING = [name for name, f in ATTENTION_FORMATS.items() if f.rotate]


def operands(s: int, length: int, d: int) -> tuple[Tensor, ...]:
    """q, k and v in bfloat16; one channel of q and k is an outlier."""
    q, k, v = (torch.randn(2, n, 3, d) for n in (s, length, length))
    q[..., 3] *= 8
    k[..., 3] *= 8
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def orthogonal(d: int) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(d, d))
    return q.bfloat16()


def test_a_rotation_changes_no_score() -> None:
    q, k, v = operands(33, 40, 64)
    weight = orthogonal(64).t().contiguous()
    rotated = QuantizedAttention("fp8", reference.attention, reference.linear, (weight, weight))
    out, lse = rotated(q, k, v, return_lse=True)
    expected, expected_lse = reference.attention(q.float(), k.float(), v.float(), return_lse=True)
    assert sqnr(expected, out) > 35
    assert (lse - expected_lse).abs().max() < 0.6  # BF16 rotations, scores up to 100


@pytest.mark.parametrize("scheme", ATTENTION_FORMATS)
def test_stored_rotations_are_used_and_others_are_the_default(scheme: str) -> None:
    ops, (q, k, v) = bind("cpu", "reference"), operands(5, 9, 64)
    kernel = emulated(scheme, reference.attention)
    stored, default = orthogonal(64), rotation(64)
    out = quantized_attention(scheme, ops, stored, stored)(q, k, v)
    assert torch.equal(out, kernel(q @ stored, k @ stored, v))
    expected = kernel(q @ default, k @ default, v) if scheme in ROTATING else kernel(q, k, v)
    assert torch.equal(quantized_attention(scheme, ops)(q, k, v), expected)


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4"])
def test_a_rotation_saves_heads_with_an_outlier(scheme: str) -> None:
    ops, (q, k, v) = bind("cpu", "reference"), operands(64, 64, 64)
    expected = reference.attention(q.float(), k.float(), v.float())
    plain = QuantizedAttention(scheme, ops.quantized.attention(scheme).call, ops.linear, (torch.eye(64),) * 2)
    assert sqnr(expected, quantized_attention(scheme, ops)(q, k, v)) > sqnr(expected, plain(q, k, v)) + 1


@pytest.mark.parametrize(("s", "length", "d"), [(1, 1, 64), (33, 47, 64), (257, 300, 128)])
@pytest.mark.parametrize("scheme", ATTENTION_FORMATS)
def test_cpu_and_twin_are_equal(scheme: str, s: int, length: int, d: int, twin: Any) -> None:
    q, k, v = operands(s, length, d)
    for stored in (None, orthogonal(d)):
        cpu, npu = (
            quantized_attention(scheme, bind(device, emulate=True), stored, stored)
            for device in ("cpu", "twin:a5")
        )
        assert torch.equal(cpu(q, k, v), npu(q, k, v))
