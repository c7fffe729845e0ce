"""Ascend chips as data: SoC numbers; memory and published peak rates per variant. Does not import torch."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ChipVariant:
    """One product variant of a chip, a row of `chips.toml`. Memory in GiB, bandwidths in GB/s."""

    name: str
    product: str
    memory_gib: int
    bf16_tflops: float
    int8_tflops: float
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    memory_gbps: int
    link_gbps: int | None = None
    source: str
    """Source of the figures; says which are `derived` or `unconfirmed`."""


@dataclass(frozen=True)
class Chip:
    """One Ascend chip.

    `soc_versions`: values of `torch_npu.npu.get_soc_version()`. `soc_name`: a device name of this chip.
    """

    name: str
    product: str
    soc_versions: range
    soc_name: str

    @property
    def variants(self) -> tuple[ChipVariant, ...]:
        """Its variants on sale, the most common first."""
        return tuple(ChipVariant(**row) for row in _rows()[self.name])


@functools.cache
def _rows() -> Mapping[str, Any]:
    return tomllib.loads(Path(__file__).with_name("chips.toml").read_text(encoding="utf-8"))


CHIPS: dict[str, Chip] = {
    c.name: c
    for c in (
        Chip("a2", "Atlas A2 (Ascend 910B)", range(220, 226), "Ascend910B1"),
        Chip("a3", "Atlas A3 (Ascend 910C)", range(250, 256), "Ascend910_9391"),
        Chip("a5", "Atlas 350 (Ascend 950)", range(260, 300), "Ascend950PR_9589"),
    )
}


def chip_of(soc_version: int) -> Chip | None:
    """The chip with this SoC number; None if Wan does not run on it."""
    return next((c for c in CHIPS.values() if soc_version in c.soc_versions), None)
