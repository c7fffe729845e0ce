"""msModelSlim 26.1.0, bit-identical: its scale rules, its rounding and the dtype of each step.

Differences from OCP: halves are rounded away from zero (`floor(|v| + 0.5)`); MXFP4 adds 9.6e-7 before the
logarithm, so no MXFP4 scale is under 2^-22 and |x| < 2^-24 becomes 0; some steps use the dtype of the weight.
A real run has bfloat16 weights under the NPU's autocast, which computes log2, pow and reciprocal in float32
and everything else in bfloat16; bfloat16 input reproduces this. float32 input uses float32 throughout, with
torch.log2, which rounds the value just below some powers of two up to them. `msms:minmax_bf16` is the run
without autocast (log2 rounded to bfloat16: 1 to 2 % of the scales are one too large).

Defined here, since msModelSlim gives no valid result: a block with an infinity or a NaN gets scale byte 255
(upstream: undefined casts of NaN, and byte 252 for an infinity in MXFP4), a group of 512 zeros gets
dual_scale 0 and elements 0 (upstream 0 / 0), and `fouroversix` clamps scales to at least 2^-127 (upstream's
byte wraps around) and accepts any K (upstream multiples of 32).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ascendit.mx.elements import assemble, decode
from ascendit.mx.formats import E2M1, E4M3, Element
from ascendit.mx.scales import exponent_and_fraction, power_of_two, split_blocks

EPSILON = {torch.float32: 9.6e-7, torch.bfloat16: 1.0078125 * 2.0**-20}
"""9.6e-7 as PyTorch adds it: rounded to bfloat16 for a bfloat16 tensor."""
CEIL_X_CANDIDATES = tuple(6.0 + 0.25 * i for i in range(25))
"""Constants tried by `msms:ceil_x:search`, 6.00 to 12.00; the first of the best wins."""
_INT8_MIN_SCALE = 2.0**-23


def encode_blocks(blocks: Tensor, element: Element, rule: str) -> tuple[Tensor, Tensor]:
    """bfloat16 or float32 [.., n, 32] -> uint8 encodings [.., n, 32], int32 exponents [.., n].

    `rule` without `msms:`: minmax and minmax_bf16 (e4m3, e2m1), mse_round (e4m3), ceil_x:<c>, ceil_x:search
    and fouroversix (e2m1). Results of blocks that are not finite are meaningless; the caller replaces them.
    """
    values, amax = blocks.to(torch.float32), blocks.abs().amax(-1)
    if rule == "ceil_x:search":
        rule = f"ceil_x:{best_ceil_x(_ceil_x_sums(values, amax))}"
    exponents, *others = scale_candidates(amax, element, rule)
    for other in others:
        errors, errors_of_other = (
            (values - _dequantized(values, e, element)).square().mean(-1) for e in (exponents, other)
        )
        exponents = torch.where(errors_of_other < errors, other, exponents)
    return _quantize(values, exponents, element), exponents


def scale_candidates(amax: Tensor, element: Element, rule: str) -> tuple[Tensor, ...]:
    """Largest magnitudes, bfloat16 or float32 [..] -> the candidate exponents of a rule, each int32 [..].

    The second is used where its mean squared error over the block is less. `mse_round`: log2(amax) - 8
    rounded down and up. `fouroversix`: scale amax to 6 or to 4. All other rules have one candidate.
    """
    if rule == "mse_round":
        return tuple((log(amax) - E4M3.emax).clamp(-127, 127) for log in (_floor_log2, _ceil_log2))
    if rule == "fouroversix":
        return _nearest_log2(_divide(amax, 6.0)), _nearest_log2(_divide(amax, 4.0))
    if rule.startswith("ceil_x:"):
        return (_ceil_x(amax, float(rule.removeprefix("ceil_x:"))),)
    return (_minmax(amax, element, coarse_log=rule == "minmax_bf16"),)


def encode_dual(rows: Tensor, coarse: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """[.., K] -> uint8 encodings [.., n, block], int32 exponents [.., n], float32 dual [.., groups].

    A group has `coarse` values. dual = max|w| / 6 of a group, then MXFP4 minmax in float32 on w / dual.
    """
    groups = split_blocks(rows.to(torch.float32), coarse)
    dual = groups.abs().amax(-1) / E2M1.max
    scaled = torch.where((dual == 0).unsqueeze(-1), 0.0, groups / dual.unsqueeze(-1))
    blocks = split_blocks(scaled.flatten(-2)[..., : rows.shape[-1]], block)
    qdata, exponents = encode_blocks(blocks, E2M1, "minmax")
    return qdata, exponents, dual


def encode_int8(rows: Tensor, lowest: int) -> tuple[Tensor, Tensor]:
    """[.., K] -> int8 qdata [.., K], float32 scale [.., 1]; all steps in the dtype of `rows`.

    scale = max(max|w| / 127, 2^-23), qdata = clamp(round_half_even(w / scale), lowest, 127). `lowest` is -128
    in msModelSlim and -127 in its legacy calibrator; the scale is rounded to bfloat16, so -128 does occur.
    """
    dtype = rows.dtype
    scale = (rows.abs().amax(-1, keepdim=True).to(torch.float32) / 127.0).to(dtype).to(torch.float32)
    scale = scale.clamp(min=_INT8_MIN_SCALE)
    steps = (rows.to(torch.float32) / scale).to(dtype).to(torch.float32)
    return torch.round(steps).clamp(lowest, 127).to(torch.int8), scale


def ceil_x_sums(rows: Tensor, block: int = 32) -> list[float]:
    """Sum of squared errors of rows [.., K], bfloat16 or float32, for each of CEIL_X_CANDIDATES.

    Blocks that are not finite count as 0. For a weight that is read in blocks of rows, add these lists and
    pass the sums to `best_ceil_x`.
    """
    blocks = split_blocks(rows, block)
    blocks = blocks.where(blocks.isfinite().all(-1, keepdim=True), 0)
    return _ceil_x_sums(blocks.to(torch.float32), blocks.abs().amax(-1))


def best_ceil_x(errors: list[float]) -> float:
    """The candidate with the least error, the first of equals; 6.0 if no error is finite.

    Errors count as equal if they differ by no more than the order of the float64 summation can cause.
    """
    comparable = [error if math.isfinite(error) else math.inf for error in errors]
    bound = min(comparable) * (1 + 1e-12)
    return next(c for c, error in zip(CEIL_X_CANDIDATES, comparable, strict=True) if error <= bound)


def _ceil_x_sums(values: Tensor, amax: Tensor) -> list[float]:
    """Squares in float32, as in msModelSlim; summed in float64, so that the order does not matter."""
    return [
        float(
            (values - _dequantized(values, _ceil_x(amax, c), E2M1)).square().sum(dtype=torch.float64).item()
        )
        for c in CEIL_X_CANDIDATES
    ]


def _minmax(amax: Tensor, element: Element, coarse_log: bool = False) -> Tensor:
    if element is E4M3:
        return (_floor_log2(amax, coarse_log) - E4M3.emax).clamp(-127, 127)
    return (_floor_log2(_divide_plus_epsilon(amax, 0.875), coarse_log) - E2M1.emax).clamp(-129, 125)


def _ceil_x(amax: Tensor, c: float) -> Tensor:
    """ceil(log2(amax / c + eps)). msModelSlim's comment also subtracts emax; its code does not."""
    return _ceil_log2(_divide_plus_epsilon(amax, c)).clamp(-129, 125)


