"""Norms, also with a quantizer behind them, and activations. float32 inside, rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.twin import cpu_kernels
from ascendit.twin.contract import FLOAT_DTYPES, HALF_DTYPES, Call, require
from ascendit.twin.operators import mx_quantize
from ascendit.twin.operators.mx_quantize import ScaleRule
from ascendit.twin.registry import Out, operator


def _same(x: Tensor) -> Out:
    """The shape and dtype of x."""
    return Out(tuple(x.shape), x.dtype)


def _rstd(x: Tensor, gamma: Tensor) -> Out:
    """One number per row: the shape of x with ones where gamma reaches."""
    lead = x.dim() - gamma.dim()
    return Out((*x.shape[:lead], *[1] * gamma.dim()), torch.float32)


def _check_gamma(x: Tensor, gamma: Tensor, wide: bool) -> None:
    require(x.dtype in FLOAT_DTYPES and 1 <= gamma.dim() <= x.dim(), "norm.gamma", x=x, gamma=gamma)
    last = x.shape[x.dim() - gamma.dim() :]
    require(gamma.shape == last, "norm.gamma_shape", gamma=gamma, x=x, last=last)
    right = gamma.dtype == x.dtype or (wide and gamma.dtype == torch.float32)
    wider = " or float32" if wide else ""
    require(right, "norm.gamma_dtype", gamma=gamma, x=x, wider=wider)


def rms(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """float32 x / sqrt(mean(x^2) + epsilon) x gamma, and the reciprocal root."""
    rstd = inverse_root(x, gamma.dim(), epsilon)
    return x.to(torch.float32) * rstd * gamma.to(torch.float32), rstd


def inverse_root(x: Tensor, axes: int, epsilon: float) -> Tensor:
    """float32 1 / sqrt(mean(x^2) + epsilon) over the last `axes` axes."""
    dims = tuple(range(-axes, 0))
    return torch.rsqrt(x.to(torch.float32).square().mean(dims, keepdim=True) + epsilon)


@operator("npu_rms_norm")
def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float) -> Iterator[Any]:
    """(y, rstd). gamma in the dtype of the input, or float32."""
    _check_gamma(self, gamma, wide=True)
    yield _same(self), _rstd(self, gamma)
    if gamma.dim() == 1:
        yield cpu_kernels.rms_norm(self, gamma, epsilon), inverse_root(self, 1, epsilon)
    else:
        y, rstd = rms(self, gamma, epsilon)
        yield y.to(self.dtype), rstd


@operator("npu_add_rms_norm")
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> Iterator[Any]:
    """(y, rstd, x1 + x2): the norm of the sum as it is before it is rounded."""
    _check_pair(x1, x2)
    _check_gamma(x1, gamma, wide=False)
    yield _same(x1), _rstd(x1, gamma), _same(x1)
    total = x1.to(torch.float32) + x2.to(torch.float32)
    y, rstd = rms(total, gamma, epsilon)
    yield y.to(x1.dtype), rstd, total.to(x1.dtype)


def _check_pair(x1: Tensor, x2: Tensor) -> None:
    require(x1.shape == x2.shape and x1.dtype == x2.dtype, "norm.pair", x1=x1, x2=x2)


def _mx_rule(a: Call, x: Tensor) -> tuple[int, mx_quantize.TargetFormat, ScaleRule]:
    """The axis, format and rule by which the norm of x is quantized."""
    a.require(x.dtype in HALF_DTYPES, "norm.half_input", x=x)
    _check_gamma(x, a.gamma, wide=True)
    target = mx_quantize.target_of(a.dst_type)
    axis = mx_quantize.check_input(x, -1, target)
    rule = ScaleRule(a.scale_alg, a.round_mode)
    mx_quantize.check_rule(rule, target, x.dtype)
    a.require(a.scale_alg < 2, "norm.scale_alg")
    return axis, target, rule


def _rms_in_mx(
    a: Call, x: Tensor, dtype: torch.dtype, axis: int, target: mx_quantize.TargetFormat, rule: ScaleRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and reciprocal root of the norm of x, rounded to `dtype` before it is quantized."""
    y, rstd = rms(x, a.gamma, a.epsilon)
    if a.beta is not None:
        y = y + a.beta.to(torch.float32)
    return *mx_quantize.to_mx(y.to(dtype), axis, target, rule), rstd


@operator("npu_rms_norm_dynamic_mx_quant")
def npu_rms_norm_dynamic_mx_quant(**given: Any) -> Iterator[Any]:
    """(codes, scales, rstd) of the norm rounded to the dtype of x."""
    a = Call(**given)
    axis, target, rule = _mx_rule(a, a.x)
    yield *mx_quantize.outs(tuple(a.x.shape), axis, target, 32), _rstd(a.x, a.gamma)
    yield _rms_in_mx(a, a.x, a.x.dtype, axis, target, rule)


