"""The C++ operators against `reference` in float32, with shapes that leave partial blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ascendit.kernels import reference
from ascendit.kernels.cpu import attention, elementwise

KERNELS = (*attention.list_kernels(), *elementwise.list_kernels())
COMPILED = {k.operator: k.call for k in KERNELS if k.needs and not k.on_request}
HALF_STEP = 2.0**-8  # relative to the largest value; half a BF16 step is 2^-9, and the last bit may differ


def compiled(name: str) -> Callable[..., Tensor]:
    if name not in COMPILED:
        pytest.skip(f"native {name} is not available on this machine")
    return COMPILED[name]


def bf16(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).bfloat16()


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error, relative to the largest value."""
    assert actual.dtype == torch.bfloat16 and actual.shape == expected.shape
    return float((actual.float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "d"),
    [
        (48, 256, 1, 64),
        (1, 1, 1, 32),
        (47, 31, 2, 32),
        (49, 257, 3, 96),
        (130, 600, 2, 128),
        (96, 512, 1, 256),
    ],
)
def test_attention(queries: int, keys: int, heads: int, d: int) -> None:
    q, k, v = bf16(1, queries, heads, d), bf16(1, keys, heads, d), bf16(1, keys, heads, d)
    actual = compiled("attention")(q, k, v)
    truth = reference.attention(q.float(), k.float(), v.float())
    assert max_error(actual, truth) < HALF_STEP
    assert (actual - truth).norm() <= 1.01 * (truth.bfloat16() - truth).norm()  # only the final rounding


def test_attention_statistics_and_a_batch() -> None:
    q, k, v = bf16(2, 50, 3, 64), bf16(2, 300, 3, 64), bf16(2, 300, 3, 64)
    top, total = torch.empty(2, 3, 50), torch.empty(2, 3, 50)
    actual = compiled("attention")(q, k, v, (top, total))
    assert max_error(actual, reference.attention(q.float(), k.float(), v.float())) < HALF_STEP
    assert torch.equal(actual[1:], compiled("attention")(q[1:], k[1:], v[1:]))
    scores = torch.einsum("bshd,blhd->bhsl", q.double(), k.double()) / 8
    assert torch.allclose(top.double(), scores.amax(-1), atol=1e-5)
    assert torch.allclose(top.double() + total.double().log(), scores.logsumexp(-1), atol=1e-5)


def test_attention_with_large_scores() -> None:
    """Scores of several thousand: the running maximum keeps every exponential finite."""
    q, k, v = bf16(1, 60, 2, 64, scale=30), bf16(1, 900, 2, 64, scale=30), bf16(1, 900, 2, 64)
    actual = compiled("attention")(q, k, v)
    assert actual.isfinite().all()
    assert max_error(actual, reference.attention(q.float(), k.float(), v.float())) < 2 * HALF_STEP


def test_attention_reads_views_and_leaves_inputs_alone() -> None:
    whole = bf16(1, 70, 3, 2, 64)
    q, k, v = whole[:, :, :, 0], whole[:, :, :, 1], whole.flip(1)[:, :, :, 0]
    before = whole.clone()
    actual = compiled("attention")(q, k, v)
    assert max_error(actual, reference.attention(q.float(), k.float(), v.float())) < HALF_STEP
    assert torch.equal(whole, before)


def test_nan_propagates() -> None:
    q, k, v = bf16(1, 5, 1, 32), bf16(1, 40, 1, 32), bf16(1, 40, 1, 32)
    q[0, 3, 0, 7] = torch.nan
    actual = compiled("attention")(q, k, v)
    assert actual[0, 3].isnan().all() and actual[0, :3].isfinite().all()
    x = bf16(1, 3, 64)
    x[0, 1, 5] = torch.nan
    assert compiled("gelu_tanh")(x)[0, 1, 5].isnan()
    assert compiled("rms_norm")(x, torch.ones(64), 1e-6)[0, 1].isnan().all()


