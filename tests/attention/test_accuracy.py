"""Every dense attention kernel of a CPU and of the twins against float64.

Errors are in half steps of BF16: half the distance between two BF16 numbers of the size of the largest
output, the error of rounding once. Kernels whose probabilities are BF16 numbers err by as much again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ascendit.device.attention_kernels import ATTENTION_KERNELS
from ascendit.device.device import parse_device
from ascendit.kernels import reference
from ascendit.kernels.kernel import Kernel, Wish
from ascendit.ops.open_device import open_device
from ascendit.ops.select import kernels_of

DEVICES = ("cpu", "twin:a2", "twin:a3", "twin:a5")
LENGTHS = (1, 2, 3, 17, 31, 33, 47, 49, 127, 255, 257, 511, 1023, 2049, 4095, 4096)
CROSS = (1, 7, 77, 512, 513)
MAX_HALF_STEPS, RMS_ROUNDINGS = 2.0, 1.6
LSE_ERROR = 1e-3
QUANTIZED_SCORES = {"qk_int8": 2.5e-2}
"""Kernel -> its largest relative error, if it does not compute the scores from BF16 numbers."""
SAMPLED = 96
"""Queries that are compared, from all over the sequence; the first and last included."""


class Case(NamedTuple):
    queries: int
    keys: int
    head_dim: int
    batch: int = 1
    layout: str = "contiguous"
    """Or views: every other number of a tensor; padded: the first keys of a longer tensor of NaN."""


def kernel(device: str, name: str) -> Kernel:
    """The kernel `name` on the opened device; skips a test if the device does not have it."""
    if name == "reference":
        return Kernel("attention", name, reference.attention, "", name=name)
    opened = open_device(device)
    for k in kernels_of(opened, Wish()):
        if (k.operator, k.name) == ("attention", name):
            if problem := k.missing():
                pytest.skip(problem)
            return k
    pytest.skip(f"{device} has no kernel {name}")


NAMES = [
    (device, name)
    for device in DEVICES
    for name, row in ATTENTION_KERNELS.items()
    if parse_device(device).operators in row.backends and (name != "reference" or device == "cpu")
]


def takes(name: str, case: Case) -> bool:
    row = ATTENTION_KERNELS[name]
    self_only = row.kinds == ("self",) and case.queries != case.keys
    head = case.head_dim % row.head_multiple == 0 and case.head_dim <= (row.largest_head or math.inf)
    return head and min(case.queries, case.keys) >= row.shortest and not self_only


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, tokens, H, d] in bfloat16."""
    heads = 3 if case.queries < 1000 else 1
    generator = torch.Generator().manual_seed(case.queries * 7919 + case.keys)

    def normal(tokens: int) -> Tensor:
        shape = (case.batch, tokens, heads, case.head_dim)
        numbers = torch.randn(shape, generator=generator).bfloat16()
        if case.layout == "views":
            return torch.stack((numbers, torch.full_like(numbers, torch.nan)), -2)[..., 0, :]
        return numbers

    q, k, v = normal(case.queries), normal(case.keys), normal(case.keys)
    if case.layout == "padded":
        padding = torch.full((case.batch, 5, heads, case.head_dim), torch.nan, dtype=torch.bfloat16)
        k, v = (torch.cat((t, padding), 1)[:, : case.keys] for t in (k, v))
    return q, k, v


