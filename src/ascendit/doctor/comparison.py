"""What one case of the self-check came to, and how two results are compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ascendit.mx.decibels import decibels

Verdict = Literal["exact", "close", "wrong", "error", "crashed", "not installed", "answered", "differs"]
"""exact: bit for bit. close: within the limit. answered, differs: a question, as the twin tells it or not."""
BAD = ("wrong", "error", "crashed")
ORDER: tuple[Verdict, ...] = (
    "crashed", "error", "wrong", "differs", "not installed", "close", "answered", "exact"
)  # fmt: skip
"""Worst first."""

DECIBELS = {"bfloat16": 50.0, "float16": 60.0, "float32": 80.0}
"""What a result in this dtype must reach: power of the expected one over that of the difference."""
ATTENTION_DECIBELS = 40.0
"""Attention kernels may keep probabilities in 16 bits."""
INT8_SHARE, CODE_SHARE = 0.01, 0.001
"""int8 codes that may be off by one step; other codes and E8M0 scales that may differ."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One case. `part`: question, operator or function."""

    part: str
    name: str
    operator: str
    used: bool = True
    """Whether ascendit calls it; only these decide whether the check is passed."""
    verdict: Verdict = "exact"
    arguments: tuple[str, ...] = ()
    """Dtype and shape of each tensor, words for the rest."""
    max_abs: float | None = None
    max_rel: float | None = None
    db: float | None = None
    """None where nothing differs."""
    different: float | None = None
    """Share of the codes that differ, for results that are codes."""
    microseconds: float | None = None
    how: str = ""
    """For functions: which operator was chosen, and why."""
    answer: str = ""
    expected: str = ""
    error: str = ""

    @property
    def failed(self) -> bool:
        return self.used and self.verdict in BAD


def worst(verdicts: Iterator[Verdict] | list[Verdict]) -> Verdict:
    """The worst of them; exact if there is none."""
    found = set(verdicts)
    return next((v for v in ORDER if v in found), "exact")


def compare(base: Result, actual: Any, expected: Any, *, db: float | None = None) -> Result:
    """`base` with the verdict of two results: tensors, tuples of them, or whole numbers. All on the CPU.

    `db`: the limit for floats instead of that of their dtype. Only an operator whose whole result is a number
    is judged by it; numbers beside tensors, as seeds are, may be anything.
    """
    if isinstance(expected, int):
        same = actual == expected
        return replace(
            base, verdict="exact" if same else "wrong", error="" if same else f"{actual}, not {expected}"
        )
    pairs = list(zip(_tensors(actual), _tensors(expected), strict=False))
    results = [_pair(base, a, e, db) for a, e in pairs if a.numel() or e.numel()]
    if not results:
        return base
    verdict = worst([r.verdict for r in results])
    first = next(r for r in results if r.verdict == verdict)
    return replace(
        base,
        verdict=verdict,
        max_abs=_most(r.max_abs for r in results),
        max_rel=_most(r.max_rel for r in results),
        db=_least(r.db for r in results),
        different=_most(r.different for r in results),
        error=first.error,
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _pair(base: Result, actual: Tensor, expected: Tensor, db: float | None) -> Result:
    def words(t: Tensor) -> str:
        return described(t)

    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return replace(base, verdict="wrong", error=f"{words(actual)} came, not {words(expected)}")
    name = str(expected.dtype).removeprefix("torch.")
    if name not in DECIBELS:
        return _codes(base, actual, expected)
    return _floats(base, actual, expected, DECIBELS[name] if db is None else db)


def _codes(base: Result, actual: Tensor, expected: Tensor) -> Result:
    """Codes, scales as bytes and packed words: equal, or hardly different."""
    if expected.dtype.is_floating_point:
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    step = (actual.to(torch.int64) - expected.to(torch.int64)).abs()
    share = float((step != 0).double().mean())
    if share == 0:
        return replace(base, different=0.0)
    small = expected.dtype == torch.int8 and int(step.max()) <= 1
    limit = INT8_SHARE if small else CODE_SHARE if expected.element_size() == 1 else 0.0
    if share <= limit:
        return replace(base, verdict="close", different=share)
    where = [int(i) for i in (step != 0).nonzero()[0]]
    error = f"{share:.2%} of the codes differ (at most {limit:.1%}), the first at {where}"
    return replace(base, verdict="wrong", different=share, error=error)


def _floats(base: Result, actual: Tensor, expected: Tensor, limit: float) -> Result:
    a, e = actual.double(), expected.double()
    if torch.equal(a.isfinite(), e.isfinite()) and torch.equal(
        a[~e.isfinite()].isnan(), e[~e.isfinite()].isnan()
    ):
        a, e = a[e.isfinite()], e[e.isfinite()]
    else:
        return replace(
            base, verdict="wrong", error="NaN or infinity where the expected is finite, or not there"
        )
    gap = (a - e).abs()
    if not gap.numel() or float(gap.max()) == 0:
        return replace(base, max_abs=0.0, max_rel=0.0)
    size = float(e.abs().max())
    noise, signal = float(gap.square().sum()), float(e.square().sum())
    db = decibels(signal, noise) if signal else 0.0
    found = replace(base, max_abs=float(gap.max()), max_rel=float(gap.max()) / size if size else None, db=db)
    if db >= limit:
        return replace(found, verdict="close")
    return replace(found, verdict="wrong", error=f"{db:.1f} dB, at least {limit:g} needed")


def _most(values: Iterator[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _least(values: Iterator[float | None]) -> float | None:
    return min((v for v in values if v is not None), default=None)


def described(value: Any) -> str:
    """`bfloat16 [5, 96]`, with its strides where it is not contiguous; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    name = str(value.dtype).removeprefix("torch.")
    strides = "" if value.is_contiguous() else f" strides {list(value.stride())}"
    return f"{name} {list(value.shape)}{strides}"
