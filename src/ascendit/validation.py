"""Input validation by pydantic: base classes for models, and conversion of its errors to ascendit's.

    class Rule(Model):                 # part of a file; `usage_error` adds the name of the file
        title = "a rule"
        kinds: Annotated[tuple[Task, ...], described("kinds = {got}, not a list of t2v, i2v, ti2v")] = ()

    class LoadOptions(Checked):        # filled in by a caller; errors name the field
        title = "load"
        nz: bool = False

AscenditErrors raised in a validator pass through pydantic unchanged.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
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
from ascendit.foreign import hint, value_for
from ascendit.option_text import option, option_name

TYPE_LABELS: dict[Any, tuple[str, str]] = {
    str: ("text", "some text"),
    int: ("a whole number", "16"),
    float: ("a number", "2.5"),
    bool: ("true or false", "false"),
    int | Fraction: ("a number from 1 to 240, as 24, 23.976 or 24000/1001", "24"),
    tuple[float, ...]: ("numbers", "1000,750,500,250"),
    tuple[str, ...]: ("text", "some text"),
}
"""Type -> label, example."""
OF_THE_MODEL = frozenset(
    ("width", "height", "num_frames", "boundary_ratio", "guidance_scale_2")
    + ("activation_rule", "attention", "recipe", "keep", "image", "last_image")
)
"""Options whose valid values depend on the model, or on files: the fix is to omit them."""
MAX_BYTES = 16 * 2**20
"""Limit for a file of settings."""
MAX_DEPTH = 64
"""Limit for tables and lists inside one another."""

_OMITTED = {"prompt": 'pass a text, as "a red circle moves right"', "seed": "omit --seed for a random one"}
"""Field of a request without a default from the model -> its fix."""


class Model(BaseModel):
    """Base class of frozen models that reject unknown keys."""

    model_config = ConfigDict(frozen=True)
    title: ClassVar[str] = "it"
    """Name in messages."""

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and (unknown := sorted(set(data) - set(cls.model_fields))):
            allowed = ", ".join(sorted(cls.model_fields))
            raise problem(f"{cls.title} has {', '.join(unknown)}; allowed are {allowed}", unknown=unknown)
        return data


class Checked(Model):
    """A model that raises UsageError (E-USE-01) instead of pydantic's errors.

    A field with a description raises RequestError (E-REQ-03); the description is the rule.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise cls._usage_error(error) from error

    def to_json(self) -> str:
        """A JSON object with all fields."""
        return json.dumps(self.model_dump(), ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises UsageError (E-USE-01) for invalid JSON or unknown fields."""
        try:
            return cls.model_validate(json.loads(text))
        except json.JSONDecodeError as e:
            got, needs = f"{cls.title} is not JSON: {e}", "one JSON object"
            raise UsageError(got, needs=needs, fix="pass the output of to_json") from e

    @classmethod
    def _usage_error(cls, error: ValidationError) -> UsageError:
        problems = error.errors(include_url=False)
        if not problems[0]["loc"]:
            unknown = problems[0].get("ctx", {}).get("unknown", type(problems[0]["input"]).__name__)
            needs = f"fields among {', '.join(sorted(cls.model_fields))}"
            got = f"{cls.title} has unknown fields: {unknown}"
            return UsageError(got, needs=needs, fix=cls._unknown_fix(unknown, problems[0]["input"]))
        invalid = [p for p in problems if p["type"] != "missing"]
        if not invalid:
            missing = ", ".join(str(p["loc"][0]) for p in problems)
            got = f"{cls.title} is incomplete or of a wrong type: {missing} missing"
            return UsageError(got, needs="every field without a default", fix="pass the output of to_json")
        name, value = str(invalid[0]["loc"][0]), invalid[0]["input"]
        field = cls.model_fields[name]
        if field.description is None:
            return bad_value(name, value, field.annotation)
        value_type = non_optional(field.annotation)
        choices = get_args(value_type) if get_origin(value_type) is Literal else ()
        fix = f"omit {option_name(name)} for the model's default"
        if choices and (choice := value_for(name, value, choices)):
            fix = option(name, choice)
        fix = _OMITTED.get(name, fix)
        return RequestError(f"{name} is {value!r}", needs=f"{name}: {field.description}", fix=fix)

    @classmethod
    def _unknown_fix(cls, unknown: Any, data: Any) -> str:
        if not isinstance(unknown, list) or not isinstance(data, Mapping):
            return "pass the output of to_json"
        value = data[unknown[0]]
        value = value if isinstance(value, str | int | float) else None
        close = get_close_matches(unknown[0], cls.model_fields, n=1)
        fix = f"{option_name(close[0])} instead of {unknown[0]}" if close else f"omit {unknown[0]}"
        return hint(unknown[0], value, cls.model_fields) or fix


def problem(text: str, **context: Any) -> PydanticCustomError:
    """An error to raise in a validator, with `text` as its message."""
    return PydanticCustomError("problem", "{text}", {"text": text, **context})


def described(text: str) -> WrapValidator:
    """For `Annotated`: `text` replaces the ValidationError for a value of the wrong type; `{got}` is the
    value.

    Nested errors keep their own messages.
    """

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as e:
            if any(len(error["loc"]) > 1 or error["type"] == "problem" for error in e.errors()):
                raise
            raise problem(text.replace("{got}", repr(value))) from None

    return WrapValidator(check)


def usage_error(error: ValueError, *, source: str, needs: str, fix: str, syntax: str = "") -> UsageError:
    """The error E-USE-01 `<source>: <problem>`: pydantic's first error, or the parse error of a text in
    `syntax`.
    """
    text = f"it is not {syntax} ({error})"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        key = "" if first["type"] == "problem" else f"{'.'.join(map(str, first['loc']))}: "
        text = key + first["msg"]
    return UsageError(f"{source}: {text}", needs=needs, fix=fix)


def bad_value(name: str, value: object, hint: Any, source: str = "") -> UsageError:
    """The error E-USE-01 for a value that is not of the type `hint`.

    `source`: the file, or `--set`, that it comes from; omitted for a flag or an argument.
    """
    value_type = non_optional(hint)
    choices = get_args(value_type) if get_origin(value_type) is Literal else ()
    label, example = (" or ".join(choices), choices[0]) if choices else TYPE_LABELS[value_type]
    example = (value_for(name, value, choices) if choices else None) or example
    setting, fix = option(name, value), option(name, example)
    if source == "--set":
        setting, fix = f"--set {name}={value}", f"--set {name}={example}"
    elif source:
        is_text = bool(choices) or value_type is str
        setting, fix = f"{source} {name}={value}", f"{name} = {json.dumps(example) if is_text else example}"
    if name in OF_THE_MODEL:
        shown = f"--set {name}" if source == "--set" else name if source else option_name(name)
        fix = f"omit {shown} for the model's default"
    return UsageError(setting, needs=f"{name}: {label}", fix=fix)


def one_of(hint: Any) -> str:
    """The values of a Literal as text: `crop, pad or stretch`."""
    *others, last = get_args(hint)
    return f"{', '.join(others)} or {last}"


def non_optional(hint: Any) -> Any:
    """The type `hint` without None."""
    types = get_args(hint)
    return next(t for t in types if t is not NoneType) if NoneType in types else hint


# ---- files of settings --------------------------------------------------------------------------


Syntax = Literal["json", "toml"]
_LONG_KEY = re.compile(rf"(?<![\w\"'-])(?:[\w\"'-]+[ \t]*\.[ \t]*){{{MAX_DEPTH + 1}}}")


def read_settings(path: Path, syntax: Syntax = "toml") -> Any:
    """The data of a TOML or JSON file.

    Raises OSError if it cannot be read or is a pipe or a device, ValueError for any other content.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(None, "not a regular file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    return parse(data.decode("utf-8"), syntax)


def parse(text: str, syntax: Syntax) -> Any:
    """Parse JSON or TOML. Raises ValueError for bad syntax, and if it is nested too deep."""
    if syntax == "toml" and _LONG_KEY.search(text):  # tomllib's time is quadratic in their length
        raise ValueError(f"a key of more than {MAX_DEPTH} parts")
    try:
        data = json.loads(text) if syntax == "json" else tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        inner = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
        level = [x for values in inner for x in values]
    if level:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return data
