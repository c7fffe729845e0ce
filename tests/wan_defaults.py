"""Defaults of published models, for tests of requests, without torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from ascendit.family import SPECS
from ascendit.pipeline.defaults import Defaults


def defaults_of(name: str, **changed: Any) -> Defaults:
    """The defaults of a folder that matches this row of the table."""
    s = SPECS[name]
    same = {f.name for f in dataclasses.fields(Defaults)} & {f.name for f in dataclasses.fields(s)}
    values = {n: getattr(s, n) for n in same}
    width, height = s.sizes[0]
    return Defaults(**(values | {"model": name, "width": width, "height": height, "spec": s} | changed))


CASCADE = defaults_of("Wan2.2-T2V-A14B")
SINGLE = defaults_of("Wan2.1-T2V-14B")
TI2V = defaults_of("Wan2.2-TI2V-5B")
I2V = defaults_of("Wan2.2-I2V-A14B")
I2V_21 = defaults_of("Wan2.1-I2V-14B-720P")
