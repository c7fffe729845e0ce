"""What each denoising step does: its precision, attention kernel and cache. Resolved before the loop.

    schedule = StepSchedule.parse("0-1:w4a8,default:w4a4")   # the first two steps with 8-bit activations
    schedule = StepSchedule.parse("0,47-49:bf16")            # these in BF16, whose weights are kept too
    steps = schedule.resolve(50)                             # a `Step` for each

W4A8 and W4A4 share one MXFP4 weight; layers in another scheme run as they are stored. A schedule belongs to a
request's state and is never written onto a layer. A step is run by one expert, so what holds for an expert is
written for its steps. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ascendit.errors import RequestError, UsageError

Precision = Literal["stored", "w4a4", "w4a8", "bf16"]
"""`stored`: as the scheme of the layer says, for MXFP4 the same as `w4a4`."""
PRECISIONS = tuple(p for p in get_args(Precision) if p != "stored")
_SPAN = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class Step:
    """What one denoising step does."""

    precision: Precision = "stored"
    attention: str | None = None
    """The name of a kernel in `Ops.attention_kernels`; None: the one that is bound."""
    cache: str | None = None
    """The action of a cache; None: everything is computed."""


@dataclass(frozen=True)
class StepSchedule:
    """Step -> what it does; the first step is 0."""

    steps: tuple[tuple[int, Step], ...] = ()
    """Rising, each step once."""
    default: Step = Step()

    @classmethod
    def parse(cls, text: str) -> StepSchedule:
        """`STEPS:PRECISION` with commas between them; STEPS is `default`, `3`, `0-4`, or more of them.

        UsageError E-USE-01 for anything else, and for a step that is named twice.
        """
        if not isinstance(text, str):
            raise _bad(str(text), f"a {type(text).__name__}, no text")
        found: dict[Any, Step] = {}
        waiting: list[str] = []
        for word in text.split(","):
            name, colon, precision = (part.strip() for part in word.partition(":"))
            waiting.append(name)
            if not colon:
                continue
            if precision not in get_args(Precision):
                raise _bad(text, f"{precision!r} is not one of {', '.join(PRECISIONS)}")
            for span in waiting:
                for step in ("default",) if span == "default" else _span(span, text):
                    if step in found:
                        raise _bad(text, f"{step if step == 'default' else f'step {step}'} stands twice")
                    found[step] = Step(precision)  # type: ignore[arg-type]
            waiting = []
        if waiting:
            raise _bad(text, f"{', '.join(waiting) or 'a part'} has no precision")
        default = found.pop("default", Step())
        return cls(tuple(sorted(found.items())), default)

    def at(self, step: int) -> Step:
        """What this step does."""
        return dict(self.steps).get(step, self.default)

    def resolve(self, count: int) -> tuple[Step, ...]:
        """What each of `count` steps does."""
        return tuple(self.at(step) for step in range(count))

    @property
    def precisions(self) -> frozenset[Precision]:
        """All that occur."""
        return frozenset(step.precision for step in (self.default, *dict(self.steps).values()))

    def check_steps(self, count: int) -> None:
        """RequestError E-REQ-03 if a step beyond the last is named."""
        beyond = [step for step, _ in self.steps if step >= count]
        if beyond:
            raise RequestError(
                f"step policy {self} names step {beyond[0]}, and there are {count} steps",
                needs=f"steps 0 to {count - 1}: the first step is 0",
                fix="correct --step-policy, or ask for more --steps",
            )

    def check_schemes(self, schemes: Iterable[str], *, floats: bool) -> None:
        """UsageError E-USE-01 for a precision that this model has no weights for.

        `schemes`: those of its layers. `floats`: BF16 weights are at hand for every layer.
        """
        found = set(schemes)
        if found <= {"bf16"}:
            raise UsageError(
                f"step policy {self}, and no layer is quantized",
                needs="a quantized model, or a BF16 one and a scheme",
                fix="add --scheme mxfp4, or leave --step-policy out",
            )
        if "bf16" in self.precisions and not floats:
            raise UsageError(
                f"step policy {self} wants BF16 steps, and this model has codes only",
                needs="the BF16 model, quantized while it is loaded",
                fix="give the BF16 folder and --scheme or --recipe",
            )
        if self.precisions & {"w4a4", "w4a8"} and "mxfp4" not in found:
            raise UsageError(
                f"step policy {self}, and no layer is in mxfp4; there are {', '.join(sorted(found))}",
                needs="MXFP4 weights, which W4A4 and W4A8 share",
                fix="--scheme mxfp4, or leave --step-policy out",
            )

    def __str__(self) -> str:
        spans: list[tuple[int, int, Precision]] = []
        for step, precision in ((step, self.at(step).precision) for step, _ in self.steps):
            if spans and spans[-1][1:] == (step - 1, precision):
                spans[-1] = (spans[-1][0], step, precision)
            else:
                spans.append((step, step, precision))
        words = [f"{a}:{p}" if a == b else f"{a}-{b}:{p}" for a, b, p in spans]
        rest = self.default.precision
        return ",".join([*words, *([] if rest == "stored" else [f"default:{rest}"])])


def _span(word: str, text: str) -> range:
    found = _SPAN.fullmatch(word)
    if not found:
        raise _bad(text, f"{word!r} is no step")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise _bad(text, f"{word} runs backwards")
    return range(first, last + 1)


def _bad(text: str, problem: str) -> UsageError:
    return UsageError(
        f"step policy {text!r}: {problem}",
        needs=f"STEPS:PRECISION, .., the first step is 0; precisions {', '.join(PRECISIONS)}",
        fix="--step-policy 0-1:w4a8,default:w4a4",
    )
