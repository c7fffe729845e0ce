"""Choose the kernel of each attention: the requested one, or the best that the device has for its size.

    policy = AttentionPolicy(device=parse_device("twin:a2"), request=parse_attention("self=laser"))
    policy.choose(calls["self"])            # Choice(name="laser", reason="requested")

The limits of the kernels are in `device/attention_limits.py`. Does not import torch, so a dry run has the
errors of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

from ascendit.device.attention_kernels import (
    ATTENTION_KERNELS,
    AUTOMATIC,
    Kind,
    Probabilities,
    attention_text,
)
from ascendit.device.attention_limits import (
    KIND_NAMES,
    LONG,
    AttentionCall,
    absence_on,
    kernels_on,
    limit_of,
    scheme_limit_on,
)
from ascendit.device.device import Device
from ascendit.errors import AscenditError, EnvironmentProblem, UsageError
from ascendit.family import WanConfig
from ascendit.option_text import option
from ascendit.quant.attention_schemes import ATTENTION_FORMATS
from ascendit.schedule import Step, StepSchedule


def calls_of(
    config: WanConfig,
    dtype: str,
    tokens: int,
    contexts: Mapping[Kind, int],
    key_length: int | None = None,
) -> dict[Kind, AttentionCall]:
    """The attentions of a transformer.

    `tokens`: those of the video; after the first `key_length` they are padding. `contexts`: kind -> tokens of
    text and image.
    """
    heads, head_dim = config.num_attention_heads, config.attention_head_dim
    lengths: dict[Kind, int] = {"self": tokens, **contexts}
    return {
        kind: AttentionCall(
            kind=kind,
            dtype=dtype,
            heads=heads,
            head_dim=head_dim,
            queries=tokens,
            keys=keys,
            key_length=key_length if kind == "self" else None,
        )
        for kind, keys in lengths.items()
    }


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The kernel of an attention, or the scheme of its quantization, with the reason."""

    name: str
    """A key of `ATTENTION_KERNELS` or of `ATTENTION_FORMATS`."""
    reason: str
    sub_head: int | None = None
    """Heads in one call, if not all."""


Measured = Callable[[Device, AttentionCall, Callable[[str], bool]], tuple[str, str] | None]
"""`measured.fastest` of a processor or card: the fastest measured kernel for a call, and the reason."""


def unmeasured(device: Device, call: AttentionCall, usable: Callable[[str], bool]) -> None:
    """A `Measured` without measurements."""


