"""The registry of broken models: what a case is, and `case`, which adds one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from broken.models import MODELS

Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A model, what is done to it, and the code of the error."""

    base: str
    """A key of `MODELS`, or "" for an empty folder."""
    what: str
    damage: Damage
    code: str
    inspect: str | None = None
    """Where another than `code`: what `inspect` says; so with the other verbs."""
    repack: str | None = None
    quantize: str | None = None
    source: str = "."
    """What the verbs are given, below the folder."""

    def expected(self, verb: str) -> str:
        found: str | None = getattr(self, verb)
        return self.code if found is None else found

    def build(self, folder: Path, model: Path | None = None) -> Path:
        """Write the broken model into `folder`, from a copy of `model` if given; what the verbs are given."""
        if model is not None:
            shutil.copytree(model, folder)
        else:
            folder.mkdir(parents=True)
            if self.base:
                MODELS[self.base](folder)
        self.damage(folder)
        return folder / self.source


CASES: dict[str, Case] = {}


def case(name: str, base: str, what: str, damage: Damage, code: str, **other: str) -> None:
    assert name not in CASES, name
    CASES[name] = Case(base, what, damage, code, **other)
