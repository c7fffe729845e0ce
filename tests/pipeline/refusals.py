"""A context that expects an error of ascendit: its class, its code and words of its text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ascendit.errors import AscenditError


@contextmanager
def refused(kind: type[AscenditError], code: str, *texts: str) -> Iterator[None]:
    with pytest.raises(kind) as caught:
        yield
    assert caught.value.code == code
    for text in texts:
        assert text in str(caught.value)
