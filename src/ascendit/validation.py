"""Values from outside, checked by pydantic: a base for models, and its errors as errors of ascendit.

    class Rule(Model):
        title = "a rule"
        kinds: Annotated[tuple[Task, ...], described("kinds = {got}, not a list of t2v, i2v, ti2v")] = ()

An error of ascendit that a validator raises passes through pydantic as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ascendit.errors import UsageError


class Model(BaseModel):
    """Frozen, and without other keys than its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    title: ClassVar[str] = "it"
    """What an error about a key calls it."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and (unknown := sorted(set(data) - set(cls.model_fields))):
            known = ", ".join(sorted(cls.model_fields))
            raise problem(f"{cls.title} has {', '.join(unknown)}; known are {known}")
        return data


def problem(text: str) -> PydanticCustomError:
    """What a validator raises: `text` is what the user reads."""
    return PydanticCustomError("problem", "{text}", {"text": text})


def described(text: str) -> WrapValidator:
    """For `Annotated`: what is said of a value of another type. `{got}` becomes the value.

    Not of one that is wrong further inside, which has words of its own.
    """

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as e:
            if any(len(error["loc"]) > 1 or error["type"] == "problem" for error in e.errors()):
                raise
            raise problem(text.replace("{got}", repr(value))) from None

    return WrapValidator(check)


def usage_error(
    error: ValueError, *, where: str, needs: str, fix: str, syntax: str = "", code: str = "E-USE-01"
) -> UsageError:
    """`<where>: <problem>` of the first thing that pydantic found, or of a text that is no `syntax`."""
    text = f"it is not {syntax} ({error})"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        key = "" if first["type"] == "problem" else f"{'.'.join(map(str, first['loc']))}: "
        text = key + first["msg"]
    return UsageError(f"{where}: {text}", needs=needs, fix=fix, code=code)
