"""The choices of a run: a kernel for each step, kind and block of an expert, and their report.

    resolved = resolve(policy, calls, declared, steps)      # before the loop
    rows = report("transformer", resolved, describe)        # for the JSON beside a video, and a dry run

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ascendit.attention.choice import AttentionPolicy, Choice
from ascendit.device.attention_kernels import ATTENTION_KERNELS, Kind
from ascendit.device.attention_limits import AttentionCall, backend_on, is_emulated_on
from ascendit.report import counted
from ascendit.schedule import Step

Resolved = Mapping[int, Mapping[Kind, tuple[Choice, ...]]]
"""Step -> kind -> the choice of each block."""


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """One kernel of a run, with the steps and blocks that it computes."""

    expert: str
    kind: Kind
    kernel: str
    """A kernel, or a scheme of quantized attention."""
    backend: str
    """cpu, cuda, npu or reference."""
    blocks: str
    """Ranges: `0`, `1-39`."""
    steps: str
    sub_head: int | None
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @property
    def choice(self) -> str:
        """Kernel and reason: `cpu on cpu (default; native: ..)`."""
        heads = f", {counted(self.sub_head, 'head')} in one call" if self.sub_head else ""
        return f"{self.kernel} on {self.backend}{heads} ({self.reason})"


def resolve(
    policy: AttentionPolicy,
    calls: Mapping[Kind, AttentionCall],
    declared: Mapping[Kind, Sequence[str | None]],
    steps: Mapping[int, Step],
) -> Resolved:
    """Choose a kernel for each step, kind and block.

    `declared`: the scheme of each block, or None. `steps`: those that the expert runs. The attention of a
    step applies to self-attention. Raises the errors of `AttentionPolicy.choose` and `check_heads`.
    """
    chosen: dict[tuple[Kind, str | None, str | None], Choice] = {}

    def choice(kind: Kind, step: str | None, scheme: str | None) -> Choice:
        key = (kind, step, scheme)
        if key not in chosen:
            chosen[key] = policy.choose(calls[kind], step=step, declared=scheme, calls=calls)
        return chosen[key]

    for call in calls.values():
        policy.check_heads(call.heads)
    by_setting = {
        setting: {
            kind: tuple(choice(kind, setting if kind == "self" else None, x) for x in declared[kind])
            for kind in calls
        }
        for setting in dict.fromkeys(step.attention for step in steps.values())
    }
    return {number: by_setting[step.attention] for number, step in steps.items()}


def report(
    expert: str, resolved: Resolved, describe: Callable[[str], tuple[str, str]]
) -> tuple[AttentionRow, ...]:
    """A row for each choice and group of blocks. `describe`: kernel or scheme -> its backend and a text."""
    groups: dict[tuple[Kind, Choice, tuple[int, ...]], list[int]] = {}
    for step, kinds in resolved.items():
        for kind, choices in kinds.items():
            for choice in dict.fromkeys(choices):
                blocks = tuple(i for i, x in enumerate(choices) if x == choice)
                groups.setdefault((kind, choice, blocks), []).append(step)
    rows = []
    for (kind, choice, blocks), numbers in groups.items():
        backend, about = describe(choice.name)
        rows.append(
            AttentionRow(
                expert=expert,
                kind=kind,
                kernel=choice.name,
                backend=backend,
                blocks=ranges(blocks),
                steps=ranges(numbers),
                sub_head=choice.sub_head,
                reason=f"{choice.reason}; {about}",
            )
        )
    return tuple(rows)


def row_lines(rows: Iterable[AttentionRow]) -> list[str]:
    """A text for each choice; with expert, blocks and steps if its kind has several."""
    by_kind: dict[Kind, list[AttentionRow]] = {}
    for row in rows:
        by_kind.setdefault(row.kind, []).append(row)
    single: dict[str, list[Kind]] = {}
    texts = []
    for kind, own in by_kind.items():
        if len(choices := {row.choice for row in own}) == 1:
            single.setdefault(choices.pop(), []).append(kind)
        else:
            spans = ((f"{kind}, {x.expert}, blocks {x.blocks}, steps {x.steps}", x.choice) for x in own)
            texts += [f"{span}: {choice}" for span, choice in spans]
    return [f"{' and '.join(kinds)}: {choice}" for choice, kinds in single.items()] + texts


def describe_on(policy: AttentionPolicy) -> Callable[[str], tuple[str, str]]:
    """`describe` of `report` before the kernels are loaded, from the tables."""

    def describe(name: str) -> tuple[str, str]:
        backend = backend_on(policy.device, "reference" if policy.reference else name)
        if name in ATTENTION_KERNELS:
            return backend, ATTENTION_KERNELS[name].about
        is_emulated = policy.reference or is_emulated_on(policy.device, name)
        return backend, "emulated: the same numbers, slower" if is_emulated else "quantized attention"

    return describe


def ranges(numbers: Iterable[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7 in ascending order."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
