"""Rules of a recipe, and how their patterns are compared with layer names. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import get_args

from ascendit.errors import UsageError
from ascendit.family import Task
from ascendit.names import to_wan
from ascendit.quant.schemes import SCHEMES

MODEL_KINDS = get_args(Task)
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


@dataclass(frozen=True)
class LayerRule:
    """`layers` get `scheme`. `kinds` empty: for every model kind."""

    layers: tuple[str, ...]
    scheme: str
    scale_rule: str | None
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionRule:
    """`layers` get `quant_type` and `rotate`; None leaves what an earlier rule said."""

    layers: tuple[str, ...]
    quant_type: str | None
    rotate: bool | None
    kinds: tuple[str, ...] = ()


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


def ruled(
    rules: Iterable[tuple[LayerRule, str]],
    inside: Sequence[str],
    every: Sequence[str],
    *,
    fix: str = LIST_LAYERS,
) -> dict[str, LayerScheme]:
    """What rules, each with its origin, say of layers; the last that matches wins.

    A pattern means layers of `inside`; only one that matches none of these reaches the others of `every`.
    UsageError E-USE-05, with `fix`, for one that matches nothing.
    """
    found = {}
    for rule, origin in rules:
        for pattern in rule.layers:
            if not (names := matching(pattern, inside) or matching(pattern, every)):
                raise no_layer(pattern, origin, every, fix=fix)
            for name in names:
                found[name] = LayerScheme(name, rule.scheme, rule.scale_rule, why_from(origin, pattern))
    return found


def matching(
    pattern: str, names: Iterable[str], other: Callable[[str], str | None] = to_wan
) -> tuple[str, ...]:
    """The `names` that `pattern` fits, by themselves or as original Wan spells them."""
    return tuple(n for n in names if fnmatchcase(n, pattern) or fnmatchcase(other(n) or n, pattern))


def wan_attention(name: str) -> str:
    """The original name of an attention: `blocks.0.self_attn`."""
    return name.replace("attn1", "self_attn").replace("attn2", "cross_attn")


def why_from(origin: str, pattern: str) -> str:
    """The `why` of a `LayerScheme`. `origin`: the name of the recipe, or `--keep`."""
    return f"--keep {pattern}" if origin == "--keep" else f"{origin}: {pattern}"


def no_layer(pattern: str, origin: str, names: Sequence[str], *, fix: str = LIST_LAYERS) -> UsageError:
    """E-USE-05, with the three nearest of `names`."""
    plain = re.sub(r"[*?\[\]]+", "", pattern)
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.0)
    return UsageError(
        f"pattern {pattern!r} of {origin} matches none of {len(names)} layers",
        needs=f"layers of this model, like {', '.join(near)}",
        fix=fix,
        code="E-USE-05",
    )
