"""Rows of `doctor`: which compiled kernels run here, and why not where PyTorch does their work."""

from __future__ import annotations

from ascendit.device.report import Row
from ascendit.native.build import native

KERNELS = {
    "encode": "quantizing weights",
    "attention": "attention on a CPU",
    "linear": "linear layers on codes on a CPU",
    "elementwise": "norms, RoPE and GELU on a CPU",
}
"""Source in `native/` -> what it is for."""


def compiled_kernels() -> list[Row]:
    """One row for each source. What was never compiled is compiled now, which takes seconds."""
    return [_kernel(name, use) for name, use in KERNELS.items()]


def _kernel(name: str, use: str) -> Row:
    built = native(name)
    row = Row(item=f"kernel: {name}", found=f"native, {built.reason}", needed=f"optional, for {use}")
    if built.library is not None:
        return row
    return Row(
        item=row.item,
        found=f"PyTorch instead: {built.reason}",
        needed=row.needed,
        status="absent",
        fix="not needed: it is slower",
    )
