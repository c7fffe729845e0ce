"""Rules of a recipe, and how their patterns match layer names. Does not import torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, TypeVar, get_args

from pydantic import BeforeValidator, Field, StrictBool, ValidationInfo, field_validator

from ascendit.errors import UsageError
from ascendit.family import Task
from ascendit.foreign import value_for
from ascendit.mx.formats import lookup, resolve_rule
from ascendit.names import to_wan
from ascendit.quant.attention_schemes import QUANT_TYPES
from ascendit.quant.schemes import SCHEMES
from ascendit.validation import Model, described, problem

OUTSIDE = "not a linear of the blocks"
LIST_LAYERS = "correct the pattern; `*` crosses dots, and `ascendit inspect SRC --layers` lists the names"


@dataclass(frozen=True)
class LayerScheme:
    """The scheme of one linear layer, and the rule that determined it."""

    name: str
    scheme: str
    """A key of `quant.schemes.SCHEMES`; bf16: not quantized."""
    scale_rule: str | None
    """None for bf16."""
    reason: str
    """The deciding rule, e.g. `ascend-w4a4: blocks.[0-4].*` or `--keep blocks.0.*`."""


@dataclass(frozen=True)
class AttentionScheme:
    """The entries stored for one attention."""

    name: str
    """Diffusers name, for example `blocks.0.attn1`."""
    quant_type: str
    """Value of `<name>.quant_type` in the manifest; "": no entry."""
    rotate: bool


Name = Annotated[str, Field(min_length=1)]
Patterns = Annotated[
    tuple[Name, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    described("layers = {got}, not a pattern or a list of them"),
]
Kinds = Annotated[tuple[Task, ...], described(f"kinds = {{got}}, not a list of {', '.join(get_args(Task))}")]
"""Model kinds; empty: all."""
ScaleRule = Annotated[str, described("scale_rule {got} is not a text")]
QuantType = Annotated[
    str,
    Field(pattern="|".join(f"^{name}$" for name in ("", *QUANT_TYPES))),
    described(f'quant_type {{got}} is not one of {", ".join(QUANT_TYPES)} or ""'),
]
Rotate = Annotated[StrictBool, described("rotate {got} is not true or false")]


class LayerRule(Model):
    """Assigns `scheme` to `layers`."""

    title = "a rule"
    layers: Patterns
    scheme: str | None = None
    """None: the scheme that the user requests is filled in."""
    scale_rule: ScaleRule | None = Field(default=None, validate_default=True)
    """If omitted, the default of the scheme; None for bf16."""
    kinds: Kinds = ()

    @field_validator("scheme")
    @classmethod
    def _check_scheme(cls, scheme: str | None, info: ValidationInfo) -> str | None:
        if scheme is None or scheme in SCHEMES:
            return scheme
        raise UsageError(
            f"scheme {scheme!r}" + (f" in {info.context}" if info.context else ""),
            needs=f"one of {', '.join(SCHEMES)}",
            fix=_scheme_fix(scheme, info.context),
        )

    @field_validator("scale_rule")
    @classmethod
    def _resolve_scale_rule(cls, rule: str | None, info: ValidationInfo) -> str | None:
        scheme = info.data.get("scheme")
        if scheme is None:
            return rule
        if weight_format := SCHEMES[scheme].weight:
            return resolve_rule(lookup(weight_format), rule)
        if rule is not None:
            raise problem(f"scale rule {rule!r} for {scheme}, which has no scales")
        return None


class AttentionRule(Model):
    """Assigns `quant_type` and `rotate` to `layers`; None leaves the value of an earlier rule."""

    title = "an attention entry"
    layers: Patterns
    quant_type: QuantType | None = None
    rotate: Rotate | None = None
    kinds: Kinds = ()


Rule = TypeVar("Rule", LayerRule, AttentionRule)


class LayerSchemes:
    """Base class: the linear layers of a model or module and their schemes."""

    layers: tuple[LayerScheme, ...]

    @property
    def quantized(self) -> dict[str, LayerScheme]:
        """Name -> layer, for the quantized layers."""
        return {layer.name: layer for layer in self.layers if layer.scheme != "bf16"}

    @property
    def schemes(self) -> dict[str, int]:
        """Scheme -> number of linear layers, in the order of `SCHEMES`, bf16 last."""
        schemes = [layer.scheme for layer in self.layers]
        order = sorted(SCHEMES, key=lambda name: name == "bf16")
        return {name: schemes.count(name) for name in order if name in schemes}


def matches(
    rules: Iterable[tuple[Rule, str]],
    layers: Sequence[Sequence[str]],
    other_name: Callable[[str], str | None] = to_wan,
    *,
    fix: str = LIST_LAYERS,
) -> Iterator[tuple[Rule, str, list[str]]]:
    """Yield (rule, reason, names of matching layers) for each pattern of `rules`, pairs of rule and origin.

    A pattern is matched against each name and its `other_name`, by default the original Wan name, in the
    first list of `layers` that has a match. Raises UsageError (E-USE-05), with `fix`, if none has.
    """
    for rule, origin in rules:
        for pattern in rule.layers:
            matching = (
                [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(other_name(n) or n, pattern)]
                for names in layers
            )
            if not (matched := next(filter(None, matching), None)):
                raise _no_layer(pattern, origin, layers[-1], fix)
            yield rule, f"--keep {pattern}" if origin == "--keep" else f"{origin}: {pattern}", matched


def wan_attention(name: str) -> str:
    """The original name of an attention, e.g. `blocks.0.self_attn`."""
    return name.replace("attn1", "self_attn").replace("attn2", "cross_attn")


def _scheme_fix(scheme: str, file: object) -> str:
    name = value_for("scheme", scheme, SCHEMES) or "mxfp8"
    return f'scheme = "{name}" in this file' if file else f"--scheme {name}"


def _keep_fix(pattern: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=1)
    return f"--keep {close[0]}" if close else "omit --keep"


def _no_layer(pattern: str, origin: str, names: Sequence[str], fix: str) -> UsageError:
    without_wildcards = re.sub(r"[*?\[\]]+", "", pattern)
    near = difflib.get_close_matches(without_wildcards, names, n=3, cutoff=0.0)
    return UsageError(
        f"pattern {pattern!r} of {origin} matches none of {len(names)} layers",
        needs=f"names of layers of this model, such as {', '.join(near)}",
        fix=f"{_keep_fix(without_wildcards, names)}; {fix}" if origin == "--keep" else fix,
        code="E-USE-05",
    )
