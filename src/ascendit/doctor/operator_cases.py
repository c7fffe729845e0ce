"""Cases of the self-check: operators of a card against the twin, bound functions against plain PyTorch.

The operators of one device for the self-check: called by name on inputs that lie on the CPU, and timed.
"""

from __future__ import annotations

import logging
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ascendit import mx, twin
from ascendit.device.chip import CAPABILITIES
from ascendit.device.device import Device
from ascendit.doctor.comparison import ATTENTION_DECIBELS, Result, compare, described
from ascendit.kernels import reference
from ascendit.ops.bind import NAMES, bind
from ascendit.ops.npu.kernels import missing
from ascendit.ops.quant_linear import native_schemes
from ascendit.ops.runtime import internal_format, synchronize
from ascendit.quant.schemes import LINEAR_SCHEMES
from ascendit.twin import example_calls
from ascendit.twin.nz import ND

Caller = Callable[..., Any]
"""`call(name, *args, **kwargs)` with tensors on the CPU, results on the CPU."""
RUNS = 5


class Card:
    """One open device. `real`: it has a speed of its own, and so repeats are timed."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.real = device.backend.tensors != "cpu"

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """torch.ops.npu.NAME, or torch.ops.mindiesd for `mindiesd::NAME`, on arguments on the device."""
        namespace, _, rest = name.rpartition("::")
        return getattr(getattr(torch.ops, namespace or "npu"), rest)(*args, **kwargs)

    def on_cpu(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """`call`, on inputs that are copied to the device and results that are copied back."""
        return self.back(self.call(name, *map(self.put, args), **{k: self.put(v) for k, v in kwargs.items()}))

    def put(self, value: Any) -> Any:
        """A copy on the device, with the same strides: some operators read them."""
        if isinstance(value, list | tuple):
            return [self.put(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        strides = value.stride()
        order = sorted(range(value.dim()), key=lambda axis: -strides[axis])
        back = sorted(range(value.dim()), key=order.__getitem__)
        plain = value.permute(order).contiguous()
        return plain.to(self.device.torch_name, copy=True).permute(back)

    def back(self, value: Any) -> Any:
        """A copy on the CPU. The kernel must have ended for that, so what went wrong in it is told here."""
        if isinstance(value, list | tuple):
            return tuple(self.back(v) for v in value)
        return value.to("cpu", copy=True) if isinstance(value, Tensor) else value

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median of a few runs, each waited for; of one where there is no device to wait for."""
        times = []
        for _ in range(RUNS if self.real else 1):
            synchronize(self.device)
            start = time.perf_counter()
            run()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def works(self) -> bool:
        """Whether the device still computes: after some faults it refuses everything until a new process."""
        try:
            (torch.ones(4, device=self.device.torch_name) * 2).cpu()
        except RuntimeError:
            return False
        return True


# ---- Cases of the self-check: operators of a card against the twin, bound functions against pla -

log = logging.getLogger("ascendit")

EPS = 1e-6
TOKENS, TEXT, HEADS, HEAD, OUT = 48, 12, 4, 64, 96
WIDTH = HEADS * HEAD
BF16 = torch.bfloat16
SMOOTHED, NZ = ", smoothed", ", FRACTAL_NZ"
"""Variants of a quantized layer, behind its name."""


@dataclass(frozen=True)
class Case:
    """One thing to find out. `run` gives `base` with the verdict, and may raise anything."""

    base: Result
    run: Callable[[Card, Result], Result]


def run_case(card: Card, case: Case) -> Result:
    """The result of one case; what it raises is one too."""
    try:
        return case.run(card, case.base)
    except Exception as e:
        log.info("self-check: %s raised", case.base.name, exc_info=True)
        return replace(case.base, verdict="error", error=shorter(f"{type(e).__name__}: {e}"))


# ---- operators ----------------------------------------------------------------------------------


def operator_cases(device: Device) -> Iterator[Case]:
    """Every sample of the twin, for the chip of this device. Nothing where it has none."""
    if not device.chip:
        return
    used = {row.operator for row in CAPABILITIES if row.used_for}
    for sample in example_calls.samples():
        base = Result(
            part="operator", name=sample.name, operator=sample.operator, used=sample.operator in used
        )
        yield Case(base, lambda card, base, s=sample: _operator(card, base, s))  # type: ignore[misc]


