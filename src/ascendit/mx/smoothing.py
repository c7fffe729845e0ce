"""Smoothing and rotation: transforms of a weight and its input before quantization.

Smoothing (SmoothQuant; msModelSlim `iter_smooth`): with s > 0 per input channel, x W = (x / s)(s W). The
quantized weight is W s; `mul_scale` = 1 / s is stored and multiplies the input at run time.
Rotation (QuaRot): q and k of an attention are multiplied by the same orthogonal matrix, which leaves q k
unchanged and spreads outliers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascendit.errors import UsageError

ROTATION_SEED = 1234


def smoothing_factors(
    input_amax: Tensor,
    weight_amax: Tensor,
    alpha: float,
    *,
    minimum: float = 1e-5,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """s [K] in `dtype`: amax_x^alpha / amax_w^(1 - alpha), from max|x| and max|w| per input channel [K].

    max|w| is at least 1e-5, s at least `minimum`. `weight_amax`: over the rows of all weights that share the
    input. As msModelSlim under the NPU's autocast: maxima in the weight's dtype, powers in float32.
    """
    inputs = input_amax.to(dtype).to(torch.float32)
    weights = weight_amax.to(dtype).to(torch.float32).clamp(min=1e-5).to(dtype).to(torch.float32)
    return (inputs.pow(alpha) / weights.pow(1 - alpha)).clamp(min=minimum).to(dtype)


def to_mul_scale(factors: Tensor) -> Tensor:
    """s [K] -> `mul_scale` [K]: float32 1 / s."""
    return factors.to(torch.float32).reciprocal()


def smooth_weight(weight: Tensor, mul_scale: Tensor) -> Tensor:
    """W [N, K] and a stored mul_scale [K] -> W s [N, K] in the dtype of W, ready to be quantized.

    s = 1 / mul_scale, rounded to the dtype of W: exactly msModelSlim's s, which had that dtype.
    Raises UsageError (E-USE-01) if `mul_scale` has another shape, or a value that is not finite and above 0.
    """
    _check_mul_scale(mul_scale, weight.shape[-1])
    factors = mul_scale.to(torch.float32).reciprocal().to(weight.dtype)
    return (weight.to(torch.float32) * factors.to(torch.float32)).to(weight.dtype)


def smooth_input(x: Tensor, mul_scale: Tensor) -> Tensor:
    """x [.., K] times mul_scale [K], computed in float32 and rounded to the dtype of x."""
    return (x.to(torch.float32) * mul_scale.to(torch.float32)).to(x.dtype)


def rotation(size: int, *, dtype: torch.dtype = torch.bfloat16, seed: int = ROTATION_SEED) -> Tensor:
    """diag(d) H / sqrt(size) [size, size] in `dtype`: d random signs, H Sylvester's Hadamard matrix.

    Seed 1234 is bit-identical to msModelSlim's `create_rot` and MindIE-SD's. Generated on the CPU.
    Raises UsageError (E-USE-01) unless `size` is a power of two.
    """
    if size < 1 or size & (size - 1):
        raise UsageError(
            f"rotation of size {size}",
            needs="a power of two",
            fix="rotate heads of 32, 64 or 128 values",
        )
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).to(torch.float32) * 2 - 1
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    # Only the float32 division and the final cast round.
    return (signs.unsqueeze(1) * matrix / torch.tensor(float(size)).sqrt()).to(dtype)


def _check_mul_scale(mul_scale: Tensor, channels: int) -> None:
    if tuple(mul_scale.shape) != (channels,) or not bool(((mul_scale > 0) & mul_scale.isfinite()).all()):
        raise UsageError(
            f"mul_scale of shape {tuple(mul_scale.shape)}, minimum {float(mul_scale.min())}",
            needs=f"{channels} finite values above zero",
            fix="quantize the layer again, or without smoothing: its mul_scale is damaged",
        )