def _divide(amax: Tensor, divisor: float) -> Tensor:
    """amax / divisor in the dtype of amax."""
    return (amax.to(torch.float32) / divisor).to(amax.dtype)


def _divide_plus_epsilon(amax: Tensor, divisor: float) -> Tensor:
    """amax / divisor + epsilon, both rounded to the dtype of amax."""
    return (_divide(amax, divisor).to(torch.float32) + EPSILON[amax.dtype]).to(amax.dtype)


def _floor_log2(x: Tensor, coarse_log: bool = False) -> Tensor:
    """int32 floor(log2 x). Exact for bfloat16; float32 is rounded by torch.log2. Zero: -127 or less."""
    if x.dtype == torch.float32:
        return torch.floor(_log2(x)).to(torch.int32)
    as_float32 = x.to(torch.float32)
    if coarse_log:
        return torch.floor(_log2(as_float32).to(torch.bfloat16).to(torch.float32)).to(torch.int32)
    return exponent_and_fraction(as_float32)[0]


def _ceil_log2(x: Tensor) -> Tensor:
    """int32 ceil(log2 x), see `_floor_log2`."""
    if x.dtype == torch.float32:
        return torch.ceil(_log2(x)).to(torch.int32)
    exponent, fraction = exponent_and_fraction(x.to(torch.float32))
    return exponent + (fraction > 0).to(torch.int32)


def _log2(x: Tensor) -> Tensor:
    """float32 log2, clamped to [-150, 128] for zeros and infinities."""
    return torch.log2(x).clamp(-150, 128)


def _nearest_log2(x: Tensor) -> Tensor:
    """int32 log2 x rounded to nearest; within 1e-6 of a half: to the odd neighbour. Zero: 0."""
    log = _log2(torch.where(x == 0, 1.0, x.to(torch.float32)))
    floor = torch.floor(log)
    fraction = log - floor
    tie = (fraction - 0.5).abs() <= 1e-6
    up = torch.where(tie, floor % 2 == 0, fraction > 0.5 + 1e-6)
    return (floor + up.to(floor.dtype)).to(torch.int32)


def _quantize(values: Tensor, exponents: Tensor, element: Element) -> Tensor:
    """uint8 encodings of values / 2^exponent, halves away from zero.

    A value that rounds to zero keeps its sign; -0 loses it, for e4m3 also a -0 that scaling produces.
    """
    scaled = values * power_of_two((-exponents).clamp(-127, 127)).unsqueeze(-1)
    scaled = torch.where((exponents < -127).unsqueeze(-1), 0.0, scaled)
    private = exponent_and_fraction(scaled)[0].clamp(element.emin, element.emax)
    steps = torch.floor(scaled.abs() * power_of_two(element.mbits - private) + 0.5)
    negative = scaled < 0 if element is E4M3 else values < 0
    return assemble(steps, private, negative, element)


def _dequantized(values: Tensor, exponents: Tensor, element: Element) -> Tensor:
    """`values` after quantization with these exponents, float32."""
    decoded = decode(_quantize(values, exponents, element), element)
    return decoded * power_of_two(exponents.clamp(-127, 127)).unsqueeze(-1)
