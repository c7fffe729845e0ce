"""`ascendit bench attention`: the time and the error of every attention kernel that works on a device.

The kernels take turns, so that load on the machine affects all alike. One call of a slow kernel has fewer
heads, which do not depend on one another, and its time is scaled to all of them; if a single head is slow, it
runs fewer times. Rotations of quantized attention, which run before the kernel, are not measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ascendit.attention.measured import Measurement, Shape, file_data
from ascendit.device.attention_kernels import ATTENTION_KERNELS
from ascendit.device.attention_limits import AttentionCall, limit_of
from ascendit.device.device import Device
from ascendit.device.memory import host_memory
from ascendit.errors import AscenditError, OutOfMemory
from ascendit.exclusive import Stop, stop_if
from ascendit.kernels import reference
from ascendit.kernels.kernel import Kernel, Wish
from ascendit.kernels.quantized_attention import operator_of
from ascendit.ops.open_device import free_bytes, hardware_name, hold_chip, open_device, synchronize
from ascendit.ops.select import kernels_of
from ascendit.progress import OnProgress, Progress
from ascendit.quant.attention_schemes import ATTENTION_FORMATS
from ascendit.report import human_bytes

DTYPE_NAME = "bfloat16"
SCHEMES = {"attention": "", **{operator_of(scheme): scheme for scheme in ATTENTION_FORMATS}}
"""Operator -> scheme of quantized attention, empty for the dense one."""
KERNEL_SECONDS = 60.0
"""Time for one kernel at one shape; at least two calls run, with at least one head."""
ANNOUNCED_SECONDS = 10
"""A run of at least this time is announced."""
PROBE_TOKENS, PROBE_HEADS = 2048, 4
"""Largest size of the calls that predict the time."""
SAMPLED_ROWS, SAMPLED_HEADS = 64, 4
BYTES = 40
"""Per element of the queries or keys: q, k, v, output, and the float32 copies of emulated attention."""


@dataclass(frozen=True)
class Candidate:
    """A kernel that works on the device."""

    name: str
    scheme: str
    kernel: Kernel

    def __str__(self) -> str:
        return f"{self.scheme} ({self.name})" if self.scheme else self.name


@dataclass
class Planned:
    """One kernel at one shape: the heads of a call, the number of calls, and their seconds."""

    candidate: Candidate
    heads: int
    repeats: int
    estimate: float
    """Predicted seconds of one call."""
    error: float = 0.0
    seconds: list[float] = field(default_factory=list)


@dataclass
class Benchmark:
    """The measurements of one device."""

    device: Device
    hardware: str
    threads: int
    rows: list[Measurement] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(kernel, why it was not measured)."""

    def as_dict(self) -> dict[str, Any]:
        """The data for JSON, which has the keys of the file."""
        skipped = [{"kernel": name, "reason": reason} for name, reason in self.skipped]
        return {
            "device": str(self.device),
            "threads": self.threads,
            **file_data(self.hardware, self.rows),
            "skipped": skipped,
        }


def run_benchmark(
    device: Device,
    shapes: Sequence[Shape],
    *,
    repeats: int = 9,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], None] = lambda text: None,
    cancel: Stop | None = None,
) -> Benchmark:
    """Measure every kernel of `device` in bfloat16 at `shapes`, after one call to warm up.

    `on_note`: called with the expected time. Raises UsageError (E-USE-01) or EnvironmentProblem (E-ENV-03)
    for a device that this machine does not have, OutOfMemory (E-MEM-01) if one head does not fit, Cancelled
    (E-CAN-01).
    """
    device = open_device(device)
    with hold_chip(device, cancel), torch.inference_mode():
        result = Benchmark(device, hardware_name(device), torch.get_num_threads())
        candidates = list(_candidates(device, result))
        for shape in shapes:
            planned = list(_plan(device, candidates, shape, repeats, result, cancel))
            seconds = sum(p.estimate * (p.repeats + 1) for p in planned)
            if seconds >= ANNOUNCED_SECONDS:
                on_note(f"{shape.kind}-attention, {shape}: about {seconds:.0f} s; Ctrl-C stops it")
            _measure(device, planned, shape, on_progress, cancel)
            result.rows += [_row(p, shape) for p in planned]
    return result


def _candidates(device: Device, result: Benchmark) -> Iterator[Candidate]:
    for kernel in kernels_of(device, Wish(emulate="decode-on-use")):
        if kernel.operator not in SCHEMES or kernel.backend == "reference":
            continue
        candidate = Candidate(kernel.name or kernel.backend, SCHEMES[kernel.operator], kernel)
        if problem := kernel.missing():
            result.skipped.append((str(candidate), problem))
        else:
            yield candidate


