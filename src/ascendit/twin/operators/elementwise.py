"""Norms, some followed by a quantizer, and activation functions: computed in float32, rounded once."""

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


def _out_like(x: Tensor) -> Out:
    """The shape and dtype of x."""
    return Out(tuple(x.shape), x.dtype)


def _rstd(x: Tensor, gamma: Tensor) -> Out:
    """float32, one value per row: the shape of x with ones for the axes of gamma."""
    lead = x.dim() - gamma.dim()
    return Out((*x.shape[:lead], *[1] * gamma.dim()), torch.float32)


def _check_gamma(x: Tensor, gamma: Tensor, allow_float32: bool) -> None:
    require(x.dtype in FLOAT_DTYPES and 1 <= gamma.dim() <= x.dim(), "norm.gamma", x=x, gamma=gamma)
    last = x.shape[x.dim() - gamma.dim() :]
    require(gamma.shape == last, "norm.gamma_shape", gamma=gamma, x=x, last=last)
    valid = gamma.dtype == x.dtype or (allow_float32 and gamma.dtype == torch.float32)
    or_float32 = " or float32" if allow_float32 else ""
    require(valid, "norm.gamma_dtype", gamma=gamma, x=x, or_float32=or_float32)


def rms(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """float32 x [.., D] * rstd * gamma [D] and rstd = 1 / sqrt(mean(x^2) + epsilon) [.., 1]."""
    rstd = inverse_root(x, gamma.dim(), epsilon)
    return x.to(torch.float32) * rstd * gamma.to(torch.float32), rstd


def inverse_root(x: Tensor, axes: int, epsilon: float) -> Tensor:
    """float32 1 / sqrt(mean(x^2) + epsilon) of x [..] over the last `axes` axes, which become 1."""
    dims = tuple(range(-axes, 0))
    return torch.rsqrt(x.to(torch.float32).square().mean(dims, keepdim=True) + epsilon)


@operator("npu_rms_norm")
def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float) -> Iterator[Any]:
    """(y, rstd [.., 1]) of `self` [.., D]. gamma [D] in the dtype of `self` or float32."""
    _check_gamma(self, gamma, allow_float32=True)
    yield _out_like(self), _rstd(self, gamma)
    if gamma.dim() == 1:
        yield cpu_kernels.rms_norm(self, gamma, epsilon), inverse_root(self, 1, epsilon)
    else:
        y, rstd = rms(self, gamma, epsilon)
        yield y.to(self.dtype), rstd


@operator("npu_add_rms_norm")
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> Iterator[Any]:
    """(y, float32 rstd [.., 1], x1 + x2) of x1, x2 [.., D]: the norm of the sum before it is rounded."""
    _check_pair(x1, x2)
    _check_gamma(x1, gamma, allow_float32=False)
    yield _out_like(x1), _rstd(x1, gamma), _out_like(x1)
    total = x1.to(torch.float32) + x2.to(torch.float32)
    y, rstd = rms(total, gamma, epsilon)
    yield y.to(x1.dtype), rstd, total.to(x1.dtype)


def _check_pair(x1: Tensor, x2: Tensor) -> None:
    require(x1.shape == x2.shape and x1.dtype == x2.dtype, "norm.pair", x1=x1, x2=x2)


def _mx_rule(a: Call, x: Tensor) -> tuple[int, mx_quantize.TargetFormat, ScaleRule]:
    """Axis, format and scale rule for quantizing the norm of x."""
    a.require(x.dtype in HALF_DTYPES, "norm.half_input", x=x)
    _check_gamma(x, a.gamma, allow_float32=True)
    target = mx_quantize.target_of(a.dst_type)
    axis = mx_quantize.check_input(x, -1, target)
    rule = ScaleRule(a.scale_alg, a.round_mode)
    mx_quantize.check_rule(rule, target, x.dtype)
    a.require(a.scale_alg < 2, "norm.scale_alg")
    return axis, target, rule


def _rms_in_mx(
    a: Call, x: Tensor, dtype: torch.dtype, axis: int, target: mx_quantize.TargetFormat, rule: ScaleRule
) -> tuple[Tensor, Tensor, Tensor]:
    """qdata and scales of the norm of x, rounded to `dtype` before it is quantized, and rstd."""
    y, rstd = rms(x, a.gamma, a.epsilon)
    if a.beta is not None:
        y = y + a.beta.to(torch.float32)
    return *mx_quantize.to_mx(y.to(dtype), axis, target, rule), rstd


@operator("npu_rms_norm_dynamic_mx_quant")
def npu_rms_norm_dynamic_mx_quant(**arguments: Any) -> Iterator[Any]:
    """(qdata, scales, rstd) of the norm of x [.., D], rounded to the dtype of x before it is quantized."""
    a = Call(**arguments)
    axis, target, rule = _mx_rule(a, a.x)
    yield *mx_quantize.outs(tuple(a.x.shape), axis, target, 32), _rstd(a.x, a.gamma)
    yield _rms_in_mx(a, a.x, a.x.dtype, axis, target, rule)


@operator("npu_add_rms_norm_dynamic_mx_quant")
def npu_add_rms_norm_dynamic_mx_quant(**arguments: Any) -> Iterator[Any]:
    """(qdata, x1 + x2, scales, rstd) of the norm of x1 + x2, [.., D]."""
    a = Call(**arguments)
    x = a.x1
    _check_pair(x, a.x2)
    axis, target, rule = _mx_rule(a, x)
    qdata, scale = mx_quantize.outs(tuple(x.shape), axis, target, 32)
    yield qdata, _out_like(x), scale, _rstd(x, a.gamma)
    total = x.to(torch.float32) + a.x2.to(torch.float32)
    quantized, scales, rstd = _rms_in_mx(a, total, x.dtype, axis, target, rule)
    yield quantized, total.to(x.dtype), scales, rstd


