"""Elements: rounding scaled float32 values to codes, and codes back; 4-bit codes two to a byte.

A code is sign, exponent, mantissa in the low bits of a uint8, as OCP MX v1.0 5.3 lays them out. Values beyond
the largest saturate (OCP leaves this open; the NPU's casts and torchao saturate). The sign of zero is kept,
and a negative value that rounds to zero gives minus zero (IEEE; not so in `mx.msmodelslim`). All
steps are exact in float32 and int32, so they give the same bits on every device.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ascendit.mx.formats import E2M1, E4M3, E5M2, Element
from ascendit.mx.scales import exponent_and_fraction, power_of_two

ELEMENTS = {e.name: e for e in (E4M3, E5M2, E2M1)}


def encode(values: Tensor, element: Element, rounding: str) -> Tensor:
    """float32 without NaN -> uint8 codes of the same shape. `rounding`: one of `formats.ROUNDINGS`."""
    negative = torch.signbit(values)
    magnitude = values.abs().clamp(max=element.max)
    exponent = exponent_and_fraction(magnitude)[0].clamp(min=element.emin)
    steps = magnitude * power_of_two(element.mbits - exponent)  # units of the last place
    return assemble(round_steps(steps, negative, rounding), exponent, negative, element)


def assemble(steps: Tensor, exponent: Tensor, negative: Tensor, element: Element) -> Tensor:
    """Whole `steps` of 2^(exponent - mbits) -> uint8 codes, saturated. A carry goes into the exponent."""
    qdata = steps.to(torch.int32) + ((exponent - element.emin) << element.mbits)
    qdata = qdata.clamp(max=largest(element)) | (negative.to(torch.int32) << (element.bits - 1))
    return qdata.to(torch.uint8)


def largest(element: Element) -> int:
    """The code of `element.max`."""
    exponent = element.emax - element.emin + 1
    return (exponent << element.mbits) + int((element.max / 2.0**element.emax - 1) * 2**element.mbits)


def round_steps(steps: Tensor, negative: Tensor, rounding: str) -> Tensor:
    """Magnitudes to whole numbers, by one of `formats.ROUNDINGS` of the values they stand for."""
    if rounding == "rint":
        return torch.round(steps)
    whole = torch.floor(steps)
    up = negative & (steps > whole) if rounding == "floor" else steps - whole >= 0.5
    return whole + up.to(steps.dtype)


def decode(qdata: Tensor, element: Element) -> Tensor:
    """uint8 codes -> float32 values, exact. e4m3 0x7f is NaN, e5m2 0x7c infinity, 0x7d to 0x7f NaN."""
    wide = qdata.to(torch.int32)
    exponent = (wide >> element.mbits) & ((1 << element.ebits) - 1)
    mantissa = wide & ((1 << element.mbits) - 1)
    steps = torch.where(exponent > 0, mantissa + (1 << element.mbits), mantissa)
    scale = power_of_two((exponent - 1).clamp(min=0) + (element.emin - element.mbits))
    value = steps.to(torch.float32) * scale
    if element.nan is not None:
        body = wide & 0x7F
        value = torch.where(body > largest(element), torch.nan, value)
        if element.name == "e5m2":
            value = torch.where(body == 0x7C, torch.inf, value)
    return torch.where(wide >> (element.bits - 1) == 1, -value, value)


def decode_stored(raw: Tensor, element: Element, length: int) -> Tensor:
    """uint8 as stored [..., K], or [..., ceil(K / 2)] for 4 bits -> float32 [..., K]: `decode`, but fast.

    By a table of the 256 bytes: the same bits on every device.
    """
    table = _table(element.name).to(raw.device)
    if element.bits == 8:
        return table[raw.to(torch.int32)]
    return table[raw.to(torch.int32)].flatten(-2)[..., :length]


@functools.cache
def _table(name: str) -> Tensor:
    """float32 [256], or [256, 2] for the two codes of a byte."""
    every = torch.arange(256, dtype=torch.uint8)
    element = ELEMENTS[name]
    return decode(every if element.bits == 8 else unpack(every[:, None], 2), element)


def pack(qdata: Tensor) -> Tensor:
    """uint8 4-bit codes [..., K] -> uint8 [..., ceil(K / 2)]: the even index in the low nibble.

    An odd K leaves the last high nibble 0. The order is that of the NPU, msModelSlim and torchao.
    """
    if qdata.shape[-1] % 2:
        qdata = torch.nn.functional.pad(qdata, (0, 1))
    return qdata[..., 0::2] | (qdata[..., 1::2] << 4)


def unpack(packed: Tensor, length: int) -> Tensor:
    """uint8 [..., ceil(length / 2)] -> uint8 4-bit codes [..., length]: the inverse of `pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :length]
