"""Step schedule: precision, attention kernel and cache of each denoising step. Does not import torch.

    schedule = StepSchedule.parse("0-1:w4a8,default:w4a4")   # the first two steps with 8-bit activations
    schedule = StepSchedule.parse("0,47-49:bf16")            # these in BF16; needs BF16 weights in memory too
    schedule = StepSchedule.parse("0-3:w4a8+attention=bf16") # and these with attention that is not quantized
    steps = schedule.resolve(50)                             # a `Step` for each

It is resolved before the loop. W4A8 and W4A4 share one MXFP4 weight; layers in other schemes run in their own
precision. A schedule belongs to the state of a request and never changes a layer. One expert runs a step, so
a setting for an expert is a setting for its steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ascendit.errors import RequestError, UsageError

Precision = Literal["stored", "w4a4", "w4a8", "bf16"]
"""`stored`: the precision of the layer's scheme, for MXFP4 the same as `w4a4`."""
PRECISIONS = tuple(p for p in get_args(Precision) if p != "stored")
_ATTENTION = re.compile(r"attention=(\w+)")
_SPAN = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class Step:
    """Settings of one denoising step."""

    precision: Precision = "stored"
    attention: str | None = None
    """Kernel, scheme or `bf16` for self-attention, see `device.attention_kernels`; None: as without a
    schedule."""
    cache: str | None = None
    """Action of the cache; None: compute everything."""

    @property
    def text(self) -> str:
        """Its settings as `StepSchedule.parse` reads them; the cache has no text."""
        attention = [] if self.attention is None else [f"attention={self.attention}"]
        precision = [] if attention and self.precision == "stored" else [self.precision]
        return "+".join([*precision, *attention])


@dataclass(frozen=True)
class StepSchedule:
    """Settings by step; the first step is 0."""

    steps: tuple[tuple[int, Step], ...] = ()
    """(step, settings) in ascending order, each step once."""
    default: Step = Step()

    @classmethod
    def parse(cls, text: str) -> StepSchedule:
        """Parse a list of `STEPS:SETTINGS` with commas; STEPS is `default`, `3`, `0-4`, or a list of these.

        SETTINGS is a precision, `attention=NAME`, or both with `+`. Raises UsageError (E-USE-01) for any
        other text, or a step that is named twice.
        """
        if not isinstance(text, str):
            raise _bad(str(text), f"it has type {type(text).__name__}, not text")
        settings: dict[Any, Step] = {}
        pending: list[str] = []
        for item in text.split(","):
            name, colon, setting = (part.strip() for part in item.partition(":"))
            pending.append(name)
            if not colon:
                continue
            parsed = _step(setting, text)
            for span in pending:
                for step in ("default",) if span == "default" else _span(span, text):
                    if step in settings:
                        raise _bad(text, f"{step if step == 'default' else f'step {step}'} is named twice")
                    settings[step] = parsed
            pending = []
        if pending:
            raise _bad(text, f"{', '.join(pending) or 'an item'} has no settings")
        default = settings.pop("default", Step())
        return cls(tuple(sorted(settings.items())), default)

    def settings_of(self, step: int) -> Step:
        """The settings of this step."""
        return dict(self.steps).get(step, self.default)

    def resolve(self, count: int) -> tuple[Step, ...]:
        """The settings of each of `count` steps."""
        return tuple(self.settings_of(step) for step in range(count))

    @property
    def settings(self) -> tuple[Step, ...]:
        """The default, and the settings of each step of the schedule."""
        return self.default, *dict(self.steps).values()

    def map(self, change: Callable[[Step], Step]) -> StepSchedule:
        """The schedule with changed settings of each step."""
        return StepSchedule(tuple((i, change(step)) for i, step in self.steps), change(self.default))

    @property
    def precisions(self) -> frozenset[Precision]:
        """All precisions in use."""
        return frozenset(step.precision for step in self.settings)

    def check_steps(self, count: int) -> None:
        """Raise RequestError (E-REQ-03) if the schedule names a step that a run of `count` steps does not
        have.
        """
        beyond = [step for step, _ in self.steps if step >= count]
        if beyond:
            raise RequestError(
                f"step policy {self} names step {beyond[0]}, but there are {count} steps",
                needs=f"steps 0 to {count - 1}: the first step is 0",
                fix=f"--steps {self.steps[-1][0] + 1}, or another --step-policy",
            )

    def check_schemes(self, schemes: Iterable[str], *, floats: bool) -> None:
        """Raise UsageError (E-USE-01) for a precision that this model has no weights for.

        `schemes`: schemes of its layers. `floats`: whether BF16 weights of all layers are available.
        """
        schemes = set(schemes)
        if self.precisions == {"stored"}:
            return
        if schemes <= {"bf16"}:
            raise UsageError(
                f"step policy {self}, but no layer is quantized",
                needs="a quantized model, or a BF16 one and a scheme",
                fix="add --scheme mxfp4, or omit --step-policy",
            )
        if "bf16" in self.precisions and not floats:
            raise UsageError(
                f"step policy {self} has BF16 steps, but this model has only quantized weights",
                needs="the BF16 model, quantized while it is loaded",
                fix="use the BF16 folder with --scheme or --recipe",
            )
        if self.precisions & {"w4a4", "w4a8"} and "mxfp4" not in schemes:
            raise UsageError(
                f"step policy {self}, but no layer is in mxfp4; the model has {', '.join(sorted(schemes))}",
                needs="MXFP4 weights, which W4A4 and W4A8 share",
                fix="use --scheme mxfp4, or omit --step-policy",
            )

    def __str__(self) -> str:
        spans: list[tuple[int, int, str]] = []
        for i, step in self.steps:
            if spans and spans[-1][1:] == (i - 1, step.text):
                spans[-1] = (spans[-1][0], i, step.text)
            else:
                spans.append((i, i, step.text))
        items = [f"{a}:{text}" if a == b else f"{a}-{b}:{text}" for a, b, text in spans]
        default = self.default.text
        return ",".join([*items, *([] if default == "stored" else [f"default:{default}"])])


def _step(setting: str, text: str) -> Step:
    """The settings of `w4a8`, `attention=bf16` or `w4a8+attention=bf16`."""
    precision: Precision | None = None
    attention = None
    for word in setting.split("+"):
        match = _ATTENTION.fullmatch(word.strip())
        if match and attention is None:
            attention = match[1]
        elif word.strip() in get_args(Precision) and precision is None:
            precision = word.strip()  # type: ignore[assignment]
        else:
            raise _bad(text, f"{word.strip()!r} is not one of {', '.join(PRECISIONS)}, attention=NAME")
    return Step(precision or "stored", attention)


def _span(item: str, text: str) -> range:
    match = _SPAN.fullmatch(item)
    if not match:
        raise _bad(text, f"{item!r} is not a step")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise _bad(text, f"{item} is in reverse order")
    return range(first, last + 1)


def _bad(text: str, problem: str) -> UsageError:
    return UsageError(
        f"step policy {text!r}: {problem}",
        needs=f"STEPS:SETTINGS, .., the first step is 0; settings: {', '.join(PRECISIONS)}, attention=NAME",
        fix="omit --step-policy, or for MXFP4 weights --step-policy 0-1:w4a8,default:w4a4",
    )
