"""Rules of a recipe, and how their patterns are compared with layer names. No torch."""

from __future__ import annotations

import difflib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, TypeVar, get_args

from pydantic import BeforeValidator, Field, StrictBool, ValidationInfo, field_validator

from ascendit.errors import CheckpointError, UsageError
from ascendit.family import Task
from ascendit.mx.formats import lookup, resolve_rule
from ascendit.names import to_wan
from ascendit.quant.schemes import SCHEMES
from ascendit.validation import Model, described, problem

log = logging.getLogger("ascendit")
QUANT_TYPES = ("FP8_DYNAMIC", "MXFP8_DYNAMIC", "MXFP4_DYNAMIC", "INT8_DYNAMIC")
"""msModelSlim's words for a quantized attention."""
OUTSIDE = "not a linear of the blocks"
LIST_LAYERS = "correct the pattern; `*` crosses dots, and `ascendit inspect SRC --layers` lists the names"


@dataclass(frozen=True)
class LayerScheme:
    """The scheme of one linear layer, and why."""

    name: str
    scheme: str
    """A key of `quant.schemes.SCHEMES`; bf16: it stays as it is."""
    scale_rule: str | None
    """None for bf16."""
    why: str
    """The rule that decided: `ascend-w4a4: blocks.[0-4].*`, `--keep blocks.0.*`."""


@dataclass(frozen=True)
class AttentionScheme:
    """What is stored for one attention."""

    name: str
    """`blocks.0.attn1`."""
    quant_type: str
    """The value of `<name>.quant_type` in the manifest, or "" for no entry."""
    rotate: bool


Name = Annotated[str, Field(min_length=1)]
Patterns = Annotated[
    tuple[Name, ...],
    Field(min_length=1),
    BeforeValidator(lambda given: (given,) if isinstance(given, str) else given),
    described("layers = {got}, not a pattern or a list of them"),
]
Kinds = Annotated[tuple[Task, ...], described(f"kinds = {{got}}, not a list of {', '.join(get_args(Task))}")]
"""Kinds of model; empty: all."""
ScaleRule = Annotated[str, described("scale_rule {got} is no text")]
QuantType = Annotated[
    str,
    Field(pattern="|".join(f"^{word}$" for word in ("", *QUANT_TYPES))),
    described(f'quant_type {{got}} is not one of {", ".join(QUANT_TYPES)} or ""'),
]
Rotate = Annotated[StrictBool, described("rotate {got} is not true or false")]


class LayerRule(Model):
    """`layers` get `scheme`."""

    title = "a rule"
    layers: Patterns
    scheme: str | None = None
    """None: left open, for the scheme that is asked for."""
    scale_rule: ScaleRule | None = Field(default=None, validate_default=True)
    """The default of the scheme if left out; None for bf16."""
    kinds: Kinds = ()

    @field_validator("scheme")
    @classmethod
    def _known(cls, scheme: str | None, info: ValidationInfo) -> str | None:
        if scheme is None or scheme in SCHEMES:
            return scheme
        raise UsageError(
            f"scheme {scheme!r}" + (f" in {info.context}" if info.context else ""),
            needs=f"one of {', '.join(SCHEMES)}",
            fix="check the spelling",
        )

    @field_validator("scale_rule")
    @classmethod
    def _of_the_scheme(cls, rule: str | None, info: ValidationInfo) -> str | None:
        scheme = info.data.get("scheme")
        if scheme is None:
            return rule
        if form := SCHEMES[scheme].weight:
            return resolve_rule(lookup(form), rule)
        if rule is not None:
            raise problem(f"scale rule {rule!r} for {scheme}, which has no scales")
        return None


class AttentionRule(Model):
    """`layers` get `quant_type` and `rotate`; None leaves what an earlier rule said."""

    title = "an attention entry"
    layers: Patterns
    quant_type: QuantType | None = None
    rotate: Rotate | None = None
    kinds: Kinds = ()


Rule = TypeVar("Rule", LayerRule, AttentionRule)


class LayerSchemes:
    """The linear layers of a model or module and their schemes."""

    layers: tuple[LayerScheme, ...]

    @property
    def coded(self) -> dict[str, LayerScheme]:
        """The layers that are quantized."""
        return {layer.name: layer for layer in self.layers if layer.scheme != "bf16"}

    @property
    def schemes(self) -> dict[str, int]:
        """Scheme -> number of linear layers, in the order of `SCHEMES`, bf16 last."""
        every = [layer.scheme for layer in self.layers]
        order = sorted(SCHEMES, key=lambda name: name == "bf16")
        return {name: every.count(name) for name in order if name in every}


def matches(
    rules: Iterable[tuple[Rule, str]],
    layers: Sequence[Sequence[str]],
    other: Callable[[str], str | None] = to_wan,
    *,
    fix: str = LIST_LAYERS,
) -> Iterator[tuple[Rule, str, list[str]]]:
    """(rule, why a layer has it, names of layers) for every pattern of `rules`, each with its origin.

    The names are those of the first list in `layers` that has some which the pattern fits, by themselves or
    as `other`, original Wan, spells them. UsageError E-USE-05, with `fix`, if it fits none in any list.
    """
    for rule, origin in rules:
        for pattern in rule.layers:
            fits = (
                [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(other(n) or n, pattern)]
                for names in layers
            )
            if not (found := next(filter(None, fits), None)):
                raise _no_layer(pattern, origin, layers[-1], fix)
            yield rule, f"--keep {pattern}" if origin == "--keep" else f"{origin}: {pattern}", found


def wan_attention(name: str) -> str:
    """The original name of an attention: `blocks.0.self_attn`."""
    return name.replace("attn1", "self_attn").replace("attn2", "cross_attn")


def _no_layer(pattern: str, origin: str, names: Sequence[str], fix: str) -> UsageError:
    plain = re.sub(r"[*?\[\]]+", "", pattern)
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.0)
    return UsageError(
        f"pattern {pattern!r} of {origin} matches none of {len(names)} layers",
        needs=f"layers of this model, like {', '.join(near)}",
        fix=fix,
        code="E-USE-05",
    )


def say_attention(name: str, quant_types: Iterable[str], path: Path | str = "") -> None:
    """Log once which quantization of attentions a model asks for and does not get.

    `quant_types`: one for each attention, from a recipe, or from the manifest at `path`. CheckpointError
    E-CKP-07 for one that is not in `QUANT_TYPES`.
    """
    asked = Counter(quant_types)
    if unknown := sorted(asked.keys() - set(QUANT_TYPES)):
        raise CheckpointError(
            f"{path}: attention of type {', '.join(unknown)} in the manifest",
            needs=f"one of {', '.join(QUANT_TYPES)}",
            fix="correct quant_model_description.json, or export the model again",
            code="E-CKP-07",
        )
    if asked:
        words = ", ".join(f"{word} for {n}" for word, n in asked.items())
        log.warning("%s: quantized attention (%s) runs in BF16 here", name, words)
