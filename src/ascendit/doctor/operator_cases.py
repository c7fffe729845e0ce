"""Cases of the self-check: operators of a card against the twin, bound functions against plain PyTorch.

Operators are called by name on inputs made on the CPU, and timed. An exception in a case is a result too.
"""

from __future__ import annotations

import logging
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ascendit import mx, twin
from ascendit.device.attention_kernels import ATTENTION_KERNELS
from ascendit.device.device import Device
from ascendit.device.operator_support import CAPABILITIES
from ascendit.kernels import reference
from ascendit.kernels.kernel import Function, Wish
from ascendit.kernels.quantized_attention import emulated
from ascendit.mx.codec import decibels
from ascendit.ops.npu import kernels
from ascendit.ops.open_device import internal_format, synchronize
from ascendit.ops.operators import OPERATOR_NAMES, bind
from ascendit.ops.select import kernels_of
from ascendit.quant.schemes import LINEAR_SCHEMES
from ascendit.twin import example_calls
from ascendit.twin.nz import ND
from ascendit.twin.registry import tensors_in

log = logging.getLogger("ascendit")

Caller = Callable[..., Any]
"""`call(name, *args, **kwargs)` with arguments and results on the CPU."""
RUNS = 5


# ---- results and their comparison ---------------------------------------------------------------

Verdict = Literal["exact", "close", "wrong", "error", "crashed", "not installed", "answered", "differs"]
"""exact: bit-identical. close: within the limit. answered, differs: same answer as the twin, or another."""
BAD = ("wrong", "error", "crashed")
ORDER: tuple[Verdict, ...] = (
    "crashed", "error", "wrong", "differs", "not installed", "close", "answered", "exact"
)  # fmt: skip
"""Worst first."""
DECIBELS = {"bfloat16": 50.0, "float16": 60.0, "float32": 80.0}
"""Minimum signal-to-noise ratio in dB for each dtype: power of the expected result over power of the
difference."""
ATTENTION_DECIBELS = 40.0
"""Lower limits, because attention kernels may store probabilities in 16 bits."""
INT8_SHARE, BYTE_SHARE = 0.01, 0.001
"""Share of int8 values that may be off by one; of other elements and E8M0 scales that may differ."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one case. `part`: question, operator or function."""

    part: str
    name: str
    operator: str
    used: bool = True
    """Whether ascendit calls it; other results do not fail the check."""
    verdict: Verdict = "exact"
    arguments: tuple[str, ...] = ()
    """Dtype and shape of tensors, repr of other arguments."""
    max_abs: float | None = None
    max_rel: float | None = None
    db: float | None = None
    """None if nothing differs."""
    different: float | None = None
    """Share of elements that differ, for quantized results."""
    microseconds: float | None = None
    how: str = ""
    """The selected kernel and the reason; "" for operators."""
    answer: str = ""
    expected: str = ""
    error: str = ""

    @property
    def failed(self) -> bool:
        return self.used and self.verdict in BAD


def worst(results: Iterable[Result]) -> Result:
    """The first result with the worst verdict. Raises ValueError if `results` is empty."""
    return min(results, key=lambda r: ORDER.index(r.verdict))


def compare_results(base: Result, actual: Any, expected: Any, *, db: float | None = None) -> Result:
    """Return `base` with the verdict on `actual`.

    Both results are on the CPU: tensors, tuples of tensors, or ints.

    `db`: limit for float tensors instead of the limit of their dtype. Ints are compared only if they are the
    only result; next to tensors they are ignored, since they may be random seeds.
    """
    if isinstance(expected, int):
        if actual == expected:
            return base
        return replace(base, verdict="wrong", error=f"{actual}, not {expected}")
    pairs = list(zip(tensors_in(actual), tensors_in(expected), strict=False))
    results = [_pair(base, a, e, db) for a, e in pairs if a.numel() or e.numel()]
    if not results:
        return base
    first = worst(results)
    return replace(
        base,
        verdict=first.verdict,
        max_abs=largest(r.max_abs for r in results),
        max_rel=largest(r.max_rel for r in results),
        db=smallest(r.db for r in results),
        different=largest(r.different for r in results),
        error=first.error,
    )


def _pair(base: Result, actual: Tensor, expected: Tensor, db: float | None) -> Result:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return replace(base, verdict="wrong", error=f"got {describe(actual)}, not {describe(expected)}")
    name = str(expected.dtype).removeprefix("torch.")
    if name not in DECIBELS:
        return _compare_bytes(base, actual, expected)
    return _compare_floats(base, actual, expected, DECIBELS[name] if db is None else db)