def layer(
    x: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 layer norm of x [..] over the last `axes` axes, with mean and rstd as in `moments`."""
    mean, rstd = moments(x, axes, eps)
    out = (x.to(torch.float32) - mean) * rstd
    if weight is not None:
        out = out * weight.to(torch.float32)
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out, mean, rstd


def moments(x: Tensor, axes: int, eps: float) -> tuple[Tensor, Tensor]:
    """float32 mean and 1 / standard deviation of x [..] over the last `axes` axes, which become 1."""
    dims = tuple(range(-axes, 0))
    values = x.to(torch.float32)
    mean = values.mean(dims, keepdim=True)
    return mean, inverse_root(values - mean, axes, eps)


def check_layer(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise TwinError (E-TWN-01) unless x is [.., *shape] in a float dtype, weight and bias [*shape]."""
    last = 0 < len(shape) <= x.dim() and tuple(x.shape[-len(shape) :]) == shape
    require(x.dtype in FLOAT_DTYPES and last, "norm.normalized_shape", shape=shape, x=x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            valid = tuple(tensor.shape) == shape and tensor.dtype in (x.dtype, torch.float32)
            require(valid, "norm.weights", name=name, tensor=tensor, shape=shape, x=x)


@operator("npu_layer_norm_eval")
def npu_layer_norm_eval(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Iterator[Any]:
    """Layer norm of `input` [.., *normalized_shape], in its dtype."""
    check_layer(input, tuple(normalized_shape), weight, bias)
    yield _out_like(input)
    yield layer(input, len(normalized_shape), weight, bias, eps)[0].to(input.dtype)


@operator("npu_add_layer_norm")
def npu_add_layer_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, epsilon: float, additional_output: bool
) -> Iterator[Any]:
    """(y, float32 mean and rstd [.., 1], x1 + x2) of x1, x2 [.., D]; zeros if no `additional_output`."""
    _check_pair(x1, x2)
    check_layer(x1, tuple(gamma.shape), gamma, beta)
    row = _rstd(x1, gamma)
    yield _out_like(x1), row, row, _out_like(x1)
    total = x1.to(torch.float32) + x2.to(torch.float32)
    y, mean, rstd = layer(total, gamma.dim(), gamma, beta, epsilon)
    added = total.to(x1.dtype) if additional_output else torch.zeros_like(x1)
    yield y.to(x1.dtype), mean, rstd, added


def _check_float(x: Tensor) -> None:
    require(x.dtype in FLOAT_DTYPES, "norm.float_input", x=x)


@operator("npu_gelu")
def npu_gelu(self: Tensor, approximate: str) -> Iterator[Any]:
    """GELU of `self` [..], float dtype: exact (`none`) or tanh. F.gelu always computes tanh on a2 and a3."""
    _check_float(self)
    require(approximate in ("none", "tanh"), "norm.approximate", approximate=approximate)
    yield _out_like(self)
    yield cpu_kernels.gelu(self, approximate)


def _fast_gelu(self: Tensor) -> Iterator[Any]:
    """x * sigmoid(1.702 x), which differs from GELU by up to 0.021."""
    _check_float(self)
    yield _out_like(self)
    x = self.to(torch.float32)
    yield (x * torch.sigmoid(1.702 * x)).to(self.dtype)


operator("npu_fast_gelu")(_fast_gelu)
operator("fast_gelu")(_fast_gelu)


@operator("npu_silu")
def npu_silu(self: Tensor) -> Iterator[Any]:
    """SiLU of `self` [..], float dtype."""
    _check_float(self)
    yield _out_like(self)
    yield F.silu(self.to(torch.float32)).to(self.dtype)


def _half_shape(x: Tensor, dim: int) -> tuple[int, ...]:
    _check_float(x)
    require(1 <= x.dim() <= 8 and -x.dim() <= dim < x.dim(), "norm.dim", x=x, last=x.dim() - 1)
    require(x.shape[dim] % 2 == 0, "norm.odd_dim", x=x, dim=dim, size=x.shape[dim])
    axis = dim % x.dim()
    return (*x.shape[:axis], x.shape[axis] // 2, *x.shape[axis + 1 :])


@operator("npu_swiglu")
def npu_swiglu(self: Tensor, dim: int) -> Iterator[Any]:
    """silu(first half) * second half of `self` [.., 2 D, ..] along `dim`, float dtype."""
    yield Out(_half_shape(self, dim), self.dtype)
    a, b = self.to(torch.float32).chunk(2, dim)
    yield (F.silu(a) * b).to(self.dtype)


@operator("npu_geglu")
def npu_geglu(self: Tensor, dim: int, approximate: int, activate_left: bool) -> Iterator[Any]:
    """(value * gelu(gate), gelu(gate)) of `self` [.., 2 D], float dtype; gate last unless `activate_left`."""
    require(approximate in (0, 1), "norm.geglu_approximate", approximate=approximate)
    half = Out(_half_shape(self, dim), self.dtype)
    yield half, half
    a, b = self.to(torch.float32).chunk(2, dim)
    value, gate = (b, a) if activate_left else (a, b)
    gelu = F.gelu(gate, approximate="tanh" if approximate else "none")
    yield (value * gelu).to(self.dtype), gelu.to(self.dtype)
