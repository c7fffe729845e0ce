# mypy: ignore-errors
"""The kernels of `ops/cuda/dense.py`, in Triton's language: one pass over memory, float32, one rounding.

One program for a token; its D numbers are in registers.
"""

from __future__ import annotations

from ascendit.ops.cuda.triton_kernels import _rounded, jit, tl


@jit
def rms_norm(x_ptr, weight_ptr, out_ptr, D, stride, eps, BLOCK: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) * weight."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < D
    f = tl.load(x_ptr + row * stride + i, mask=inside, other=0.0).to(tl.float32)
    f = f * tl.rsqrt(tl.sum(f * f, 0) / D + eps)
    f = f * tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + i, _rounded(f, out_ptr.dtype.element_ty), mask=inside)


@jit
def layer_norm(
    x_ptr, scale_ptr, shift_ptr, out_ptr, D, stride_batch, stride, out_batch, eps,
    SCALE: tl.constexpr, ONE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Layer norm, times (ONE + scale), + shift. Program (token, batch)."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < D
    f = tl.load(x_ptr + batch * stride_batch + token * stride + i, mask=inside, other=0.0).to(tl.float32)
    f = tl.where(inside, f - tl.sum(f, 0) / D, 0.0)
    f = f * tl.rsqrt(tl.sum(f * f, 0) / D + eps)
    if SCALE:
        f = f * (ONE + tl.load(scale_ptr + i, mask=inside, other=0.0).to(tl.float32))
    if SHIFT:
        f = f + tl.load(shift_ptr + i, mask=inside, other=0.0).to(tl.float32)
    out_ptr += batch * out_batch + token * D
    tl.store(out_ptr + i, _rounded(f, out_ptr.dtype.element_ty), mask=inside)


@jit
def gated_residual(
    x_ptr, y_ptr, gate_ptr, out_ptr, D, x_batch, x_stride, y_batch, y_stride, out_batch, BLOCK: tl.constexpr
):
    """x + y * gate. Program (token, batch)."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < D
    x = tl.load(x_ptr + batch * x_batch + token * x_stride + i, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + batch * y_batch + token * y_stride + i, mask=inside, other=0.0).to(tl.float32)
    f = x + y * tl.load(gate_ptr + i, mask=inside, other=0.0).to(tl.float32)
    out_ptr += batch * out_batch + token * D
    tl.store(out_ptr + i, _rounded(f, out_ptr.dtype.element_ty), mask=inside)


@jit
def rope(
    x_ptr, cos_ptr, sin_ptr, out_ptr, pairs, turns, stride_batch, stride, out_batch, BLOCK: tl.constexpr
):
    """(a, b) -> (a cos - b sin, a sin + b cos) for each of the `pairs` of a token; heads share `turns`."""
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    both = pair[:, None] * 2 + tl.arange(0, 2)[None, :]
    inside = both < 2 * pairs
    x = tl.load(x_ptr + batch * stride_batch + token * stride + both, mask=inside, other=0.0)
    a, b = tl.split(x.to(tl.float32))
    turn = token * turns + pair % turns
    c = tl.load(cos_ptr + turn, mask=pair < pairs, other=0.0)
    s = tl.load(sin_ptr + turn, mask=pair < pairs, other=0.0)
    f = tl.join(a * c - b * s, a * s + b * c)
    out_ptr += batch * out_batch + token * 2 * pairs
    tl.store(out_ptr + both, _rounded(f, out_ptr.dtype.element_ty), mask=inside)