@operator("npu_add_rms_norm_dynamic_mx_quant")
def npu_add_rms_norm_dynamic_mx_quant(**given: Any) -> Iterator[Any]:
    """(codes, x1 + x2, scales, rstd)."""
    a = Call(**given)
    x = a.x1
    _check_pair(x, a.x2)
    axis, target, rule = _mx_rule(a, x)
    qdata, scale = mx_quantize.outs(tuple(x.shape), axis, target, 32)
    yield qdata, _same(x), scale, _rstd(x, a.gamma)
    total = x.to(torch.float32) + a.x2.to(torch.float32)
    quantized, scales, rstd = _rms_in_mx(a, total, x.dtype, axis, target, rule)
    yield quantized, total.to(x.dtype), scales, rstd


def layer(
    x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 layer norm over the last `axes` axes, its mean and reciprocal deviation."""
    mean, rstd = moments(x, axes, eps)
    out = (x.to(torch.float32) - mean) * rstd
    if weight is not None:
        out = out * weight.to(torch.float32)
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out, mean, rstd


def moments(x: Tensor, axes: int, eps: float) -> tuple[Tensor, Tensor]:
    """float32 mean and reciprocal deviation over the last `axes` axes."""
    dims = tuple(range(-axes, 0))
    wide = x.to(torch.float32)
    mean = wide.mean(dims, keepdim=True)
    return mean, inverse_root(wide - mean, axes, eps)


def check_layer(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> None:
    """The last axes of x are `shape`; weight and bias have them too."""
    last = 0 < len(shape) <= x.dim() and tuple(x.shape[-len(shape) :]) == shape
    require(x.dtype in FLOAT_DTYPES and last, "norm.normalized_shape", shape=shape, x=x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            right = tuple(tensor.shape) == shape and tensor.dtype in (x.dtype, torch.float32)
            require(right, "norm.weights", name=name, tensor=tensor, shape=shape, x=x)


@operator("npu_layer_norm_eval")
def npu_layer_norm_eval(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Iterator[Any]:
    check_layer(input, tuple(normalized_shape), weight, bias)
    yield _same(input)
    yield layer(input, len(normalized_shape), weight, bias, eps)[0].to(input.dtype)


@operator("npu_add_layer_norm")
def npu_add_layer_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, epsilon: float, additional_output: bool
) -> Iterator[Any]:
    """(y, mean, rstd, x1 + x2). The sum is only written with `additional_output`; zeros stand for it else."""
    _check_pair(x1, x2)
    check_layer(x1, tuple(gamma.shape), gamma, beta)
    row = _rstd(x1, gamma)
    yield _same(x1), row, row, _same(x1)
    total = x1.to(torch.float32) + x2.to(torch.float32)
    y, mean, rstd = layer(total, gamma.dim(), gamma, beta, epsilon)
    added = total.to(x1.dtype) if additional_output else torch.zeros_like(x1)
    yield y.to(x1.dtype), mean, rstd, added


def _float(x: Tensor) -> None:
    require(x.dtype in FLOAT_DTYPES, "norm.float_input", x=x)


@operator("npu_gelu")
def npu_gelu(self: Tensor, approximate: str) -> Iterator[Any]:
    """Exact (`none`) or tanh, on every chip; F.gelu is tanh on a2 and a3 whatever it is told."""
    _float(self)
    require(approximate in ("none", "tanh"), "norm.approximate", approximate=approximate)
    yield _same(self)
    yield cpu_kernels.gelu(self, approximate)


def _fast_gelu(self: Tensor) -> Iterator[Any]:
    """x sigmoid(1.702 x): another function, up to 0.021 away from GELU."""
    _float(self)
    yield _same(self)
    wide = self.to(torch.float32)
    yield (wide * torch.sigmoid(1.702 * wide)).to(self.dtype)


operator("npu_fast_gelu")(_fast_gelu)
operator("fast_gelu")(_fast_gelu)


@operator("npu_silu")
def npu_silu(self: Tensor) -> Iterator[Any]:
    _float(self)
    yield _same(self)
    yield F.silu(self.to(torch.float32)).to(self.dtype)


def _halves(x: Tensor, dim: int) -> tuple[int, ...]:
    _float(x)
    require(1 <= x.dim() <= 8 and -x.dim() <= dim < x.dim(), "norm.dim", x=x, last=x.dim() - 1)
    require(x.shape[dim] % 2 == 0, "norm.odd_dim", x=x, dim=dim, size=x.shape[dim])
    at = dim % x.dim()
    return (*x.shape[:at], x.shape[at] // 2, *x.shape[at + 1 :])


@operator("npu_swiglu")
def npu_swiglu(self: Tensor, dim: int) -> Iterator[Any]:
    """silu(first half) x second half."""
    yield Out(_halves(self, dim), self.dtype)
    a, b = self.to(torch.float32).chunk(2, dim)
    yield (F.silu(a) * b).to(self.dtype)


@operator("npu_geglu")
def npu_geglu(self: Tensor, dim: int, approximate: int, activate_left: bool) -> Iterator[Any]:
    """(value x gelu(gate), gelu(gate)); the gate is the second half unless `activate_left`."""
    require(approximate in (0, 1), "norm.geglu_approximate", approximate=approximate)
    half = Out(_halves(self, dim), self.dtype)
    yield half, half
    a, b = self.to(torch.float32).chunk(2, dim)
    value, gate = (b, a) if activate_left else (a, b)
    gelu = F.gelu(gate, approximate="tanh" if approximate else "none")
    yield (value * gelu).to(self.dtype), gelu.to(self.dtype)
