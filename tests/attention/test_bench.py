"""The benchmark of attention kernels, with quick shapes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from ascendit.attention import bench
from ascendit.attention.bench import run_benchmark
from ascendit.attention.measured import Shape
from ascendit.device.device import parse_device
from ascendit.errors import Cancelled, OutOfMemory, UsageError
from ascendit.kernels import reference
from ascendit.kernels.kernel import Kernel
from ascendit.progress import Progress

SELF = Shape(kind="self", queries=40, keys=40, heads=4, head_dim=64)
CROSS = Shape(kind="cross", queries=40, keys=9, heads=4, head_dim=64)
CPU = parse_device("cpu")


def kernels(*calls: tuple[str, str, Any], missing: str = "") -> list[Kernel]:
    """A list of kernels: (operator, name, call); the last one is missing for this reason."""
    listed = [Kernel(operator, "cpu", call, "", name=name) for operator, name, call in calls]
    return [
        *listed,
        Kernel("attention", "cpu", reference.attention, "", name="flash", missing=lambda: missing),
    ]


def test_every_kernel_of_a_cpu_is_measured() -> None:
    events: list[Progress] = []
    result = run_benchmark(CPU, [SELF, CROSS], repeats=2, on_progress=events.append)
    names = {(row.kernel, row.scheme) for row in result.rows if row.shape == SELF}
    assert len(names) >= 5 and {scheme for _, scheme in names} == {"", "int8", "fp8", "mxfp8", "mxfp4"}
    assert names == {(row.kernel, row.scheme) for row in result.rows if row.shape == CROSS}
    for row in result.rows:
        assert 0 < row.best_seconds <= row.seconds and row.repeats == 2 and row.measured_heads == 4
        limits = {"cpu": 5e-3, "sdpa": 5e-3, "reference": 5e-3, "qk_int8": 2.5e-2, "mxfp4": 0.5}
        assert row.error < limits.get(row.scheme or row.kernel, 0.1)
    assert len(events) == 3 * len(result.rows) and events[-1].step == events[-1].total
    assert result.as_dict()["device"] == "cpu" and result.as_dict()["threads"] == torch.get_num_threads()


def test_a_wrong_kernel_has_a_large_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(q: Any, k: Any, v: Any) -> Any:
        return 2 * reference.attention(q, k, v)

    wrong = kernels(
        ("attention", "cpu", doubled), ("attention", "sdpa", reference.attention), missing="absent"
    )
    monkeypatch.setattr(bench, "kernels_of", lambda device, wish: wrong)
    result = run_benchmark(CPU, [SELF], repeats=1)
    assert [row.kernel for row in result.rows] == ["cpu", "sdpa"]
    assert result.rows[0].error == pytest.approx(1, abs=0.01) and result.rows[1].error < 5e-3
    assert result.skipped == [("flash", "absent")]


def test_a_slow_kernel_gets_fewer_heads_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"cpu": 1e-4, "sdpa": 0.2}  # per head
    heads = []

    def time_of(device: Any, candidate: Any, inputs: Any) -> tuple[float, torch.Tensor]:
        q = inputs[0]
        heads.append((candidate.name, q.shape[2]))
        return seconds[candidate.name] * q.shape[2] * (q.shape[1] / 40) ** 2, reference.attention(*inputs)

    two = kernels(("attention", "cpu", None), ("attention", "sdpa", None), missing="absent")
    monkeypatch.setattr(bench, "kernels_of", lambda device, wish: two)
    monkeypatch.setattr(bench, "_time", time_of)
    monkeypatch.setattr(bench, "PROBE_TOKENS", 16)
    monkeypatch.setattr(bench, "KERNEL_SECONDS", 0.5)
    notes: list[str] = []
    fast, slow = run_benchmark(CPU, [SELF], repeats=9, on_note=notes.append).rows
    assert (fast.measured_heads, fast.repeats) == (4, 9)
    assert (slow.measured_heads, slow.repeats) == (1, 2)
    assert heads[-13:] == [*[("cpu", 4), ("sdpa", 1)] * 3, *[("cpu", 4)] * 7]
    assert slow.seconds == pytest.approx(4 * 0.2)  # of all four heads
    assert notes == []


def test_kernels_that_do_not_take_a_shape_are_listed() -> None:
    result = run_benchmark(parse_device("twin:a2"), [SELF], repeats=1)
    assert {row.kernel for row in result.rows if not row.scheme} >= {"fusion", "fused_infer"}
    assert "laser" not in {row.kernel for row in result.rows}
    odd = Shape(kind="self", queries=8, keys=8, heads=1, head_dim=40)
    skipped = dict(run_benchmark(parse_device("twin:a2"), [odd], repeats=1).skipped)
    assert skipped["fused_infer"] == "self-attention: it takes head sizes that are multiples of 16, not 40"


def test_a_shape_that_does_not_fit_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "host_memory", lambda: 10 * 2**20)
    large = Shape(kind="self", queries=100_000, keys=100_000, heads=2, head_dim=64)
    with pytest.raises(OutOfMemory) as e:
        run_benchmark(CPU, [large])
    assert e.value.needs == "244.1 MiB for one head; 10.0 MiB is free"
    assert e.value.fix == "--shape 2048,2,64"
    assert bench._heads_that_fit(CPU, Shape(kind="self", queries=2048, keys=2048, heads=3, head_dim=64)) == 2


def test_the_check_before_a_call_stops_the_benchmark() -> None:
    cancel = threading.Event()
    done: list[Progress] = []

    def stop(event: Progress) -> None:
        done.append(event)
        cancel.set()

    with pytest.raises(Cancelled):
        run_benchmark(CPU, [SELF], on_progress=stop, cancel=cancel)
    assert len(done) == 1
    with pytest.raises(UsageError):
        parse_device("tpu")
