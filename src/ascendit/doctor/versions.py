"""Versions that belong together on an Ascend machine, as tables; and which row of them a machine is.

Only what the vendor has published, each with where. None, or no entry: no public page says. Rows older than
the oldest torch that ascendit runs with are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ascendit.doctor.report import numbers

TORCH_NPU_PAGE = "https://gitcode.com/Ascend/pytorch/blob/master/COMPATIBILITY.md"
MINDIE_PAGE = "https://www.hiascend.com/document/detail/en/mindie/310/releasenote/docs/en/release_note.md"
CANN_PAGE = "https://www.hiascend.com/document/detail/en/canncommercial/850/releasenote/releasenote_0000.html"
CLUSTER_PAGE = "https://www.hiascend.com/document/detail/en/mindcluster/2610/patchnote/mxreleasenote_006.html"
WHEEL_PAGE = "https://pypi.org/project/torch-npu/2.13.0/"


@dataclass(frozen=True)
class Stack:
    """One row. `cann`: 9.1 stands for every 9.1.x. `release`: the vendor's name of the torch_npu release."""

    torch_npu: str
    torch: str
    cann: str | None
    release: str | None
    source: str = TORCH_NPU_PAGE

    def __str__(self) -> str:
        return f"torch {self.torch}, torch_npu {self.torch_npu}, CANN {self.cann or 'not published'}"


STACKS: tuple[Stack, ...] = (
    Stack("2.13.0", "2.13.0", None, None, WHEEL_PAGE),
    Stack("2.12.0.post2", "2.12.0", "9.1", "26.1.1"),
    Stack("2.11.0.post2", "2.11.0", "9.1", "26.1.1"),
    Stack("2.10.0.post6", "2.10.0", "9.1", "26.1.1"),
    Stack("2.9.0.post8", "2.9.0", "9.1", "26.1.1"),
    Stack("2.12.0", "2.12.0", "9.1.0", "26.1.0"),
    Stack("2.11.0", "2.11.0", "9.1.0", "26.1.0"),
    Stack("2.10.0.post4", "2.10.0", "9.1.0", "26.1.0"),
    Stack("2.9.0.post6", "2.9.0", "9.1.0", "26.1.0"),
    Stack("2.10.0", "2.10.0", "9.0.0", "26.0.0"),
    Stack("2.9.0.post2", "2.9.0", "9.0.0", "26.0.0"),
    Stack("2.9.0", "2.9.0", "8.5.0", "7.3.0"),
)
"""Newest first. ascendit's schemas are those of the first row; its CANN is not published."""

MINDIESD: Mapping[str, tuple[str, ...]] = {
    "9.1.0": ("3.1.0",),
    "9.0.1": ("3.1.0",),
    "9.0.0": ("3.1.0", "3.0.0"),
    "8.5.1": ("3.0.0",),
    "8.5.0": ("3.0.0", "2.3.0"),
}
"""CANN -> MindIE-SD, from `MINDIE_PAGE`."""
DRIVERS: Mapping[str, tuple[str, ...]] = {
    "9.1.0": ("26.1.0", "25.7.RC1"),
    "8.5.0": ("25.5", "25.3", "25.2", "25.0"),
}
"""CANN -> driver, as its version begins; 25.7.RC1 is the Atlas 350's. From `CLUSTER_PAGE` and `CANN_PAGE`."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a machine has; None for what it lacks."""

    torch: str | None = None
    torch_npu: str | None = None
    cann: str | None = None
    mindiesd: str | None = None
    driver: str | None = None


@dataclass(frozen=True)
class Match:
    """`stack`: the row of this torch_npu. `wrong`: of another row. `unlisted`: what no page tells."""

    stack: Stack | None
    wrong: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()


def match(found: Found) -> Match:
    """The row that the machine's torch_npu is, and what beside it is not of that row."""
    stack = next((s for s in STACKS if s.torch_npu == _public(found.torch_npu)), None)
    wrong, unlisted = [], []
    if stack is None:
        unlisted.append(f"torch_npu {found.torch_npu or 'none'} is in no published table")
    else:
        if found.torch is not None and _public(found.torch) != stack.torch:
            wrong.append(f"torch {found.torch} is not the {stack.torch} of torch_npu {stack.torch_npu}")
        if stack.cann is None:
            unlisted.append(f"no CANN is published for torch_npu {stack.torch_npu}")
        elif found.cann is not None and not begins(found.cann, stack.cann):
            wrong.append(f"CANN {found.cann} is not the {stack.cann} of torch_npu {stack.torch_npu}")
    unlisted += _beside("MindIE-SD", found.mindiesd, found.cann, MINDIESD)
    unlisted += _beside("driver", found.driver, found.cann, DRIVERS)
    return Match(stack, tuple(wrong), tuple(unlisted))


def advise(found: Found) -> Stack:
    """The whole row that asks for the fewest changes: same CANN, then same torch, then the newest."""

    def score(stack: Stack) -> tuple[bool, bool, bool]:
        cann = found.cann is not None and stack.cann is not None and begins(found.cann, stack.cann)
        torch = found.torch is not None and numbers(found.torch)[:2] == numbers(stack.torch)[:2]
        return cann, stack.cann is not None, torch

    return max(STACKS, key=score)  # the first of equals


def begins(version: str, start: str) -> bool:
    """Whether `version` is `start` or one below it: 9.1.0 begins with 9.1, 9.10.0 does not."""
    version, start = version.lower(), start.lower()
    return version == start or version.startswith((f"{start}.", f"{start}-"))


def _beside(
    what: str, version: str | None, cann: str | None, table: Mapping[str, Sequence[str]]
) -> list[str]:
    """A line if a table has this CANN, and another `what` for it."""
    known = table.get(cann or "", ())
    if version is None or not known or any(begins(version, k) for k in known):
        return []
    return [f"{what} {version} is not among those published for CANN {cann}: {', '.join(known)}"]


def _public(version: str | None) -> str | None:
    """2.10.0+cpu -> 2.10.0"""
    return None if version is None else version.partition("+")[0]