def test_gelu_over_every_bf16_value() -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    u = 1.5957691216057308 * (x.double() + 0.044715 * x.double() ** 3)
    actual, expected = (
        compiled("gelu_tanh")(x).double(),
        x.double() * torch.sigmoid(u),
    )  # 1 + tanh, without cancellation
    small = expected.abs() < 1e-35
    assert (actual[small].abs() < 2e-35).all()
    assert float(((actual - expected).abs() / expected.abs())[~small].max()) < HALF_STEP


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("d", [32, 96, 1536])
def test_rms_norm(rows: int, d: int) -> None:
    x, weight = bf16(1, rows, d, scale=3), torch.randn(d)
    expected = reference.rms_norm(x.float(), weight, 1e-6)
    assert max_error(compiled("rms_norm")(x, weight, 1e-6), expected) < HALF_STEP
    assert max_error(compiled("rms_norm")(x, weight.bfloat16(), 1e-6), expected) < 3 * HALF_STEP


def test_rope() -> None:
    x, angle = bf16(1, 33, 3, 96), torch.rand(33, 48) * 7
    expected = reference.rope(x.float(), angle.cos(), angle.sin())
    assert max_error(compiled("rope")(x, angle.cos(), angle.sin()), expected) < HALF_STEP


@pytest.mark.parametrize("spans", [(20,), (3, 17), (1, 1, 18)])
def test_gated_residual(spans: tuple[int, ...]) -> None:
    x, y, gate = bf16(1, 20, 48), bf16(1, 20, 48), torch.randn(len(spans), 48)
    expected = reference.gated_residual(x.float(), y.float(), gate, spans)
    assert max_error(compiled("gated_residual")(x, y, gate, spans), expected) < HALF_STEP


def test_samples_of_a_batch_are_computed_independently() -> None:
    x, y, angle, gate = bf16(2, 33, 3, 96), bf16(2, 33, 288), torch.rand(33, 48) * 7, torch.randn(2, 288)
    rotated = compiled("rope")(x, angle.cos(), angle.sin())
    assert torch.equal(rotated[1:], compiled("rope")(x[1:], angle.cos(), angle.sin()))
    added = compiled("gated_residual")(x.flatten(2), y, gate, (3, 30))
    assert torch.equal(added[1:], compiled("gated_residual")(x.flatten(2)[1:], y[1:], gate, (3, 30)))
    assert (
        max_error(added, reference.gated_residual(x.flatten(2).float(), y.float(), gate, (3, 30))) < HALF_STEP
    )


def test_float32_and_odd_heads_use_pytorch() -> None:
    q = torch.randn(1, 9, 2, 32)
    assert torch.equal(compiled("attention")(q, q, q), attention.attention(q, q, q))
    odd = bf16(1, 9, 2, 20)
    assert torch.equal(compiled("attention")(odd, odd, odd), attention.attention(odd, odd, odd))


TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.is_dir(), reason="the threads of a process are not listed")
def test_kernels_use_the_number_of_threads_of_the_call() -> None:
    """Counted in a new thread, for which OpenMP starts its own."""
    x, added = bf16(64, 64), []

    def count() -> None:
        for threads in (1, 3):
            before = set(TASKS.iterdir())
            with mock.patch.object(torch, "get_num_threads", lambda threads=threads: threads):
                compiled("gelu_tanh")(x)
            added.append(len(set(TASKS.iterdir()) - before))

    compiled("gelu_tanh")
    thread = Thread(target=count)
    thread.start()
    thread.join()
    assert added == [0, 2]


@pytest.mark.parametrize("operator", ["attention", "gelu_tanh", "rms_norm", "rope", "gated_residual"])
def test_kernels_take_the_number_of_threads_from_torch(operator: str) -> None:
    x, half = bf16(1, 8, 2, 32), torch.zeros(8, 16)
    arguments: dict[str, tuple[Any, ...]] = {
        "attention": (x, x, x),
        "gelu_tanh": (x,),
        "rms_norm": (x, x[0, 0, 0], 1e-6),
        "rope": (x, half, half),
        "gated_residual": (x.flatten(2), x.flatten(2), torch.zeros(1, 64), (8,)),
    }
    with mock.patch.object(torch, "get_num_threads", mock.Mock(return_value=1)) as number:
        compiled(operator)(*arguments[operator])
    assert number.call_count == 1


def test_same_bytes_on_any_number_of_threads() -> None:
    q, k, v = bf16(1, 200, 3, 64), bf16(1, 300, 3, 64), bf16(1, 300, 3, 64)
    torch.set_num_threads(2)
    many = compiled("attention")(q, k, v)
    torch.set_num_threads(1)
    assert torch.equal(compiled("attention")(q, k, v), many)
