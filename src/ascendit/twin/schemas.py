"""The operators' schemas, frozen from torch_npu 2.13.0 and MindIE-SD 3.1.0, and how arguments meet them."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from ascendit.twin.faults import refuse

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
            what = (
                f"Unknown keyword argument '{unknown[0]}'" if unknown else f"{len(args)} positional arguments"
            )
            refuse(
                f"{what} for operator '{self.qualified}'. Schema: {self.text}",
                needs=f"at most {self.positional} without a name, then {', '.join(self.names) or 'nothing'}",
                fix="spell the arguments as the schema does",
            )
        bound = {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}
        missing = [n for n in self.names if n not in bound]
        if missing:
            refuse(
                f"{self.qualified}() is missing value for argument '{missing[0]}'. Schema: {self.text}",
                needs=", ".join(n for n in self.names if n not in self.defaults),
                fix="give the missing arguments",
            )
        return bound


@functools.cache
def signature(name: str) -> Signature:
    """The signature of an operator by its name, `npu_rms_norm` or `mindiesd::adaln`."""
    namespace, rest = split(name)
    if namespace not in VERSIONS or rest not in frozen(namespace):
        refuse(
            f"operator {name}",
            needs="a name of torch_npu 2.13.0 or, with mindiesd::, of MindIE-SD 3.1.0",
            fix="check the spelling; the schemas are in ascendit/twin/data",
        )
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