def _plan(
    device: Device,
    candidates: Iterable[Candidate],
    shape: Shape,
    repeats: int,
    result: Benchmark,
    cancel: Stop | None,
) -> Iterator[Planned]:
    """Run small calls of each kernel to predict its time. Kernels that refuse the shape are skipped."""
    largest = _heads_that_fit(device, shape)
    tokens, keys = min(shape.queries, PROBE_TOKENS), min(shape.keys, PROBE_TOKENS)
    small = Shape(
        kind=shape.kind,
        queries=tokens,
        keys=keys,
        heads=min(largest, PROBE_HEADS),
        head_dim=shape.head_dim,
    )
    inputs = _inputs(device, small, small.heads)
    for candidate in candidates:
        stop_if(cancel)
        problem = _limit(candidate, shape)
        try:
            pace = 0.0 if problem else min(_time(device, candidate, inputs)[0] for _ in range(2))
        except AscenditError as e:
            problem = e.got
        if problem:
            result.skipped.append((str(candidate), f"{shape.kind}-attention: {problem}"))
            continue
        head = pace / small.flops * shape.flops / shape.heads
        heads = max(1, min(largest, int(KERNEL_SECONDS / repeats / head)))
        calls = max(1, min(repeats, int(KERNEL_SECONDS / (head * heads))))
        yield Planned(candidate, heads, calls, head * heads)


def _limit(candidate: Candidate, shape: Shape) -> str:
    """Why a dense kernel does not take the shape; "" if it does."""
    if candidate.scheme or candidate.name not in ATTENTION_KERNELS:
        return ""
    call = AttentionCall(
        kind="self" if shape.kind == "self" else "text",
        dtype=DTYPE_NAME,
        heads=shape.heads,
        head_dim=shape.head_dim,
        queries=shape.queries,
        keys=shape.keys,
    )
    return limit_of(ATTENTION_KERNELS[candidate.name], call)


def _heads_that_fit(device: Device, shape: Shape) -> int:
    """The heads for which this device has memory, at most all. Raises OutOfMemory if not even one fits."""
    free = free_bytes(device) if device.is_accelerator else host_memory()
    one = BYTES * max(shape.queries, shape.keys) * shape.head_dim
    if free is None or free >= one * shape.heads:
        return shape.heads
    if free < one:
        tokens = max(1, free // 2 // (BYTES * shape.head_dim))
        raise OutOfMemory(
            f"attention of {max(shape.queries, shape.keys):,} tokens with heads of {shape.head_dim}",
            needs=f"{human_bytes(one)} for one head; {human_bytes(free)} is free",
            fix=f"--shape {tokens},{shape.heads},{shape.head_dim}",
        )
    return int(free // one)


def _inputs(device: Device, shape: Shape, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, tokens, heads, head_dim] of normal numbers."""
    generator = torch.Generator().manual_seed(5)

    def normal(tokens: int) -> Tensor:
        numbers = torch.randn(
            1, tokens, heads, shape.head_dim, generator=generator, dtype=getattr(torch, DTYPE_NAME)
        )
        return numbers.to(device.torch_name)

    return normal(shape.queries), normal(shape.keys), normal(shape.keys)


def _time(
    device: Device, candidate: Candidate, inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[float, Tensor]:
    """Seconds of one call, and its output."""
    synchronize(device)
    start = time.perf_counter()
    out = candidate.kernel.call(*inputs)
    synchronize(device)
    return time.perf_counter() - start, out


def _measure(
    device: Device,
    planned: Sequence[Planned],
    shape: Shape,
    on_progress: OnProgress | None,
    cancel: Stop | None,
) -> None:
    """Warm up each kernel, which also measures its error, then run the kernels in turns."""
    inputs = _inputs(device, shape, max((p.heads for p in planned), default=1))
    rounds = max((p.repeats for p in planned), default=0)
    calls = [(p, n) for n in range(rounds + 1) for p in planned if n <= p.repeats]
    for step, (p, n) in enumerate(calls, 1):
        stop_if(cancel)
        q, k, v = (t[:, :, : p.heads] if p.heads < t.shape[2] else t for t in inputs)
        if p.heads < inputs[0].shape[2]:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        seconds, out = _time(device, p.candidate, (q, k, v))
        if n:
            p.seconds.append(seconds)
        else:
            p.error = _error(out, q, k, v)
        if on_progress:
            name = f"{shape.kind} {p.candidate}"
            on_progress(Progress(stage="measure", name=name, step=step, total=len(calls), seconds=seconds))


def _error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """norm(out - reference) / norm(reference), of some queries of the first heads of [1, S, H, d]."""
    rows = torch.linspace(0, q.shape[1] - 1, min(q.shape[1], SAMPLED_ROWS)).long().to(q.device)
    heads = slice(0, SAMPLED_HEADS)
    expected = reference.attention(q[:, rows, heads].float(), k[:, :, heads].float(), v[:, :, heads].float())
    difference = out[:, rows, heads].float() - expected
    return float(difference.norm() / expected.norm())


def _row(p: Planned, shape: Shape) -> Measurement:
    scale = shape.heads / p.heads
    return Measurement(
        kernel=p.candidate.name,
        scheme=p.candidate.scheme,
        shape=shape,
        dtype=DTYPE_NAME,
        seconds=statistics.median(p.seconds) * scale,
        best_seconds=min(p.seconds) * scale,
        repeats=len(p.seconds),
        measured_heads=p.heads,
        error=p.error,
    )