def oracle(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """float64 attention of some queries -> [B, rows, H, d] and its log-sum-exp [B, H, rows]."""
    q, k, v = q[:, rows].double(), k.double(), v.double()
    scores = torch.einsum("bshd,blhd->bhsl", q, k) / math.sqrt(q.shape[-1])
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhsl,blhd->bshd", weights / total, v)
    return out, (top + total.log()).squeeze(-1)


def problems(k: Kernel, case: Case) -> Iterator[str]:
    """The differences from float64 that are too large, and wrong shapes or dtypes."""
    q, keys, v = inputs(case)
    rows = torch.linspace(0, case.queries - 1, min(case.queries, SAMPLED)).round().long()
    expected, expected_lse = oracle(q, keys, v, rows)
    out, lse = k.call(q, keys, v, return_lse=True)
    if (out.shape, out.dtype, lse.shape, lse.dtype) != (
        q.shape, torch.bfloat16, (case.batch, q.shape[2], case.queries), torch.float32,
    ):  # fmt: skip
        yield f"shapes or dtypes: {out.shape} {out.dtype} {lse.shape} {lse.dtype}"
        return
    if case.queries < 1000 and not torch.equal(out, k.call(q, keys, v)):
        yield "return_lse changes the output"
    error = out[:, rows].double() - expected
    if k.name in QUANTIZED_SCORES:
        relative = float(error.norm() / expected.norm())
        if not relative <= QUANTIZED_SCORES[k.name]:
            yield f"relative error {relative:.1e}"
        return
    half_step = 2.0 ** (math.floor(math.log2(float(expected.abs().max()))) - 8)
    largest = float(error.abs().max()) / half_step
    rounding = float((expected.bfloat16().double() - expected).norm())
    rms = float(error.norm()) / rounding if rounding else float(error.norm())
    difference = float((lse[..., rows].double() - expected_lse).abs().max())
    if not (largest <= MAX_HALF_STEPS and rms <= RMS_ROUNDINGS and difference <= LSE_ERROR):
        yield f"{largest:.2f} half steps, {rms:.2f} roundings, log-sum-exp {difference:.1e}"


SAMPLE = (
    Case(1, 1, 128),
    Case(2, 77, 64, batch=2),
    Case(3, 1, 128, layout="views"),
    Case(17, 513, 64, layout="padded"),
    Case(31, 31, 128, batch=2, layout="views"),
    Case(33, 7, 64),
    Case(47, 512, 128, batch=2, layout="padded"),
    Case(49, 49, 64),
    Case(127, 127, 128),
    Case(257, 255, 64, batch=2),
    Case(511, 513, 128),
    Case(1023, 1023, 64, layout="views"),
    Case(2049, 77, 128),
    Case(2049, 2049, 64, layout="padded"),
    Case(4096, 4096, 128),
)
"""Each length, with few combinations of the others."""


def failures(k: Kernel, cases: Iterable[Case]) -> list[str]:
    return [f"{case}: {problem}" for case in cases for problem in problems(k, case)]


@pytest.mark.parametrize(("device", "name"), [x for x in NAMES if x[0] != "twin:a3"])  # it computes as a2
def test_a_sample(device: str, name: str) -> None:
    k = kernel(device, name)
    cases = [case for case in SAMPLE if takes(name, case)]
    assert len(cases) >= 2
    assert failures(k, cases) == []


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("device", "name"), NAMES)
def test_all_combinations(device: str, name: str, length: int) -> None:
    k = kernel(device, name)
    layouts = ("contiguous", "views", "padded")
    every = (
        Case(length, keys, head_dim, batch, layout)
        for keys, head_dim, batch, layout in product((length, *CROSS), (64, 128), (1, 2), layouts)
    )
    cases = [case for case in every if takes(name, case)]
    if not cases:
        pytest.skip(f"{name} takes at least {ATTENTION_KERNELS[name].shortest} tokens")
    assert failures(k, cases) == []


def test_the_oracle_and_the_limits_see_errors() -> None:
    """A kernel with a wrong scale, and one that ignores the last key, are seen."""

    def wrong_scale(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> object:
        out, lse = oracle(1.01 * q, k, v, torch.arange(q.shape[1]))
        return (out.bfloat16(), lse.float()) if return_lse else out.bfloat16()

    def last_key(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> object:
        out, lse = oracle(q, k[:, :-1], v[:, :-1], torch.arange(q.shape[1]))
        return (out.bfloat16(), lse.float()) if return_lse else out.bfloat16()

    for call in (wrong_scale, last_key):
        broken = Kernel("attention", "cpu", call, "", name="broken")  # type: ignore[arg-type]
        assert list(problems(broken, Case(33, 513, 64)))
