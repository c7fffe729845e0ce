"""Pydantic errors as errors of ascendit."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import StrictInt, ValidationError, field_validator

from ascendit.errors import UsageError
from ascendit.validation import Model, described, problem, usage_error

Sizes = Annotated[tuple[StrictInt, ...], described("sizes = {got}, not a list of numbers")]


class Inner(Model):
    title = "an entry"
    sizes: Sizes = ()


class Outer(Model):
    title = "the file"
    entries: Annotated[tuple[Inner, ...], described("entries is not a list of tables")] = ()
    count: int = 1

    @field_validator("count")
    @classmethod
    def _small(cls, count: int) -> int:
        if count > 9:
            raise problem(f"count {count} is too much")
        if count < 0:
            raise UsageError("count below 0", needs="n", fix="f", code="E-REQ-03")
        return count


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"entry": 1, "a": 2}, "the file has a, entry; allowed are count, entries"),
        ({"entries": "x"}, "entries is not a list of tables"),
        ({"entries": [1]}, "entries is not a list of tables"),
        ({"entries": [{"size": 1}]}, "an entry has size; allowed are sizes"),
        ({"entries": [{}, {"sizes": [1, "{b}"]}]}, "sizes = [1, '{b}'], not a list of numbers"),
        ({"count": 10}, "count 10 is too much"),
        ({"count": None}, "count: Input should be a valid integer"),
    ],
)
def test_the_error_is_the_first_problem(data: object, text: str) -> None:
    with pytest.raises(ValidationError) as e:
        Outer.model_validate(data)
    error = usage_error(e.value, source="my.toml", needs="entries", fix="correct it")
    assert error.got == f"my.toml: {text}"
    assert (error.needs, error.fix, error.code) == ("entries", "correct it", "E-USE-01")


def test_an_ascendit_error_is_raised_unchanged() -> None:
    with pytest.raises(UsageError, match="E-REQ-03"):
        Outer.model_validate({"count": -1})


def test_a_text_that_is_not_toml() -> None:
    error = usage_error(ValueError("line 1"), source="my.toml", syntax="TOML", needs="n", fix="f")
    assert error.got == "my.toml: it is not TOML (line 1)"
