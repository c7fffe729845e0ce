"""The twin is enabled for these tests, and disabled for those of other folders."""

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
    """`on("a2")` changes the chip for one test; the default is a5. Launch counts start at zero."""
    ascendit.twin.enable("a5")
    ascendit.twin.allow_internal_format(False)
    ascendit.twin.reset()
    return ascendit.twin.enable
