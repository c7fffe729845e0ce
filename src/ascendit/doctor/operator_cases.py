"""Cases of the self-check: operators of a card against the twin, bound functions against plain PyTorch.

Operators are called by name on inputs made on the CPU, and timed. What a case raises is a result too.
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
from ascendit.device.device import Device
from ascendit.device.operator_support import CAPABILITIES
from ascendit.kernels import reference
from ascendit.mx.codec import decibels
from ascendit.ops.npu import kernels
from ascendit.ops.open_device import internal_format, synchronize
from ascendit.ops.operators import OPERATOR_NAMES, bind
from ascendit.quant.schemes import LINEAR_SCHEMES
from ascendit.twin import example_calls
from ascendit.twin.nz import ND
from ascendit.twin.registry import tensors_in

log = logging.getLogger("ascendit")

Caller = Callable[..., Any]
"""`call(name, *args, **kwargs)` with tensors on the CPU, results on the CPU."""
RUNS = 5


# ---- a result, and the comparison that gives it -------------------------------------------------

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


def worst(results: Iterable[Result]) -> Result:
    """The first with the worst verdict. Raises ValueError if there is none."""
    return min(results, key=lambda r: ORDER.index(r.verdict))


def compare_results(base: Result, actual: Any, expected: Any, *, db: float | None = None) -> Result:
    """`base` with the verdict of two results: tensors, tuples of them, or whole numbers. All on the CPU.

    `db`: the limit for floats instead of that of their dtype. Only an operator whose whole result is a number
    is judged by it; numbers beside tensors, as seeds are, may be anything.
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
        max_abs=most(r.max_abs for r in results),
        max_rel=most(r.max_rel for r in results),
        db=least(r.db for r in results),
        different=most(r.different for r in results),
        error=first.error,
    )


def _pair(base: Result, actual: Tensor, expected: Tensor, db: float | None) -> Result:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return replace(base, verdict="wrong", error=f"{described(actual)} came, not {described(expected)}")
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
    finite = e.isfinite()
    if not torch.equal(a.isfinite(), finite) or not torch.equal(a[~finite].isnan(), e[~finite].isnan()):
        error = "NaN or infinity where the expected is finite, or not there"
        return replace(base, verdict="wrong", error=error)
    a, e = a[finite], e[finite]
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


def most(values: Iterable[float | None]) -> float | None:
    """The largest; None stands for no number."""
    return max((v for v in values if v is not None), default=None)


def least(values: Iterable[float | None]) -> float | None:
    """The smallest; None stands for no number."""
    return min((v for v in values if v is not None), default=None)


def described(value: Any) -> str:
    """`bfloat16 [5, 96]`, with its strides where it is not contiguous; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    name = str(value.dtype).removeprefix("torch.")
    strides = "" if value.is_contiguous() else f" strides {list(value.stride())}"
    return f"{name} {list(value.shape)}{strides}"


# ---- the device under test ----------------------------------------------------------------------


class CheckedDevice:
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


# ---- one case -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckCase:
    """One thing to find out. `run` gives `base` with the verdict, and may raise anything."""

    base: Result
    run: Callable[[CheckedDevice, Result], Result]


def run_case(card: CheckedDevice, case: CheckCase) -> Result:
    """The result of one case; what it raises is one too."""
    try:
        return case.run(card, case.base)
    except Exception as e:
        log.info("self-check: %s raised", case.base.name, exc_info=True)
        return replace(case.base, verdict="error", error=shorter(f"{type(e).__name__}: {e}"))


def shorter(text: str, size: int = 300) -> str:
    """The first line of an error, in a report of one page."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return re.sub(r"\s+", " ", line)[:size]


# ---- operators against the twin -----------------------------------------------------------------


def operator_cases(device: Device) -> Iterator[CheckCase]:
    """Every sample of the twin, for the chip of this device. Nothing where it has none."""
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
    found = compare_results(base, actual, expected, db=limit)
    return replace(found, microseconds=card.seconds(lambda: card.call(name, *args, **kwargs)) * 1e6)


# ---- bound functions against plain PyTorch ------------------------------------------------------