def _operator(card: Card, base: Result, sample: Any) -> Result:
    if missing(sample.operator, str(card.device.chip)):
        return replace(base, verdict="not installed")
    last: list[Any] = []

    def called(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == sample.operator:
            last[:] = [name, args, kwargs]
        return card.call(name, *args, **kwargs)

    with internal_format(card.device, True):
        first = sample.run(called, card.put)
    expected = sample.run(twin.call, lambda t: t.clone())
    if sample.operator == "npu_format_cast":  # a copy to the CPU would hide the order of the bytes
        first = card.call("npu_format_cast", first, ND)
        expected = twin.call("npu_format_cast", expected, ND)
    name, args, kwargs = last
    given = (*map(described, args), *(f"{k}={described(v)}" for k, v in kwargs.items()))
    base = replace(base, arguments=given)
    actual = card.back(first)
    limit = ATTENTION_DECIBELS if "attention" in name or name == "mindiesd::la" else None
    found = compare(base, actual, expected, db=limit)
    return replace(found, microseconds=card.seconds(lambda: card.call(name, *args, **kwargs)) * 1e6)


# ---- functions ----------------------------------------------------------------------------------


def function_cases(device: Device) -> Iterator[Case]:
    """Every dense operator and quantized linear layer that is bound on this device, against the plain one."""
    ops = bind(device)
    inputs = _inputs()
    assert set(inputs) == set(NAMES), "a new operator needs its inputs here"
    for name, args in inputs.items():
        base = Result(part="function", name=name, operator=name, how=ops.choices[name])
        plain = getattr(reference, name)
        yield Case(base, lambda card, base, n=name, p=plain, a=args: _dense(card, base, ops, n, p, a))  # type: ignore[misc]
    for scheme in LINEAR_SCHEMES:
        if device.chip and scheme not in native_schemes(device):
            continue
        for variant in ("", SMOOTHED, NZ) if device.operators == "npu" else ("", SMOOTHED):
            base = Result(part="function", name=f"{scheme} linear{variant}", operator=f"linear in {scheme}")
            yield Case(base, lambda card, base, s=scheme, v=variant: _linear(card, base, ops.quantized, s, v))  # type: ignore[misc]


def rand(*shape: int, seed: int = 0) -> Tensor:
    """The same float32 numbers on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _inputs() -> dict[str, tuple[Any, ...]]:
    x, y, rows = rand(1, TOKENS, WIDTH).to(BF16), rand(1, TOKENS, WIDTH, seed=1).to(BF16), rand(2, WIDTH)
    weight, bias, gamma = rand(OUT, WIDTH).to(BF16), rand(OUT).to(BF16), rand(WIDTH)
    q, text = rand(1, TOKENS, HEADS, HEAD).to(BF16), rand(1, TEXT, HEADS, HEAD).to(BF16)
    angle, spans = rand(TOKENS, HEAD // 2), (TEXT, TOKENS - TEXT)
    return {
        "linear": (x, weight, bias),
        "rms_norm": (x, gamma, EPS),
        "layer_norm": (x, gamma, gamma, EPS),
        "adaln": (x, rows, rows, spans, EPS),
        "gated_residual": (x, y, rows, spans),
        "rope": (q, angle.cos(), angle.sin()),
        "gelu_tanh": (x,),
        "gelu": (x,),
        "attention": (q, text, text),
    }


PREPARED = {"rope": slice(1, 3), "adaln": slice(1, 3), "gated_residual": slice(2, 3)}
"""Operator -> its arguments that `Ops.prepare` may lay out once."""


def _dense(card: Card, base: Result, ops: Any, name: str, plain: Callable[..., Tensor], args: Any) -> Result:
    given = [card.put(a) if isinstance(a, Tensor) else a for a in args]
    if (where := PREPARED.get(name)) is not None:
        given[where] = ops.prepare(name, *given[where], dtype=BF16)
    bound = getattr(ops, name)
    base = replace(base, arguments=tuple(map(described, args)))
    limit = ATTENTION_DECIBELS if name == "attention" else None
    found = compare(base, card.back(bound(*given)), plain(*args), db=limit)
    return replace(found, microseconds=card.seconds(lambda: bound(*given)) * 1e6)


def _linear(card: Card, base: Result, schemes: Any, scheme: str, variant: str) -> Result:
    """One layer [OUT, K]: the weight must come back as it was stored, the product be the plain one."""
    k = 1024 if scheme == "mxfp4_dualscale" else WIDTH
    stored, bias = mx.encode(rand(OUT, k), LINEAR_SCHEMES[scheme].weight), rand(OUT)
    mul_scale = rand(k).abs() + 0.5 if variant == SMOOTHED else None
    x = rand(1, TOKENS, k, seed=2).to(BF16)
    given = (stored.codes, stored.scale, stored.dual_scale, bias, LINEAR_SCHEMES[scheme].weight)
    weight = schemes.prepare_weight(*given, nz=variant == NZ)
    tokens = schemes.quantize_activation(card.put(x), scheme, card.put(mul_scale))
    kernel = schemes.kernel(scheme)
    base = replace(
        base,
        how=kernel.reason,
        arguments=(described(x), f"weight {LINEAR_SCHEMES[scheme].weight} {[OUT, k]}"),
    )
    again = schemes.stored(weight)
    for part in ("codes", "scale", "dual_scale"):
        here, there = getattr(stored, part), card.back(getattr(again, part))
        if here is not None and not torch.equal(here.view(torch.uint8), there.view(torch.uint8)):
            return replace(base, verdict="wrong", error=f"{part} of the weight do not come back as stored")
    host = torch.device("cpu")
    plain = reference.quantized_linear(
        reference.quantize_activation(x, scheme, mul_scale), reference.prepare_weight(stored, bias, host)
    )
    found = compare(base, card.back(kernel.call(tokens, weight)), plain)
    return replace(found, microseconds=card.seconds(lambda: kernel.call(tokens, weight)) * 1e6)


def shorter(text: str, size: int = 300) -> str:
    """The first line of an error, in a report of one page."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return re.sub(r"\s+", " ", line)[:size]