def _compare_bytes(base: Result, actual: Tensor, expected: Tensor) -> Result:
    """Compare qdata, E8M0 scales and packed integers: a small share of elements may differ."""
    if expected.dtype.is_floating_point:
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
    step = (actual.to(torch.int64) - expected.to(torch.int64)).abs()
    share = float((step != 0).double().mean())
    if share == 0:
        return replace(base, different=0.0)
    small = expected.dtype == torch.int8 and int(step.max()) <= 1
    limit = INT8_SHARE if small else BYTE_SHARE if expected.element_size() == 1 else 0.0
    if share <= limit:
        return replace(base, verdict="close", different=share)
    index = [int(i) for i in (step != 0).nonzero()[0]]
    error = f"{share:.2%} of the elements differ (at most {limit:.1%}), the first at {index}"
    return replace(base, verdict="wrong", different=share, error=error)


def _compare_floats(base: Result, actual: Tensor, expected: Tensor, limit: float) -> Result:
    a, e = actual.double(), expected.double()
    finite = e.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].isnan(), e[~finite].isnan()):
        error = "NaN or infinity where the expected result is finite, or the reverse"
        return replace(base, verdict="wrong", error=error)
    a, e = a[finite], e[finite]
    gap = (a - e).abs()
    if not gap.numel() or float(gap.max()) == 0:
        return replace(base, max_abs=0.0, max_rel=0.0)
    size = float(e.abs().max())
    noise, signal = float(gap.square().sum()), float(e.square().sum())
    db = decibels(signal, noise) if signal else 0.0
    max_rel = float(gap.max()) / size if size else None
    result = replace(base, max_abs=float(gap.max()), max_rel=max_rel, db=db)
    if db >= limit:
        return replace(result, verdict="close")
    return replace(result, verdict="wrong", error=f"{db:.1f} dB, at least {limit:g} needed")


def largest(values: Iterable[float | None]) -> float | None:
    """The largest value, ignoring None; None if there are no values."""
    return max((v for v in values if v is not None), default=None)


def smallest(values: Iterable[float | None]) -> float | None:
    """The smallest value, ignoring None; None if there are no values."""
    return min((v for v in values if v is not None), default=None)


