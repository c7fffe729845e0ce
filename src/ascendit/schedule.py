"""Which precision a denoising step runs in, where the weights leave a choice.

    StepSchedule.parse("0-1:w4a8,default:w4a4")      # the first two steps with 8-bit activations
    StepSchedule.parse("0,47-49:bf16")               # these in BF16, for which BF16 weights are kept too

W4A8 and W4A4 share one MXFP4 weight; layers in another scheme run as they are stored. A policy belongs to a
request's state and is never written onto a layer. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from ascendit.errors import RequestError, UsageError

Precision = Literal["stored", "w4a4", "w4a8", "bf16"]
"""`stored`: as the scheme of the layer says, for MXFP4 the same as `w4a4`."""
PRECISIONS = tuple(p for p in get_args(Precision) if p != "stored")
_SPAN = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class StepSchedule:
    """Step -> precision; the first step is 0."""

    steps: tuple[tuple[int, Precision], ...] = ()
    """Rising, each step once."""
    default: Precision = "stored"

    @classmethod
    def parse(cls, text: str) -> StepSchedule:
        """`STEPS:PRECISION` with commas between them; STEPS is `default`, `3`, `0-4`, or more of them.

        UsageError E-USE-01 for anything else, and for a step that is named twice.
        """
        if not isinstance(text, str):
            raise _bad(str(text), f"a {type(text).__name__}, no text")
        steps: dict[int, Precision] = {}
        default: Precision | None = None
        waiting: list[str] = []
        for word in text.split(","):
            name, colon, precision = (part.strip() for part in word.partition(":"))
            waiting.append(name)
            if not colon:
                continue
            chosen = _precision(precision, text)
            for span in waiting:
                if span == "default":
                    if default is not None:
                        raise _bad(text, "default stands twice")
                    default = chosen
                    continue
                for step in _span(span, text):
                    if step in steps:
                        raise _bad(text, f"step {step} stands twice")
                    steps[step] = chosen
            waiting = []
        if waiting:
            raise _bad(text, f"{', '.join(waiting) or 'a part'} has no precision")
        return cls(tuple(sorted(steps.items())), default or "stored")

    def at(self, step: int) -> Precision:
        """The precision of this step."""
        return next((precision for known, precision in self.steps if known == step), self.default)

    @property
    def precisions(self) -> frozenset[Precision]:
        """All that occur."""
        return frozenset(precision for _, precision in self.steps) | {self.default}

    def check_steps(self, count: int) -> None:
        """RequestError E-REQ-03 if a step beyond the last is named."""
        beyond = [step for step, _ in self.steps if step >= count]
        if beyond:
            raise RequestError(
                f"step policy {self} names step {beyond[0]}, and there are {count} steps",
                needs=f"steps 0 to {count - 1}: the first step is 0",
                fix="correct --step-policy, or ask for more --steps",
                code="E-REQ-03",
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
                code="E-USE-01",
            )
        if "bf16" in self.precisions and not floats:
            raise UsageError(
                f"step policy {self} wants BF16 steps, and this model has codes only",
                needs="the BF16 model, quantized while it is loaded",
                fix="give the BF16 folder and --scheme or --recipe",
                code="E-USE-01",
            )
        if self.precisions & {"w4a4", "w4a8"} and "mxfp4" not in found:
            raise UsageError(
                f"step policy {self}, and no layer is in mxfp4; there are {', '.join(sorted(found))}",
                needs="MXFP4 weights, which W4A4 and W4A8 share",
                fix="--scheme mxfp4, or leave --step-policy out",
                code="E-USE-01",
            )

    def __str__(self) -> str:
        spans: list[tuple[int, int, Precision]] = []
        for step, precision in self.steps:
            if spans and spans[-1][1:] == (step - 1, precision):
                spans[-1] = (spans[-1][0], step, precision)
            else:
                spans.append((step, step, precision))
        words = [f"{a}:{p}" if a == b else f"{a}-{b}:{p}" for a, b, p in spans]
        return ",".join([*words, *([] if self.default == "stored" else [f"default:{self.default}"])])


def _precision(word: str, text: str) -> Precision:
    if word not in PRECISIONS:
        raise _bad(text, f"{word!r} is not one of {', '.join(PRECISIONS)}")
    return word  # type: ignore[return-value]


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
        code="E-USE-01",
    )
