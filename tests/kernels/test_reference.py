"""`reference` against PyTorch's own float64 arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops.arguments import D, S, arguments
from torch import Tensor

from ascendit.kernels import reference
from ascendit.ops.operators import OPERATOR_NAMES


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_reference_against_float64(name: str) -> None:
    args = arguments(name, torch.float32, (5, S - 5))
    float64 = [a.double() if isinstance(a, Tensor) else a for a in args]
    x = float64[0]
    norm = (D,)
    oracle = {
        "linear": lambda: x @ float64[1].T + float64[2],
        "rms_norm": lambda: F.rms_norm(x, norm, float64[1], 1e-6),
        "layer_norm": lambda: F.layer_norm(x, norm, float64[1], float64[2], 1e-6),
        "adaln": lambda: (
            F.layer_norm(x, norm, None, None, 1e-6) * (1 + per_token(float64[1])) + per_token(float64[2])
        ),
        "gated_residual": lambda: x + float64[1] * per_token(float64[2]),
        "rope": lambda: rotate(x, float64[1], float64[2]),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
        "gelu": lambda: F.gelu(x),
        "attention": lambda: sdpa(*float64),
    }[name]()
    assert relative(getattr(reference, name)(*args), oracle) < 1e-6


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def per_token(values: Tensor) -> Tensor:
    return values.repeat_interleave(torch.tensor([5, S - 5]), dim=0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs as complex numbers."""
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.complex(cos, sin)[:, None, :]).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_in_two_phases(dtype: torch.dtype) -> None:
    """Two phases equal the fused norm, and so do two halves of the channels with averaged means."""
    x, weight, eps = arguments("rms_norm", dtype, (S,))
    fused = reference.rms_norm(x, weight, eps)
    assert torch.equal(reference.rms_scale(x, reference.mean_square(x), weight, eps), fused)
    halves, weights = x.chunk(2, -1), weight.chunk(2)
    means = [reference.mean_square(half) for half in halves]
    mean = (means[0] + means[1]) / 2
    assert mean.dtype == torch.float32 and mean.shape == (*x.shape[:-1], 1)
    torch.testing.assert_close(mean, reference.mean_square(x), rtol=2.0**-22, atol=0)  # order of summation
    parts = [reference.rms_scale(h, mean, w, eps) for h, w in zip(halves, weights, strict=True)]
    rounding = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-7}[dtype]
    torch.testing.assert_close(torch.cat(parts, -1), fused, rtol=rounding, atol=0)


def test_reference_attention_over_several_blocks_of_queries() -> None:
    q, k, v = (torch.randn(1, 600, 2, 16) for _ in range(3))
    expected = sdpa(q.double(), k.double(), v.double())
    assert relative(reference.attention(q, k, v), expected) < 1e-6


def test_layer_norm_without_weights() -> None:
    x = torch.randn(2, 9, 16)
    expected = F.layer_norm(x, (16,), None, None, 1e-5)
    assert relative(reference.layer_norm(x, None, None, 1e-5), expected) < 1e-6
