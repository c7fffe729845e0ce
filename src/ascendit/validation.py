"""Values from outside, checked by pydantic: base classes for models, and its errors turned into ours.

    class Rule(Model):                 # a part of a file: `usage_error` names the file
        title = "a rule"
        kinds: Annotated[tuple[Task, ...], described("kinds = {got}, not a list of t2v, i2v, ti2v")] = ()

    class LoadOptions(Checked):        # what a caller fills in: a wrong field is reported by its name
        title = "load"
        nz: bool = False

An error of ascendit that a validator raises passes through pydantic as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import NoneType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ascendit.errors import RequestError, UsageError

KINDS: dict[Any, tuple[str, str]] = {
    str: ("text", "some text"),
    int: ("a whole number", "16"),
    float: ("a number", "2.5"),
    bool: ("true or false", "false"),
    tuple[float, ...]: ("numbers", "1000,750,500,250"),
    tuple[str, ...]: ("text", "some text"),
}
"""Type -> in words, an example."""


class Model(BaseModel):
    """Frozen, and without other keys than its fields."""

    model_config = ConfigDict(frozen=True)
    title: ClassVar[str] = "it"
    """Its name in messages."""

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and (unknown := sorted(set(data) - set(cls.model_fields))):
            known = ", ".join(sorted(cls.model_fields))
            raise problem(f"{cls.title} has {', '.join(unknown)}; known are {known}", unknown=unknown)
        return data


class Checked(Model):
    """A model that raises UsageError, never pydantic's own error.

    E-USE-01, or RequestError E-REQ-03 for a field whose rule is its description.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise cls._usage_error(error) from error

    def to_json(self) -> str:
        """One JSON object with every field."""
        return json.dumps(self.model_dump(), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Unknown fields are refused with the list of known ones."""
        try:
            return cls.model_validate(json.loads(text))
        except json.JSONDecodeError as e:
            got, needs = f"{cls.title} is no JSON: {e}", "one JSON object"
            raise UsageError(got, needs=needs, fix="pass what to_json wrote") from e

    @classmethod
    def _usage_error(cls, error: ValidationError) -> UsageError:
        problems = error.errors(include_url=False)
        if not problems[0]["loc"]:
            unknown = problems[0].get("ctx", {}).get("unknown", type(problems[0]["input"]).__name__)
            needs = f"fields among {', '.join(sorted(cls.model_fields))}"
            got = f"{cls.title} has unknown fields: {unknown}"
            return UsageError(got, needs=needs, fix="remove or correct them")
        wrong = [p for p in problems if p["type"] != "missing"]
        if not wrong:
            missing = ", ".join(str(p["loc"][0]) for p in problems)
            got = f"{cls.title} is incomplete or of a wrong type: no {missing}"
            return UsageError(got, needs="every field without a default", fix="pass what to_json wrote")
        name, value = str(wrong[0]["loc"][0]), wrong[0]["input"]
        field = cls.model_fields[name]
        if field.description is None:
            return bad_value(name, value, field.annotation)
        fix = f"give {name} a legal value, or leave it out for the model's own"
        return RequestError(f"{name} is {value!r}", needs=f"{name}: {field.description}", fix=fix)


def problem(text: str, **context: Any) -> PydanticCustomError:
    """What a validator raises: `text` is what the user reads."""
    return PydanticCustomError("problem", "{text}", {"text": text, **context})


def described(text: str) -> WrapValidator:
    """For `Annotated`: what is said of a value of another type. `{got}` becomes the value.

    A nested error keeps its own message.
    """

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as e:
            if any(len(error["loc"]) > 1 or error["type"] == "problem" for error in e.errors()):
                raise
            raise problem(text.replace("{got}", repr(value))) from None

    return WrapValidator(check)


def usage_error(error: ValueError, *, where: str, needs: str, fix: str, syntax: str = "") -> UsageError:
    """`<where>: <problem>` of the first thing that pydantic found, or of a text that is no `syntax`."""
    text = f"it is not {syntax} ({error})"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        key = "" if first["type"] == "problem" else f"{'.'.join(map(str, first['loc']))}: "
        text = key + first["msg"]
    return UsageError(f"{where}: {text}", needs=needs, fix=fix)


def bad_value(name: str, value: object, hint: Any, where: str = "") -> UsageError:
    """UsageError E-USE-01 for a value that is not of the type `hint`. `where`: what it was read from."""
    kind = plain_kind(hint)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    words, example = (" or ".join(choices), choices[0]) if choices else KINDS[kind]
    got = f"{name}={value}" if choices or where else f"{name} {value!r}"
    return UsageError(f"{where} {got}".strip(), needs=f"{name}: {words}", fix=f"{name}={example}")


def plain_kind(hint: Any) -> Any:
    """The type of a value that is not None."""
    kinds = get_args(hint)
    return next(k for k in kinds if k is not NoneType) if NoneType in kinds else hint
