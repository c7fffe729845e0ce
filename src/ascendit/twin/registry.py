"""Operators by name: their frozen schemas, and a decorator that registers the implementation of one.

    @operator("npu_silu")
    def npu_silu(self):                                  # all arguments of the schema, by name
        require(self.dim() > 0, ...)                     # 1. check the arguments
        yield Out(tuple(self.shape), self.dtype)         # 2. shapes and dtypes of the outputs
        yield torch.nn.functional.silu(self)             # 3. the outputs

A call on fake tensors ends after step 2. Every other call checks the outputs of step 3 against step 2, so the
two always agree. Schemas are those of torch_npu 2.13.0 and MindIE-SD 3.1.0.
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
"""Entries that have a name but no schema in the wheel."""


@functools.cache
def frozen(namespace: str) -> Mapping[str, str]:
    """Operator name with overload -> schema in the syntax of `Library.define`."""
    text = resources.files("ascendit.twin").joinpath("data", f"{VERSIONS[namespace]}.json").read_text()
    schemas: dict[str, str] = json.loads(text)["schemas"]
    return {name: schema for name, schema in schemas.items() if name not in UNDEFINABLE}


def split(name: str) -> tuple[str, str]:
    """`mindiesd::adaln` -> (mindiesd, adaln); the default namespace is `npu`."""
    namespace, _, base = name.rpartition("::")
    return namespace or "npu", base


@dataclass(frozen=True)
class Signature:
    """The arguments of one operator."""

    qualified: str
    text: str
    names: tuple[str, ...]
    positional: int
    """Number of arguments that may be positional."""
    defaults: Mapping[str, Any]
    integers: frozenset[str]
    """Arguments of type int, which also take a torch.dtype, as in torch's binding."""

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments by name.

        Raises TwinError (E-TWN-01) for unknown, missing or too many arguments, as in torch.
        """
        unknown = [k for k in kwargs if k not in self.names or k in self.names[: len(args)]]
        if unknown or len(args) > self.positional:
            problem = f"{len(args)} positional arguments"
            if unknown:
                problem = f"Unknown keyword argument '{unknown[0]}'"
            refuse("call.surplus", problem=problem, self=self, names=", ".join(self.names) or "nothing")
        bound = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        required = [n for n in self.names if n not in self.defaults]
        missing = [n for n in required if n not in bound]
        require(not missing, "call.missing", self=self, missing=missing, required=required)
        return bound


@functools.cache
def signature(name: str) -> Signature:
    """The signature of `npu_rms_norm` or `mindiesd::adaln`.

    Raises TwinError (E-TWN-01) for an unknown name.
    """
    namespace, base = split(name)
    if namespace not in VERSIONS or base not in frozen(namespace):
        refuse("call.name", name=name)
    parsed = torch._C.parse_schema(frozen(namespace)[base])
    arguments = parsed.arguments
    return Signature(
        f"{namespace}::{base}",
        str(parsed),
        tuple(a.name for a in arguments),
        sum(not a.kwarg_only for a in arguments),
        {a.name: a.default_value for a in arguments if a.has_default_value()},
        frozenset(a.name for a in arguments if str(a.real_type) in ("int", "Optional[int]")),
    )


@dataclass(frozen=True)
class Out:
    """Shape and dtype of one output tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Outs = Out | int | tuple[Out | int, ...]
Body = Callable[..., Iterator[Any]]

OPERATORS: dict[str, Body] = {}
"""Operator name, `npu_rms_norm` or `mindiesd::adaln`, -> implementation."""


def operator(name: str) -> Callable[[Body], Body]:
    """Register the implementation of an operator of the frozen schemas."""

    def register(body: Body) -> Body:
        assert name not in OPERATORS, name
        OPERATORS[name] = body
        return body

    return register


def current_chip() -> str:
    """The chip that calls are checked for. Raises TwinError (E-CAP-01) if the twin is not enabled."""
    if STATE.chip is None:
        raise TwinError(
            "the twin is not enabled", needs="a chip", fix='ascendit.twin.enable("a5")', code=CHIP
        )
    return STATE.chip


def check_capability(name: str, mode: str = "") -> None:
    """Raise TwinError (E-CAP-01) if the chip has no kernel for this call, see
    `operator_support.CAPABILITIES`.
    """
    chip = current_chip()
    row = capability(name, mode)
    answer = row.support_on(chip)
    if answer == "yes":
        return
    label = f"{name} {mode}".strip()
    got = {
        "adapter": row.message,
        "cann": f"NPU function error: call {row.aclnn or name} failed, error code is 361001",
        "unknown": f"no public document says that {label} runs on this chip",
    }[answer]
    chips = ", ".join(f"{CHIPS[c].product} ({c})" for c in row.chips)
    raise TwinError(f"{got} [{label} on {chip}]", needs=chips, fix=row.instead, code=CHIP)


def run(name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Check and compute a call, and count it as a launch.

    Raises TwinError (E-TWN-01, E-CAP-01) if it is refused.
    """
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
    """Check a call on meta or fake tensors and return empty outputs. Raises the errors of `run`."""
    bound = signature(name).bind(args, kwargs)
    check_capability(name)
    outs: Outs = next(OPERATORS[name](**bound))
    like = next(tensors_in(list(bound.values())), None)
    device = "meta" if like is None else like.device
    empty = tuple(
        o if isinstance(o, int) else torch.empty(o.shape, dtype=o.dtype, device=device)
        for o in (outs if isinstance(outs, tuple) else (outs,))
    )
    return empty if isinstance(outs, tuple) else empty[0]


def refuse_uncomputed(name: str, /, *args: Any, **kwargs: Any) -> None:
    """Raise TwinError (E-TWN-01) for an operator of the frozen schemas that the twin does not compute."""
    namespace, base = split(name)
    refuse("call.uncomputed", namespace=namespace, base=base, computed=sorted(OPERATORS))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors [..] of any dtype in a value, or in nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _check(name: str, outs: Outs, result: Any) -> None:
    """The outputs of step 3 must match step 2; a mismatch is a bug of the twin."""
    assert isinstance(result, tuple) == isinstance(outs, tuple), name
    for out, value in zip(outs, result, strict=True) if isinstance(outs, tuple) else ((outs, result),):
        actual = Out(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
        assert actual == out, (name, actual, out)