EPS = 1e-6
TOKENS, TEXT, HEADS, HEAD, OUT = 48, 12, 4, 64, 96
WIDTH = HEADS * HEAD
BF16 = torch.bfloat16
SMOOTHED, NZ = ", smoothed", ", FRACTAL_NZ"
"""Variants of a quantized layer, behind its name."""

PREPARED = {"rope": slice(1, 3), "adaln": slice(1, 3), "gated_residual": slice(2, 3)}
"""Operator -> its arguments that `Ops.prepare` may lay out once."""


def function_cases(device: Device) -> Iterator[CheckCase]:
    """Every dense operator and quantized linear layer that is bound on this device, against the plain one."""
    ops = bind(device)
    inputs = _inputs()
    assert set(inputs) == set(OPERATOR_NAMES), "a new operator needs its inputs here"
    for name, args in inputs.items():
        base = Result(part="function", name=name, operator=name, how=ops.choices[name])
        plain = getattr(reference, name)
        yield CheckCase(base, partial(_dense, ops=ops, name=name, plain=plain, args=args))
    for scheme in LINEAR_SCHEMES:
        if device.chip and scheme not in device.native_schemes:
            continue
        for variant in ("", SMOOTHED, NZ) if device.operators == "npu" else ("", SMOOTHED):
            base = Result(part="function", name=f"{scheme} linear{variant}", operator=f"linear in {scheme}")
            yield CheckCase(base, partial(_linear, schemes=ops.quantized, scheme=scheme, variant=variant))


def seeded(*shape: int, seed: int = 0) -> Tensor:
    """The same float32 numbers on every machine."""
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
    card: CheckedDevice, base: Result, ops: Any, name: str, plain: Callable[..., Tensor], args: Any
) -> Result:
    given = [card.put(a) if isinstance(a, Tensor) else a for a in args]
    if (where := PREPARED.get(name)) is not None:
        given[where] = ops.prepare(name, *given[where], dtype=BF16)
    bound = getattr(ops, name)
    base = replace(base, arguments=tuple(map(described, args)))
    limit = ATTENTION_DECIBELS if name == "attention" else None
    found = compare_results(base, card.back(bound(*given)), plain(*args), db=limit)
    return replace(found, microseconds=card.seconds(lambda: bound(*given)) * 1e6)


def _linear(card: CheckedDevice, base: Result, schemes: Any, scheme: str, variant: str) -> Result:
    """One layer [OUT, K]: the weight must come back as it was stored, the product be the plain one."""
    k = 1024 if scheme == "mxfp4_dualscale" else WIDTH
    stored, bias = mx.encode(seeded(OUT, k), LINEAR_SCHEMES[scheme].weight), seeded(OUT)
    mul_scale = seeded(k).abs() + 0.5 if variant == SMOOTHED else None
    x = seeded(1, TOKENS, k, seed=2).to(BF16)
    given = (stored.qdata, stored.scale, stored.dual_scale, bias, LINEAR_SCHEMES[scheme].weight)
    weight = schemes.prepare_weight(*given, nz=variant == NZ)
    tokens = schemes.quantize_activation(card.put(x), scheme, card.put(mul_scale))
    kernel = schemes.kernel(scheme)
    arguments = (described(x), f"weight {LINEAR_SCHEMES[scheme].weight} {[OUT, k]}")
    base = replace(base, how=kernel.reason, arguments=arguments)
    again = schemes.stored(weight)
    for part in ("qdata", "scale", "dual_scale"):
        here, there = getattr(stored, part), card.back(getattr(again, part))
        if here is not None and not torch.equal(here.view(torch.uint8), there.view(torch.uint8)):
            return replace(base, verdict="wrong", error=f"{part} of the weight do not come back as stored")
    host = torch.device("cpu")
    plain = reference.quantized_linear(
        reference.quantize_activation(x, scheme, mul_scale), reference.prepare_weight(stored, bias, host)
    )
    found = compare_results(base, card.back(kernel.call(tokens, weight)), plain)
    return replace(found, microseconds=card.seconds(lambda: kernel.call(tokens, weight)) * 1e6)
