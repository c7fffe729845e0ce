"""Ascend chips as data: SoC numbers, and the memory and published peaks of each variant. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ChipVariant:
    """One variant of a chip: memory and published peaks of what torch sees as one device.

    Dense matrix products on the cube unit alone; product names such as "313T" add the vector unit.
    """

    name: str
    product: str
    memory_gib: int
    bf16_tflops: float
    int8_tflops: float
    fp8_tflops: float | None = None
    """None: the chip has no such matmul."""
    fp4_tflops: float | None = None
    memory_gbps: int
    """Bandwidth of its memory in GB/s."""
    link_gbps: int | None = None
    """To other devices, all links, both directions, in GB/s. None: no confirmed figure is published."""
    source: str
    """Where the figures are from; `derived` and `unconfirmed` where they are."""


@dataclass(frozen=True)
class Chip:
    """`soc_versions`: what `torch_npu.npu.get_soc_version()` says. `soc_name`: one name of such a device.

    `variants`: what it is sold as, the usual one first.
    """

    name: str
    product: str
    soc_versions: range
    soc_name: str
    variants: tuple[ChipVariant, ...]


_CUBE = "cann/ops-nn#6033 on gitcode.com explains 313T and 376T as cube plus vector unit"
_ARCH = "cannbot npu-arch-guide.md, from CANN's INI files: cores x clock x 4096 multiply-adds"
_MFU = "op-mfu-calculator SKILL.md"
_MINDIE = "MindIE-SD docs/zh/features/supported_matrix.md"
_950 = "Ascend 950 white paper, table 3-1, quoted in cann/ops-nn#6033 and cann/ops-cv#997 on gitcode.com"

_A2 = (
    ChipVariant(
        name="a2-64g",
        product="Ascend 910B3, 313T: the default Atlas 800I A2",
        memory_gib=64,
        bf16_tflops=294.9,
        int8_tflops=589.8,
        memory_gbps=1600,
        source=f"{_MINDIE}; {_MFU}; {_CUBE}; int8 derived as twice BF16; bandwidth unconfirmed",
    ),
    ChipVariant(
        name="a2-64g-376t",
        product="Ascend 910B2, 376T",
        memory_gib=64,
        bf16_tflops=353.9,
        int8_tflops=707.8,
        memory_gbps=1600,
        source=f"{_ARCH}; {_CUBE}; int8 derived as twice BF16; bandwidth unconfirmed",
    ),
    ChipVariant(
        name="a2-32g",
        product="Ascend 910B4, 280T",
        memory_gib=32,
        bf16_tflops=270.0,
        int8_tflops=540.0,
        memory_gbps=800,
        source=f"{_MFU}; int8 derived as twice BF16; bandwidth unconfirmed: half of a 910B2's by pto-isa's"
        " flash_atten README",
    ),
)
_A3 = (
    ChipVariant(
        name="a3",
        product="one of two dies of an Ascend 910C, 752T a chip",
        memory_gib=64,
        bf16_tflops=353.9,
        int8_tflops=707.8,
        memory_gbps=1600,
        link_gbps=392,
        source="CloudMatrix384 summaries, each for a chip: 752 TFLOPS by reportify.ai, 784 GB/s by besthub,"
        f" 3200 GB/s by techpowerup; derived: half of a chip, 353.9 of 376 on the cube unit, {_CUBE}",
    ),
    ChipVariant(
        name="a3-560t",
        product="one of two dies of an Ascend 910C, 560T a chip: the Atlas 800I A3",
        memory_gib=64,
        bf16_tflops=270.0,
        int8_tflops=540.0,
        memory_gbps=1600,
        link_gbps=392,
        source=f"{_MINDIE}; derived: a die of 280T as the 910B4's; bandwidths as those of a3, unconfirmed",
    ),
)
_A5 = (
    ChipVariant(
        name="a5",
        product="Ascend 950PR PCIe: Atlas 350",
        memory_gib=112,
        bf16_tflops=378.0,
        int8_tflops=756.0,
        fp8_tflops=756.0,
        fp4_tflops=1513.0,
        memory_gbps=1400,
        link_gbps=2000,
        source=f"{_950}; link as that of the server card, unconfirmed",
    ),
    ChipVariant(
        name="a5-128g",
        product="Ascend 950PR server",
        memory_gib=128,
        bf16_tflops=432.0,
        int8_tflops=865.0,
        fp8_tflops=865.0,
        fp4_tflops=1730.0,
        memory_gbps=1600,
        link_gbps=2000,
        source=f"{_950}; link: Huawei Connect 2025 keynote",
    ),
)

CHIPS: dict[str, Chip] = {
    c.name: c
    for c in (
        Chip("a2", "Atlas A2 (Ascend 910B)", range(220, 226), "Ascend910B1", _A2),
        Chip("a3", "Atlas A3 (Ascend 910C)", range(250, 256), "Ascend910_9391", _A3),
        Chip("a5", "Atlas 350 (Ascend 950)", range(260, 300), "Ascend950PR_9589", _A5),
    )
}


def chip_of(soc_version: int) -> Chip | None:
    """The chip with this SoC number, None for one that Wan does not run on."""
    return next((c for c in CHIPS.values() if soc_version in c.soc_versions), None)
