"""The CPU attention, in C++ and in PyTorch, against float64."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from ascendit.device.attention_kernels import Probabilities, attention_probabilities
from ascendit.kernels import reference
from ascendit.kernels.cpu import attention

Heads = tuple[Tensor, Tensor, Tensor]
HAVE = attention.library().library is not None
KERNELS = [
    pytest.param(attention.attention, id="sdpa"),
    pytest.param(
        attention.compiled,
        id="cpu",
        marks=pytest.mark.skipif(not HAVE, reason="native attention is not available on this machine"),
    ),
]
needs_compiled = pytest.mark.skipif(not HAVE, reason="native attention is not available on this machine")
SHAPES = [
    # S, L, H, d
    (1, 1, 1, 32),
    (1, 4096, 1, 128),
    (47, 31, 2, 32),
    (49, 513, 3, 96),
    (48, 512, 1, 64),
    (129, 1025, 2, 128),
    (513, 257, 1, 64),
    (96, 512, 1, 256),
    (4096, 65, 1, 64),
]
BF16_ERROR = {"one": 1.45, "two": 1.01}
"""Norm of the error relative to that of rounding the exact output to BF16. Two independent roundings of equal
size make the square root of 2."""


def heads(s: int, length: int, h: int, d: int, *, b: int = 1, scale: float = 1.0) -> Heads:
    q, k, v = (torch.randn(b, n, h, d).bfloat16() for n in (s, length, length))
    return (q.float() * scale).bfloat16(), k, v


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bshd,blhd->bhsl", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


def error(actual: Tensor, truth: Tensor) -> float:
    assert actual.dtype == torch.bfloat16 and actual.shape == truth.shape
    return float((actual.double() - truth).norm())


def rounding(truth: Tensor) -> float:
    return float((truth.bfloat16().double() - truth).norm())


@pytest.mark.parametrize("call", KERNELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_log_sum_exp(call: Callable[..., Any], shape: tuple[int, ...]) -> None:
    q, k, v = heads(*shape)
    out, lse = call(q, k, v, return_lse=True)
    truth, truth_lse = exact(q, k, v)
    assert error(out, truth) <= 1.6 * rounding(truth)  # one query has few numbers
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), truth_lse, rtol=0, atol=4e-5)
    assert torch.equal(call(q, k, v), out)


@needs_compiled
@pytest.mark.parametrize("numbers", ["one", "two"])
def test_numbers_per_probability(numbers: Probabilities) -> None:
    q, k, v = heads(200, 900, 2, 128)
    with attention_probabilities(numbers):
        out = attention.compiled(q, k, v)
    truth, _ = exact(q, k, v)
    assert error(out, truth) <= BF16_ERROR[numbers] * rounding(truth)
    other: Probabilities = "two" if numbers == "one" else "one"
    with attention_probabilities(other):
        assert not torch.equal(attention.compiled(q, k, v), out)


@needs_compiled
def test_one_number_is_as_exact_as_pytorch() -> None:
    q, k, v = heads(300, 2000, 2, 128)
    truth, _ = exact(q, k, v)
    with attention_probabilities("one"):
        ours = attention.compiled(q, k, v)
    assert error(ours, truth) <= 1.01 * error(attention.attention(q, k, v), truth)


@needs_compiled
def test_the_setting_ends_with_its_context_and_is_not_seen_by_other_threads() -> None:
    q, k, v = heads(50, 90, 1, 64)
    default, seen = attention.compiled(q, k, v), []
    with attention_probabilities("one"):
        one = attention.compiled(q, k, v)
    with attention_probabilities("two"):
        two = attention.compiled(q, k, v)
        thread = Thread(target=lambda: seen.append(attention.compiled(q, k, v)))
        thread.start()
        thread.join()
    assert torch.equal(attention.compiled(q, k, v), default) and torch.equal(seen[0], default)
    assert torch.equal(default, one) and not torch.equal(one, two)


@needs_compiled
def test_statistics_and_a_batch() -> None:
    q, k, v = heads(50, 300, 3, 64, b=2)
    out, top, total = attention.attention_with_sums(q, k, v)
    assert torch.equal(out[1:], attention.compiled(q[1:], k[1:], v[1:]))
    scores = torch.einsum("bshd,blhd->bhsl", q.double(), k.double()) / 8
    torch.testing.assert_close(top.double(), scores.amax(-1), rtol=0, atol=1e-5)
    expected = torch.exp(scores - scores.amax(-1, keepdim=True)).sum(-1)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("call", KERNELS)
def test_large_scores(call: Callable[..., Tensor]) -> None:
    """Scores of several thousand: the running maximum keeps every exponential finite."""
    q, k, v = heads(60, 1100, 2, 64, scale=900)
    out, truth = call(q, k, v), exact(q, k, v)[0]
    assert out.isfinite().all()
    assert error(out, truth) <= 1.5 * rounding(truth)


@needs_compiled
def test_a_growing_maximum_rescales_earlier_sums() -> None:
    """Keys in the order of their scores: every block of keys raises the maximum."""
    q, k, v = heads(50, 2048, 1, 64)
    q, k = (
        q[:, :1].expand(-1, 50, -1, -1),
        (k.float() * torch.linspace(0.0, 3.0, 2048)[:, None, None]).bfloat16(),
    )
    order = (q[0, 0, 0].float() @ k[0, :, 0].float().t()).argsort()
    k, v = k[:, order], v[:, order]
    (out, lse), (truth, truth_lse) = attention.compiled(q, k, v, return_lse=True), exact(q, k, v)
    assert error(out, truth) <= 1.5 * rounding(truth)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=0, atol=4e-5)


@pytest.mark.parametrize("call", KERNELS)
def test_views_are_read_and_inputs_left_alone(call: Callable[..., Any]) -> None:
    whole = (
        torch.randn(1, 2, 64, 70, 3).bfloat16().permute(0, 3, 4, 1, 2)
    )  # [1, 70, 3, 2, 64]: no axis is dense
    q, k, v = whole[:, :, :, 0], whole[:, :, :, 1], whole.flip(1)[:, :, :, 0]
    before = whole.clone()
    out, lse = call(q, k, v, return_lse=True)
    truth, truth_lse = exact(q, k, v)
    assert error(out, truth) <= BF16_ERROR["one"] * rounding(truth)
    torch.testing.assert_close(lse.double(), truth_lse, rtol=0, atol=4e-5)
    assert torch.equal(whole, before)


@needs_compiled
def test_nan_propagates() -> None:
    q, k, v = heads(5, 40, 1, 32)
    q[0, 3, 0, 7] = torch.nan
    out = attention.compiled(q, k, v)
    assert out[0, 3].isnan().all() and out[0, :3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_and_heads_use_pytorch(dtype: torch.dtype) -> None:
    d = 20 if dtype == torch.bfloat16 else 32
    q, k, v = (t.to(dtype) for t in heads(9, 13, 2, d))
    assert torch.equal(attention.compiled(q, k, v), attention.attention(q, k, v))
    out, lse = attention.compiled(q, k, v, return_lse=True)
    assert torch.equal(out, attention.attention(q, k, v))
    torch.testing.assert_close(lse.double(), exact(q, k, v)[1], rtol=0, atol=4e-5)


@pytest.mark.parametrize("call", KERNELS)
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0)])
def test_nothing_to_attend(call: Callable[..., Any], queries: int, keys: int) -> None:
    q, k, v = heads(queries, keys, 2, 32)
    out, lse = call(q, k, v, return_lse=True)
    expected, expected_lse = reference.attention(q, k, v, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_compiled
@pytest.mark.usefixtures("torch_threads")
def test_same_bytes_on_any_number_of_threads() -> None:
    q, k, v = heads(200, 300, 3, 64)
    torch.set_num_threads(2)
    many = attention.compiled(q, k, v)
    torch.set_num_threads(1)
    assert torch.equal(attention.compiled(q, k, v), many)


@needs_compiled
def test_kept_memory_leaves_no_trace_in_later_calls() -> None:
    """Shapes that grow and shrink, in two threads at once: each equals the result of a fresh thread."""
    inputs = [heads(s, n, h, d) for s, n, h, d in [(90, 700, 2, 64), (20, 33, 1, 32), (130, 1100, 3, 128)]]
    inputs += inputs[::-1]

    def attend(which: list[Heads], to: list[Tensor]) -> None:
        to.extend(attention.compiled(*h) for h in which)

    fresh: list[Tensor] = []
    for one in inputs:
        thread = Thread(target=attend, args=([one], fresh))
        thread.start()
        thread.join()
    results: list[list[Tensor]] = [[], []]
    threads = [Thread(target=attend, args=(inputs * 3, to)) for to in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for to in results:
        assert all(torch.equal(a, b) for a, b in zip(to, fresh * 3, strict=True))


@needs_compiled
@pytest.mark.usefixtures("torch_threads")
def test_threads_that_end_free_their_memory() -> None:
    """Also those of OpenMP, of which each of our threads starts its own."""
    inputs = heads(100, 40, 2, 128)
    torch.set_num_threads(4)

    def resident_bytes(threads: int) -> int:
        for _ in range(threads):
            thread = Thread(target=attention.compiled, args=inputs)
            thread.start()
            thread.join()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes(20)
    assert resident_bytes(60) - before < 60 * 100_000
