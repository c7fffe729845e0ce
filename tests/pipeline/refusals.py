"""A context that expects an ascendit error: its class, code and parts of its text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ascendit.errors import AscenditError


@contextmanager
def refused(error: type[AscenditError], code: str, *texts: str) -> Iterator[None]:
    with pytest.raises(error) as caught:
        yield
    assert caught.value.code == code
    for text in texts:
        assert text in str(caught.value)
