"""The registry of broken models: `Case`, and `case`, which adds one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from broken.models import MODELS

Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A model, the damage done to it, and the expected error code."""

    base: str
    """A key of `MODELS`, or "" for an empty folder."""
    fault: str
    damage: Damage
    code: str
    inspect: str | None = None
    """The code of `inspect` if it differs from `code`; likewise for the other verbs."""
    repack: str | None = None
    quantize: str | None = None
    source: str = "."
    """The path passed to the verbs, relative to the folder."""

    def expected(self, verb: str) -> str:
        code: str | None = getattr(self, verb)
        return self.code if code is None else code

    def build(self, folder: Path, model: Path | None = None) -> Path:
        """Write the broken model into `folder`, from a copy of `model` if passed. Return the verbs' input."""
        if model is not None:
            shutil.copytree(model, folder)
        else:
            folder.mkdir(parents=True)
            if self.base:
                MODELS[self.base](folder)
        self.damage(folder)
        return folder / self.source


CASES: dict[str, Case] = {}


def case(name: str, base: str, fault: str, damage: Damage, code: str, **other: str) -> None:
    assert name not in CASES, name
    CASES[name] = Case(base, fault, damage, code, **other)
