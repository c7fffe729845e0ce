"""The twin is switched on once for these tests, and off again for those of other folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import ascendit.twin


@pytest.fixture(autouse=True, scope="module")
def _twin() -> Iterator[None]:
    ascendit.twin.enable("a5")
    yield
    ascendit.twin.disable()


@pytest.fixture(autouse=True)
def on() -> Callable[[str], None]:
    """`on("a2")` changes the chip for one test; without it the chip is a5. Counts start at nothing."""
    ascendit.twin.enable("a5")
    ascendit.twin.allow_internal_format(False)
    ascendit.twin.reset()
    return ascendit.twin.enable
