"""The operators by name: a dict and a decorator. Each is one generator, in three parts:

    @operator("npu_silu")
    def npu_silu(self):                                  # every argument of the schema, by name
        require(self.dim() > 0, ...)                     # 1. the contract
        yield Out(tuple(self.shape), self.dtype)         # 2. what comes out; a fake stops here
        yield torch.nn.functional.silu(self)             # 3. the numbers

so a fake and the numbers cannot disagree: what part 3 gives is checked against part 2 on every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascendit.device.npu import CHIPS, capability
from ascendit.twin.faults import CHIP, TwinError, refuse
from ascendit.twin.schemas import signature, split
from ascendit.twin.state import STATE


@dataclass(frozen=True)
class Out:
    """Shape and dtype of one tensor that an operator returns."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Outs = Out | int | tuple[Out | int, ...]
Body = Callable[..., Iterator[Any]]

OPERATORS: dict[str, Body] = {}
"""Operator name -> body: `npu_rms_norm`, `mindiesd::adaln`."""


def operator(name: str) -> Callable[[Body], Body]:
    """Register the body of an operator of the frozen schemas."""

    def register(body: Body) -> Body:
        assert name not in OPERATORS, name
        OPERATORS[name] = body
        return body

    return register


def current_chip() -> str:
    """The chip that calls are checked for. TwinError if the twin is off."""
    if STATE.chip is None:
        raise TwinError(
            "the twin is not enabled", needs="a chip", fix='ascendit.twin.enable("a5")', code=CHIP
        )
    return STATE.chip


def gate(name: str, mode: str = "") -> None:
    """Refuse what this chip has no kernel for, by `ascendit.device.npu.CAPABILITIES`."""
    chip = current_chip()
    row = capability(name, mode)
    answer = row.on(chip)
    if answer == "yes":
        return
    what = f"{name} {mode}".strip()
    if answer == "adapter":
        got = row.message
    elif answer == "cann":
        got = f"NPU function error: call {row.aclnn or name} failed, error code is 361001"
    else:
        got = f"no public document says that {what} runs here"
    where = ", ".join(f"{CHIPS[c].product} ({c})" for c in row.chips)
    raise TwinError(f"{got} [{what} on {chip}]", needs=where, fix=row.instead, code=CHIP)


def run(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Check the call and compute it. Counts one launch."""
    bound = signature(name).bind(args, kwargs)
    if name not in OPERATORS:
        not_here(name)
    gate(name)
    with torch.no_grad():
        steps = OPERATORS[name](**bound)
        outs = next(steps)
        result = next(steps)
    _check(name, outs, result)
    STATE.launches[name] = STATE.launches.get(name, 0) + 1
    return result


def fake(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Check the call and give empty results, for meta and fake tensors."""
    bound = signature(name).bind(args, kwargs)
    gate(name)
    outs: Outs = next(OPERATORS[name](**bound))
    like = next((t for t in _tensors(bound.values())), None)
    device = "meta" if like is None else like.device

    def empty(out: Out | int) -> Any:
        return out if isinstance(out, int) else torch.empty(out.shape, dtype=out.dtype, device=device)

    return tuple(empty(o) for o in outs) if isinstance(outs, tuple) else empty(outs)


def not_here(name: str) -> None:
    """An operator of the frozen schemas that the twin does not compute."""
    namespace, rest = split(name)
    refuse(
        f"torch.ops.{namespace}.{rest} is defined but not computed by the twin",
        needs="one of " + ", ".join(sorted(OPERATORS)),
        fix="write this part with one of them or with plain PyTorch, or run it on a card",
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _check(name: str, outs: Outs, result: Any) -> None:
    """Part 3 must give what part 2 said: ours to get right."""
    if isinstance(outs, tuple):
        assert isinstance(result, tuple) and len(result) == len(outs), name
        for out, value in zip(outs, result, strict=True):
            _check(name, out, value)
    elif isinstance(outs, Out):
        assert tuple(result.shape) == outs.shape, (name, tuple(result.shape), outs)
        assert result.dtype == outs.dtype, (name, result.dtype, outs)
    else:
        assert result == outs, (name, result, outs)