def describe(value: Any) -> str:
    """A tensor as `bfloat16 [5, 96]`, with strides if it is not contiguous; the repr of other values."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    name = str(value.dtype).removeprefix("torch.")
    strides = "" if value.is_contiguous() else f" strides {list(value.stride())}"
    return f"{name} {list(value.shape)}{strides}"


# ---- the device under test ----------------------------------------------------------------------


class CheckedDevice:
    """An open device. `real`: hardware rather than a twin or the CPU, so calls are repeated for timing."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.real = device.backend.tensors != "cpu"

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """torch.ops.npu.NAME, or torch.ops.mindiesd.NAME for `mindiesd::NAME`, of arguments on the device."""
        namespace, _, base = name.rpartition("::")
        return getattr(getattr(torch.ops, namespace or "npu"), base)(*args, **kwargs)

    def on_cpu(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """`call` with arguments copied to the device and results copied back to the CPU."""
        moved = {key: self.to_device(value) for key, value in kwargs.items()}
        return self.to_cpu(self.call(name, *map(self.to_device, args), **moved))

    def to_device(self, value: Any) -> Any:
        """A copy on the device, with the same strides, which some operators read."""
        if isinstance(value, list | tuple):
            return [self.to_device(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        strides = value.stride()
        order = sorted(range(value.dim()), key=lambda axis: -strides[axis])
        inverse = sorted(range(value.dim()), key=order.__getitem__)
        contiguous = value.permute(order).contiguous()
        return contiguous.to(self.device.torch_name, copy=True).permute(inverse)

    def to_cpu(self, value: Any) -> Any:
        """A copy on the CPU. Waits for the kernel, so errors of the kernel are raised here."""
        if isinstance(value, list | tuple):
            return tuple(self.to_cpu(v) for v in value)
        return value.to("cpu", copy=True) if isinstance(value, Tensor) else value

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median time of `RUNS` synchronized runs; of one run if the device is not `real`."""
        times = []
        for _ in range(RUNS if self.real else 1):
            synchronize(self.device)
            start = time.perf_counter()
            run()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def works(self) -> bool:
        """Whether the device still computes: after some faults it fails every call until the process ends."""
        try:
            (torch.ones(4, device=self.device.torch_name) * 2).cpu()
        except RuntimeError:
            return False
        return True


# ---- one case -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckCase:
    """One check. `run` returns `base` with the verdict, and may raise any exception."""

    base: Result
    run: Callable[[CheckedDevice, Result], Result]


def run_case(card: CheckedDevice, case: CheckCase) -> Result:
    """The result of one case. Does not raise: an exception is a result with the verdict `error`."""
    try:
        return case.run(card, case.base)
    except Exception as e:
        log.info("self-check: %s raised", case.base.name, exc_info=True)
        return replace(case.base, verdict="error", error=shortened(f"{type(e).__name__}: {e}"))


def shortened(text: str, size: int = 300) -> str:
    """The first line of an error, cut to `size` characters."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return re.sub(r"\s+", " ", line)[:size]


# ---- operators against the twin -----------------------------------------------------------------


def operator_cases(device: Device) -> Iterator[CheckCase]:
    """All samples of the twin for the chip of this device; none if it has no chip."""
    if not device.chip:
        return
    used = {row.operator for row in CAPABILITIES if row.used_for}
    for sample in example_calls.samples():
        base = Result(
            part="operator", name=sample.name, operator=sample.operator, used=sample.operator in used
        )
        yield CheckCase(base, partial(_operator, sample=sample))


def _operator(card: CheckedDevice, base: Result, sample: Any) -> Result:
    if kernels.missing(sample.operator, str(card.device.chip)):
        return replace(base, verdict="not installed")
    last: list[Any] = []

    def called(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == sample.operator:
            last[:] = [name, args, kwargs]
        return card.call(name, *args, **kwargs)

    with internal_format(card.device, True):
        first = sample.run(called, card.to_device)
    expected = sample.run(twin.call, lambda t: t.clone())
    if sample.operator == "npu_format_cast":  # a copy to the CPU would hide the byte order
        first = card.call("npu_format_cast", first, ND)
        expected = twin.call("npu_format_cast", expected, ND)
    name, args, kwargs = last
    arguments = (*map(describe, args), *(f"{k}={describe(v)}" for k, v in kwargs.items()))
    base = replace(base, arguments=arguments)
    actual = card.to_cpu(first)
    limit = ATTENTION_DECIBELS if "attention" in name or name == "mindiesd::la" else None
    result = compare_results(base, actual, expected, db=limit)
    return replace(result, microseconds=card.seconds(lambda: card.call(name, *args, **kwargs)) * 1e6)


# ---- bound functions against plain PyTorch ------------------------------------------------------

EPS = 1e-6
TOKENS, TEXT, HEADS, HEAD, OUT = 48, 12, 4, 64, 96
WIDTH = HEADS * HEAD
BF16 = torch.bfloat16
SMOOTHED, NZ = ", smoothed", ", FRACTAL_NZ"
"""Suffixes of the names of quantized layers."""

PREPARED = {"rope": slice(1, 3), "adaln": slice(1, 3), "gated_residual": slice(2, 3)}
"""Operator -> arguments that `Ops.prepare` can convert once."""


def function_cases(device: Device) -> Iterator[CheckCase]:
    """All dense operators and quantized linear layers bound on this device, against plain PyTorch."""
    ops = bind(device)
    inputs = _inputs()
    assert set(inputs) == set(OPERATOR_NAMES), "a new operator needs its inputs here"
    for name, args in inputs.items():
        base = Result(part="function", name=name, operator=name, how=ops.choices[name])
        expected = getattr(reference, name)
        yield CheckCase(base, partial(_dense, ops=ops, name=name, expected=expected, args=args))
    yield from _attention_cases(device)
    for scheme in LINEAR_SCHEMES:
        if device.chip and scheme not in device.native_schemes:
            continue
        for variant in ("", SMOOTHED, NZ) if device.operators == "npu" else ("", SMOOTHED):
            base = Result(part="function", name=f"{scheme} linear{variant}", operator=f"linear in {scheme}")
            yield CheckCase(base, partial(_linear, schemes=ops.quantized, scheme=scheme, variant=variant))


def _attention_cases(device: Device) -> Iterator[CheckCase]:
    """Every attention kernel of an NPU, dense and quantized, with the log-sum-exp, at odd lengths."""
    for kernel in kernels_of(device, Wish()) if device.operators == "npu" else ():
        if not kernel.operator.startswith("attention") or kernel.missing():
            continue
        scheme = kernel.operator.partition("attention_")[2]
        row = ATTENTION_KERNELS.get(kernel.name)
        length = max(TOKENS, row.shortest if row else 0) + 3
        name = f"attention{' in ' * bool(scheme)}{scheme}, {kernel.name}"
        base = Result(part="function", name=name, operator=kernel.needs, how=kernel.reason)
        expected = emulated(scheme, reference.attention) if scheme else reference.attention
        yield CheckCase(base, partial(_attention, call=kernel.call, expected=expected, length=length))


def _attention(card: CheckedDevice, base: Result, call: Function, expected: Function, length: int) -> Result:
    q, k, v = (seeded(1, length, 1, HEAD, seed=seed).to(BF16) for seed in range(3))
    moved = [card.to_device(t) for t in (q, k, v)]
    actual = card.to_cpu(call(*moved, return_lse=True))
    base = replace(base, arguments=tuple(map(describe, (q, k, v))))
    result = compare_results(base, actual, expected(q, k, v, return_lse=True), db=ATTENTION_DECIBELS)
    return replace(result, microseconds=card.seconds(lambda: call(*moved)) * 1e6)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers [*shape] in float32, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _inputs() -> dict[str, tuple[Any, ...]]:
    x, y = (seeded(1, TOKENS, WIDTH, seed=seed).to(BF16) for seed in (0, 1))
    rows, gamma = seeded(2, WIDTH), seeded(WIDTH)
    weight, bias = seeded(OUT, WIDTH).to(BF16), seeded(OUT).to(BF16)
    q, text = seeded(1, TOKENS, HEADS, HEAD).to(BF16), seeded(1, TEXT, HEADS, HEAD).to(BF16)
    angle, spans = seeded(TOKENS, HEAD // 2), (TEXT, TOKENS - TEXT)
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


def _dense(
    card: CheckedDevice, base: Result, ops: Any, name: str, expected: Callable[..., Tensor], args: Any
) -> Result:
    moved = [card.to_device(a) if isinstance(a, Tensor) else a for a in args]
    if (indices := PREPARED.get(name)) is not None:
        moved[indices] = ops.prepare(name, *moved[indices], dtype=BF16)
    bound = getattr(ops, name)
    base = replace(base, arguments=tuple(map(describe, args)))
    limit = ATTENTION_DECIBELS if name == "attention" else None
    result = compare_results(base, card.to_cpu(bound(*moved)), expected(*args), db=limit)
    return replace(result, microseconds=card.seconds(lambda: bound(*moved)) * 1e6)


def _linear(card: CheckedDevice, base: Result, schemes: Any, scheme: str, variant: str) -> Result:
    """One layer [OUT, K]: the prepared weight converts back to the stored one, and the product is correct."""
    k = 1024 if scheme == "mxfp4_dualscale" else WIDTH
    stored, bias = mx.encode(seeded(OUT, k), LINEAR_SCHEMES[scheme].weight), seeded(OUT)
    mul_scale = seeded(k).abs() + 0.5 if variant == SMOOTHED else None
    x = seeded(1, TOKENS, k, seed=2).to(BF16)
    tensors = (stored.qdata, stored.scale, stored.dual_scale, bias, LINEAR_SCHEMES[scheme].weight)
    weight = schemes.prepare_weight(*tensors, nz=variant == NZ)
    activation = schemes.quantize_activation(card.to_device(x), scheme, card.to_device(mul_scale))
    kernel = schemes.kernel(scheme)
    arguments = (describe(x), f"weight {LINEAR_SCHEMES[scheme].weight} {[OUT, k]}")
    base = replace(base, how=kernel.reason, arguments=arguments)
    restored = schemes.stored(weight)
    for role in ("qdata", "scale", "dual_scale"):
        before, after = getattr(stored, role), card.to_cpu(getattr(restored, role))
        if before is not None and not torch.equal(before.view(torch.uint8), after.view(torch.uint8)):
            return replace(
                base, verdict="wrong", error=f"{role} of the prepared weight differs from the stored"
            )
    host = torch.device("cpu")
    expected = reference.quantized_linear(
        reference.quantize_activation(x, scheme, mul_scale), reference.prepare_weight(stored, bias, host)
    )
    result = compare_results(base, card.to_cpu(kernel.call(activation, weight)), expected)
    return replace(result, microseconds=card.seconds(lambda: kernel.call(activation, weight)) * 1e6)