@dataclass(frozen=True, kw_only=True)
class AttentionPolicy:
    """The requests of a user, and the device that has to meet them."""

    device: Device
    request: Mapping[Kind, str] = field(default_factory=dict)
    """Kind -> kernel, scheme or bf16, from `parse_attention`."""
    schedule: StepSchedule = StepSchedule()
    """The step schedule, whose attention overrides `request`; for the fixes of errors."""
    sub_head: int | None = None
    """Heads in one call of self-attention."""
    reference: bool = False
    """Plain PyTorch only."""
    probabilities: Probabilities | None = None
    """Numbers per probability of the kernel `cpu`; None: its default."""
    emulate: bool = False
    """Emulate quantized attention on a chip without it; a CPU and CUDA always do."""
    missing: Callable[[str], str] = lambda name: ""
    """Why a kernel that this kind of device has is missing on this machine, "" if it is not."""
    measured: Measured = unmeasured

    def choose(
        self,
        call: AttentionCall,
        *,
        step: str | None = None,
        declared: str | None = None,
        calls: Mapping[Kind, AttentionCall] = MappingProxyType({}),
    ) -> Choice:
        """The kernel or scheme of an attention.

        `step`: the request of the step schedule. `declared`: the scheme that the model declares. The first of
        `step`, `request` and `declared` decides. `calls`: all kinds of the model, for the fix of an error.
        Raises UsageError (E-USE-01) for a request that the size or kind of the attention excludes,
        EnvironmentProblem (E-CAP-01) for one that the chip or machine excludes.
        """
        sources = {"step policy": step, "requested": self.request.get(call.kind), "of the model": declared}
        reason, name = next(((k, v) for k, v in sources.items() if v is not None), ("default", AUTOMATIC))
        sub_head = self.sub_head if call.kind == "self" and self.sub_head != call.heads else None
        if name in ATTENTION_FORMATS:
            self._check_scheme(name, call, step, declared)
            return Choice(name=name, reason=reason, sub_head=sub_head)
        if name == AUTOMATIC:
            best = self.automatic(call)
            if reason != "default":
                best = replace(best, reason=f"{reason}: bf16; {best.reason}")
            return replace(best, sub_head=sub_head)
        if problem := self.problem_of(name, call):
            raise self._refused(name, call, problem, step, calls)
        return Choice(name=name, reason=reason, sub_head=sub_head)

    def automatic(self, call: AttentionCall) -> Choice:
        """The fastest measured kernel, else the first usable one of the table."""
        if self.reference:
            return Choice(name="reference", reason="ops=reference")
        measured = self.measured(self.device, call, lambda name: not self.problem_of(name, call))
        if measured:
            return Choice(name=measured[0], reason=measured[1])
        skipped: list[str] = []
        for name, kernel in kernels_on(self.device).items():
            if kernel.on_request:
                continue
            if not (problem := self.problem_of(name, call)):
                return Choice(name=name, reason="; ".join(["default", *skipped]))
            skipped.append(f"{name}: {problem}")
        raise AssertionError("the reference takes every call")

    def problem_of(self, name: str, call: AttentionCall) -> str:
        """Why a kernel cannot compute `call`, "" if it can."""
        return self._absence(name) or limit_of(ATTENTION_KERNELS[name], call) or self.missing(name)

    def usable(self, call: AttentionCall) -> list[str]:
        """The kernels that can compute `call`, the best first; those only on request last."""
        names = [name for name in kernels_on(self.device) if not self.problem_of(name, call)]
        return sorted(names, key=lambda name: ATTENTION_KERNELS[name].on_request)

    def check_names(self) -> None:
        """Raise UsageError (E-USE-01) for a request that this device refuses for every size."""
        for kind, name in self.request.items():
            if name in ATTENTION_FORMATS or name == AUTOMATIC:
                continue
            row = ATTENTION_KERNELS[name]
            dtype, head = row.dtypes[0], row.head_multiple * -(-64 // row.head_multiple)
            call = AttentionCall(kind=kind, dtype=dtype, heads=1, head_dim=head, queries=LONG, keys=LONG)
            if problem := self._absence(name) or limit_of(row, call):
                raise self._refused(name, call, problem)

    def check_heads(self, heads: int) -> None:
        """Raise UsageError (E-USE-01) if `sub_head` does not divide the number of heads."""
        if self.sub_head is None or not heads % self.sub_head:
            return
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - (self.sub_head or 0)))
        raise UsageError(
            f"--sub-head {self.sub_head} with {heads} heads",
            needs=f"a divisor of {heads}: {', '.join(map(str, divisors))}",
            fix=f"--sub-head {nearest}",
        )

    def _absence(self, name: str) -> str:
        """Why this device never has a kernel, "" if it may have it."""
        if self.reference and name != "reference":
            return "ops=reference computes in plain PyTorch"
        return absence_on(self.device, name)

    def _check_scheme(self, scheme: str, call: AttentionCall, step: str | None, declared: str | None) -> None:
        """Raise the error of a scheme that the device does not compute, or not for heads of this size."""
        shown, size, problem = self._shown(call.kind, scheme, step), call.head_dim, ""
        if not self.reference:
            try:
                problem = scheme_limit_on(self.device, scheme, call, emulate=self.emulate)
            except EnvironmentProblem as error:
                error.got = f"{shown}: {error.got}"
                raise
        if ATTENTION_FORMATS[scheme].rotate and size & (size - 1) and scheme != declared:
            problem = problem or f"its rotation takes head sizes that are powers of two, not {size}"
        if problem:
            raise UsageError(
                f"{shown} on {self.device}: {problem}",
                needs="a size that the scheme takes, or attention that is not quantized",
                fix=self._replaced(scheme, AUTOMATIC, step)
                or option("attention", attention_text({**self.request, call.kind: AUTOMATIC})),
            )

    def _refused(
        self,
        name: str,
        call: AttentionCall,
        problem: str,
        step: str | None = None,
        calls: Mapping[Kind, AttentionCall] = MappingProxyType({}),
    ) -> AscenditError:
        """The error for a kernel: lists those that can compute `call`, and why the others cannot."""
        usable = self.usable(call)
        others = {n: self.problem_of(n, call) for n in kernels_on(self.device) if n != name}
        reasons = "".join(f"; {n}: {reason}" for n, reason in others.items() if reason)
        got = f"{self._shown(call.kind, name, step)} on {self.device}: {problem}"
        needs = f"{' or '.join(usable)} for {KIND_NAMES[call.kind]}{reasons}"
        fix = self._replaced(name, usable[0], step) or self._fix(call, usable[0], calls)
        if problem == self.missing(name):
            return EnvironmentProblem(got, needs=needs, fix=fix, code="E-CAP-01")
        return UsageError(got, needs=needs, fix=fix)

    def _replaced(self, name: str, other: str, step: str | None) -> str:
        """The step schedule with another kernel or scheme; "" if `step` is None."""
        best = partial(_with_attention, name=name, other=other)
        return "" if step is None else option("step_policy", self.schedule.map(best))

    def _fix(self, call: AttentionCall, best: str, calls: Mapping[Kind, AttentionCall]) -> str:
        """The request with usable kernels instead of those that cannot be used."""
        fixed = {**self.request, call.kind: best}
        for kind, name in self.request.items():
            if kind == call.kind or name not in ATTENTION_KERNELS:
                continue
            other = calls.get(kind)
            if other is None and (kind not in ATTENTION_KERNELS[name].kinds or self._absence(name)):
                fixed[kind] = best
            elif other is not None and self.problem_of(name, other):
                fixed[kind] = self.usable(other)[0]
        return option("attention", attention_text(fixed))

    @staticmethod
    def _shown(kind: Kind, name: str, step: str | None) -> str:
        return f"attention={name} of the step policy" if step else f"attention {kind}={name}"


def _with_attention(step: Step, *, name: str, other: str) -> Step:
    return replace(step, attention=other) if step.attention == name else step
