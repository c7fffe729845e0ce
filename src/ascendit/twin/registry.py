"""The operators by name: their frozen schemas, and a decorator that registers a body for one.

    @operator("npu_silu")
    def npu_silu(self):                                  # every argument of the schema, by name
        require(self.dim() > 0, ...)                     # 1. the contract
        yield Out(tuple(self.shape), self.dtype)         # 2. what comes out; a fake stops here
        yield torch.nn.functional.silu(self)             # 3. the numbers

so a fake and the numbers cannot disagree: what part 3 gives is checked against part 2 on every call. Schemas
are those of torch_npu 2.13.0 and MindIE-SD 3.1.0.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from ascendit.device.chip import CHIPS
from ascendit.device.operator_support import capability
from ascendit.twin import STATE
from ascendit.twin.contract import CHIP, TwinError, refuse, require

VERSIONS: Mapping[str, str] = {"npu": "torch_npu_2.13.0", "mindiesd": "mindiesd_3.1.0"}
"""Namespace of torch.ops -> file in `twin/data`."""

UNDEFINABLE = frozenset({"as_strided_", "new_empty_strided"})
"""Entries of the frozen list that are a name without a schema, as they are in the wheel."""


@functools.cache
def frozen(namespace: str) -> Mapping[str, str]:
    """Operator name with overload -> schema, as `Library.define` takes it."""
    text = resources.files("ascendit.twin").joinpath("data", f"{VERSIONS[namespace]}.json").read_text()
    schemas: dict[str, str] = json.loads(text)["schemas"]
    return {name: schema for name, schema in schemas.items() if name not in UNDEFINABLE}


def split(name: str) -> tuple[str, str]:
    """`mindiesd::adaln` -> (mindiesd, adaln); a name alone is one of `npu`."""
    namespace, _, rest = name.rpartition("::")
    return namespace or "npu", rest


@dataclass(frozen=True)
class Signature:
    """The arguments of one operator."""

    qualified: str
    text: str
    names: tuple[str, ...]
    positional: int
    """How many may be given without a name."""
    defaults: Mapping[str, Any]
    integers: frozenset[str]
    """Arguments of type int: these take a torch.dtype too, as torch's own binding does."""

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Every argument by name. Refuses unknown, missing and surplus ones in the dispatcher's words."""
        unknown = [k for k in kwargs if k not in self.names or k in self.names[: len(args)]]
        if unknown or len(args) > self.positional:
            what = f"{len(args)} positional arguments"
            what = f"Unknown keyword argument '{unknown[0]}'" if unknown else what
            refuse("call.surplus", what=what, self=self, names=", ".join(self.names) or "nothing")
        bound = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        required = [n for n in self.names if n not in self.defaults]
        missing = [n for n in required if n not in bound]
        require(not missing, "call.missing", self=self, missing=missing, required=required)
        return bound


@functools.cache
def signature(name: str) -> Signature:
    """The signature of an operator by its name, `npu_rms_norm` or `mindiesd::adaln`."""
    namespace, rest = split(name)
    if namespace not in VERSIONS or rest not in frozen(namespace):
        refuse("call.name", name=name)
    parsed = torch._C.parse_schema(frozen(namespace)[rest])
    arguments = parsed.arguments
    return Signature(
        f"{namespace}::{rest}",
        str(parsed),
        tuple(a.name for a in arguments),
        sum(not a.kwarg_only for a in arguments),
        {a.name: a.default_value for a in arguments if a.has_default_value()},
        frozenset(a.name for a in arguments if str(a.real_type) in ("int", "Optional[int]")),
    )


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


def check_capability(name: str, mode: str = "") -> None:
    """Refuse what this chip has no kernel for, by `ascendit.device.operator_support.CAPABILITIES`."""
    chip = current_chip()
    row = capability(name, mode)
    answer = row.on(chip)
    if answer == "yes":
        return
    what = f"{name} {mode}".strip()
    got = {
        "adapter": row.message,
        "cann": f"NPU function error: call {row.aclnn or name} failed, error code is 361001",
        "unknown": f"no public document says that {what} runs here",
    }[answer]
    where = ", ".join(f"{CHIPS[c].product} ({c})" for c in row.chips)
    raise TwinError(f"{got} [{what} on {chip}]", needs=where, fix=row.instead, code=CHIP)


def run(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Check the call and compute it. Counts one launch."""
    bound = signature(name).bind(args, kwargs)
    if name not in OPERATORS:
        refuse_uncomputed(name)
    check_capability(name)
    with torch.no_grad():
        steps = OPERATORS[name](**bound)
        outs = next(steps)
        result = next(steps)
    _check(name, outs, result)
    STATE.launches[name] = STATE.launches.get(name, 0) + 1
    return result


def fake(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Check the call and give empty results, for meta and fake tensors."""
    bound = signature(name).bind(args, kwargs)
    check_capability(name)
    outs: Outs = next(OPERATORS[name](**bound))
    like = next(tensors_in(list(bound.values())), None)
    device = "meta" if like is None else like.device
    made = tuple(
        o if isinstance(o, int) else torch.empty(o.shape, dtype=o.dtype, device=device)
        for o in (outs if isinstance(outs, tuple) else (outs,))
    )
    return made if isinstance(outs, tuple) else made[0]


def refuse_uncomputed(name: str, /, *args: Any, **kwargs: Any) -> None:
    """An operator of the frozen schemas that the twin does not compute."""
    namespace, rest = split(name)
    refuse("call.uncomputed", namespace=namespace, rest=rest, computed=sorted(OPERATORS))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, and in lists and tuples of values."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def _check(name: str, outs: Outs, result: Any) -> None:
    """Part 3 must give what part 2 said: ours to get right."""
    assert isinstance(result, tuple) == isinstance(outs, tuple), name
    for out, value in zip(outs, result, strict=True) if isinstance(outs, tuple) else ((outs, result),):
        given = Out(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
        assert given == out, (name, given, out)
