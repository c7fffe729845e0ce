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

COMPILED = {k.operator: k.call for k in (*attention.list_kernels(), *elementwise.list_kernels()) if k.needs}
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


def test_nan_propagates() -> None:
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
