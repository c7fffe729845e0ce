"""E8M0 scales: the largest magnitude of a block -> a power of two, by integer arithmetic on float32 bits.

All rules except msModelSlim's have two integers (`thresholds`). With amax = 1.frac x 2^E,

    exponent = E - shift + (frac > threshold),   clamped to [-127, 127],   byte = exponent + 127

| rule    | meaning                                 | same as                                         |
|---------|-----------------------------------------|-------------------------------------------------|
| floor   | floor(log2 amax) - emax                 | OCP MX v1.0 6.3, NPU scale_alg 0, torchao FLOOR |
| ceil    | ceil(log2(amax / max))                  | NPU scale_alg 1, cuBLAS, torchao RCEIL          |
| pow2    | ceil(log2 amax) - emax                  | torchao CEIL                                    |
| even    | floor of amax rounded, halves up, to as | torchao EVEN; for e2m1 this is the 8/7 rule     |
|         | many bits as the element's mantissa has |                                                 |
| max:<m> | ceil(log2(amax / m)), e2m1              | NPU scale_alg 2 with dst_type_max m             |

Zero and tiny blocks get byte 0 = 2^-127 and are divided by exactly that. A block with an infinity or a NaN
gets byte 255, which is NaN (OCP MX v1.0 5.4.1; NPU, all algorithms), and its elements are NaN, or 0 if the
element has no NaN. Known differences: the NPU's algorithms 0 and 2 also set blocks of byte 0 to zeros;
torchao divides a block of byte 0 by 2^-126 (RCEIL: by 1), gives a block with an infinity a finite scale, and
its RCEIL computes log2 in float32, which may miss a quotient of float32 input just above a power of two (a
few blocks in a million).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ascendit.mx.formats import E2M1, Element

BIAS = 127
NAN_BYTE = 255
_FRACTION = (1 << 23) - 1


def split_blocks(rows: Tensor, block: int) -> Tensor:
    """[.., K] -> [.., ceil(K / block), block], same dtype; the last block is padded with zeros."""
    padding = -rows.shape[-1] % block
    if padding:
        rows = torch.nn.functional.pad(rows, (0, padding))
    blocks: Tensor = rows.unflatten(-1, (-1, block))
    return blocks


def join_blocks(blocks: Tensor, length: int) -> Tensor:
    """[.., n, block] -> [.., length], same dtype: the inverse of `split_blocks`, without the padding."""
    return blocks.flatten(-2)[..., :length]


def exponent_and_fraction(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..] -> int32 E, frac [..]: |x| = (1 + frac / 2^23) 2^E. Zeros and subnormals give E = -127."""
    bits = x.contiguous().view(torch.int32) & 0x7FFFFFFF
    return (bits >> 23) - BIAS, bits & _FRACTION


def power_of_two(exponent: Tensor) -> Tensor:
    """int32 in [-127, 127] -> float32 2^exponent, same shape, exact (2^-127 is subnormal)."""
    bits = torch.where(exponent > -BIAS, (exponent + BIAS) << 23, 1 << 22)
    return bits.to(torch.int32).view(torch.float32)


def thresholds(rule: str, element: Element) -> tuple[int, int]:
    """(shift, threshold) of a rule, see above. `rule`: floor, ceil, pow2, even or max:<m>."""
    if rule == "floor":
        return element.emax, _FRACTION
    if rule == "pow2":
        return element.emax, 0
    if rule == "even":
        return element.emax, _FRACTION - (1 << (22 - element.mbits))
    bound = element.max if rule == "ceil" else float(rule.removeprefix("max:"))
    fraction, exponent = math.frexp(bound)
    return exponent - 1, int((2 * fraction - 1) * (1 << 23))


def fraction_mask(rule: str, element: Element) -> int:
    """The bits of `frac` that a rule uses. `max:6` and `max:7` truncate amax to bfloat16, as the NPU does.

    This affects float32 input only.
    """
    truncate = element is E2M1 and rule.startswith("max:") and float(rule[4:]) in (6.0, 7.0)
    return _FRACTION & ~0xFFFF if truncate else _FRACTION


def shared_exponents(amax: Tensor, element: Element, rule: str) -> Tensor:
    """float32 magnitudes [..] -> int32 exponents [..] in [-127, 127], meaningless for inf and NaN."""
    exponent, fraction = exponent_and_fraction(amax)
    fraction = fraction & fraction_mask(rule, element)
    shift, threshold = thresholds(rule, element)
    return (exponent - shift + (fraction > threshold).to(torch.int32)).clamp(-BIAS, BIAS)


def every_bf16_amax() -> Tensor:
    """bfloat16 [32768]: all non-negative values in the order of their bits; infinity and NaN at the end."""
    return torch.arange(0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def to_bytes(exponents: Tensor, finite: Tensor) -> Tensor:
    """int32 exponents [..], clamped to [-127, 127] -> uint8 E8M0 [..], 255 where not `finite` (bool [..])."""
    return torch.where(finite, exponents.clamp(-BIAS, BIAS) + BIAS, NAN_BYTE).to(torch.uint8)


def from_bytes(scale: Tensor) -> Tensor:
    """uint8 E8M0 [..] -> float32 powers of two [..], NaN for byte 255 (OCP MX v1.0 5.4.1)."""
    exponents = scale.to(torch.int32) - BIAS
    value = power_of_two(exponents.clamp(max=BIAS))
    return torch.where(scale == NAN_BYTE, torch.nan, value)
