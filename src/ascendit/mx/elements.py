"""Elements: round scaled float32 values to FP8 or FP4 encodings, and decode them; pack two FP4 in a byte.

An encoding is sign, exponent, mantissa in the low bits of a uint8 (layout of OCP MX v1.0 5.3). Values beyond
the largest saturate (OCP leaves this open; the NPU's casts and torchao saturate). The sign of zero is
preserved, and a negative value that rounds to zero gives -0 (IEEE; `mx.msmodelslim` differs). All steps are
exact in float32 and int32, so every device gives the same bits.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ascendit.mx.formats import E2M1, E4M3, E5M2, Element
from ascendit.mx.scales import exponent_and_fraction, power_of_two

ELEMENTS = {e.name: e for e in (E4M3, E5M2, E2M1)}


def encode(values: Tensor, element: Element, rounding: str) -> Tensor:
    """float32 [..] without NaN -> uint8 encodings [..], saturated. `rounding`: one of `formats.ROUNDINGS`."""
    negative = torch.signbit(values)
    magnitude = values.abs().clamp(max=element.max)
    exponent = exponent_and_fraction(magnitude)[0].clamp(min=element.emin)
    steps = magnitude * power_of_two(element.mbits - exponent)  # in units of the last mantissa bit
    return assemble(round_steps(steps, negative, rounding), exponent, negative, element)


def assemble(steps: Tensor, exponent: Tensor, negative: Tensor, element: Element) -> Tensor:
    """Integral float32 `steps` [..] of 2^(exponent - mbits), with int32 `exponent` and bool `negative` [..]
    -> uint8 encodings [..], saturated. A carry increments the exponent.
    """
    qdata = steps.to(torch.int32) + ((exponent - element.emin) << element.mbits)
    qdata = qdata.clamp(max=largest(element)) | (negative.to(torch.int32) << (element.bits - 1))
    return qdata.to(torch.uint8)


def largest(element: Element) -> int:
    """The encoding of `element.max`."""
    exponent = element.emax - element.emin + 1
    return (exponent << element.mbits) + int((element.max / 2.0**element.emax - 1) * 2**element.mbits)


def round_steps(steps: Tensor, negative: Tensor, rounding: str) -> Tensor:
    """Round float32 magnitudes [..] to integers. `negative`: bool [..], their signs."""
    if rounding == "rint":
        return torch.round(steps)
    floor = torch.floor(steps)
    up = negative & (steps > floor) if rounding == "floor" else steps - floor >= 0.5
    return floor + up.to(steps.dtype)


def decode(qdata: Tensor, element: Element) -> Tensor:
    """uint8 encodings [..] -> float32 [..], exact. e4m3 0x7f is NaN, e5m2 0x7c infinity, 0x7d to 0x7f NaN."""
    bits = qdata.to(torch.int32)
    exponent = (bits >> element.mbits) & ((1 << element.ebits) - 1)
    mantissa = bits & ((1 << element.mbits) - 1)
    steps = torch.where(exponent > 0, mantissa + (1 << element.mbits), mantissa)
    scale = power_of_two((exponent - 1).clamp(min=0) + (element.emin - element.mbits))
    value = steps.to(torch.float32) * scale
    if element.nan is not None:
        magnitude = bits & 0x7F
        value = torch.where(magnitude > largest(element), torch.nan, value)
        if element.name == "e5m2":
            value = torch.where(magnitude == 0x7C, torch.inf, value)
    return torch.where(bits >> (element.bits - 1) == 1, -value, value)


def decode_stored(raw: Tensor, element: Element, length: int) -> Tensor:
    """Stored bytes, uint8 [.., K], or [.., ceil(K / 2)] for FP4 -> float32 [.., K], with K = `length`.

    Same values as `decode`, but faster: a lookup in a table of the 256 bytes.
    """
    table = _table(element.name, raw.device)
    if element.bits == 8:
        return table[raw.to(torch.int32)]
    return table[raw.to(torch.int32)].flatten(-2)[..., :length]


@functools.cache
def _table(name: str, device: torch.device) -> Tensor:
    """float32 [256], or [256, 2] for the two FP4 values of a byte."""
    all_bytes = torch.arange(256, dtype=torch.uint8)
    element = ELEMENTS[name]
    return decode(all_bytes if element.bits == 8 else unpack(all_bytes[:, None], 2), element).to(device)


def pack(qdata: Tensor) -> Tensor:
    """uint8 FP4 encodings [.., K] -> uint8 [.., ceil(K / 2)], the even index in the low nibble.

    For an odd K the last high nibble is 0. The NPU, msModelSlim and torchao use the same order.
    """
    if qdata.shape[-1] % 2:
        qdata = torch.nn.functional.pad(qdata, (0, 1))
    return qdata[..., 0::2] | (qdata[..., 1::2] << 4)


def unpack(packed: Tensor, length: int) -> Tensor:
    """uint8 [.., ceil(length / 2)] -> uint8 FP4 encodings [.., length]: the inverse of `pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :length]
