"""Inputs shared by the tests of `mx`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MX_FORMATS = ("mxfp8", "mxfp8_e5m2", "mxfp4")


def bf16_from_bits(bits: Tensor) -> Tensor:
    """int32 0 to 65535 -> the bfloat16 numbers with these bits."""
    return torch.where(bits > 0x7FFF, bits - 0x10000, bits).to(torch.int16).view(torch.bfloat16)


def every_bf16() -> Tensor:
    """bfloat16 [65536]: all bit patterns."""
    return bf16_from_bits(torch.arange(0x10000, dtype=torch.int32))


def every_finite_amax() -> Tensor:
    """All 32640 finite bfloat16 numbers with sign bit 0, including zero and the subnormals."""
    return every_bf16()[:0x7F80]


def random_blocks(count: int, seed: int, lowest: int = 0) -> Tensor:
    """bfloat16 [count, 32], finite: exponents of the full range, in a block at most 24 below its largest."""
    generator = torch.Generator().manual_seed(seed)
    top = torch.randint(lowest, 255, (count, 1), generator=generator)
    below = torch.randint(0, 24, (count, 32), generator=generator)
    bits = (top - below).clamp(min=0) << 7
    bits |= torch.randint(0, 128, bits.shape, generator=generator)
    bits |= torch.randint(0, 2, bits.shape, generator=generator) << 15
    return bf16_from_bits(bits)


def blocks_of(amax: Tensor, seed: int) -> Tensor:
    """bfloat16 [n, 32] whose largest magnitudes are `amax` [n], with random position and sign."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(amax.numel(), 32, generator=generator) * 2 - 1
    share = share * torch.exp2(-torch.randint(0, 12, share.shape, generator=generator).float())
    x = (share * amax.float().unsqueeze(1)).to(torch.bfloat16)
    index = torch.randint(0, 32, (amax.numel(), 1), generator=generator)
    sign = torch.randint(0, 2, (amax.numel(), 1), generator=generator) * 2 - 1
    return x.scatter(1, index, (amax.unsqueeze(1) * sign).to(torch.bfloat16))


def raw(t: Tensor) -> Tensor:
    """float8 as uint8; other dtypes unchanged."""
    return t.view(torch.uint8) if t.element_size() == 1 else t
